//! What was judged and allowed, and what was denied and is to be forgotten.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, LruHashMap};
use npm_common::conntrack::{Proof, Tuple};
use npm_common::layout::{MAX_DENIED, MAX_PROOFS};

/// Original tuple -> address of the entry, or [`npm_common::conntrack::listed`]. One number a value: a value that the
/// kernel has given to another key meanwhile is another number.
#[map]
static PROOFS: LruHashMap<Tuple, u64> = LruHashMap::with_max_entries(MAX_PROOFS, 0);

/// Original tuples of connections that were denied, until user space has deleted their entries.
#[map]
static DENIED: HashMap<Tuple, u64> =
    HashMap::with_max_entries(MAX_DENIED, aya_ebpf::bindings::BPF_F_NO_PREALLOC);

/// Whether the connection with this original tuple and this entry was judged and allowed.
#[inline(always)]
pub(crate) fn is_proven(original: &Tuple, entry: u64) -> bool {
    let Some(value) = PROOFS.get_ptr(original) else { return false };
    // SAFETY: the kernel keeps the memory until the program has ended; whoever writes it writes the whole number.
    match Proof::of(unsafe { value.read_volatile() }, original, entry) {
        Proof::Holds => true,
        Proof::Listed => {
            prove(original, entry);
            true
        }
        Proof::None => false,
    }
}

/// Records that the connection was allowed. Without room for it the connection is judged again at its next packet.
#[inline(always)]
pub(crate) fn prove(original: &Tuple, entry: u64) {
    let _ = PROOFS.insert(original, entry, 0);
}

/// Takes a proof back, and has the entry deleted. Without room for that the next packet of the connection asks again.
#[inline(always)]
pub(crate) fn refute(original: &Tuple, entry: u64) {
    let _ = PROOFS.remove(original);
    let _ = DENIED.insert(original, entry, 0);
}
