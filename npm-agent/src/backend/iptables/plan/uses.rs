//! Which sets say whom a policy isolates, and which say whom it allows in which direction.

use std::collections::{BTreeMap, BTreeSet};

use super::super::layout;
use super::super::state::{Chain, Name};

/// The roles of sets in rules of our layout.
#[derive(Debug, Default)]
pub(super) struct Uses {
    local: BTreeSet<Name>,
    ingress: BTreeSet<Name>,
    egress: BTreeSet<Name>,
}

impl Uses {
    pub(super) fn of(chains: &BTreeMap<Name, Chain>) -> Self {
        let mut uses = Self::default();
        uses.ingress = direction(chains, layout::INGRESS, &mut uses.local);
        uses.egress = direction(chains, layout::EGRESS, &mut uses.local);
        uses
    }

    /// Whether membership isolates.
    pub(super) fn is_local(&self, set: &Name) -> bool {
        self.local.contains(set)
    }

    /// Whether membership allows, in ingress.
    pub(super) fn is_ingress(&self, set: &Name) -> bool {
        self.ingress.contains(set)
    }

    /// Whether membership allows, in egress.
    pub(super) fn is_egress(&self, set: &Name) -> bool {
        self.egress.contains(set)
    }
}

/// The sets that the policies of a base chain name; those of the base chain itself go to `local`.
fn direction(chains: &BTreeMap<Name, Chain>, base: &str, local: &mut BTreeSet<Name>) -> BTreeSet<Name> {
    let mut sets = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut todo: Vec<Name> = Vec::new();
    for line in chains.get(base).into_iter().flat_map(|chain| chain.iter()) {
        local.extend(line.sets());
        todo.extend(line.callees());
    }
    while let Some(name) = todo.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        for line in chains.get(&name).into_iter().flat_map(|chain| chain.iter()) {
            sets.extend(line.sets());
            todo.extend(line.callees());
        }
    }
    sets
}
