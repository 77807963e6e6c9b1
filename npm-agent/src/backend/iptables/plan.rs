//! From the state that is there to the state that must be, in writes that each change the kernel at once.
//!
//! Two kinds of writes are atomic: one operation on one set, and one `iptables-restore` transaction. Between any two
//! writes every flow must be decided as before or as after: a flow denied (allowed) by both states is denied (allowed)
//! at every instant. So:
//!
//! - Rules only OR, and what a flow looks up in the peer sets of one direction is one address. Adds then deletes in
//!   place are safe where only one direction's sets change, or one address's memberships, and where nothing shrinks or
//!   nothing grows. Not otherwise: with sets of both directions changing, old ingress with new egress may allow what
//!   both states deny; and so may a peer set and a named port's set, which rules AND.
//! - Membership in a subject set isolates, and so can lose and gain: one such write at a time, or none.
//! - Everything else is switched: fresh sets beside the old ones, one transaction that names them, then the sets
//!   under their own names, and a second transaction back to these.
//!
//! Steps are separate programs' runs, so milliseconds lie between the last add and the first delete: no packet is under
//! way through the rules for so long.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use npm_policy::goal::Member;

use super::layout::{self, Placement};
use super::state::{Chain, Line, Name, Rule, Set, SetKind, State};

mod one;
mod uses;

use one::OneAddress;
use uses::Uses;

/// One write to a set. Each is atomic by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetOp {
    /// Makes an empty set.
    Create {
        /// Its name.
        set: Name,
        /// What it can hold.
        kind: SetKind,
    },
    /// Puts a member in.
    Add {
        /// The set.
        set: Name,
        /// The member.
        member: Member,
    },
    /// Takes a member out.
    Delete {
        /// The set.
        set: Name,
        /// The member.
        member: Member,
    },
    /// Exchanges the contents of two sets of one kind, with whatever rules name them.
    Swap {
        /// One.
        one: Name,
        /// The other.
        other: Name,
    },
    /// Removes a set that no rule names.
    Destroy {
        /// The set.
        set: Name,
    },
}

/// One `iptables-restore` run: all of it happens, at once, or none.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Transaction {
    /// `Some`: the chain holds exactly these rules. `None`: it is gone.
    pub chains: BTreeMap<Name, Option<Chain>>,
    /// What happens to `FORWARD`.
    pub forward: Option<ForwardEdit>,
}

impl Transaction {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.forward.is_none()
    }
}

/// How our jump gets to its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardEdit {
    /// These rules go, each once.
    pub delete: Vec<Line>,
    /// Then our jump is put before the rule with this number (from 0); `None`: nowhere.
    pub insert: Option<(usize, Rule)>,
}

/// A step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// One `ipset restore` run: writes to sets, in order.
    Sets(Vec<SetOp>),
    /// One transaction on the filter table.
    Rules(Transaction),
    /// The rules now enforce the desired policy: what else enforces (the other variant's rules) can go.
    Enforced,
}

/// What else there is beside the state that is planned from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Other {
    /// The other iptables variant has nothing of ours.
    Absent,
    /// It has rules of ours, which name these sets.
    Present(BTreeSet<Name>),
}

/// Plans the way from `actual` to `desired` for one family. No steps if nothing differs.
pub fn plan(actual: &State, desired: &State, placement: Placement, other: &Other) -> Vec<Step> {
    let planner = Planner::new(actual, desired, placement, other);
    let mut steps = planner.steps();
    steps.retain(|step| match step {
        Step::Sets(ops) => !ops.is_empty(),
        Step::Rules(transaction) => !transaction.is_empty(),
        Step::Enforced => *other != Other::Absent,
    });
    steps
}

/// What has to happen to `FORWARD` so that our jump stands in its place, once. `None`: nothing.
pub fn forward_edit(forward: &[Line], jump: &Rule, placement: Placement) -> Option<ForwardEdit> {
    let (ours, others): (Vec<_>, Vec<_>) =
        forward.iter().enumerate().partition(|(_, line)| layout::is_our_jump(line));
    let insert_at = match placement {
        Placement::First => 0,
        Placement::AfterServices => {
            let services =
                |line: &Line| line.callees().iter().any(|callee| **callee == *layout::KUBE_SERVICES);
            others.iter().position(|(_, line)| services(line)).map_or(0, |position| position + 1)
        }
    };
    match ours.as_slice() {
        [(index, line)] if *index == insert_at && **line == Line::Rule(jump.clone()) => None,
        _ => Some(ForwardEdit {
            delete: ours.into_iter().map(|(_, line)| line.clone()).collect(),
            insert: Some((insert_at, jump.clone())),
        }),
    }
}

/// The writes that make the contents of a set, adds and deletes apart.
#[derive(Clone, Debug, Default)]
struct Change {
    adds: Vec<Member>,
    deletes: Vec<Member>,
}

impl Change {
    fn between(actual: &Set, desired: &Set) -> Self {
        let mut change = Self::default();
        for item in actual.members.diff(&desired.members) {
            match item {
                imbl::ordset::DiffItem::Add(member) => change.adds.push(*member),
                imbl::ordset::DiffItem::Remove(member) => change.deletes.push(*member),
            }
        }
        change
    }

    fn members(&self) -> impl Iterator<Item = &Member> {
        self.adds.iter().chain(&self.deletes)
    }

    fn adds(&self, set: &Name) -> impl Iterator<Item = SetOp> {
        self.adds.iter().map(|member| SetOp::Add { set: Arc::clone(set), member: *member })
    }

    fn deletes(&self, set: &Name) -> impl Iterator<Item = SetOp> {
        self.deletes.iter().map(|member| SetOp::Delete { set: Arc::clone(set), member: *member })
    }
}

struct Planner<'a> {
    actual: &'a State,
    desired: &'a State,
    other: &'a Other,
    forward: Option<ForwardEdit>,
    /// Sets that rules name now.
    live: BTreeSet<Name>,
    /// Live sets whose contents differ, and that can be changed as they are.
    changes: BTreeMap<Name, Change>,
    /// Live sets of the wrong kind.
    misfits: BTreeSet<Name>,
}

impl<'a> Planner<'a> {
    fn new(actual: &'a State, desired: &'a State, placement: Placement, other: &'a Other) -> Self {
        let mut live = actual.referenced_sets();
        match other {
            Other::Absent => {}
            Other::Present(sets) => live.extend(sets.iter().cloned()),
        }
        let mut changes = BTreeMap::new();
        let mut misfits = BTreeSet::new();
        // A set that a list holds can't be destroyed before the list is, and lists may be named by rules.
        let listed = actual.sets.values().any(|set| set.kind.is_list());
        for (name, wanted) in &desired.sets {
            match actual.sets.get(name) {
                Some(found) if listed && found.kind != wanted.kind => {
                    misfits.insert(Arc::clone(name));
                }
                Some(_) | None if !live.contains(name) => {}
                Some(found) if found.kind != wanted.kind => {
                    misfits.insert(Arc::clone(name));
                }
                Some(found) if found.members != wanted.members => {
                    changes.insert(Arc::clone(name), Change::between(found, wanted));
                }
                Some(_) | None => {}
            }
        }
        let forward = forward_edit(&actual.forward, &desired.jump(), placement);
        Self { actual, desired, other, forward, live, changes, misfits }
    }

    fn steps(&self) -> Vec<Step> {
        if *self.other != Other::Absent || !self.misfits.is_empty() || self.forward.is_some() {
            return self.switch_all();
        }
        if self.transaction(&self.actual.chains, &self.desired.chains).is_empty() {
            if self.changes.is_empty() {
                return vec![Step::Sets(self.fill_free()), Step::Sets(self.destroy_unused([]))];
            }
            let uses = Uses::of(&self.desired.chains);
            if self.is_safe_in_place(&uses) {
                return self.in_place();
            }
            if let Some(steps) = OneAddress::plan(self) {
                return steps;
            }
            if self.changes.len() == 1 {
                return self.swap();
            }
        } else if let Some(steps) = OneAddress::plan(self) {
            return steps;
        }
        self.switch_all()
    }

    /// Whether adds and then deletes, set by set, keep every flow that both states decide alike.
    fn is_safe_in_place(&self, uses: &Uses) -> bool {
        let changes = || self.changes.values();
        if changes().map(|change| change.members().count()).sum::<usize>() == 1 {
            return true;
        }
        let nets = |member: &Member| matches!(member, Member::Include(_) | Member::Except(_));
        if self.changes.keys().any(|set| uses.is_local(set))
            || changes().any(|change| change.members().any(nets))
        {
            return false;
        }
        let monotone = changes().all(|change| change.adds.is_empty())
            || changes().all(|change| change.deletes.is_empty());
        let kinds: BTreeSet<&SetKind> = self.changes.keys().map(|set| &self.desired.sets[set].kind).collect();
        let addresses: BTreeSet<IpAddr> =
            changes().flat_map(Change::members).filter_map(member_address).collect();
        let one_direction = self.changes.keys().all(|set| !uses.is_ingress(set))
            || self.changes.keys().all(|set| !uses.is_egress(set));
        // A flow looks an address up among the sources in ingress, among the destinations in egress, so what one address
        // is a member of is one direction's matter for each flow; the destination's ports are both directions'.
        let one_address = addresses.len() == 1 && kinds.contains(&SetKind::Net);
        monotone || (kinds.len() == 1 && (one_direction || one_address))
    }

    fn in_place(&self) -> Vec<Step> {
        let mut first = self.fill_free();
        first.extend(self.changes.iter().flat_map(|(set, change)| change.adds(set)));
        let mut last: Vec<SetOp> =
            self.changes.iter().flat_map(|(set, change)| change.deletes(set)).collect();
        last.extend(self.destroy_unused([]));
        vec![Step::Sets(first), Step::Sets(last)]
    }

    /// One set only: its new contents are built beside it and take its place in one write.
    fn swap(&self) -> Vec<Step> {
        let mut first = self.fill_free();
        let mut last = Vec::new();
        let mut temporary = Vec::new();
        for set in self.changes.keys() {
            let fresh = self.temporary_name(set);
            first.extend(self.fill(&fresh, &self.desired.sets[set]));
            last.push(SetOp::Swap { one: Arc::clone(set), other: Arc::clone(&fresh) });
            temporary.push(fresh);
        }
        vec![Step::Sets(first), Step::Sets(last), Step::Sets(self.destroy_unused(temporary))]
    }

    fn switch_all(&self) -> Vec<Step> {
        let sets = self.changes.keys().chain(&self.misfits).cloned().collect();
        self.switch(&sets, Vec::new(), Vec::new())
    }

    /// Makes the desired rules hold in one transaction, with `substituted` sets replaced by fresh ones; then these sets
    /// get their contents, and a second transaction names them again.
    fn switch(&self, substituted: &BTreeSet<Name>, before: Vec<SetOp>, after: Vec<SetOp>) -> Vec<Step> {
        let fresh: BTreeMap<Name, Name> =
            substituted.iter().map(|set| (Arc::clone(set), self.temporary_name(set))).collect();
        let mut first = self.fill_free();
        first.extend(before);
        for (set, fresh) in &fresh {
            first.extend(self.fill(fresh, &self.desired.sets[set]));
        }
        let between = substitute(&self.desired.chains, &fresh);
        let mut switch = self.transaction(&self.actual.chains, &between);
        switch.forward = self.forward.clone();
        // The first transaction has emptied what it had to keep.
        let back = changed(&between, &self.desired.chains);
        // Lists hold their members fast: they go first. No rule of ours names one any more.
        let lists = if self.misfits.is_empty() { Vec::new() } else { self.lists().collect() };
        let mut refill: Vec<SetOp> =
            lists.iter().map(|set| SetOp::Destroy { set: Arc::clone(set) }).collect();
        refill.extend(substituted.iter().flat_map(|set| {
            let gone = lists.contains(set);
            self.fill(set, &self.desired.sets[set])
                .into_iter()
                .filter(move |op| !(gone && matches!(op, SetOp::Destroy { .. })))
        }));
        let mut last = after;
        let unused = self.destroy_unused(fresh.into_values());
        last.extend(
            unused.into_iter().filter(|op| !matches!(op, SetOp::Destroy { set } if lists.contains(set))),
        );
        vec![
            Step::Sets(first),
            Step::Rules(switch),
            Step::Enforced,
            Step::Sets(refill),
            Step::Rules(Transaction { chains: back, forward: None }),
            Step::Sets(last),
        ]
    }

    /// A name for a set to stand in for `set` that no rule names.
    fn temporary_name(&self, set: &Name) -> Name {
        let mut names = layout::temporary_names(set);
        let free = names.find(|name| !self.live.contains(name));
        // Rules that name a set and all of its stand-ins at once are nobody's plan; then one of them is overwritten.
        free.unwrap_or_else(|| layout::temporary_names(set).next().unwrap_or_else(|| Arc::clone(set)))
    }

    /// Desired sets that no rule names yet can be written in any order.
    fn fill_free(&self) -> Vec<SetOp> {
        let free = self.desired.sets.iter();
        let free = free.filter(|(name, _)| !self.live.contains(*name) && !self.misfits.contains(*name));
        free.flat_map(|(name, set)| self.fill(name, set)).collect()
    }

    /// Gives a set that no rule names this content, from whatever is there under its name.
    fn fill(&self, name: &Name, wanted: &Set) -> Vec<SetOp> {
        let mut ops = Vec::new();
        let empty = Set { kind: wanted.kind.clone(), members: imbl::OrdSet::new() };
        let found = match self.actual.sets.get(name) {
            Some(found) if found.kind == wanted.kind => found,
            found => {
                if found.is_some() {
                    ops.push(SetOp::Destroy { set: Arc::clone(name) });
                }
                ops.push(SetOp::Create { set: Arc::clone(name), kind: wanted.kind.clone() });
                &empty
            }
        };
        let change = Change::between(found, wanted);
        // A network is in a set once, included or excepted: out with the one before in with the other.
        ops.extend(change.deletes(name));
        ops.extend(change.adds(name));
        ops
    }

    /// Destroys what no desired rule names, sets of sets first.
    fn destroy_unused(&self, temporary: impl IntoIterator<Item = Name>) -> Vec<SetOp> {
        let temporary: BTreeSet<Name> = temporary.into_iter().collect();
        let is_list = |name: &Name| self.actual.sets.get(name).is_some_and(|set| set.kind.is_list());
        let unused = self.actual.sets.keys().filter(|name| !self.desired.sets.contains_key(*name));
        let mut names: Vec<Name> = unused.filter(|name| !temporary.contains(*name)).cloned().collect();
        names.extend(temporary);
        names.sort_by_key(|name| !is_list(name));
        names.into_iter().map(|set| SetOp::Destroy { set }).collect()
    }

    /// Sets of sets: none is ours today.
    fn lists(&self) -> impl Iterator<Item = Name> {
        self.actual.sets.iter().filter(|(_, set)| set.kind.is_list()).map(|(name, _)| Arc::clone(name))
    }

    /// What turns our chains into others. A chain that somebody else's rules lead to is emptied and not deleted.
    fn transaction(&self, from: &BTreeMap<Name, Chain>, to: &BTreeMap<Name, Chain>) -> Transaction {
        let mut chains = changed(from, to);
        for name in &self.actual.claimed {
            if let Some(fate @ None) = chains.get_mut(name) {
                let is_empty = from.get(name).is_some_and(|chain| chain.is_empty());
                *fate = Some(Arc::new(Vec::new()));
                if is_empty {
                    chains.remove(name);
                }
            }
        }
        Transaction { chains, forward: None }
    }
}

/// The chains that differ, as they must become.
fn changed(from: &BTreeMap<Name, Chain>, to: &BTreeMap<Name, Chain>) -> BTreeMap<Name, Option<Chain>> {
    let mut chains = BTreeMap::new();
    for (name, chain) in to {
        if from.get(name) != Some(chain) {
            chains.insert(Arc::clone(name), Some(Arc::clone(chain)));
        }
    }
    for name in from.keys().filter(|name| !to.contains_key(*name)) {
        chains.insert(Arc::clone(name), None);
    }
    chains
}

/// Chains in which other sets take the places of some. Chains that name none of them are shared.
fn substitute(chains: &BTreeMap<Name, Chain>, fresh: &BTreeMap<Name, Name>) -> BTreeMap<Name, Chain> {
    let replace = |line: &Line| match line {
        Line::Unreadable(_) => line.clone(),
        Line::Rule(rule) => {
            let mut rule: Rule = rule.clone();
            for matched in &mut rule.sets {
                if let Some(name) = fresh.get(&matched.set) {
                    matched.set = Arc::clone(name);
                }
            }
            Line::Rule(rule)
        }
    };
    let concerned =
        |chain: &Chain| chain.iter().any(|line| line.sets().iter().any(|set| fresh.contains_key(set)));
    let map = chains.iter().map(|(name, chain)| {
        let chain =
            if concerned(chain) { Arc::new(chain.iter().map(replace).collect()) } else { Arc::clone(chain) };
        (Arc::clone(name), chain)
    });
    map.collect()
}

/// The one address that a member is about; `None` for a network.
fn member_address(member: &Member) -> Option<IpAddr> {
    match member {
        Member::Address(address) | Member::Port(address, ..) => Some(*address),
        Member::Include(_) | Member::Except(_) => None,
    }
}
