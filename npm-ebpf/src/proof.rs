//! What was judged and allowed, and what was denied and is to be forgotten: in the kernel's entries, or in maps.

use core::ptr::from_ref;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_jiffies64;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap};
use npm_common::conntrack::{Proof, Recent, State, Tuple, recent};
use npm_common::layout::{MAX_DENIED, MAX_PROOFS, RECENT_PLACES};

use crate::conntrack::{Read, Which};
use crate::entry::{self, Found};

/// Original tuple -> address of the entry, or [`npm_common::conntrack::listed`]. One number a value: a value that the
/// kernel has given to another key meanwhile is another number.
#[map]
static PROOFS: LruHashMap<Tuple, u64> = LruHashMap::with_max_entries(MAX_PROOFS, 0);

/// What `PROOFS` was found to hold lately: a search in that map takes several times as long as everything else that a packet
/// of an established connection needs.
#[map]
static RECENT: Array<Place> = Array::with_max_entries(1 << RECENT_PLACES, 0);

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
    /// Whether the connection of the entry is known, at little cost, to have been judged and allowed.
    fn is_known<R: Read>(entry: u64) -> bool;

    /// Whether a map of all says so.
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
    fn is_known<R: Read>(entry: u64) -> bool {
        let words = R::words(entry, Which::Original);
        words.and_then(|words| age(&words, entry)).is_some_and(|age| age < YOUNG)
    }

    #[inline(always)]
    fn is_listed(subject: Subject<'_>) -> bool {
        match proof(subject) {
            Proof::Holds => {
                tell_recent(subject);
                true
            }
            Proof::Listed => {
                Self::prove(subject);
                true
            }
            Proof::None => false,
        }
    }

    #[inline(always)]
    fn prove(subject: Subject<'_>) {
        let _ = PROOFS.insert(subject.original, subject.entry, 0);
        tell_recent(subject);
    }

    #[inline(always)]
    fn refute(subject: Subject<'_>, _: State) {
        let Subject { original, entry, .. } = subject;
        // In this order: what is found here is told there.
        let _ = PROOFS.remove(original);
        forget_recent(subject);
        let _ = DENIED.insert(original, entry, 0);
    }
}

/// In the marks of the kernel's entries, which are ended at once; in maps as far as the kernel's functions do not reach.
pub(crate) struct InMarks;

impl Proofs for InMarks {
    #[inline(always)]
    fn is_known<R: Read>(entry: u64) -> bool {
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

/// Whether the map says that the connection was judged and allowed.
#[inline(always)]
pub(crate) fn is_listed(subject: Subject<'_>) -> bool {
    match proof(subject) {
        Proof::Holds | Proof::Listed => true,
        Proof::None => false,
    }
}

/// What the map says of the connection.
#[inline(always)]
fn proof(Subject { original, entry, .. }: Subject<'_>) -> Proof {
    let Some(value) = PROOFS.get_ptr(original) else { return Proof::None };
    // SAFETY: the kernel keeps the memory until the program has ended; whoever writes it writes the whole number.
    Proof::of(unsafe { value.read_volatile() }, original, entry)
}

/// A place: what is told there, and when (in the kernel's jiffies).
#[repr(C)]
struct Place {
    told: Recent,
    at: u64,
}

/// As many jiffies long what is told is as good as what `PROOFS` says (a second has 100 to 1,000). Then that map is asked
/// again: it forgets what it was not asked for, but not as soon; and what it has lost for a reason is told here no longer,
/// whoever told it in the same moment, of another program's map, or of an entry that was at the same address.
const YOUNG: u64 = 25;

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper has no arguments. The verifier puts a load in its place.
    unsafe { bpf_jiffies64() }
}

/// How many jiffies ago an entry with these words of its original tuple was told of, unless others were since.
#[inline(always)]
fn age(words: &[u64; 5], entry: u64) -> Option<u64> {
    let (place, told) = recent(words, entry, RECENT_PLACES);
    let place = RECENT.get_ptr_mut(place)?.cast::<u64>();
    // SAFETY: the kernel keeps the memory, six words of it; each is read and written as a whole.
    let word = |index: usize| unsafe { place.add(index).read_volatile() };
    let differ = |index: usize| word(index) ^ told[index];
    let is_same = differ(0) | differ(1) | differ(2) | differ(3) | differ(4) == 0;
    is_same.then(|| now().wrapping_sub(word(5)))
}

/// By words: the compiler would read bytes one by one.
#[inline(always)]
fn words(tuple: &Tuple) -> [u64; 5] {
    // SAFETY: a tuple has five words, and is aligned as they are.
    unsafe { from_ref(tuple).cast::<[u64; 5]>().read() }
}

#[inline(always)]
fn tell_recent(Subject { original, entry, .. }: Subject<'_>) {
    let (place, told) = recent(&words(original), entry, RECENT_PLACES);
    write_recent(place, told);
}

/// Empties the connection's place, whoever has it: another only loses time.
#[inline(always)]
fn forget_recent(Subject { original, entry, .. }: Subject<'_>) {
    let (place, _) = recent(&words(original), entry, RECENT_PLACES);
    write_recent(place, [0; 5]);
}

#[inline(always)]
fn write_recent(place: u32, told: Recent) {
    let Some(place) = RECENT.get_ptr_mut(place).map(|place| place.cast::<u64>()) else { return };
    // SAFETY: as in `age`.
    let write = |index: usize, word: u64| unsafe { place.add(index).write_volatile(word) };
    for (index, word) in told.into_iter().enumerate() {
        write(index, word);
    }
    write(5, now());
}
