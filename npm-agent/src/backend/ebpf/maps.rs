//! The kernel's maps, filled: only what differs is written.

use std::collections::BTreeMap;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use aya::{Ebpf, Pod};
use npm_common::layout::{Bits, V4, V6, WORDS};

use super::kernel::KernelError;
use super::lower::{FamilyMaps, Lowered, OfFamily, Prefix};

type Row = Bits<WORDS>;
/// An endpoint, a policy or a segment.
type Words = [u32; 4];

/// A map that can be written to.
trait Write<K, V> {
    fn insert(&mut self, key: &K, value: &V) -> Result<(), MapError>;
    fn delete(&mut self, key: &K) -> Result<(), MapError>;
}

impl<K: Pod, V: Pod> Write<K, V> for HashMap<MapData, K, V> {
    fn insert(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        HashMap::insert(self, key, value, 0)
    }

    fn delete(&mut self, key: &K) -> Result<(), MapError> {
        self.remove(key)
    }
}

impl<A: Pod, V: Pod> Write<Prefix<A>, V> for LpmTrie<MapData, A, V> {
    fn insert(&mut self, key: &Prefix<A>, value: &V) -> Result<(), MapError> {
        LpmTrie::insert(self, &Key::new(key.length, key.address), value, 0)
    }

    fn delete(&mut self, key: &Prefix<A>) -> Result<(), MapError> {
        self.remove(&Key::new(key.length, key.address))
    }
}

impl<V: Pod + Default> Write<u32, V> for Array<MapData, V> {
    fn insert(&mut self, key: &u32, value: &V) -> Result<(), MapError> {
        self.set(*key, value, 0)
    }

    /// Entries of arrays are always there.
    fn delete(&mut self, key: &u32) -> Result<(), MapError> {
        self.set(*key, V::default(), 0)
    }
}

/// A map of the kernel, and what is in it: nobody else writes it.
struct Mirrored<M, K, V> {
    name: &'static str,
    map: M,
    held: BTreeMap<K, V>,
}

impl<M: Write<K, V> + TryFrom<Map, Error = MapError>, K: Ord + Copy, V: PartialEq + Copy> Mirrored<M, K, V> {
    fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, KernelError> {
        let map = ebpf.take_map(name).ok_or(KernelError::Missing { name })?;
        let map = M::try_from(map).map_err(|source| KernelError::Map { name, source })?;
        Ok(Self { name, map, held: BTreeMap::new() })
    }

    /// Makes the map hold these entries and no others; gives the number of writes. What was written before an error is
    /// known.
    fn converge(&mut self, wanted: &BTreeMap<K, V>) -> Result<usize, KernelError> {
        let name = self.name;
        let failed = |source| KernelError::Map { name, source };
        let gone: Vec<K> = self.held.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        let mut writes = gone.len();
        // Deletions first: what is wanted may need the room.
        for key in gone {
            self.map.delete(&key).map_err(failed)?;
            self.held.remove(&key);
        }
        for (key, value) in wanted {
            if self.held.get(key) != Some(value) {
                self.map.insert(key, value).map_err(failed)?;
                self.held.insert(*key, *value);
                writes += 1;
            }
        }
        Ok(writes)
    }
}

/// One family's maps.
struct OneFamily<A: OfFamily + Pod>
where
    A::Pair: Pod,
{
    endpoints: Mirrored<HashMap<MapData, A, Words>, A, Words>,
    members: Mirrored<HashMap<MapData, A, Row>, A, Row>,
    networks: Mirrored<LpmTrie<MapData, A, Row>, Prefix<A>, Row>,
    pairs: Mirrored<HashMap<MapData, A::Pair, Row>, A::Pair, Row>,
}

impl<A: OfFamily + Pod> OneFamily<A>
where
    A::Pair: Pod,
{
    fn take(ebpf: &mut Ebpf, names: [&'static str; 4]) -> Result<Self, KernelError> {
        let [endpoints, members, networks, pairs] = names;
        Ok(Self {
            endpoints: Mirrored::take(ebpf, endpoints)?,
            members: Mirrored::take(ebpf, members)?,
            networks: Mirrored::take(ebpf, networks)?,
            pairs: Mirrored::take(ebpf, pairs)?,
        })
    }

    fn converge(&mut self, wanted: &FamilyMaps<A, WORDS>) -> Result<usize, KernelError> {
        let FamilyMaps { endpoints, members, networks, pairs } = wanted;
        let endpoints = endpoints.iter().map(|(address, endpoint)| (*address, endpoint.words())).collect();
        Ok(self.endpoints.converge(&endpoints)?
            + self.members.converge(members)?
            + self.networks.converge(networks)?
            + self.pairs.converge(pairs)?)
    }
}

/// All maps of the program `verdict`.
pub(super) struct Maps {
    v4: OneFamily<V4>,
    v6: OneFamily<V6>,
    policies: Mirrored<Array<MapData, Words>, u32, Words>,
    segments: Mirrored<Array<MapData, Words>, u32, Words>,
    rows: Mirrored<Array<MapData, Row>, u32, Row>,
}

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        Ok(Self {
            v4: OneFamily::take(ebpf, ["ENDPOINTS_V4", "MEMBERS_V4", "NETWORKS_V4", "PAIRS_V4"])?,
            v6: OneFamily::take(ebpf, ["ENDPOINTS_V6", "MEMBERS_V6", "NETWORKS_V6", "PAIRS_V6"])?,
            policies: Mirrored::take(ebpf, "POLICIES")?,
            segments: Mirrored::take(ebpf, "SEGMENTS")?,
            rows: Mirrored::take(ebpf, "ROWS")?,
        })
    }

    /// Makes the maps hold this and nothing else; gives the number of writes. No packet may be judged meanwhile: the
    /// order of the writes is of no meaning.
    pub(super) fn converge(&mut self, wanted: &Lowered) -> Result<usize, KernelError> {
        let Lowered { v4, v6, policies, segments, rows, bits: _ } = wanted;
        Ok(self.v4.converge(v4)?
            + self.v6.converge(v6)?
            + self.policies.converge(&indexed(policies.iter().map(|policy| policy.words())))?
            + self.segments.converge(&indexed(segments.iter().map(|segment| segment.words())))?
            + self.rows.converge(&indexed(rows.iter().copied()))?)
    }
}

fn indexed<V>(values: impl Iterator<Item = V>) -> BTreeMap<u32, V> {
    (0..).zip(values).collect()
}
