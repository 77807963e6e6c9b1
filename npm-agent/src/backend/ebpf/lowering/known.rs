//! The entries of one family's addresses: what becomes of them, and which halves that packets do not use are behind.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use npm_common::layout::{Address, Known, NO_POD, NOBODY, NOT_ISOLATED, PairRecord, Record, set_bit};
use npm_policy::goal::{Goal, Program};

use super::difference::OfAddresses;
use super::index::{Content, Meanings};
use crate::backend::ebpf::held::{FamilyWrite, Held, HeldFamily, Limits};
use crate::backend::ebpf::lower::{Direction, OfFamily, Prefix, join, longest, union};
use crate::backend::ebpf::plan::family::halves;

/// What the steps of a family are found by.
pub(super) struct Part<'a, const W: usize> {
    pub(super) held: &'a Held<W>,
    pub(super) goal: &'a Goal,
    pub(super) meanings: &'a Meanings<W>,
}

/// What is kept of a family.
#[derive(Debug)]
pub(super) struct KeptFamily<A: Address> {
    free_places: VecDeque<u32>,
    free_pair_places: VecDeque<u32>,
    /// Whose two halves differ.
    behind: BTreeSet<A>,
    networks_behind: Vec<Prefix<A>>,
    pairs_behind: BTreeSet<A::Pair>,
}

/// What is to be done, as in a plan for everything.
pub(super) struct FamilySteps<A: Address> {
    pub(super) sweep: Vec<FamilyWrite<A>>,
    pub(super) fill: Vec<FamilyWrite<A>>,
}

/// What packets are to be told otherwise than now.
pub(super) struct Changed<A: Address> {
    known: BTreeMap<A, Known>,
    pairs: BTreeMap<A::Pair, u32>,
}

impl<A: OfFamily> Changed<A> {
    /// `None`: it can't be told by what is kept, or there is no room.
    pub(super) fn of<const W: usize>(
        part: &Part<'_, W>,
        held: &HeldFamily<A>,
        differs: &OfAddresses<A>,
        content: &mut Content<W>,
    ) -> Option<Self> {
        Some(Self {
            known: known(part, held, differs, content)?,
            pairs: pairs(part, held, differs, content)?,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty() && self.pairs.is_empty()
    }
}

impl<A: OfFamily> KeptFamily<A> {
    /// `None`: an address or a pair leads to what is another's.
    pub(super) fn of(held: &HeldFamily<A>, half: usize, limits: &Limits) -> Option<Self> {
        let mut behind = BTreeSet::new();
        for address in held.places.keys() {
            let [even, odd] = held.record(address)?.1.halves;
            if even != odd || even == Known::NOTHING {
                behind.insert(*address);
            }
        }
        let mut pairs_behind = BTreeSet::new();
        for pair in held.pairs.keys() {
            let [even, odd] = held.pair_record(pair)?.1.rows;
            if even != odd || even == NOBODY {
                pairs_behind.insert(*pair);
            }
        }
        let differs =
            |(prefix, rows): (&Prefix<A>, &[u32; 2])| (rows[half] != rows[1 - half]).then_some(*prefix);
        let taken: BTreeSet<u32> = held.places.values().copied().collect();
        let taken_by_pairs: BTreeSet<u32> = held.pairs.values().copied().collect();
        Some(Self {
            free_places: (0..limits.records).filter(|place| !taken.contains(place)).collect(),
            free_pair_places: (0..limits.pairs).filter(|place| !taken_by_pairs.contains(place)).collect(),
            behind,
            networks_behind: held.networks.iter().filter_map(differs).collect(),
            pairs_behind,
        })
    }

    /// Both halves are the same, by steps that were found otherwise.
    pub(super) fn settled(&mut self) {
        self.behind.clear();
        self.networks_behind.clear();
        self.pairs_behind.clear();
    }

    /// The steps that make both halves what packets use.
    pub(super) fn settle(&mut self, held: &HeldFamily<A>, half: usize) -> FamilySteps<A> {
        let mut steps = FamilySteps { sweep: Vec::new(), fill: Vec::new() };
        self.records_behind(held, half, &BTreeMap::new(), &mut steps);
        self.networks_behind(held, half, &mut steps);
        self.pairs_behind(held, half, &BTreeMap::new(), &mut steps);
        steps
    }

    /// The steps of a switch: besides what changes, what is behind has to be brought up to what packets use.
    /// `None`: there is no room.
    pub(super) fn steps(
        &mut self,
        held: &HeldFamily<A>,
        half: usize,
        Changed { known, pairs }: Changed<A>,
    ) -> Option<FamilySteps<A>> {
        let mut steps = FamilySteps { sweep: Vec::new(), fill: Vec::new() };
        self.records_behind(held, half, &known, &mut steps);
        self.records(held, half, known, &mut steps.fill)?;
        self.networks_behind(held, half, &mut steps);
        self.pairs_behind(held, half, &pairs, &mut steps);
        self.pair_records(held, half, pairs, &mut steps.fill)?;
        Some(steps)
    }

    fn networks_behind(&mut self, held: &HeldFamily<A>, half: usize, steps: &mut FamilySteps<A>) {
        for prefix in std::mem::take(&mut self.networks_behind) {
            if let Some(rows) = held.networks.get(&prefix) {
                steps.fill.push(FamilyWrite::Network(prefix, [rows[half]; 2]));
            }
        }
    }

    fn records_behind(
        &mut self,
        held: &HeldFamily<A>,
        half: usize,
        changed: &BTreeMap<A, Known>,
        FamilySteps { sweep, fill }: &mut FamilySteps<A>,
    ) {
        let mut behind = std::mem::take(&mut self.behind);
        behind.retain(|address| !changed.contains_key(address));
        for address in behind {
            let Some((place, record)) = held.record(&address) else { continue };
            let now = record.halves[half];
            if now == Known::NOTHING {
                sweep.push(FamilyWrite::Unplace(address));
                self.free_places.push_back(place);
            } else if record.halves != [now; 2] {
                fill.push(FamilyWrite::Record(place, Record { address, halves: [now; 2] }));
            }
        }
    }

    fn records(
        &mut self,
        held: &HeldFamily<A>,
        half: usize,
        changed: BTreeMap<A, Known>,
        fill: &mut Vec<FamilyWrite<A>>,
    ) -> Option<()> {
        for (address, then) in changed {
            match held.record(&address) {
                Some((place, record)) => {
                    let halves = halves(half, record.halves[half], then);
                    fill.push(FamilyWrite::Record(place, Record { address, halves }));
                }
                None => {
                    let place = self.free_places.pop_front()?;
                    let halves = halves(half, Known::NOTHING, then);
                    fill.push(FamilyWrite::Record(place, Record { address, halves }));
                    fill.push(FamilyWrite::Place(address, place));
                }
            }
            self.behind.insert(address);
        }
        Some(())
    }

    fn pairs_behind(
        &mut self,
        held: &HeldFamily<A>,
        half: usize,
        changed: &BTreeMap<A::Pair, u32>,
        FamilySteps { sweep, fill }: &mut FamilySteps<A>,
    ) {
        let mut behind = std::mem::take(&mut self.pairs_behind);
        behind.retain(|pair| !changed.contains_key(pair));
        for pair in behind {
            let Some((place, record)) = held.pair_record(&pair) else { continue };
            let now = record.rows[half];
            if now == NOBODY {
                sweep.push(FamilyWrite::PairUnplace(pair));
                self.free_pair_places.push_back(place);
            } else if record.rows != [now; 2] {
                fill.push(FamilyWrite::PairRecord(place, PairRecord { pair, rows: [now; 2] }));
            }
        }
    }

    fn pair_records(
        &mut self,
        held: &HeldFamily<A>,
        half: usize,
        changed: BTreeMap<A::Pair, u32>,
        fill: &mut Vec<FamilyWrite<A>>,
    ) -> Option<()> {
        for (pair, then) in changed {
            match held.pair_record(&pair) {
                Some((place, record)) => {
                    let rows = halves(half, record.rows[half], then);
                    fill.push(FamilyWrite::PairRecord(place, PairRecord { pair, rows }));
                }
                None => {
                    let place = self.free_pair_places.pop_front()?;
                    let rows = halves(half, NOBODY, then);
                    fill.push(FamilyWrite::PairRecord(place, PairRecord { pair, rows }));
                    fill.push(FamilyWrite::PairPlace(pair, place));
                }
            }
            self.pairs_behind.insert(pair);
        }
        Some(())
    }
}

/// What is to be known of addresses otherwise than now.
fn known<A: OfFamily, const W: usize>(
    part: &Part<'_, W>,
    held: &HeldFamily<A>,
    differs: &OfAddresses<A>,
    content: &mut Content<W>,
) -> Option<BTreeMap<A, Known>> {
    let half = part.held.half();
    let addresses: BTreeSet<&A> = differs.bits.keys().chain(&differs.subjects).collect();
    let mut changed = BTreeMap::new();
    for address in addresses {
        let now = match held.places.get(address) {
            Some(_) => held.record(address)?.1.halves[half],
            None => Known::NOTHING,
        };
        let mut then = now;
        if let Some(bits) = differs.bits.get(address) {
            then.row = row(part, held, *address, now.row, bits, content)?;
        }
        if differs.subjects.contains(address) {
            then.pod = differs.pods.get(address).copied().unwrap_or(now.pod);
            (then.ingress, then.egress) = policies(part, *address, then.pod, content)?;
        }
        if then != now {
            changed.insert(*address, then);
        }
    }
    Some(changed)
}

/// The row of an address that has entered or left expressions.
fn row<A: OfFamily, const W: usize>(
    Part { held: all, goal: _, meanings }: &Part<'_, W>,
    held: &HeldFamily<A>,
    address: A,
    now: u32,
    bits: &[(usize, bool)],
    content: &mut Content<W>,
) -> Option<u32> {
    let of = |index: u32| all.rows.get(&index).copied().unwrap_or([0; W]);
    let mut row = of(now);
    for (word, own) in row.iter_mut().zip(&meanings.of_expressions) {
        *word &= own;
    }
    for (bit, is_there) in bits {
        if *is_there {
            set_bit(&mut row, *bit);
        } else if let Some(word) = row.get_mut(bit / 64) {
            *word &= !(1 << (bit % 64));
        }
    }
    // Whoever is in no expression is asked for in the networks, like any other address.
    if row == [0; W] {
        return Some(NOBODY);
    }
    if let Some((_, rows)) = longest(&held.networks, address, A::BITS) {
        join(&mut row, &of(rows[all.half()]));
    }
    content.row(&row)
}

/// The policies of a subject.
fn policies<A: OfFamily, const W: usize>(
    Part { held: _, goal, meanings }: &Part<'_, W>,
    address: A,
    pod: u32,
    content: &mut Content<W>,
) -> Option<(u32, u32)> {
    let ip = address.ip();
    let programs = goal.programs.values().filter(|program| goal.contains(&program.subjects, ip));
    let programs: Vec<&Program> = programs.map(|program| &**program).collect();
    // An address that is selected and nobody's would be a pod by itself.
    if pod == NO_POD && !programs.is_empty() {
        return None;
    }
    let mut id = |direction| match union(goal, &meanings.peers, ip, &programs, direction) {
        Some(union) => content.policy(&meanings.peers, &union),
        None => Some(NOT_ISOLATED),
    };
    Some((id(Direction::Ingress)?, id(Direction::Egress)?))
}

/// The rows that pairs are to have otherwise than now.
fn pairs<A: OfFamily, const W: usize>(
    Part { held: all, goal, meanings }: &Part<'_, W>,
    held: &HeldFamily<A>,
    differs: &OfAddresses<A>,
    content: &mut Content<W>,
) -> Option<BTreeMap<A::Pair, u32>> {
    let half = all.half();
    let mut changed = BTreeMap::new();
    for address in &differs.pairs {
        let wanted = meanings.pairs_at(goal, *address);
        let of_address = address.pair(0, 0)..=address.pair(u8::MAX, u16::MAX);
        let there = held.pairs.range(of_address).map(|(pair, _)| *pair);
        let all: BTreeSet<A::Pair> = there.chain(wanted.keys().copied()).collect();
        for pair in all {
            let now = match held.pairs.get(&pair) {
                Some(_) => held.pair_record(&pair)?.1.rows[half],
                None => NOBODY,
            };
            let then = match wanted.get(&pair) {
                Some(bits) => content.row(bits)?,
                None => NOBODY,
            };
            if then != now {
                changed.insert(pair, then);
            }
        }
    }
    Some(changed)
}
