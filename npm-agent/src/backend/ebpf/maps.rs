//! The kernel's maps: read back, planned for, written to.

mod kernel_map;

use std::io;
use std::mem::discriminant;
use std::path::Path;

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError};
use aya::{Ebpf, Pod};
use npm_common::decide::Verdict;
use npm_common::layout::{Bits, Generation, Meaning, PairRecord, Policy, Record, Segment, V4, V6};
use npm_policy::flow::Flow;
use npm_policy::goal::Goal;

use super::grace::Grace;
use super::held::{FamilyWrite, Held, HeldFamily, Limits, Readers, Write};
use super::lower::{LowerError, OfFamily, isolated};
use super::lowering::{Lowering, Unfit};
use super::plan::{Full, Step, isolate, usage};
use crate::backend::meter::Store;
use crate::memory;
use kernel_map::{Entries, KernelMap, Plain, key};

/// The names of the maps in the object and of their pins.
pub const NAMES: [&str; 15] = [
    "GENERATION",
    "MEANINGS",
    "POLICIES",
    "SEGMENTS",
    "ROWS",
    "PLACES_V4",
    "RECORDS_V4",
    "NETWORKS_V4",
    "PAIRS_V4",
    "PAIR_RECORDS_V4",
    "PLACES_V6",
    "RECORDS_V6",
    "NETWORKS_V6",
    "PAIRS_V6",
    "PAIR_RECORDS_V6",
];

/// Why maps can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    /// The object or the directory lacks a map.
    #[error("there is no eBPF map {name}")]
    Missing {
        /// The map.
        name: &'static str,
    },
    /// A map is not as expected, or could not be read or written.
    #[error("cannot use the eBPF map {name}")]
    Map {
        /// The map.
        name: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// It could not be waited until running programs had ended.
    #[error("cannot wait for running eBPF programs")]
    Grace(#[source] io::Error),
}

/// Why a goal is not what packets are judged by. What they were judged by before, they are judged by still, or more
/// strictly: if the goal does not fit, whoever it isolates and was not isolated is denied everything.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The goal does not fit into rows of this width.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// A map is full.
    #[error(transparent)]
    Full(#[from] Full),
    /// The maps could not be read or written. The next apply reads them back and goes on from there.
    #[error(transparent)]
    Maps(#[from] MapsError),
}

impl From<Unfit> for ApplyError {
    fn from(unfit: Unfit) -> Self {
        match unfit {
            Unfit::Lower(error) => Self::Lower(error),
            Unfit::Full(full) => Self::Full(full),
        }
    }
}

/// What an apply did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Writes {
    /// Entries written or deleted.
    pub entries: usize,
    /// Times that it was waited for running programs.
    pub waits: usize,
}

/// As many writes to one map are worth a call of their own. Fewer stay single: then a test that ends the agent at any call ends
/// it between any two of them.
const LEAST_AT_ONCE: usize = 16;
/// Writes to one map that are done in one call: they are copied for it, a row of the widest 1,280 bytes long.
const MOST_AT_ONCE: usize = 512;

/// How many writes of one apply the next one may have to do again for the other half.
const MOST_LEFT_UNSETTLED: usize = 64;

/// The maps of one family.
struct OneFamily<A: OfFamily + Pod>
where
    A::Pair: Pod,
{
    places: KernelMap<HashMap<MapData, A, u32>>,
    records: KernelMap<Array<MapData, Plain<Record<A>>>>,
    networks: KernelMap<LpmTrie<MapData, A, [u32; 2]>>,
    pairs: KernelMap<HashMap<MapData, A::Pair, u32>>,
    pair_records: KernelMap<Array<MapData, Plain<PairRecord<A::Pair>>>>,
}

/// The maps of one program, with rows of `W` words.
pub struct Maps<const W: usize> {
    v4: OneFamily<V4>,
    v6: OneFamily<V6>,
    policies: KernelMap<Array<MapData, Plain<Policy>>>,
    segments: KernelMap<Array<MapData, Plain<Segment>>>,
    rows: KernelMap<Array<MapData, Bits<W>>>,
    meanings: KernelMap<Array<MapData, Meaning>>,
    generation: KernelMap<Array<MapData, Generation>>,
    held: Held<W>,
    lowering: Lowering<W>,
    /// Whether what is held is what was read or written last without an error.
    is_known: bool,
    grace: Grace,
    least_at_once: usize,
}

/// Gives maps by their names.
type Source<'a> = dyn FnMut(&'static str) -> Result<Map, MapsError> + 'a;

impl<const W: usize> Maps<W> {
    /// The maps of a loaded object, made afresh or adopted by pins, and read back.
    ///
    /// # Errors
    /// The object lacks a map, a map is not as expected, or can't be read.
    pub fn take(ebpf: &mut Ebpf) -> Result<Self, MapsError> {
        Self::of(&mut |name| ebpf.take_map(name).ok_or(MapsError::Missing { name }))
    }

    /// The maps that are pinned in a directory under their names, read back.
    ///
    /// # Errors
    /// As [`Maps::take`].
    pub fn pinned(directory: &Path) -> Result<Self, MapsError> {
        Self::of(&mut |name| {
            let found = MapData::from_pin(directory.join(name)).and_then(Map::from_map_data);
            found.map_err(|source| MapsError::Map { name, source })
        })
    }

    fn of(source: &mut Source<'_>) -> Result<Self, MapsError> {
        let mut maps = Self {
            v4: OneFamily::of(
                source,
                ["PLACES_V4", "RECORDS_V4", "NETWORKS_V4", "PAIRS_V4", "PAIR_RECORDS_V4"],
            )?,
            v6: OneFamily::of(
                source,
                ["PLACES_V6", "RECORDS_V6", "NETWORKS_V6", "PAIRS_V6", "PAIR_RECORDS_V6"],
            )?,
            policies: KernelMap::of(source, "POLICIES")?,
            segments: KernelMap::of(source, "SEGMENTS")?,
            rows: KernelMap::of(source, "ROWS")?,
            meanings: KernelMap::of(source, "MEANINGS")?,
            generation: KernelMap::of(source, "GENERATION")?,
            held: Held::default(),
            lowering: Lowering::default(),
            is_known: false,
            grace: Grace::new().map_err(MapsError::Grace)?,
            least_at_once: LEAST_AT_ONCE,
        };
        maps.read_back()?;
        Ok(maps)
    }

    /// So many writes to one map are one call from here on, where they follow each other: for tests, which write few.
    pub fn write_at_once_from(&mut self, least: usize) {
        self.least_at_once = least;
    }

    /// What the maps hold, as last read or written.
    pub fn held(&self) -> &Held<W> {
        &self.held
    }

    /// Whether nothing is known of any address: the maps were just made, or a goal that isolates nobody was applied.
    pub fn is_empty(&self) -> bool {
        let Held { v4, v6, .. } = &self.held;
        v4.places.is_empty() && v4.networks.is_empty() && v6.places.is_empty() && v6.networks.is_empty()
    }

    /// How full the maps are: with what packets use now. A change needs room for what it brings beside that.
    pub fn stores(&self) -> Vec<Store> {
        usage(&self.held, &Limits::OBJECT)
    }

    /// Makes packets be judged by a goal, with one store when all is ready for it. Writes only what differs.
    ///
    /// # Errors
    /// Packets are judged as before, or as [`ApplyError`] says; the next apply goes on from what is in the maps.
    pub fn apply(&mut self, goal: &Goal) -> Result<Writes, ApplyError> {
        if !self.is_known {
            self.read_back()?;
        }
        self.converge(goal)
    }

    /// Reads the maps back, repairs what somebody else has changed, and says what that was: one line for people each.
    ///
    /// # Errors
    /// As [`Maps::apply`].
    pub fn verify(&mut self, goal: &Goal) -> Result<(Writes, Vec<String>), ApplyError> {
        let was_known = self.is_known;
        // No more than two at a time, and one while everything is lowered: nothing else takes as much memory.
        let meant = std::mem::take(&mut self.held);
        if let Err(error) = self.read_back() {
            self.held = meant;
            return Err(error.into());
        }
        let mut drift = if was_known { self.held.differences(&meant) } else { Vec::new() };
        drop(meant);
        let (is_as_left, before) = (was_known && drift.is_empty(), self.held.generation);
        let writes = self.converge(goal)?;
        if is_as_left && self.held.generation != before {
            // What was read back is lowered as a whole.
            drift.push("the maps held what was written, and that was not what the policies mean".to_owned());
        }
        Ok((writes, drift))
    }

    /// What the maps, as last read or written, say of a flow.
    pub fn decide(&self, flow: &Flow) -> Verdict {
        self.held.decide(flow)
    }

    /// Reads everything back from the kernel.
    ///
    /// # Errors
    /// A map can't be read. What is held is not known then.
    pub fn read_back(&mut self) -> Result<(), MapsError> {
        self.is_known = false;
        self.lowering.forget();
        self.held = Held {
            generation: self.generation.one()?,
            v4: self.v4.read()?,
            v6: self.v6.read()?,
            policies: self.policies.nonzero(&Plain(Policy::default()))?.plain(),
            segments: self.segments.nonzero(&Plain(Segment::default()))?.plain(),
            rows: self.rows.nonzero(&[0; W])?,
            meanings: self.meanings.nonzero(&[0; 2])?,
            readers: Readers::Behind,
        };
        self.is_known = true;
        // Whoever wrote last may have written just now.
        self.grace.begin();
        Ok(())
    }

    fn converge(&mut self, goal: &Goal) -> Result<Writes, ApplyError> {
        let was_kept = self.lowering.is_kept();
        if !was_kept {
            // To lower everything takes more memory than anything else, and it often comes after a list.
            memory::give_back();
        }
        let steps = match self.lowering.steps(&self.held, goal, &Limits::OBJECT) {
            Ok(steps) => steps,
            Err(does_not_fit) => {
                let steps = isolate(&self.held, &isolated(goal), &Limits::OBJECT)?;
                self.perform(&steps)?;
                return Err(does_not_fit.into());
            }
        };
        let mut writes = self.perform(&steps)?;
        // There may be tens of thousands, and more are to come.
        drop(steps);
        self.lowering.done(&self.held, goal, &Limits::OBJECT);
        // What packets are judged by is in its place. After much of a change the other half follows at once, or the
        // next change, however small, would have to write it all.
        if writes.entries > MOST_LEFT_UNSETTLED {
            let steps = self.lowering.settle(&self.held, &Limits::OBJECT);
            let settled = self.perform(&steps)?;
            writes.entries += settled.entries;
            writes.waits += settled.waits;
        }
        if !was_kept {
            memory::give_back();
        }
        Ok(writes)
    }

    fn perform(&mut self, steps: &[Step<W>]) -> Result<Writes, MapsError> {
        let mut writes = Writes::default();
        self.is_known = false;
        let is_same_map = |one: &Step<W>, next: &Step<W>| {
            let (Step::Write(one), Step::Write(next)) = (one, next) else { return false };
            let is_kind = discriminant(one) == discriminant(next);
            is_kind
                && match (one, next) {
                    (Write::V4(one), Write::V4(next)) => discriminant(one) == discriminant(next),
                    (Write::V6(one), Write::V6(next)) => discriminant(one) == discriminant(next),
                    _ => true,
                }
        };
        // In their order, whatever is done at once.
        for some in steps.chunk_by(is_same_map).flat_map(|alike| alike.chunks(MOST_AT_ONCE)) {
            match some {
                [Step::Grace] => {
                    self.grace.wait().map_err(MapsError::Grace)?;
                    self.held.readers = Readers::Current;
                    writes.waits += 1;
                }
                some => {
                    let some: Vec<&Write<W>> = some.iter().filter_map(Step::write).collect();
                    if some.len() < self.least_at_once {
                        for write in &some {
                            self.write(write)?;
                            self.held.write(write);
                        }
                    } else {
                        self.write_all(&some)?;
                        some.iter().for_each(|write| self.held.write(write));
                    }
                    writes.entries += some.len();
                }
            }
        }
        self.is_known = true;
        if !steps.is_empty() {
            self.grace.begin();
        }
        Ok(writes)
    }

    fn write(&mut self, write: &Write<W>) -> Result<(), MapsError> {
        match write {
            Write::Row(index, bits) => self.rows.set(*index, **bits),
            Write::Segment(index, segment) => self.segments.set(*index, Plain(*segment)),
            Write::Policy(id, policy) => self.policies.set(*id, Plain(*policy)),
            Write::Meaning(bit, meaning) => self.meanings.set(*bit, *meaning),
            Write::V4(write) => self.v4.write(write),
            Write::V6(write) => self.v6.write(write),
            Write::Generation(generation) => {
                self.publish()?;
                self.generation.set(0, *generation)
            }
        }
    }

    /// The same for several of one kind, in one call to the kernel.
    fn write_all(&mut self, writes: &[&Write<W>]) -> Result<(), MapsError> {
        macro_rules! all {
            ($($pattern:pat => $element:expr),+) => {
                writes.iter().filter_map(|write| match write { $($pattern => Some($element),)+ _ => None }).collect::<Vec<_>>()
            };
        }
        match writes.first() {
            Some(Write::Row(..)) => self.rows.set_all(&all!(Write::Row(index, bits) => (*index, **bits))),
            Some(Write::Segment(..)) => {
                self.segments.set_all(&all!(Write::Segment(index, segment) => (*index, Plain(*segment))))
            }
            Some(Write::Policy(..)) => {
                self.policies.set_all(&all!(Write::Policy(id, policy) => (*id, Plain(*policy))))
            }
            Some(Write::Meaning(..)) => {
                self.meanings.set_all(&all!(Write::Meaning(bit, meaning) => (*bit, *meaning)))
            }
            Some(Write::V4(_)) => self.v4.write_all(&all!(Write::V4(write) => write)),
            Some(Write::V6(_)) => self.v6.write_all(&all!(Write::V6(write) => write)),
            // Nothing is seen before this one, and there are no two of it.
            Some(Write::Generation(_)) | None => writes.iter().try_for_each(|write| self.write(write)),
        }
    }

    /// Makes all writes be seen by whoever sees the next one. Where loads may be done out of order, a program could have
    /// read an entry before and the generation after: there it takes a grace period (x86: no load passes an older one).
    fn publish(&mut self) -> Result<(), MapsError> {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if cfg!(not(target_arch = "x86_64")) {
            self.grace.begin();
            self.grace.wait().map_err(MapsError::Grace)?;
        }
        Ok(())
    }
}

impl<A: OfFamily + Pod> OneFamily<A>
where
    A::Pair: Pod,
{
    fn of(source: &mut Source<'_>, names: [&'static str; 5]) -> Result<Self, MapsError> {
        let [places, records, networks, pairs, pair_records] = names;
        Ok(Self {
            places: KernelMap::of(source, places)?,
            records: KernelMap::of(source, records)?,
            networks: KernelMap::of(source, networks)?,
            pairs: KernelMap::of(source, pairs)?,
            pair_records: KernelMap::of(source, pair_records)?,
        })
    }

    fn read(&self) -> Result<HeldFamily<A>, MapsError> {
        let places = self.places.entries()?;
        let pairs = self.pairs.entries()?;
        Ok(HeldFamily {
            // Of the records, those that something leads to.
            records: self.records.at(places.values(), &Plain(Record::default()))?.plain(),
            networks: self.networks.entries()?,
            pair_records: self.pair_records.at(pairs.values(), &Plain(PairRecord::default()))?.plain(),
            places,
            pairs,
        })
    }

    fn write(&mut self, write: &FamilyWrite<A>) -> Result<(), MapsError> {
        match write {
            FamilyWrite::Record(place, record) => self.records.set(*place, Plain(*record)),
            FamilyWrite::Place(address, place) => self.places.insert(address, place),
            FamilyWrite::Unplace(address) => self.places.delete(address),
            FamilyWrite::Network(prefix, rows) => self.networks.insert(prefix, rows),
            FamilyWrite::DropNetwork(prefix) => self.networks.delete(prefix),
            FamilyWrite::PairRecord(place, record) => self.pair_records.set(*place, Plain(*record)),
            FamilyWrite::PairPlace(pair, place) => self.pairs.insert(pair, place),
            FamilyWrite::PairUnplace(pair) => self.pairs.delete(pair),
        }
    }

    /// The same for several of one kind, in one call to the kernel.
    fn write_all(&mut self, writes: &[&FamilyWrite<A>]) -> Result<(), MapsError> {
        macro_rules! all {
            ($pattern:pat => $element:expr) => {
                writes
                    .iter()
                    .filter_map(|write| match write {
                        $pattern => Some($element),
                        _ => None,
                    })
                    .collect::<Vec<_>>()
            };
        }
        match writes.first() {
            Some(FamilyWrite::Record(..)) => {
                self.records.set_all(&all!(FamilyWrite::Record(place, record) => (*place, Plain(*record))))
            }
            Some(FamilyWrite::Place(..)) => {
                self.places.insert_all(&all!(FamilyWrite::Place(address, place) => (*address, *place)))
            }
            Some(FamilyWrite::Unplace(_)) => {
                self.places.delete_all(&all!(FamilyWrite::Unplace(address) => *address))
            }
            Some(FamilyWrite::Network(..)) => {
                self.networks.insert_all(&all!(FamilyWrite::Network(prefix, rows) => (key(prefix), *rows)))
            }
            Some(FamilyWrite::DropNetwork(_)) => {
                self.networks.delete_all(&all!(FamilyWrite::DropNetwork(prefix) => key(prefix)))
            }
            Some(FamilyWrite::PairRecord(..)) => self
                .pair_records
                .set_all(&all!(FamilyWrite::PairRecord(place, record) => (*place, Plain(*record)))),
            Some(FamilyWrite::PairPlace(..)) => {
                self.pairs.insert_all(&all!(FamilyWrite::PairPlace(pair, place) => (*pair, *place)))
            }
            Some(FamilyWrite::PairUnplace(_)) => {
                self.pairs.delete_all(&all!(FamilyWrite::PairUnplace(pair) => *pair))
            }
            None => Ok(()),
        }
    }
}
