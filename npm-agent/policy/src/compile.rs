//! World x node -> Goal: what one node must program.
//!
//! [`compile`] is the definition: it looks at every policy and every pod. [`Compiler`] keeps the same Goal up to date by
//! looking only at what a change touches; after any sequence of changes both are equal (`tests/tests/agreement.rs`).
//!
//! ```text
//! policy ── program() ──► Program      depends on the policy alone
//! pod x set ── contribution() ──► members   the one place that says who is in a set
//! ```

mod anchor;
mod census;
mod contribution;
mod incremental;
mod matching;
mod program;

use std::borrow::Borrow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

pub use census::{Census, SetCount, census};
pub(crate) use contribution::in_block;
pub use incremental::Compiler;

use crate::goal::{Goal, Set, SetKey};
use crate::model::{PodKey, PolicyKey};
use crate::world::World;
use contribution::{View, contribution, fixed_members};
use matching::selects;
use program::program;

/// Something an operator should know: the Goal is right, and stricter or other than somebody may expect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Warning {
    /// Several active pods claim an address; the one created last holds it.
    Contested {
        /// The address.
        address: IpAddr,
        /// Who holds it.
        holder: PodKey,
        /// Who claims it too.
        others: Vec<PodKey>,
    },
    /// An egress rule crosses so many peers with so many port names that its named ports are left out: they
    /// allow nothing.
    TooManyNamedPorts {
        /// The policy.
        policy: PolicyKey,
        /// Peers times names.
        product: usize,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Contested { address, holder, others } => {
                write!(f, "pod {holder}: holds {address}, which is claimed by ")?;
                for (index, other) in others.iter().enumerate() {
                    let separator = if index == 0 { "" } else { ", " };
                    write!(f, "{separator}{other}")?;
                }
                f.write_str(" too; the pod created last counts")
            }
            Self::TooManyNamedPorts { policy, product } => write!(
                f,
                "policy {policy}: an egress rule names {product} combinations of peer and port name, more than {}; \
                 its named ports allow nothing",
                program::MAX_NAMED_SETS
            ),
        }
    }
}

/// Compiles the whole world for one node, from nothing: the definition of a node's Goal.
pub fn compile(world: &World, node: &str) -> (Goal, Vec<Warning>) {
    let mut goal = Goal::default();
    let mut warnings = contested(world);
    let views: Vec<View> = world.pods().map(|pod| View::of(world, node, pod)).collect();
    let locals: Vec<&View> = views.iter().filter(|view| view.local && !view.held.is_empty()).collect();
    for policy in world.policies() {
        let selected: Vec<_> = locals
            .iter()
            .filter(|view| view.pod.key.namespace == policy.key.namespace)
            .filter(|view| selects(&policy.subjects, &view.pod.labels))
            .collect();
        let (program, complaints) = program(policy);
        if selected.is_empty() || !program.isolates() {
            continue;
        }
        warnings.extend(complaints);
        for view in selected {
            goal.subjects.insert(view.pod.key.clone(), view.held.clone());
        }
        for key in program.sets() {
            if !goal.sets.contains_key(&key) {
                let set = fill(&key, &views);
                goal.sets.insert(key, set);
            }
        }
        goal.programs.insert(policy.key.clone(), Arc::new(program));
    }
    warnings.sort();
    (goal, warnings)
}

/// The set's members among these pods, and those that no pod contributes.
fn fill<V: Borrow<View>>(key: &SetKey, pods: impl IntoIterator<Item = V>) -> Set {
    let mut set = Set::default();
    for member in fixed_members(key) {
        set.family_mut(member.family()).insert(member);
    }
    for view in pods {
        for member in contribution(key, view.borrow()) {
            set.family_mut(member.family()).insert(member);
        }
    }
    set
}

fn contested(world: &World) -> Vec<Warning> {
    let warning = |address: IpAddr| {
        let mut claimants = world.claimants(address).rev().cloned();
        let holder = claimants.next()?;
        Some(Warning::Contested { address, holder, others: claimants.collect() })
    };
    world.contested().filter_map(warning).collect()
}
