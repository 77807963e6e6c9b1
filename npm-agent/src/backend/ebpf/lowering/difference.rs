//! Which addresses two goals with the same programs tell apart, and in what.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use imbl::ordmap::DiffItem;
use imbl::ordset::DiffItem as MemberDiff;
use npm_common::layout::{NO_POD, V4, V6};
use npm_policy::goal::{Goal, Member, SetKey};

use super::index::Meanings;
use crate::backend::ebpf::held::Held;
use crate::backend::ebpf::lower::OfFamily;

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
    /// `None`: the programs differ, or something that only they decide.
    pub(super) fn between<const W: usize>(
        before: &Goal,
        after: &Goal,
        meanings: &Meanings<W>,
    ) -> Option<Self> {
        if before.programs != after.programs {
            return None;
        }
        let mut difference = Self::default();
        for item in before.sets.diff(&after.sets) {
            let DiffItem::Update { old: (key, old), new: (_, new) } = item else { return None };
            for item in old.v4.diff(&new.v4).chain(old.v6.diff(&new.v6)) {
                difference.member(key, item, meanings)?;
            }
        }
        Some(difference)
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
                of_family!(self, *ip, |of, address| {
                    of.subjects.insert(address);
                });
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

/// The number of the pod that has an address.
fn number_of<const W: usize>(held: &Held<W>, ip: IpAddr) -> u32 {
    let half = held.half();
    let v4 = V4::of(ip).and_then(|address| held.v4.record(&address)).map(|(_, it)| it.halves[half].pod);
    let v6 = || V6::of(ip).and_then(|address| held.v6.record(&address)).map(|(_, it)| it.halves[half].pod);
    v4.or_else(v6).unwrap_or(NO_POD)
}
