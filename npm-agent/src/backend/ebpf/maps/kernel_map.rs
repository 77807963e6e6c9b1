//! One map of the kernel: its name, and the few things that are done with it.
#![expect(unsafe_code, reason = "aya asks for a promise about layouts")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::Pod;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use npm_common::layout::{PairRecord, Policy, Record, Segment};

use super::{MapsError, Source};
use crate::backend::ebpf::lower::Prefix;
use crate::backend::ebpf::syscall::array_values;

/// Values of an array that are read at once: at most half a megabyte.
const AT_ONCE: usize = 2048;

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
    /// An array's, for what aya does not do with it.
    array: Option<OwnedFd>,
}

impl<M: TryFrom<Map, Error = MapError>> KernelMap<M> {
    pub(super) fn of(source: &mut Source<'_>, name: &'static str) -> Result<Self, MapsError> {
        let failed = |source| MapsError::Map { name, source };
        let map = source(name)?;
        let array =
            if let Map::Array(data) = &map { Some(data.fd().as_fd().try_clone_to_owned()) } else { None };
        let array = array.transpose().map_err(|error| failed(MapError::IoError(error)))?;
        Ok(Self { name, map: M::try_from(map).map_err(failed)?, array })
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
        let failed = |error| self.failed()(MapError::IoError(error));
        // Its values are as long as these: aya has compared that when it took the map for such an array.
        let array = self.array.as_ref().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let mut entries = BTreeMap::new();
        let mut values = vec![*zero; AT_ONCE.min(self.map.len() as usize)];
        let mut first = 0;
        while first < self.map.len() {
            let count = array_values(array.as_fd(), first, &mut values).map_err(failed)?;
            if count == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            let found = (first..).zip(&values[..count]).filter(|(_, value)| *value != zero);
            entries.extend(found.map(|(index, value)| (index, *value)));
            first += count as u32;
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
