//! One family's addresses, networks and pairs: what is swept, and the halves that are filled.

use std::collections::{BTreeMap, BTreeSet};

use npm_common::layout::{Address, Known, NOBODY, PairRecord, Record};

use super::{Full, MapName};
use crate::backend::ebpf::held::{FamilyWrite, HeldFamily, Limits};
use crate::backend::ebpf::lower::{Prefix, longest};

/// What is wanted, in the numbers of the maps.
pub(super) struct Wanted<A: Address> {
    pub(super) known: BTreeMap<A, Known>,
    pub(super) networks: BTreeMap<Prefix<A>, u32>,
    pub(super) pairs: BTreeMap<A::Pair, u32>,
}

impl<A: Address> Wanted<A> {
    /// What is in use.
    pub(super) fn in_use(held: &HeldFamily<A>, half: usize) -> Self {
        let known = |address: &A| Some((*address, held.record(address)?.1.halves[half]));
        let pair = |pair: &A::Pair| Some((*pair, held.pair_record(pair)?.1.rows[half]));
        let row = |prefix: &Prefix<A>, rows: &[u32; 2]| {
            let length = prefix.length.checked_sub(1);
            let shorter = length.and_then(|length| longest(&held.networks, prefix.address, length));
            let says = shorter.map_or(NOBODY, |(_, rows)| rows[half]);
            (rows[half] != says).then_some((*prefix, rows[half]))
        };
        Self {
            known: held.places.keys().filter_map(known).filter(|it| it.1 != Known::NOTHING).collect(),
            networks: held.networks.iter().filter_map(|(prefix, rows)| row(prefix, rows)).collect(),
            pairs: held.pairs.keys().filter_map(pair).filter(|it| it.1 != NOBODY).collect(),
        }
    }
}

/// What is to be done.
pub(super) struct FamilyPlan<A: Address> {
    /// Takes out what is not known in the half in use, nor wanted.
    pub(super) sweep: Vec<FamilyWrite<A>>,
    /// Makes the other half what is wanted.
    pub(super) fill: Vec<FamilyWrite<A>>,
    /// What may not be seen before the switch.
    pub(super) after: Vec<FamilyWrite<A>>,
    /// Whether packets are judged otherwise than wanted, as long as the halves are not switched.
    pub(super) is_seen: bool,
}

/// Places that are free, those that were swept last. Whoever reads there still what was swept reads nothing in the half
/// in use, before and after the place is given away.
fn free(taken: &BTreeSet<u32>, swept: Vec<u32>, wanted: usize, limit: u32) -> Option<Vec<u32>> {
    let never_taken = (0..limit).filter(|place| !taken.contains(place));
    let places: Vec<u32> = never_taken.chain(swept).take(wanted).collect();
    (places.len() == wanted).then_some(places)
}

/// Both halves: the one in use, and the other.
pub(in crate::backend::ebpf) fn halves<T: Copy>(half: usize, now: T, then: T) -> [T; 2] {
    if half == 0 { [now, then] } else { [then, now] }
}

impl<A: Address> FamilyPlan<A> {
    /// # Errors
    /// A map is full.
    pub(super) fn of(
        held: &HeldFamily<A>,
        half: usize,
        wanted: &Wanted<A>,
        limits: &Limits,
    ) -> Result<Self, Full> {
        let mut plan = Self { sweep: Vec::new(), fill: Vec::new(), after: Vec::new(), is_seen: false };
        plan.records(held, half, wanted, limits.records)?;
        plan.networks(held, half, wanted, limits.networks)?;
        plan.pairs(held, half, wanted, limits.pairs)?;
        Ok(plan)
    }

    fn records(
        &mut self,
        held: &HeldFamily<A>,
        half: usize,
        wanted: &Wanted<A>,
        limit: u32,
    ) -> Result<(), Full> {
        let mut swept = Vec::new();
        let mut missing = Vec::new();
        let addresses: BTreeSet<&A> = held.places.keys().chain(wanted.known.keys()).collect();
        for address in addresses {
            let then = wanted.known.get(address).copied().unwrap_or(Known::NOTHING);
            let Some((place, record)) = held.record(address) else {
                if then != Known::NOTHING {
                    missing.push((*address, then));
                    self.is_seen = true;
                } else {
                    self.sweep.push(FamilyWrite::Unplace(*address));
                }
                continue;
            };
            let now = record.halves[half];
            self.is_seen |= now != then;
            if now == Known::NOTHING && then == Known::NOTHING {
                swept.push(place);
                self.sweep.push(FamilyWrite::Unplace(*address));
                continue;
            }
            let halves = halves(half, now, then);
            if record.halves != halves {
                self.fill.push(FamilyWrite::Record(place, Record { address: *address, halves }));
            }
        }
        let taken: BTreeSet<u32> = held.places.values().copied().collect();
        let places = free(&taken, swept, missing.len(), limit).ok_or(Full {
            map: MapName::Records,
            wanted: wanted.known.len(),
            in_use: held.places.len(),
            limit,
        })?;
        let places: Vec<_> = places.into_iter().zip(missing).collect();
        for (place, (address, then)) in &places {
            let halves = halves(half, Known::NOTHING, *then);
            self.fill.push(FamilyWrite::Record(*place, Record { address: *address, halves }));
        }
        for (place, (address, _)) in places {
            // An address that leads to another's record, which is not our work, is denied. It stays so until then.
            let writes = if held.places.contains_key(&address) { &mut self.after } else { &mut self.fill };
            writes.push(FamilyWrite::Place(address, place));
        }
        Ok(())
    }

    fn networks(
        &mut self,
        held: &HeldFamily<A>,
        half: usize,
        wanted: &Wanted<A>,
        limit: u32,
    ) -> Result<(), Full> {
        let prefixes: BTreeSet<&Prefix<A>> = held.networks.keys().chain(wanted.networks.keys()).collect();
        let mut count = prefixes.len();
        for prefix in prefixes {
            let then =
                longest(&wanted.networks, prefix.address, prefix.length).map_or(NOBODY, |(_, row)| *row);
            let shorter = || {
                let length = prefix.length.checked_sub(1)?;
                longest(&held.networks, prefix.address, length).map(|(_, rows)| rows[half])
            };
            let there = held.networks.get(prefix);
            let now = there.map(|rows| rows[half]).or_else(shorter).unwrap_or(NOBODY);
            self.is_seen |= now != then;
            match there {
                Some(_) if !wanted.networks.contains_key(prefix) && shorter().unwrap_or(NOBODY) == now => {
                    self.sweep.push(FamilyWrite::DropNetwork(*prefix));
                    count -= 1;
                }
                Some(rows) if *rows == halves(half, now, then) => {}
                Some(_) | None => self.fill.push(FamilyWrite::Network(*prefix, halves(half, now, then))),
            }
        }
        if count > limit as usize {
            let (wanted, in_use) = (wanted.networks.len(), held.networks.len());
            return Err(Full { map: MapName::Networks, wanted, in_use, limit });
        }
        Ok(())
    }

    fn pairs(
        &mut self,
        held: &HeldFamily<A>,
        half: usize,
        wanted: &Wanted<A>,
        limit: u32,
    ) -> Result<(), Full> {
        let mut swept = Vec::new();
        let mut missing = Vec::new();
        let pairs: BTreeSet<&A::Pair> = held.pairs.keys().chain(wanted.pairs.keys()).collect();
        for pair in pairs {
            let then = wanted.pairs.get(pair).copied().unwrap_or(NOBODY);
            let Some((place, record)) = held.pair_record(pair) else {
                if then != NOBODY {
                    missing.push((*pair, then));
                    self.is_seen = true;
                } else {
                    self.sweep.push(FamilyWrite::PairUnplace(*pair));
                }
                continue;
            };
            let now = record.rows[half];
            self.is_seen |= now != then;
            if now == NOBODY && then == NOBODY {
                swept.push(place);
                self.sweep.push(FamilyWrite::PairUnplace(*pair));
                continue;
            }
            let rows = halves(half, now, then);
            if record.rows != rows {
                self.fill.push(FamilyWrite::PairRecord(place, PairRecord { pair: *pair, rows }));
            }
        }
        let taken: BTreeSet<u32> = held.pairs.values().copied().collect();
        let places = free(&taken, swept, missing.len(), limit).ok_or(Full {
            map: MapName::Pairs,
            wanted: wanted.pairs.len(),
            in_use: held.pairs.len(),
            limit,
        })?;
        let places: Vec<_> = places.into_iter().zip(missing).collect();
        for (place, (pair, then)) in &places {
            let rows = halves(half, NOBODY, *then);
            self.fill.push(FamilyWrite::PairRecord(*place, PairRecord { pair: *pair, rows }));
        }
        for (place, (pair, _)) in places {
            let writes = if held.pairs.contains_key(&pair) { &mut self.after } else { &mut self.fill };
            writes.push(FamilyWrite::PairPlace(pair, place));
        }
        Ok(())
    }
}
