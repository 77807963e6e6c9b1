//! What both families share and packets only read: rows, segments, policies. What is there already is used, whatever it
//! was for; the rest is written where no half in use leads.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use npm_common::layout::{Address, Bits, Meaning, NOBODY, NOT_ISOLATED, Policy, Segment};

use super::{Full, MapName};
use crate::backend::ebpf::held::{Held, HeldFamily, Limits, Write};
use crate::backend::ebpf::lower::{FamilyMaps, Lowered};

/// Where the wanted content is, and the writes that bring it there.
pub(super) struct Content<const W: usize> {
    rows: HashMap<Bits<W>, u32>,
    /// By the wanted policies' indices.
    policies: Vec<u32>,
    pub(super) writes: Vec<Write<W>>,
}

/// What the half in use leads to.
#[derive(Default)]
pub(in crate::backend::ebpf) struct InUse {
    pub(in crate::backend::ebpf) policies: BTreeSet<u32>,
    pub(in crate::backend::ebpf) rows: BTreeSet<u32>,
    /// Runs of segments: where they begin and how long they are.
    pub(in crate::backend::ebpf) runs: BTreeSet<(u32, u32)>,
}

impl InUse {
    pub(in crate::backend::ebpf) fn of<const W: usize>(held: &Held<W>) -> Self {
        let mut used = Self { rows: [NOBODY].into(), policies: [NOT_ISOLATED].into(), ..Self::default() };
        used.family(&held.v4, held.half());
        used.family(&held.v6, held.half());
        for policy in used.policies.iter().filter_map(|id| held.policies.get(id)) {
            used.rows.insert(policy.rest);
            used.runs.insert((policy.first, policy.segments));
            let run = policy.first..policy.first.saturating_add(policy.segments);
            used.rows.extend(held.segments.range(run).map(|(_, segment)| segment.row));
        }
        used
    }

    fn family<A: Address>(&mut self, family: &HeldFamily<A>, half: usize) {
        for (_, record) in family.places.keys().filter_map(|address| family.record(address)) {
            let known = record.halves[half];
            self.policies.extend([known.ingress, known.egress]);
            self.rows.insert(known.row);
        }
        self.rows.extend(family.networks.values().map(|rows| rows[half]));
        let pairs = family.pairs.keys().filter_map(|pair| family.pair_record(pair));
        self.rows.extend(pairs.map(|(_, record)| record.rows[half]));
    }
}

/// The policies that the half in use leads to, nobody's included.
pub(super) fn policies_in_use<const W: usize>(held: &Held<W>) -> BTreeSet<u32> {
    InUse::of(held).policies
}

/// How much the half in use leads to, without what is nobody's.
pub(super) struct Usage {
    pub(super) policies: usize,
    pub(super) segments: usize,
    pub(super) rows: usize,
}

pub(super) fn usage<const W: usize>(held: &Held<W>) -> Usage {
    let used = InUse::of(held);
    Usage {
        policies: used.policies.len() - 1,
        segments: used.runs.iter().map(|(_, length)| *length as usize).sum(),
        rows: used.rows.len() - 1,
    }
}

/// What tells a policy from others: the row of the rest, whether it names pairs, its segments.
pub(in crate::backend::ebpf) type PolicyKey = (u32, u32, Vec<(u32, u32, u32)>);

pub(in crate::backend::ebpf) fn key(policy: &Policy, segments: impl Iterator<Item = Segment>) -> PolicyKey {
    (policy.rest, policy.pairs, segments.map(|it| (it.first, it.last, it.row)).collect())
}

impl<const W: usize> Content<W> {
    pub(super) fn of(held: &Held<W>, wanted: &Lowered<W>, limits: &Limits) -> Result<Self, Full> {
        let mut used = InUse::of(held);
        let mut writes = Vec::new();
        let rows = place_rows(held, wanted, limits, &mut used, &mut writes)?;
        let mut content = Self { rows, policies: Vec::new(), writes };
        content.place_policies(held, wanted, limits, &mut used)?;
        content.write_meanings(held, wanted);
        Ok(content)
    }

    pub(super) fn row(&self, bits: &Bits<W>) -> u32 {
        self.rows.get(bits).copied().unwrap_or(NOBODY)
    }

    pub(super) fn policy(&self, index: u32) -> u32 {
        let place = usize::try_from(index).ok().and_then(|index| self.policies.get(index));
        place.copied().unwrap_or(NOT_ISOLATED)
    }

    fn place_policies(
        &mut self,
        held: &Held<W>,
        wanted: &Lowered<W>,
        limits: &Limits,
        used: &mut InUse,
    ) -> Result<(), Full> {
        let segments_of = |policy: &Policy| {
            let run = policy.first..policy.first.saturating_add(policy.segments);
            run.map(|index| held.segments.get(&index).copied().unwrap_or_default())
        };
        let in_use = used.policies.len() - 1;
        let mut found: HashMap<PolicyKey, u32> = HashMap::new();
        // A policy that allows nobody anything is all zeroes: one in use is there, though nothing is held.
        let now = used.policies.iter().filter(|id| **id != NOT_ISOLATED).copied();
        let idle = held.policies.keys().filter(|id| !used.policies.contains(id)).copied();
        for id in now.chain(idle) {
            let policy = held.policies.get(&id).copied().unwrap_or_default();
            let fits = policy.first.checked_add(policy.segments).is_some_and(|end| end <= limits.segments);
            if fits && id < limits.policies {
                found.entry(key(&policy, segments_of(&policy))).or_insert(id);
            }
        }
        // What is there, before what must be made: nothing that is used may be overwritten.
        let rows: Vec<u32> = wanted.rows.iter().map(|bits| self.row(bits)).collect();
        let row = |index: u32| rows.get(index as usize).copied().unwrap_or(NOBODY);
        let mut places: BTreeMap<usize, u32> = BTreeMap::from([(0, NOT_ISOLATED)]);
        let mut missing = Vec::new();
        for (index, policy) in wanted.policies.iter().enumerate().skip(1) {
            let run = policy.first..policy.first.saturating_add(policy.segments);
            let segments: Vec<Segment> = run
                .filter_map(|index| wanted.segments.get(index as usize))
                .map(|segment| Segment { row: row(segment.row), ..*segment })
                .collect();
            let policy = Policy { rest: row(policy.rest), ..*policy };
            match found.get(&key(&policy, segments.iter().copied())) {
                Some(id) => {
                    used.policies.insert(*id);
                    if let Some(there) = held.policies.get(id) {
                        used.runs.insert((there.first, there.segments));
                    }
                    places.insert(index, *id);
                }
                None => missing.push((index, policy, segments)),
            }
        }
        let full = |map, wanted, in_use, limit| Full { map, wanted, in_use, limit };
        let mut gaps = gaps(&used.runs, limits.segments);
        let mut ids = 1..limits.policies;
        for (index, policy, segments) in missing {
            let id = ids.find(|id| !used.policies.contains(id));
            let full_policies = full(MapName::Policies, wanted.policies.len() - 1, in_use, limits.policies);
            let id = id.ok_or(full_policies)?;
            let length = policy.segments;
            let segments_used = used.runs.iter().map(|(_, length)| *length as usize).sum();
            let first = take(&mut gaps, length).ok_or(full(
                MapName::Segments,
                wanted.segments.len(),
                segments_used,
                limits.segments,
            ))?;
            for (index, segment) in (first..).zip(segments) {
                if held.segments.get(&index) != Some(&segment) {
                    self.writes.push(Write::Segment(index, segment));
                }
            }
            self.writes.push(Write::Policy(id, Policy { first, ..policy }));
            places.insert(index, id);
        }
        self.policies = places.into_values().collect();
        Ok(())
    }

    fn write_meanings(&mut self, held: &Held<W>, wanted: &Lowered<W>) {
        for (number, bit) in &wanted.bits {
            let fingerprint = bit.fingerprint();
            let meaning: Meaning = [(fingerprint >> 64) as u64, fingerprint as u64];
            if let Ok(number) = u32::try_from(*number)
                && held.meanings.get(&number) != Some(&meaning)
            {
                self.writes.push(Write::Meaning(number, meaning));
            }
        }
    }
}

/// Every row that is wanted: where it is.
fn place_rows<const W: usize>(
    held: &Held<W>,
    wanted: &Lowered<W>,
    limits: &Limits,
    used: &mut InUse,
    writes: &mut Vec<Write<W>>,
) -> Result<HashMap<Bits<W>, u32>, Full> {
    let in_use = used.rows.len() - 1;
    let mut found: HashMap<&Bits<W>, u32> = HashMap::new();
    let (now, idle): (Vec<_>, Vec<_>) = held.rows.iter().partition(|(index, _)| used.rows.contains(index));
    for (index, bits) in now.into_iter().chain(idle) {
        if *index < limits.rows {
            found.entry(bits).or_insert(*index);
        }
    }
    let mut places: HashMap<Bits<W>, u32> = HashMap::from([([0; W], NOBODY)]);
    let mut missing = Vec::new();
    for bits in wanted.rows.iter().chain(family_rows(&wanted.v4)).chain(family_rows(&wanted.v6)) {
        if places.contains_key(bits) {
            continue;
        }
        match found.get(bits) {
            Some(index) => {
                used.rows.insert(*index);
                places.insert(*bits, *index);
            }
            None => {
                // The place is found when all that are there are known.
                places.insert(*bits, NOBODY);
                missing.push(bits);
            }
        }
    }
    let mut free = (1..limits.rows).filter(|index| !used.rows.contains(index));
    for bits in missing {
        let full = Full { map: MapName::Rows, wanted: places.len() - 1, in_use, limit: limits.rows };
        let index = free.next().ok_or(full)?;
        places.insert(*bits, index);
        writes.push(Write::Row(index, Box::new(*bits)));
    }
    Ok(places)
}

fn family_rows<A: Address, const W: usize>(maps: &FamilyMaps<A, W>) -> impl Iterator<Item = &Bits<W>> {
    maps.members.values().chain(maps.networks.values()).chain(maps.pairs.values())
}

/// The free runs of segments: length and beginning, shortest first.
pub(in crate::backend::ebpf) fn gaps(runs: &BTreeSet<(u32, u32)>, limit: u32) -> BTreeSet<(u32, u32)> {
    let mut gaps = BTreeSet::new();
    let mut end = 0;
    for (first, length) in runs.iter().filter(|(_, length)| *length > 0) {
        if *first > end {
            gaps.insert((first - end, end));
        }
        end = end.max(first.saturating_add(*length));
    }
    if limit > end {
        gaps.insert((limit - end, end));
    }
    gaps
}

/// Takes a run out of the shortest gap that has the room.
pub(in crate::backend::ebpf) fn take(gaps: &mut BTreeSet<(u32, u32)>, length: u32) -> Option<u32> {
    if length == 0 {
        return Some(0);
    }
    let (room, first) = *gaps.range((length, 0)..).next()?;
    gaps.remove(&(room, first));
    if room > length {
        gaps.insert((room - length, first + length));
    }
    Some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_taken_from_the_shortest_gap() {
        let mut gaps = gaps(&[(2, 3), (0, 0), (5, 1), (9, 2)].into(), 20);
        assert_eq!(gaps, [(2, 0), (3, 6), (9, 11)].into());
        assert_eq!(take(&mut gaps, 0), Some(0));
        assert_eq!(take(&mut gaps, 3), Some(6));
        assert_eq!(take(&mut gaps, 3), Some(11));
        assert_eq!(take(&mut gaps, 7), None);
        assert_eq!(take(&mut gaps, 6), Some(14));
        assert_eq!(gaps, [(2, 0)].into());
    }
}
