//! One map of the kernel: its name, and the few things that are done with it.
#![expect(unsafe_code, reason = "aya asks for a promise about layouts")]

use std::collections::BTreeMap;

use aya::Pod;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use npm_common::layout::{PairRecord, Policy, Record, Segment};

use super::{MapsError, Source};
use crate::backend::ebpf::lower::Prefix;

/// A type of npm_common's as a map's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Plain<T>(pub(super) T);

// SAFETY: the layout is C's, of integers and arrays of them, without padding (the sizes are asserted where the types
// are), so every byte may be read and any bytes are a value.
unsafe impl<A: Pod> Pod for Plain<Record<A>> {}
// SAFETY: as for records.
unsafe impl<P: Pod> Pod for Plain<PairRecord<P>> {}
// SAFETY: as for records.
unsafe impl Pod for Plain<Policy> {}
// SAFETY: as for records.
unsafe impl Pod for Plain<Segment> {}

/// A map of the kernel.
pub(super) struct KernelMap<M> {
    name: &'static str,
    map: M,
}

impl<M: TryFrom<Map, Error = MapError>> KernelMap<M> {
    pub(super) fn of(source: &mut Source<'_>, name: &'static str) -> Result<Self, MapsError> {
        let map = M::try_from(source(name)?).map_err(|source| MapsError::Map { name, source })?;
        Ok(Self { name, map })
    }
}

impl<M> KernelMap<M> {
    fn failed(&self) -> impl Fn(MapError) -> MapsError + use<M> {
        let name = self.name;
        move |source| MapsError::Map { name, source }
    }
}

impl<V: Pod> KernelMap<Array<MapData, V>> {
    pub(super) fn set(&mut self, index: u32, value: V) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.set(index, value, 0).map_err(failed)
    }

    pub(super) fn one(&self) -> Result<V, MapsError> {
        self.map.get(&0, 0).map_err(self.failed())
    }

    /// The entries that are not zero.
    pub(super) fn nonzero(&self, zero: &V) -> Result<BTreeMap<u32, V>, MapsError>
    where
        V: PartialEq,
    {
        let mut entries = BTreeMap::new();
        for (index, value) in (0..).zip(self.map.iter()) {
            let value = value.map_err(self.failed())?;
            if value != *zero {
                entries.insert(index, value);
            }
        }
        Ok(entries)
    }

    /// The entries at these indices; what is past the end is left out.
    pub(super) fn at<'a>(
        &self,
        indices: impl Iterator<Item = &'a u32>,
    ) -> Result<BTreeMap<u32, V>, MapsError> {
        let inside = indices.filter(|index| **index < self.map.len());
        inside.map(|index| Ok((*index, self.map.get(index, 0).map_err(self.failed())?))).collect()
    }
}

impl<K: Pod + Ord, V: Pod> KernelMap<HashMap<MapData, K, V>> {
    pub(super) fn insert(&mut self, key: &K, value: &V) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.insert(key, value, 0).map_err(failed)
    }

    pub(super) fn delete(&mut self, key: &K) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.remove(key).or_else(unless_absent).map_err(failed)
    }

    pub(super) fn entries(&self) -> Result<BTreeMap<K, V>, MapsError> {
        self.map.iter().collect::<Result<_, _>>().map_err(self.failed())
    }
}

impl<A: Pod + Ord, V: Pod> KernelMap<LpmTrie<MapData, A, V>> {
    pub(super) fn insert(&mut self, prefix: &Prefix<A>, value: &V) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.insert(&Key::new(prefix.length, prefix.address), value, 0).map_err(failed)
    }

    pub(super) fn delete(&mut self, prefix: &Prefix<A>) -> Result<(), MapsError> {
        let failed = self.failed();
        let key = Key::new(prefix.length, prefix.address);
        self.map.remove(&key).or_else(unless_absent).map_err(failed)
    }

    pub(super) fn entries(&self) -> Result<BTreeMap<Prefix<A>, V>, MapsError> {
        let entry = |entry: Result<(Key<A>, V), MapError>| {
            let (key, value) = entry.map_err(self.failed())?;
            Ok((Prefix { length: key.prefix_len(), address: key.data() }, value))
        };
        self.map.iter().map(entry).collect()
    }
}

/// That an entry is gone already is no failure to delete it.
fn unless_absent(error: MapError) -> Result<(), MapError> {
    /// include/uapi/asm-generic/errno-base.h.
    const ENOENT: i32 = 2;
    let is_absent = matches!(error, MapError::KeyNotFound)
        || matches!(&error, MapError::SyscallError(call) if call.io_error.raw_os_error() == Some(ENOENT));
    if is_absent { Ok(()) } else { Err(error) }
}

/// Maps of values of npm_common's types.
pub(super) trait Entries<K, T> {
    /// The same without [`Plain`].
    fn plain(self) -> BTreeMap<K, T>;
}

impl<K: Ord, T> Entries<K, T> for BTreeMap<K, Plain<T>> {
    fn plain(self) -> BTreeMap<K, T> {
        self.into_iter().map(|(key, Plain(value))| (key, value)).collect()
    }
}
