//! Which addresses two goals tell apart, and in what.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use imbl::ordmap::DiffItem;
use imbl::ordset::DiffItem as MemberDiff;
use npm_common::layout::{NO_POD, V4, V6};
use npm_policy::goal::{Goal, Member, Set, SetKey};

use super::index::{Meanings, Turnover};
use crate::backend::ebpf::held::Held;
use crate::backend::ebpf::lower::{Bit, OfFamily};

/// What differs of the addresses of one family.
#[derive(Debug)]
pub(super) struct OfAddresses<A> {
    /// Bits of expressions that an address has from now on, or has not.
    pub(super) bits: BTreeMap<A, Vec<(usize, bool)>>,
    /// Addresses whose policies may be others.
    pub(super) subjects: BTreeSet<A>,
    /// Addresses of which pairs may be others.
    pub(super) pairs: BTreeSet<A>,
    /// The numbers of pods that addresses have from now on.
    pub(super) pods: BTreeMap<A, u32>,
}

impl<A> Default for OfAddresses<A> {
    fn default() -> Self {
        Self {
            bits: BTreeMap::new(),
            subjects: BTreeSet::new(),
            pairs: BTreeSet::new(),
            pods: BTreeMap::new(),
        }
    }
}

/// What differs.
#[derive(Debug, Default)]
pub(super) struct Difference {
    pub(super) v4: OfAddresses<V4>,
    pub(super) v6: OfAddresses<V6>,
}

/// Does the same with the addresses of either family.
macro_rules! of_family {
    ($difference:expr, $ip:expr, |$of:ident, $address:ident| $work:expr) => {
        match $ip {
            IpAddr::V4(address) => {
                let ($of, $address) = (&mut $difference.v4, address.octets());
                $work
            }
            IpAddr::V6(address) => {
                let ($of, $address) = (&mut $difference.v6, address.octets());
                $work
            }
        }
    };
}

impl Difference {
    /// Also what bits mean is brought up to date. `None`: not all that differs can be told so.
    pub(super) fn between<const W: usize>(
        before: &Goal,
        after: &Goal,
        held: &Held<W>,
        meanings: &mut Meanings<W>,
    ) -> Option<Self> {
        let mut difference = Self::default();
        difference.programs(before, after, held, meanings)?;
        let nothing = Set::default();
        for item in before.sets.diff(&after.sets) {
            let (key, old, new) = match item {
                DiffItem::Add(key, new) => (key, &nothing, new),
                DiffItem::Remove(key, old) => (key, old, &nothing),
                DiffItem::Update { old: (key, old), new: (_, new) } => (key, old, new),
            };
            for item in old.v4.diff(&new.v4).chain(old.v6.diff(&new.v6)) {
                difference.member(key, item, meanings)?;
            }
        }
        Some(difference)
    }

    /// The addresses that programs concern which are no more, or are new: their subjects, and who is in what only one side
    /// names.
    fn programs<const W: usize>(
        &mut self,
        before: &Goal,
        after: &Goal,
        held: &Held<W>,
        meanings: &mut Meanings<W>,
    ) -> Option<()> {
        let (mut old, mut new) = (Vec::new(), Vec::new());
        for item in before.programs.diff(&after.programs) {
            match item {
                DiffItem::Add(_, now) => new.push(&**now),
                DiffItem::Remove(_, then) => old.push(&**then),
                DiffItem::Update { old: (_, then), new: (_, now) } => {
                    old.push(&**then);
                    new.push(&**now);
                }
            }
        }
        if old.is_empty() && new.is_empty() {
            return Some(());
        }
        for (goal, programs) in [(before, &old), (after, &new)] {
            for ip in programs.iter().flat_map(|program| addresses(goal, &program.subjects)) {
                of_family!(self, ip, |of, address| of.subjects.insert(address));
            }
        }
        let Turnover { come, gone } = meanings.turn_over(&old, &new, held)?;
        for (goal, bits, is_there) in [(before, gone, false), (after, come, true)] {
            for (number, bit) in bits {
                match &bit {
                    Bit::Any => return None,
                    Bit::Peer(set) => {
                        for ip in addresses(goal, set) {
                            of_family!(self, ip, |of, address| {
                                of.bits.entry(address).or_default().push((number, is_there));
                            });
                        }
                    }
                    Bit::Pairs { protocol: _, set, peers: _ } => {
                        for ip in addresses(goal, set) {
                            of_family!(self, ip, |of, address| of.pairs.insert(address));
                        }
                    }
                }
            }
        }
        Some(())
    }

    fn member<const W: usize>(
        &mut self,
        key: &SetKey,
        item: MemberDiff<'_, '_, Member>,
        meanings: &Meanings<W>,
    ) -> Option<()> {
        let (member, is_there) = match item {
            MemberDiff::Add(member) => (member, true),
            MemberDiff::Remove(member) => (member, false),
        };
        match (key, member) {
            (SetKey::Pods(_), Member::Address(ip)) => of_family!(self, *ip, |of, address| {
                if let Some(number) = meanings.expression(key) {
                    of.bits.entry(address).or_default().push((number, is_there));
                }
                if meanings.is_peer_of_pairs(key) {
                    of.pairs.insert(address);
                }
            }),
            (SetKey::Local(_), Member::Address(ip)) => {
                of_family!(self, *ip, |of, address| of.subjects.insert(address));
            }
            (SetKey::Ports { .. }, Member::Port(ip, ..)) => of_family!(self, *ip, |of, address| {
                // In ingress they are the subject's own numbers.
                of.subjects.insert(address);
                of.pairs.insert(address);
            }),
            // Blocks are what their names say, and no set has members of another kind.
            (SetKey::Block(_) | SetKey::Ports { .. } | SetKey::Pods(_) | SetKey::Local(_), _) => return None,
        }
        Some(())
    }

    /// Gives the pods that are subjects from now on numbers: the ones that they had, or new ones.
    pub(super) fn number_pods<const W: usize>(
        &mut self,
        before: &Goal,
        after: &Goal,
        held: &Held<W>,
        next: &mut u32,
    ) -> Option<()> {
        let mut come: Vec<(u32, &BTreeSet<IpAddr>)> = Vec::new();
        for item in before.subjects.diff(&after.subjects) {
            let (old, new) = match item {
                DiffItem::Add(_, new) => (None, Some(new)),
                DiffItem::Remove(_, old) => (Some(old), None),
                DiffItem::Update { old: (_, old), new: (_, new) } => (Some(old), Some(new)),
            };
            for ip in old.into_iter().flatten() {
                self.number(*ip, NO_POD);
            }
            if let Some(new) = new {
                let had = old.into_iter().flatten().map(|ip| number_of(held, *ip));
                let number = match had.into_iter().find(|number| *number != NO_POD) {
                    Some(number) => number,
                    None => {
                        let number = *next;
                        *next = next.checked_add(1)?;
                        number
                    }
                };
                come.push((number, new));
            }
        }
        // An address may have gone from one pod to another.
        for (number, addresses) in come {
            addresses.iter().for_each(|ip| self.number(*ip, number));
        }
        Some(())
    }

    fn number(&mut self, ip: IpAddr, number: u32) {
        of_family!(self, ip, |of, address| {
            of.pods.insert(address, number);
            of.subjects.insert(address);
        });
    }
}

/// The addresses that the members of a set are of.
fn addresses<'a>(goal: &'a Goal, key: &SetKey) -> impl Iterator<Item = IpAddr> + use<'a> {
    let members = goal.sets.get(key).into_iter().flat_map(|set| set.v4.iter().chain(&set.v6));
    members.filter_map(|member| match member {
        Member::Address(ip) | Member::Port(ip, ..) => Some(*ip),
        Member::Include(_) | Member::Except(_) => None,
    })
}

/// The number of the pod that has an address.
fn number_of<const W: usize>(held: &Held<W>, ip: IpAddr) -> u32 {
    let half = held.half();
    let v4 = V4::of(ip).and_then(|address| held.v4.record(&address)).map(|(_, it)| it.halves[half].pod);
    let v6 = || V6::of(ip).and_then(|address| held.v6.record(&address)).map(|(_, it)| it.halves[half].pod);
    v4.or_else(v6).unwrap_or(NO_POD)
}
