//! bpf(2) itself, for what aya does not offer.
#![expect(unsafe_code, reason = "a system call that no crate of ours wraps")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use aya::Pod;
use aya::maps::{MapData, MapError};

use crate::interfaces::Index;

/// include/uapi/linux/bpf.h.
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;
const BPF_TCX_EGRESS: u32 = 47;

/// More programs than anybody attaches to one interface; the kernel refuses more than 63 links at one place
/// (BPF_MPROG_MAX, include/linux/bpf_mprog.h).
const MAX_PROGRAMS: usize = 64;

/// The attributes of BPF_PROG_QUERY.
#[repr(C)]
struct Query {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// The attributes of BPF_MAP_LOOKUP_BATCH and its likes.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// Reads values of an array, from the one at an index on, as many as there is room for; gives how many that were. One call
/// for each would take a hundred times as long (from 5.6 on there is one for many). The map's values have to be of this
/// length, as aya sees to when it takes a map for such an array: the kernel would write past the end.
///
/// # Errors
/// The kernel's.
pub(super) fn array_values<V: Pod>(map: BorrowedFd<'_>, from: u32, values: &mut [V]) -> io::Result<usize> {
    let mut keys = vec![0_u32; values.len()];
    let (before, mut last) = (from.wrapping_sub(1), 0_u32);
    let mut batch = Batch {
        // Nothing, for the beginning; otherwise the index before. All of these live until the call has ended.
        in_batch: if from == 0 { 0 } else { &raw const before as u64 },
        out_batch: &raw mut last as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: u32::try_from(values.len()).map_err(io::Error::other)?,
        map_fd: map.as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    };
    match bpf(BPF_MAP_LOOKUP_BATCH, &mut batch) {
        Ok(_) => {}
        // The end was reached before the room was used up.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => return Err(error),
    }
    let count = usize::try_from(batch.count).map_err(io::Error::other)?;
    let in_turn = keys.iter().zip(from..).take(count).all(|(key, index)| *key == index);
    if in_turn { Ok(count) } else { Err(io::Error::other("an array's values are out of turn")) }
}

/// Writes many elements of a map in one call, in this order. The map's keys and values have to be of these lengths, as aya sees
/// to when it takes a map for such a one: the kernel would read past the end. Every kernel that the programs run on has
/// this for arrays, hashes and tries (5.13).
///
/// # Errors
/// The kernel's, of the first element that it did not take; those before it are written.
pub(super) fn update_all<K: Pod, V: Pod>(map: BorrowedFd<'_>, elements: &[(K, V)]) -> io::Result<()> {
    let (mut keys, mut values): (Vec<K>, Vec<V>) = elements.iter().copied().unzip();
    let mut batch = of_elements(map, &mut keys)?;
    batch.values = values.as_mut_ptr() as u64;
    bpf(BPF_MAP_UPDATE_BATCH, &mut batch).map(drop)
}

/// Deletes many elements of a map in one call each time that one is there no more. Lengths as for [`update_all`].
///
/// # Errors
/// The kernel's, of the first element that it did not delete; those before it are gone.
pub(super) fn delete_all<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<()> {
    let mut keys = keys.to_vec();
    let mut rest = keys.as_mut_slice();
    while !rest.is_empty() {
        let mut batch = of_elements(map, rest)?;
        let deleted = bpf(BPF_MAP_DELETE_BATCH, &mut batch);
        match deleted {
            Ok(_) => return Ok(()),
            // That one is gone already.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                let done = usize::try_from(batch.count).map_err(io::Error::other)?;
                rest = rest.get_mut(done + 1..).unwrap_or_default();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What a call for these elements begins with. They have to live until it has ended.
fn of_elements<K: Pod>(map: BorrowedFd<'_>, keys: &mut [K]) -> io::Result<Batch> {
    Ok(Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_mut_ptr() as u64,
        values: 0,
        count: u32::try_from(keys.len()).map_err(io::Error::other)?,
        map_fd: map.as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    })
}

/// A hash map, read many elements at once.
#[derive(Debug)]
pub(super) struct HashElements<K, V> {
    map: OwnedFd,
    elements: PhantomData<(K, V)>,
}

impl<K: Pod + Default, V: Pod + Default> HashElements<K, V> {
    /// # Errors
    /// The map's keys or values are not of these lengths: the kernel would write past the end of what it is given.
    pub(super) fn of(map: &MapData) -> Result<Self, MapError> {
        let info = map.info()?;
        let [key, value] = [info.key_size(), info.value_size()].map(|size| size as usize);
        if key != size_of::<K>() {
            return Err(MapError::InvalidKeySize { size: size_of::<K>(), expected: key });
        }
        if value != size_of::<V>() {
            return Err(MapError::InvalidValueSize { size: size_of::<V>(), expected: value });
        }
        let map = map.fd().as_fd().try_clone_to_owned().map_err(MapError::IoError)?;
        Ok(Self { map, elements: PhantomData })
    }

    /// Gives every element, `at_once` of them a call. What is written meanwhile may be among them or not; what stays is. To a
    /// map that forgets what it is not asked for, this is no question.
    ///
    /// # Errors
    /// The kernel's. ENOSPC: more than `at_once` are in one bucket.
    pub(super) fn each(&self, at_once: usize, each: impl FnMut(K, V)) -> io::Result<()> {
        each_element(self.map.as_fd(), at_once, each)
    }
}

/// As [`HashElements::each`], of a hash map whose keys and values are known to be of these lengths.
///
/// # Errors
/// As there.
pub(super) fn each_element<K: Pod + Default, V: Pod + Default>(
    map: BorrowedFd<'_>,
    at_once: usize,
    mut each: impl FnMut(K, V),
) -> io::Result<()> {
    let (mut keys, mut values) = (vec![K::default(); at_once], vec![V::default(); at_once]);
    let (mut before, mut next) = (None::<u32>, 0_u32);
    loop {
        let mut batch = Batch {
            // Nothing, for the beginning; otherwise what the kernel gave. All of these live until the call has ended.
            in_batch: before.as_ref().map_or(0, |before| std::ptr::from_ref(before) as u64),
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(at_once).map_err(io::Error::other)?,
            map_fd: map.as_raw_fd().cast_unsigned(),
            element_flags: 0,
            flags: 0,
        };
        let is_end = match bpf(BPF_MAP_LOOKUP_BATCH, &mut batch) {
            Ok(_) => false,
            // The end was reached, with or without elements before it.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let count = usize::try_from(batch.count).map_err(io::Error::other)?;
        keys.iter().zip(&values).take(count).for_each(|(key, value)| each(*key, *value));
        if is_end {
            return Ok(());
        }
        before = Some(next);
    }
}

/// Calls bpf(2). What the attributes point to has to live until it returns, and be as long as they say.
///
/// # Errors
/// The kernel's.
pub(super) fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    let size = size_of::<T>();
    // SAFETY: the kernel reads and writes `size` bytes of attributes, which live through the call; what they point to does
    // too, as their makers say.
    let outcome = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome) }
}

/// The numbers of the programs at an interface's TCX egress, in the order in which a packet meets them. The agent may ask
/// for numbers; to ask for more by a number takes CAP_SYS_ADMIN, which it is not granted.
///
/// # Errors
/// EINVAL: the kernel has no TCX (before 6.6). ENODEV: the interface is gone.
pub(super) fn tcx_egress(interface: Index) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MAX_PROGRAMS];
    let mut query = Query {
        target_ifindex: interface.0,
        attach_type: BPF_TCX_EGRESS,
        query_flags: 0,
        attach_flags: 0,
        // It lives until the call has ended.
        prog_ids: ids.as_mut_ptr() as u64,
        count: MAX_PROGRAMS as u32,
        pad: 0,
        prog_attach_flags: 0,
        link_ids: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    bpf(BPF_PROG_QUERY, &mut query)?;
    let count = usize::try_from(query.count).map_err(io::Error::other)?;
    Ok(ids[..count.min(MAX_PROGRAMS)].to_vec())
}
