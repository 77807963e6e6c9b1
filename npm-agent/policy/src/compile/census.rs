//! Counts over the whole cluster's policies: what one node would program if every pod ran on it.
//!
//! It is a function of the World alone, so every node has the same numbers, under either backend. [`census`] is the
//! definition; [`Counter`] keeps it up to date by looking at what a change touches. Only counts are kept: distinct pods
//! contribute distinct members, so numbers can be added and taken away without the members.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;

use super::anchor::AnchorIndex;
use super::contribution::{View, contribution, fixed_members};
use super::incremental::{Transition, expression_of, likely_pods};
use super::matching::selects;
use super::program::program;
use crate::goal::{Clause, Family, Member, PeerMatch, PortMatch, Program, SetKey};
use crate::model::{Labels, NamespaceScope, Pod};
use crate::names::{self, SetNames};
use crate::world::World;

/// Counts over the whole cluster's policies.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Census {
    /// Rules, as Azure NPM counts them: for each policy and direction that it isolates, the jump to its chain, one rule
    /// for each pair of a peer and a port that it allows, and the one that marks what is left. The rules that stand
    /// whatever policies there are do not count.
    pub rules: usize,
    /// Members of all sets together, of both families.
    pub entries: usize,
    /// The sets that the policies name. A set of subjects holds the subjects of all nodes.
    pub sets: OrdMap<SetKey, SetCount>,
}

/// How many members a set has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetCount {
    /// The set's names.
    pub names: Arc<SetNames>,
    /// IPv4 members.
    pub v4: usize,
    /// IPv6 members.
    pub v6: usize,
}

impl SetCount {
    /// An empty set.
    fn of(key: &SetKey) -> Self {
        let name = names::set_name(key);
        let kernel = |family| names::kernel_set_name(&name, family).into();
        let (v4, v6) = (kernel(Family::V4), kernel(Family::V6));
        Self { names: Arc::new(SetNames { name: name.into(), v4, v6 }), v4: 0, v6: 0 }
    }

    fn family_mut(&mut self, family: Family) -> &mut usize {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// Counts the whole world, from nothing: the definition.
pub fn census(world: &World) -> Census {
    let mut census = Census::default();
    let views: Vec<View> = world.pods().map(|pod| everywhere(world, pod)).collect();
    for policy in world.policies() {
        let (program, _) = program(policy);
        if !program.isolates() {
            continue;
        }
        census.rules += rules(&program);
        for key in program.sets() {
            if !census.sets.contains_key(&key) {
                let set = super::fill(&key, &views);
                let count = SetCount { v4: set.v4.len(), v6: set.v6.len(), ..SetCount::of(&key) };
                census.entries += count.v4 + count.v6;
                census.sets.insert(key, count);
            }
        }
    }
    census
}

/// A pod, seen as if it ran on the node that is compiled for.
fn everywhere(world: &World, pod: &Arc<Pod>) -> View {
    View { local: true, ..View::of(world, "", pod) }
}

fn rules(program: &Program) -> usize {
    let direction = |clauses: &Option<Vec<Clause>>| match clauses {
        Some(clauses) => 2 + clauses.iter().map(pairs).sum::<usize>(),
        None => 0,
    };
    direction(&program.ingress) + direction(&program.egress)
}

/// Pairs of a peer and a port that a clause allows.
fn pairs(Clause { peers, ports }: &Clause) -> usize {
    let peers = match peers {
        PeerMatch::Sets(sets) => sets.len(),
        PeerMatch::Any => 1,
    };
    let ports = match ports {
        PortMatch::Only { ranges, named } => ranges.len() + named.len(),
        PortMatch::Any => 1,
    };
    peers * ports
}

/// A census that is kept up to date.
#[derive(Clone, Debug, Default)]
pub(super) struct Counter {
    census: Census,
    /// How many programs name a set.
    references: BTreeMap<SetKey, usize>,
    index: AnchorIndex<SetKey>,
    /// The sets of named ports of a block's pods, by the port's name.
    block_ports: BTreeMap<Arc<str>, BTreeSet<SetKey>>,
}

impl Counter {
    /// The counts now.
    pub(super) fn census(&self) -> Census {
        self.census.clone()
    }

    /// A policy's program is another from now on; `None`: there is none that isolates.
    pub(super) fn replace(&mut self, world: &World, old: Option<&Program>, new: Option<&Program>) {
        // The new one comes first, so that sets that both name are not filled twice.
        for key in new.iter().flat_map(|new| new.sets()) {
            let count = self.references.entry(key.clone()).or_default();
            *count += 1;
            if *count == 1 {
                self.file(&key);
                self.fill(world, key);
            }
        }
        for key in old.iter().flat_map(|old| old.sets()) {
            let Some(count) = self.references.get_mut(&key) else { continue };
            *count -= 1;
            if *count == 0 {
                self.references.remove(&key);
                self.unfile(&key);
                if let Some(count) = self.census.sets.remove(&key) {
                    self.census.entries -= count.v4 + count.v6;
                }
            }
        }
        self.census.rules += new.map_or(0, rules);
        self.census.rules -= old.map_or(0, rules);
    }

    /// Pods have become others.
    pub(super) fn move_members(&mut self, transitions: &[Transition]) {
        for transition in transitions {
            let local = |view: &Option<View>| view.clone().map(|view| View { local: true, ..view });
            let (before, after) = (local(&transition.before), local(&transition.after));
            let mut keys = BTreeSet::new();
            for view in before.iter().chain(&after) {
                keys.extend(self.candidates(view));
            }
            for key in keys {
                self.contribute(&key, before.as_ref(), after.as_ref());
            }
        }
    }

    /// A namespace's labels are others.
    pub(super) fn relabel_namespace(
        &mut self,
        world: &World,
        name: &Arc<str>,
        before: &Labels,
        after: &Labels,
    ) {
        let flips = |key: &&SetKey| match expression_of(key).map(|expression| &expression.namespaces) {
            Some(NamespaceScope::Matching(selector)) => selects(selector, before) != selects(selector, after),
            Some(NamespaceScope::Named(_)) | None => false,
        };
        let flipped: Vec<SetKey> = match before == after {
            true => Vec::new(),
            false => self.references.keys().filter(flips).cloned().collect(),
        };
        if flipped.is_empty() {
            return;
        }
        for pod in world.pods_in(name) {
            let is = everywhere(world, pod);
            let was = View { namespace: before.clone(), ..is.clone() };
            for key in &flipped {
                self.contribute(key, Some(&was), Some(&is));
            }
        }
    }

    /// Counts what a pod contributes to a set from now on, instead of what it did.
    fn contribute(&mut self, key: &SetKey, before: Option<&View>, after: Option<&View>) {
        let members = |view: Option<&View>| view.map(|view| contribution(key, view)).unwrap_or_default();
        let (gone, come) = (members(before), members(after));
        // Most candidates turn out to hold the pod neither before nor after, or both times.
        if gone == come {
            return;
        }
        if let Some(count) = self.census.sets.get_mut(key) {
            come.iter().for_each(|member| *count.family_mut(member.family()) += 1);
            gone.iter().for_each(|member| *count.family_mut(member.family()) -= 1);
            self.census.entries += come.len();
            self.census.entries -= gone.len();
        }
    }

    fn fill(&mut self, world: &World, key: SetKey) {
        let mut count = SetCount::of(&key);
        let mut add = |member: &Member| *count.family_mut(member.family()) += 1;
        fixed_members(&key).iter().for_each(&mut add);
        let mut from = |pod: &Arc<Pod>| contribution(&key, &everywhere(world, pod)).iter().for_each(&mut add);
        match (expression_of(&key), &key) {
            (Some(expression), _) => likely_pods(world, expression).for_each(&mut from),
            (None, SetKey::Ports { .. }) => world.pods().for_each(&mut from),
            // Nothing in these depends on pods.
            (None, SetKey::Block(_) | SetKey::Pods(_) | SetKey::Local(_)) => {}
        }
        self.census.entries += count.v4 + count.v6;
        self.census.sets.insert(key, count);
    }

    fn candidates(&self, view: &View) -> BTreeSet<SetKey> {
        let mut keys = self.index.candidates(&view.pod.key.namespace, &view.namespace, &view.pod.labels);
        for port in &view.pod.ports {
            keys.extend(self.block_ports.get(&port.name).into_iter().flatten().cloned());
        }
        keys
    }

    fn file(&mut self, key: &SetKey) {
        match (expression_of(key), key) {
            (Some(expression), _) => self.index.insert(expression, key),
            (None, SetKey::Ports { name, of: _ }) => {
                self.block_ports.entry(Arc::clone(name)).or_default().insert(key.clone());
            }
            (None, SetKey::Pods(_) | SetKey::Local(_) | SetKey::Block(_)) => {}
        }
    }

    fn unfile(&mut self, key: &SetKey) {
        match (expression_of(key), key) {
            (Some(expression), _) => self.index.remove(expression, key),
            (None, SetKey::Ports { name, of: _ }) => {
                if let Some(keys) = self.block_ports.get_mut(name) {
                    keys.remove(key);
                    if keys.is_empty() {
                        self.block_ports.remove(name);
                    }
                }
            }
            (None, SetKey::Pods(_) | SetKey::Local(_) | SetKey::Block(_)) => {}
        }
    }
}
