//! What the kernel's maps hold, as data: written to like the maps themselves, and asked like them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::IpAddr;

use npm_common::decide::{self, Lookups, Verdict};
use npm_common::layout::{
    Address, Bits, Generation, MAX_NETWORKS, MAX_PAIRS, MAX_POLICIES, MAX_RECORDS, MAX_ROWS, MAX_SEGMENTS,
    Meaning, PairRecord, Policy, Record, Segment, V4, V6, half_of,
};
use npm_policy::flow::{Flow, Transport};

use super::lower::{Numbers, OfFamily, Prefix, longest};

/// What the maps hold. Entries of arrays that are zero are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held<const W: usize> {
    /// Which halves packets use.
    pub generation: Generation,
    /// IPv4's maps.
    pub v4: HeldFamily<V4>,
    /// IPv6's maps.
    pub v6: HeldFamily<V6>,
    /// By id.
    pub policies: BTreeMap<u32, Policy>,
    /// By index.
    pub segments: BTreeMap<u32, Segment>,
    /// By index.
    pub rows: BTreeMap<u32, Bits<W>>,
    /// By bit.
    pub meanings: BTreeMap<u32, Meaning>,
    /// What programs that run now may have read.
    pub readers: Readers,
}

/// What programs that run now may have read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Readers {
    /// The generation, or places, of before the last writes.
    #[default]
    Behind,
    /// What the maps hold: a grace period has passed since.
    Current,
}

/// What the maps of one family hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldFamily<A: Address> {
    /// Where addresses' records are.
    pub places: BTreeMap<A, u32>,
    /// By place.
    pub records: BTreeMap<u32, Record<A>>,
    /// Rows by generation.
    pub networks: BTreeMap<Prefix<A>, [u32; 2]>,
    /// Where pairs' records are.
    pub pairs: BTreeMap<A::Pair, u32>,
    /// By place.
    pub pair_records: BTreeMap<u32, PairRecord<A::Pair>>,
}

impl<A: Address> Default for HeldFamily<A> {
    fn default() -> Self {
        Self {
            places: BTreeMap::new(),
            records: BTreeMap::new(),
            networks: BTreeMap::new(),
            pairs: BTreeMap::new(),
            pair_records: BTreeMap::new(),
        }
    }
}

/// One write to one entry: atomic for packets, as far as they may see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write<const W: usize> {
    /// A row that no half in use leads to.
    Row(u32, Box<Bits<W>>),
    /// A segment that no half in use leads to.
    Segment(u32, Segment),
    /// A policy that no half in use leads to.
    Policy(u32, Policy),
    /// What a bit means.
    Meaning(u32, Meaning),
    /// To a map of IPv4.
    V4(FamilyWrite<V4>),
    /// To a map of IPv6.
    V6(FamilyWrite<V6>),
    /// The switch: from here on packets use the other halves.
    Generation(Generation),
}

/// A write to a map of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FamilyWrite<A: Address> {
    /// What a place holds. If an address leads there, then the half in use is as it was.
    Record(u32, Record<A>),
    /// An address leads to its record.
    Place(A, u32),
    /// An address leads nowhere. Nothing was known of it.
    Unplace(A),
    /// The rows of a prefix. In the half in use it says what was said before of its addresses.
    Network(Prefix<A>, [u32; 2]),
    /// A prefix goes that says what the next shorter one says.
    DropNetwork(Prefix<A>),
    /// What a pair's place holds.
    PairRecord(u32, PairRecord<A::Pair>),
    /// A pair leads to its record.
    PairPlace(A::Pair, u32),
    /// A pair leads nowhere. It had no row.
    PairUnplace(A::Pair),
}

/// How many entries the maps take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Addresses of pods, for each family.
    pub records: u32,
    /// Prefixes, for each family.
    pub networks: u32,
    /// Named ports of peers, for each family.
    pub pairs: u32,
    /// Policies, the first being nobody's.
    pub policies: u32,
    /// Segments.
    pub segments: u32,
    /// Rows, the first being nobody's.
    pub rows: u32,
}

impl Limits {
    /// Those of the object's maps.
    pub const OBJECT: Self = Self {
        records: MAX_RECORDS,
        networks: MAX_NETWORKS,
        pairs: MAX_PAIRS,
        policies: MAX_POLICIES,
        segments: MAX_SEGMENTS,
        rows: MAX_ROWS,
    };
}

/// Writes to an array's entry: zero is nothing.
fn store<V: PartialEq>(entries: &mut BTreeMap<u32, V>, index: u32, value: V, zero: &V) {
    if value == *zero {
        entries.remove(&index);
    } else {
        entries.insert(index, value);
    }
}

impl<const W: usize> Default for Held<W> {
    /// Maps just made: nobody is isolated.
    fn default() -> Self {
        Self {
            generation: 0,
            v4: HeldFamily::default(),
            v6: HeldFamily::default(),
            policies: BTreeMap::new(),
            segments: BTreeMap::new(),
            rows: BTreeMap::new(),
            meanings: BTreeMap::new(),
            readers: Readers::default(),
        }
    }
}

impl<const W: usize> Held<W> {
    /// Does to the data what a write does to the maps.
    pub fn write(&mut self, write: &Write<W>) {
        match write {
            Write::Row(index, bits) => store(&mut self.rows, *index, **bits, &[0; W]),
            Write::Segment(index, segment) => {
                store(&mut self.segments, *index, *segment, &Segment::default());
            }
            Write::Policy(id, policy) => store(&mut self.policies, *id, *policy, &Policy::default()),
            Write::Meaning(bit, meaning) => store(&mut self.meanings, *bit, *meaning, &[0; 2]),
            Write::V4(write) => self.v4.write(write, &mut self.readers),
            Write::V6(write) => self.v6.write(write, &mut self.readers),
            Write::Generation(generation) => {
                self.generation = *generation;
                self.readers = Readers::Behind;
            }
        }
    }

    /// What differs from what was meant to be held: one line for people each.
    pub fn differences(&self, meant: &Self) -> Vec<String> {
        let Self { generation, v4, v6, policies, segments, rows, meanings, readers: _ } = self;
        let mut lines = Vec::new();
        if *generation != meant.generation {
            lines.push(format!("generation: {generation} instead of {}", meant.generation));
        }
        differences(&mut lines, "policies", policies, &meant.policies);
        differences(&mut lines, "segments", segments, &meant.segments);
        differences(&mut lines, "rows", rows, &meant.rows);
        differences(&mut lines, "meanings", meanings, &meant.meanings);
        v4.differences(&mut lines, "IPv4", &meant.v4);
        v6.differences(&mut lines, "IPv6", &meant.v6);
        lines
    }

    /// The half that packets use.
    pub fn half(&self) -> usize {
        half_of(self.generation)
    }

    /// The numbers that are in use.
    pub fn numbers(&self) -> Numbers {
        let mut pods = BTreeMap::new();
        self.v4.pods(self.half(), &mut pods);
        self.v6.pods(self.half(), &mut pods);
        Numbers { bits: self.numbers_of_bits(), pods }
    }

    /// The numbers of bits, by their fingerprints.
    pub(super) fn numbers_of_bits(&self) -> BTreeMap<u128, usize> {
        let bit = |(bit, [high, low]): (&u32, &Meaning)| {
            let fingerprint = u128::from(*high) << 64 | u128::from(*low);
            Some((fingerprint, usize::try_from(*bit).ok()?))
        };
        self.meanings.iter().filter_map(bit).collect()
    }

    /// What the maps say of a flow: the kernel's own function, in user space. An end that is no isolated pod of this
    /// node is not isolated here.
    pub fn decide(&self, flow: &Flow) -> Verdict {
        match (flow.source, flow.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.judge(&self.v4, source.octets(), destination.octets(), flow.transport)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.judge(&self.v6, source.octets(), destination.octets(), flow.transport)
            }
            // No packet is of two families.
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Verdict::default(),
        }
    }

    fn judge<A: Address>(
        &self,
        family: &HeldFamily<A>,
        source: A,
        destination: A,
        transport: Transport,
    ) -> Verdict {
        let port = match transport {
            Transport::Port(protocol, port) => Some((protocol.number(), port)),
            Transport::Portless(_) => None,
        };
        decide::decide(&View { family, shared: self }, &decide::Flow { source, destination, port })
    }
}

/// How many entries of one map are told apart in words.
const TOLD: usize = 3;

fn differences<K: Ord + Debug, V: PartialEq>(
    lines: &mut Vec<String>,
    map: &str,
    found: &BTreeMap<K, V>,
    meant: &BTreeMap<K, V>,
) {
    let keys: BTreeSet<&K> = found.keys().chain(meant.keys()).collect();
    let differing: Vec<&K> = keys.into_iter().filter(|key| found.get(key) != meant.get(key)).collect();
    for key in differing.iter().take(TOLD) {
        let what = match (found.contains_key(key), meant.contains_key(key)) {
            (true, true) => "changed",
            (true, false) => "added",
            (false, _) => "gone",
        };
        lines.push(format!("{map}: {key:?} {what}"));
    }
    if differing.len() > TOLD {
        lines.push(format!("{map}: {} more", differing.len() - TOLD));
    }
}

impl<A: Address> HeldFamily<A> {
    fn differences(&self, lines: &mut Vec<String>, family: &str, meant: &Self) {
        let Self { places, records, networks, pairs, pair_records } = self;
        let name = |map: &str| format!("{family} {map}");
        differences(lines, &name("places"), places, &meant.places);
        // Records that nothing leads to are not read back.
        let led = |held: &Self| -> BTreeMap<u32, Record<A>> {
            held.places.keys().filter_map(|key| held.record(key)).map(|(place, it)| (place, *it)).collect()
        };
        differences(lines, &name("records"), records, &led(meant));
        differences(lines, &name("networks"), networks, &meant.networks);
        differences(lines, &name("pairs"), pairs, &meant.pairs);
        let led = |held: &Self| -> BTreeMap<u32, PairRecord<A::Pair>> {
            held.pairs
                .keys()
                .filter_map(|key| held.pair_record(key))
                .map(|(place, it)| (place, *it))
                .collect()
        };
        differences(lines, &name("pair records"), pair_records, &led(meant));
    }

    fn write(&mut self, write: &FamilyWrite<A>, readers: &mut Readers) {
        match write {
            FamilyWrite::Record(place, record) => drop(self.records.insert(*place, *record)),
            FamilyWrite::Place(address, place) => {
                // Whoever had the address's place before may read there still.
                if self.places.insert(*address, *place).is_some() {
                    *readers = Readers::Behind;
                }
            }
            FamilyWrite::Unplace(address) => {
                self.places.remove(address);
                *readers = Readers::Behind;
            }
            FamilyWrite::Network(prefix, rows) => drop(self.networks.insert(*prefix, *rows)),
            FamilyWrite::DropNetwork(prefix) => drop(self.networks.remove(prefix)),
            FamilyWrite::PairRecord(place, record) => drop(self.pair_records.insert(*place, *record)),
            FamilyWrite::PairPlace(pair, place) => {
                if self.pairs.insert(*pair, *place).is_some() {
                    *readers = Readers::Behind;
                }
            }
            FamilyWrite::PairUnplace(pair) => {
                self.pairs.remove(pair);
                *readers = Readers::Behind;
            }
        }
    }

    /// The record that an address leads to, if it is the address's.
    pub fn record(&self, address: &A) -> Option<(u32, &Record<A>)> {
        let place = *self.places.get(address)?;
        let record = self.records.get(&place).filter(|record| record.address == *address)?;
        Some((place, record))
    }

    /// The record that a pair leads to, if it is the pair's.
    pub fn pair_record(&self, pair: &A::Pair) -> Option<(u32, &PairRecord<A::Pair>)> {
        let place = *self.pairs.get(pair)?;
        let record = self.pair_records.get(&place).filter(|record| record.pair == *pair)?;
        Some((place, record))
    }
}

impl<A: OfFamily> HeldFamily<A> {
    fn pods(&self, half: usize, pods: &mut BTreeMap<IpAddr, u32>) {
        for address in self.places.keys() {
            if let Some((_, record)) = self.record(address)
                && record.halves[half].pod != 0
            {
                pods.insert(address.ip(), record.halves[half].pod);
            }
        }
    }
}

/// One family's maps and those that both share.
struct View<'a, A: Address, const W: usize> {
    family: &'a HeldFamily<A>,
    shared: &'a Held<W>,
}

impl<'a, A: Address, const W: usize> Lookups<A, W> for View<'a, A, W> {
    type Row = &'a Bits<W>;

    fn generation(&self) -> Generation {
        self.shared.generation
    }

    fn place(&self, address: &A) -> Option<u32> {
        self.family.places.get(address).copied()
    }

    fn record(&self, place: u32) -> Option<Record<A>> {
        self.family.records.get(&place).copied()
    }

    fn network(&self, address: &A) -> Option<[u32; 2]> {
        longest(&self.family.networks, *address, A::BITS).map(|(_, rows)| *rows)
    }

    fn pair_place(&self, pair: &A::Pair) -> Option<u32> {
        self.family.pairs.get(pair).copied()
    }

    fn pair_record(&self, place: u32) -> Option<PairRecord<A::Pair>> {
        self.family.pair_records.get(&place).copied()
    }

    fn policy(&self, id: u32) -> Option<Policy> {
        Some(self.shared.policies.get(&id).copied().unwrap_or_default())
    }

    fn row(&self, index: u32) -> Option<&'a Bits<W>> {
        Some(self.shared.rows.get(&index).unwrap_or(&[0; W]))
    }

    fn row_at(&self, policy: &Policy, position: u32) -> u32 {
        let segment = |index: u32| Some(self.shared.segments.get(&index).copied().unwrap_or_default());
        decide::row_at(segment, policy, position)
    }

    fn meet(&self, row: &Bits<W>, bits: &Bits<W>) -> bool {
        decide::meet(row, bits)
    }
}
