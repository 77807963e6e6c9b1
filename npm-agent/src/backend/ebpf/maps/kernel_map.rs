//! One map of the kernel: its name, and the few things that are done with it.
#![expect(unsafe_code, reason = "aya asks for a promise about layouts")]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::Pod;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use npm_common::layout::{PairRecord, Policy, Record, Segment};

use super::{MapsError, Source};
use crate::backend::ebpf::lower::Prefix;
use crate::backend::ebpf::syscall::{array_values, delete_all, each_element, update_all};

/// Values of an array that are read at once: at most half a megabyte.
const AT_ONCE: usize = 2048;

/// As many of an array's values as these are read one by one.
const FEW: usize = 32;

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
    /// For what aya does not do with it. Its keys and values are as long as those of `map`: aya has compared that.
    descriptor: OwnedFd,
}

impl<M: TryFrom<Map, Error = MapError>> KernelMap<M> {
    pub(super) fn of(source: &mut Source<'_>, name: &'static str) -> Result<Self, MapsError> {
        let failed = |source| MapsError::Map { name, source };
        let map = source(name)?;
        let (Map::Array(data) | Map::HashMap(data) | Map::LpmTrie(data)) = &map else {
            return Err(failed(MapError::InvalidMapType { map_type: 0 }));
        };
        let descriptor = data.fd().as_fd().try_clone_to_owned();
        let descriptor = descriptor.map_err(|error| failed(MapError::IoError(error)))?;
        Ok(Self { name, map: M::try_from(map).map_err(failed)?, descriptor })
    }
}

impl<M> KernelMap<M> {
    fn failed(&self) -> impl Fn(MapError) -> MapsError + use<M> {
        let name = self.name;
        move |source| MapsError::Map { name, source }
    }

    fn refused(&self) -> impl Fn(io::Error) -> MapsError + use<M> {
        let failed = self.failed();
        move |error| failed(MapError::IoError(error))
    }
}

impl<V: Pod> KernelMap<Array<MapData, V>> {
    pub(super) fn set(&mut self, index: u32, value: V) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.set(index, value, 0).map_err(failed)
    }

    /// In one call, in this order.
    pub(super) fn set_all(&mut self, elements: &[(u32, V)]) -> Result<(), MapsError> {
        update_all(self.descriptor.as_fd(), elements).map_err(self.refused())
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
        self.each_before(self.map.len(), zero, |index, value| {
            if value != zero {
                entries.insert(index, *value);
            }
        })?;
        Ok(entries)
    }

    /// The entries at these indices; what is past the end is left out.
    pub(super) fn at<'a>(
        &self,
        indices: impl Iterator<Item = &'a u32>,
        zero: &V,
    ) -> Result<BTreeMap<u32, V>, MapsError> {
        let wanted: BTreeSet<u32> = indices.copied().filter(|index| *index < self.map.len()).collect();
        if wanted.len() <= FEW {
            let one = |index: &u32| Ok((*index, self.map.get(index, 0).map_err(self.failed())?));
            return wanted.iter().map(one).collect();
        }
        let end = wanted.last().map_or(0, |last| last + 1);
        let mut entries = BTreeMap::new();
        self.each_before(end, zero, |index, value| {
            if wanted.contains(&index) {
                entries.insert(index, *value);
            }
        })?;
        Ok(entries)
    }

    /// Gives the entries below an index, which is in the array or its end.
    fn each_before(&self, end: u32, zero: &V, mut each: impl FnMut(u32, &V)) -> Result<(), MapsError> {
        let mut values = vec![*zero; AT_ONCE.min(end as usize)];
        let mut first = 0;
        while first < end {
            let room = values.len().min((end - first) as usize);
            let read = array_values(self.descriptor.as_fd(), first, &mut values[..room]);
            let count = read.map_err(self.refused())?;
            if count == 0 {
                return Err(self.refused()(io::ErrorKind::UnexpectedEof.into()));
            }
            (first..).zip(&values[..count]).for_each(|(index, value)| each(index, value));
            first += count as u32;
        }
        Ok(())
    }
}

impl<K: Pod + Ord + Default, V: Pod + Default> KernelMap<HashMap<MapData, K, V>> {
    pub(super) fn insert(&mut self, key: &K, value: &V) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.insert(key, value, 0).map_err(failed)
    }

    /// In one call, in this order.
    pub(super) fn insert_all(&mut self, elements: &[(K, V)]) -> Result<(), MapsError> {
        update_all(self.descriptor.as_fd(), elements).map_err(self.refused())
    }

    pub(super) fn delete(&mut self, key: &K) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.remove(key).or_else(unless_absent).map_err(failed)
    }

    /// Those that are there.
    pub(super) fn delete_all(&mut self, keys: &[K]) -> Result<(), MapsError> {
        delete_all(self.descriptor.as_fd(), keys).map_err(self.refused())
    }

    pub(super) fn entries(&self) -> Result<BTreeMap<K, V>, MapsError> {
        let mut entries = BTreeMap::new();
        each_element(self.descriptor.as_fd(), AT_ONCE, |key, value| {
            entries.insert(key, value);
        })
        .map_err(self.refused())?;
        Ok(entries)
    }
}

impl<A: Pod + Ord, V: Pod> KernelMap<LpmTrie<MapData, A, V>> {
    pub(super) fn insert(&mut self, prefix: &Prefix<A>, value: &V) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.insert(&key(prefix), value, 0).map_err(failed)
    }

    /// In one call, in this order.
    pub(super) fn insert_all(&mut self, elements: &[(Key<A>, V)]) -> Result<(), MapsError> {
        update_all(self.descriptor.as_fd(), elements).map_err(self.refused())
    }

    pub(super) fn delete(&mut self, prefix: &Prefix<A>) -> Result<(), MapsError> {
        let failed = self.failed();
        self.map.remove(&key(prefix)).or_else(unless_absent).map_err(failed)
    }

    /// Those that are there.
    pub(super) fn delete_all(&mut self, keys: &[Key<A>]) -> Result<(), MapsError> {
        delete_all(self.descriptor.as_fd(), keys).map_err(self.refused())
    }

    pub(super) fn entries(&self) -> Result<BTreeMap<Prefix<A>, V>, MapsError> {
        let entry = |entry: Result<(Key<A>, V), MapError>| {
            let (key, value) = entry.map_err(self.failed())?;
            Ok((Prefix { length: key.prefix_len(), address: key.data() }, value))
        };
        self.map.iter().map(entry).collect()
    }
}

/// A prefix as the kernel has it.
pub(super) fn key<A: Pod>(prefix: &Prefix<A>) -> Key<A> {
    Key::new(prefix.length, prefix.address)
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
