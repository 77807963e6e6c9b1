//! What was judged and allowed, and what was denied and is to be forgotten: in the kernel's entries, or in maps.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, LruHashMap};
use npm_common::conntrack::{Proof, State, Tuple};
use npm_common::layout::{MAX_DENIED, MAX_PROOFS};

use crate::conntrack::Read;
use crate::entry::{self, Found};

/// Original tuple -> address of the entry, or [`npm_common::conntrack::listed`]. One number a value: a value that the
/// kernel has given to another key meanwhile is another number.
#[map]
static PROOFS: LruHashMap<Tuple, u64> = LruHashMap::with_max_entries(MAX_PROOFS, 0);

/// Original tuples of connections that were denied, until user space has deleted their entries.
#[map]
static DENIED: HashMap<Tuple, u64> =
    HashMap::with_max_entries(MAX_DENIED, aya_ebpf::bindings::BPF_F_NO_PREALLOC);

/// The packet of which something is to be recorded.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) skb: *mut __sk_buff,
    /// The original tuple of its connection.
    pub(crate) original: &'a Tuple,
    /// The address of its connection's entry.
    pub(crate) entry: u64,
}

/// Where proofs are.
pub(crate) trait Proofs {
    /// Whether the entry itself says that the connection was judged and allowed.
    fn is_marked<R: Read>(entry: u64) -> bool;

    /// Whether a map says so.
    fn is_listed(subject: Subject<'_>) -> bool;

    /// Records that the connection was allowed. Where that fails the connection is judged again at its next packet.
    fn prove(subject: Subject<'_>);

    /// Takes a proof back, and has the entry ended. Where that fails the next packet of the connection asks again.
    fn refute(subject: Subject<'_>, state: State);
}

/// In maps; user space ends entries.
pub(crate) struct InMaps;

impl Proofs for InMaps {
    #[inline(always)]
    fn is_marked<R: Read>(_: u64) -> bool {
        false
    }

    #[inline(always)]
    fn is_listed(subject: Subject<'_>) -> bool {
        match proof(subject) {
            Proof::Holds => true,
            Proof::Listed => {
                Self::prove(subject);
                true
            }
            Proof::None => false,
        }
    }

    #[inline(always)]
    fn prove(Subject { original, entry, .. }: Subject<'_>) {
        let _ = PROOFS.insert(original, entry, 0);
    }

    #[inline(always)]
    fn refute(Subject { original, entry, .. }: Subject<'_>, _: State) {
        let _ = PROOFS.remove(original);
        let _ = DENIED.insert(original, entry, 0);
    }
}

/// In the marks of the kernel's entries, which are ended at once; in maps as far as the kernel's functions do not reach.
pub(crate) struct InMarks;

impl Proofs for InMarks {
    #[inline(always)]
    fn is_marked<R: Read>(entry: u64) -> bool {
        R::mark(entry).is_some_and(entry::is_proof)
    }

    #[inline(always)]
    fn is_listed(Subject { skb, original, entry }: Subject<'_>) -> bool {
        take_over(skb, original, entry) == 1
    }

    #[inline(always)]
    fn prove(Subject { skb, original, entry }: Subject<'_>) {
        prove_by_mark(skb, original, entry);
    }

    #[inline(always)]
    fn refute(Subject { skb, original, entry }: Subject<'_>, state: State) {
        refute_by_mark(skb, original, entry, (state == State::New).into());
    }
}

// Functions of their own: the verifier checks each once and apart, the stack of one is free when it returns, and a program
// that does not call them does not hold them.

/// 1: a map has the proof; the mark has it from here on.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_over(skb: *mut __sk_buff, original: *const Tuple, entry: u64) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(original) = (unsafe { original.as_ref() }) else { return 0 };
    match proof(Subject { skb, original, entry }) {
        Proof::Holds | Proof::Listed => {
            prove_by_mark(skb, original, entry);
            1
        }
        Proof::None => 0,
    }
}

/// Records the proof in the mark, or else in the map.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn prove_by_mark(skb: *mut __sk_buff, original: *const Tuple, entry: u64) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(original) = (unsafe { original.as_ref() }) else { return 0 };
    match entry::prove(skb, original, entry) {
        Found::Entry => {}
        Found::Nothing => InMaps::prove(Subject { skb, original, entry }),
    }
    0
}

/// Ends the entry, or notes it. `first` is 1 for a packet that may be the connection's first: a proof is of before. Any
/// other had none; if its entry has one by now, then a packet of the other direction was allowed meanwhile.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refute_by_mark(skb: *mut __sk_buff, original: *const Tuple, entry: u64, first: u32) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(original) = (unsafe { original.as_ref() }) else { return 0 };
    let found =
        if first == 1 { entry::end(skb, original, entry) } else { entry::end_unproven(skb, original, entry) };
    let _ = PROOFS.remove(original);
    match found {
        Found::Entry => {}
        Found::Nothing => {
            let _ = DENIED.insert(original, entry, 0);
        }
    }
    0
}

/// What the map says of the connection.
#[inline(always)]
fn proof(Subject { original, entry, .. }: Subject<'_>) -> Proof {
    let Some(value) = PROOFS.get_ptr(original) else { return Proof::None };
    // SAFETY: the kernel keeps the memory until the program has ended; whoever writes it writes the whole number.
    Proof::of(unsafe { value.read_volatile() }, original, entry)
}
