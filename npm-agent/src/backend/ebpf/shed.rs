//! Policies of which the maps can't hold what they allow: they isolate and allow nothing, so that all others go on.
//!
//! One policy can name more networks than a map has room for, and its author is not the one who is paged. What is left out is
//! that of the policies that need the most of what is scarce.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use npm_policy::goal::{Clause, Goal, PeerMatch, PortMatch, Program, Set, SetKey};
use npm_policy::model::PolicyKey;

use super::lower::LowerError;
use super::maps::ApplyError;
use super::plan::{Full, MapName};
use crate::backend::Degraded;

/// What is left out.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Shed(BTreeMap<PolicyKey, Left>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Left {
    program: Arc<Program>,
    reason: String,
}

/// What there is too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scarce {
    /// Bits of rows.
    Bits,
    /// Entries of a map.
    Entries(MapName),
}

impl Shed {
    /// Whether nothing is left out.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The policies that allow less than they say.
    pub fn degraded(&self) -> Vec<Degraded> {
        let line = |(policy, left): (&PolicyKey, &Left)| Degraded {
            policy: policy.clone(),
            reason: format!("what it allows is left out: {}", left.reason),
        };
        self.0.iter().map(line).collect()
    }

    /// Gives policies that have changed another chance, and forgets those that are gone.
    pub fn keep_for(&mut self, goal: &Goal) {
        self.0.retain(|policy, left| {
            goal.programs
                .get(policy)
                .is_some_and(|program| Arc::ptr_eq(program, &left.program) || *program == left.program)
        });
    }

    /// The goal without what is left out: it isolates whoever the goal does, and allows nothing that the goal does not.
    pub fn reduce<'a>(&self, goal: &'a Goal) -> Cow<'a, Goal> {
        if self.is_empty() {
            return Cow::Borrowed(goal);
        }
        let mut reduced = goal.clone();
        for policy in self.0.keys() {
            if let Some(program) = reduced.programs.get_mut(policy) {
                let Program { subjects, ingress, egress } = &**program;
                let nothing = |clauses: &Option<Vec<Clause>>| clauses.as_ref().map(|_| Vec::new());
                let (ingress, egress) = (nothing(ingress), nothing(egress));
                *program = Arc::new(Program { subjects: subjects.clone(), ingress, egress });
            }
        }
        let mut unnamed: BTreeSet<SetKey> = reduced.sets.keys().cloned().collect();
        for program in reduced.programs.values() {
            unnamed.remove(&program.subjects);
            for key in named(program) {
                unnamed.remove(key);
            }
        }
        for key in &unnamed {
            reduced.sets.remove(key);
        }
        Cow::Owned(reduced)
    }

    /// Leaves out more, because the goal without what is left out already did not fit. Each round takes twice as much as the
    /// one before: what policies share is not free before the last of them goes. `false`: nothing more can be left out.
    pub fn more(&mut self, goal: &Goal, error: &ApplyError, round: u32) -> bool {
        let (scarce, excess) = match error {
            ApplyError::Lower(LowerError::Peers { needed, available }) => {
                (Scarce::Bits, needed.saturating_sub(*available))
            }
            ApplyError::Full(Full { map, wanted, limit, in_use: _ }) => {
                (Scarce::Entries(*map), wanted.saturating_sub(*limit as usize))
            }
            ApplyError::Maps(_) => return false,
        };
        let mut excess = excess.max(1).saturating_mul(1 << round.min(16));
        let left = goal.programs.iter().filter(|(policy, _)| !self.0.contains_key(policy));
        let mut needs: Vec<(usize, &PolicyKey, &Arc<Program>)> = left
            .map(|(policy, program)| (need(program, goal, scarce), policy, program))
            .filter(|(need, _, _)| *need > 0)
            .collect();
        // The most first; of equals the first by name, everywhere and every time.
        needs.sort_by(|one, other| other.0.cmp(&one.0).then(one.1.cmp(other.1)));
        let is_less = !needs.is_empty();
        for (need, policy, program) in needs {
            let left = Left { program: Arc::clone(program), reason: error.to_string() };
            self.0.insert(policy.clone(), left);
            excess = excess.saturating_sub(need);
            if excess == 0 {
                break;
            }
        }
        is_less
    }
}

fn clauses(program: &Program) -> impl Iterator<Item = &Clause> {
    program.ingress.iter().chain(&program.egress).flatten()
}

/// The sets that a policy's clauses name.
fn named(program: &Program) -> BTreeSet<&SetKey> {
    let mut keys = BTreeSet::new();
    for Clause { peers, ports } in clauses(program) {
        match peers {
            PeerMatch::Sets(sets) => keys.extend(sets),
            PeerMatch::Any => {}
        }
        match ports {
            PortMatch::Only { named, ranges: _ } => keys.extend(named.iter().map(|named| &named.set)),
            PortMatch::Any => {}
        }
    }
    keys
}

/// How much a policy needs by itself of what is scarce, at most.
fn need(program: &Program, goal: &Goal, scarce: Scarce) -> usize {
    let members = |kind: fn(&SetKey) -> bool| -> usize {
        let sets = named(program).into_iter().filter(|key| kind(key)).filter_map(|key| goal.sets.get(key));
        sets.map(|Set { v4, v6 }| v4.len() + v6.len()).sum()
    };
    let is_peer = |key: &SetKey| matches!(key, SetKey::Pods(_) | SetKey::Block(_));
    match scarce {
        Scarce::Bits => named(program).into_iter().filter(|key| is_peer(key)).count(),
        Scarce::Entries(MapName::Records) => members(|key| matches!(key, SetKey::Pods(_))),
        Scarce::Entries(MapName::Networks) => members(|key| matches!(key, SetKey::Block(_))),
        Scarce::Entries(MapName::Pairs) => members(|key| matches!(key, SetKey::Ports { .. })),
        Scarce::Entries(MapName::Policies) => clauses(program).count(),
        Scarce::Entries(MapName::Segments | MapName::Rows) => {
            let ports = |clause: &Clause| match &clause.ports {
                PortMatch::Only { ranges, named } => ranges.len() + named.len(),
                PortMatch::Any => 1,
            };
            clauses(program).map(ports).sum()
        }
    }
}
