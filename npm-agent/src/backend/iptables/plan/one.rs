//! One address comes under (more of) our rules, or leaves them, and nothing changes for anybody else: the common case
//! of a pod that starts or ends, without rebuilding the large sets that it is a peer in.
//!
//! It comes: what its own ingress needs is filled in first (named ports on itself, of which nobody else's flows know);
//! then its isolation is switched at once; then it becomes a peer of others, set by set, which only allows more. A flow
//! to or from it that was allowed before and will be after is allowed in between by the others' unchanged memberships;
//! one denied in both stays so, because it is no new peer before it is isolated. It leaves: the same backwards.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use npm_policy::goal::Member;

use super::super::layout;
use super::super::state::{Chain, Line, Name, SetKind, State, Target};
use super::uses::Uses;
use super::{Change, Planner, Step, Transaction, member_address};

/// Which way the address goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Comes,
    Leaves,
}

/// The plan for one address.
pub(super) struct OneAddress<'a, 'b> {
    planner: &'b Planner<'a>,
    way: Way,
    /// The roles of sets on the side that knows the address.
    uses: Uses,
}

impl OneAddress<'_, '_> {
    /// The steps, if one address comes or leaves and all else stays.
    pub(super) fn plan(planner: &Planner<'_>) -> Option<Vec<Step>> {
        let changes = || planner.changes.values();
        let way =
            match (changes().any(|change| !change.adds.is_empty()), changes().any(|c| !c.deletes.is_empty()))
            {
                (true, false) => Way::Comes,
                (false, true) => Way::Leaves,
                (true, true) | (false, false) => return None,
            };
        let addresses: BTreeSet<Option<IpAddr>> =
            changes().flat_map(Change::members).map(member_address).collect();
        let Some(&Some(address)) = addresses.first().filter(|_| addresses.len() == 1) else { return None };
        let (less, more) = match way {
            Way::Comes => (planner.actual, planner.desired),
            Way::Leaves => (planner.desired, planner.actual),
        };
        let plan = OneAddress { planner, way, uses: Uses::of(&more.chains) };
        plan.is_all_else_equal(less, more, address).then(|| plan.steps())?
    }

    /// Whether the chains differ in what concerns the address only: jumps for it alone, their chains, and the rules
    /// that let a pod reach itself.
    fn is_all_else_equal(&self, less: &State, more: &State, address: IpAddr) -> bool {
        let base = |name: &str| name == layout::INGRESS || name == layout::EGRESS;
        let empty = |name: &str| less.chains.get(name).is_none_or(|chain| chain.is_empty());
        let unbroken = less.chains.iter().all(|(name, chain)| match more.chains.get(name) {
            None => planner_keeps(self.planner, name, chain),
            Some(_) if base(name) || &**name == layout::DENIED => true,
            Some(_) if &**name == layout::ENTRY && chain.is_empty() => true,
            Some(other) => chain == other,
        });
        // With an entry that leads nowhere there is nobody else.
        let entry_grows =
            empty(layout::ENTRY) != more.chains.get(layout::ENTRY).is_none_or(|chain| chain.is_empty());
        if entry_grows && !(empty(layout::INGRESS) && empty(layout::EGRESS)) {
            return false;
        }
        let bases = [layout::INGRESS, layout::EGRESS];
        unbroken
            && only_itself_differs(address, less, more)
            && bases.iter().all(|base| only_jumps_for(address, less, more, base))
    }

    fn steps(&self) -> Option<Vec<Step>> {
        let planner = self.planner;
        let mut own = Vec::new();
        let mut peers = Vec::new();
        let mut local = BTreeMap::new();
        for (set, change) in &planner.changes {
            let ops = || change.adds(set).chain(change.deletes(set));
            let peer = self.uses.is_ingress(set) || self.uses.is_egress(set);
            match planner.desired.sets[set].kind {
                _ if self.uses.is_local(set) && peer => return None,
                _ if self.uses.is_local(set) => {
                    local.insert(Arc::clone(set), change);
                }
                // A named port that ingress and egress both look up would open egress before its time.
                SetKind::IpPort if self.uses.is_ingress(set) && self.uses.is_egress(set) => return None,
                SetKind::IpPort if self.uses.is_ingress(set) => own.extend(ops()),
                SetKind::IpPort | SetKind::Net => peers.extend(ops()),
                SetKind::Other(_) => return None,
            }
        }
        let (before, after) = match self.way {
            Way::Comes => (own, peers),
            Way::Leaves => (peers, own),
        };
        let rules = planner.transaction(&planner.actual.chains, &planner.desired.chains);
        let isolation_is_one_write =
            local.values().map(|change| change.members().count()).sum::<usize>() == 1;
        let only_self = rules.chains.keys().all(|name| &**name == layout::DENIED);
        if local.is_empty() || !(isolation_is_one_write && only_self) {
            let local: BTreeSet<Name> = local.into_keys().collect();
            return Some(planner.switch(&local, before, after));
        }
        // A packet to itself is denied by neither state: its rule comes before the isolation and leaves after it.
        let isolate = local.iter().flat_map(|(set, change)| change.adds(set).chain(change.deletes(set)));
        let mut first = planner.fill_free();
        first.extend(before);
        let mut last = after;
        last.extend(planner.destroy_unused([]));
        let isolate = Step::Sets(isolate.collect());
        let rules = Step::Rules(Transaction { forward: planner.forward.clone(), ..rules });
        let (middle, end) = match self.way {
            Way::Comes => (rules, isolate),
            Way::Leaves => (isolate, rules),
        };
        Some(vec![Step::Sets(first), middle, end, Step::Sets(last)])
    }
}

/// A chain that stays only because somebody else's rules lead to it.
fn planner_keeps(planner: &Planner<'_>, name: &Name, chain: &Chain) -> bool {
    planner.actual.claimed.contains(name) && chain.is_empty()
}

/// Whether the rules that let a pod reach itself differ in the address with itself only. Where a pod's other address is
/// concerned, what passed as the pod's own may pass by a policy afterwards, and both have to change in one write.
fn only_itself_differs(address: IpAddr, less: &State, more: &State) -> bool {
    let lines = |state: &State| -> BTreeSet<Line> {
        state.chains.get(layout::DENIED).map(|chain| chain.iter().cloned().collect()).unwrap_or_default()
    };
    let own = Some(IpNet::from(address));
    lines(less).symmetric_difference(&lines(more)).all(|line| match line {
        Line::Unreadable(_) => false,
        Line::Rule(rule) => (rule.source, rule.destination) == (own, own) || rule.target == Target::Drop,
    })
}

/// Whether a base chain of `more` is that of `less` with jumps added whose subjects are the address alone.
fn only_jumps_for(address: IpAddr, less: &State, more: &State, base: &str) -> bool {
    let lines = |state: &State| -> Vec<Line> {
        state.chains.get(base).map(|chain| chain.to_vec()).unwrap_or_default()
    };
    let (fewer, all) = (lines(less), lines(more));
    let mut rest = fewer.iter().peekable();
    for line in &all {
        if rest.peek() == Some(&line) {
            rest.next();
            continue;
        }
        let sets = line.sets();
        let for_it = |set: &Name| {
            let Some(set) = more.sets.get(set) else { return false };
            set.members.iter().all(|member| *member == Member::Address(address))
        };
        // The judgement at the end of the chain comes with the first jump.
        let judgement = sets.is_empty() && fewer.is_empty();
        if !judgement && (sets.is_empty() || !sets.iter().all(for_it)) {
            return false;
        }
    }
    rest.peek().is_none()
}
