//! The maps that verdicts are looked up in; npm_common::layout says what they hold.
//!
//! Hash maps take memory for an entry when it is written (`BPF_F_NO_PREALLOC`), so room for large clusters costs little
//! on small nodes.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap};
use npm_common::decide::{self, Lookups};
#[cfg(not(feature = "wide"))]
use npm_common::layout::NARROW_WORDS as WORDS;
#[cfg(feature = "wide")]
use npm_common::layout::WIDE_WORDS as WORDS;
use npm_common::layout::{
    Address, Bits, Generation, MAX_NETWORKS, MAX_PAIRS, MAX_POLICIES, MAX_RECORDS, MAX_ROWS, MAX_SEGMENTS,
    Meaning, PairRecord, Policy, Record, Segment, V4, V6,
};

type Row = Bits<WORDS>;
type PairV4 = <V4 as Address>::Pair;
type PairV6 = <V6 as Address>::Pair;

#[map]
static GENERATION: Array<Generation> = Array::with_max_entries(1, 0);
/// Of user space alone: what each bit means, for a process that finds the maps.
#[map]
static MEANINGS: Array<Meaning> = Array::with_max_entries(WORDS as u32 * 64, 0);
#[map]
static POLICIES: Array<Policy> = Array::with_max_entries(MAX_POLICIES, 0);
#[map]
static SEGMENTS: Array<Segment> = Array::with_max_entries(MAX_SEGMENTS, 0);
#[map]
static ROWS: Array<Row> = Array::with_max_entries(MAX_ROWS, 0);
#[map]
static PLACES_V4: HashMap<V4, u32> = HashMap::with_max_entries(MAX_RECORDS, BPF_F_NO_PREALLOC);
#[map]
static PLACES_V6: HashMap<V6, u32> = HashMap::with_max_entries(MAX_RECORDS, BPF_F_NO_PREALLOC);
#[map]
static RECORDS_V4: Array<Record<V4>> = Array::with_max_entries(MAX_RECORDS, 0);
#[map]
static RECORDS_V6: Array<Record<V6>> = Array::with_max_entries(MAX_RECORDS, 0);
#[map]
static NETWORKS_V4: LpmTrie<V4, [u32; 2]> = LpmTrie::with_max_entries(MAX_NETWORKS, 0);
#[map]
static NETWORKS_V6: LpmTrie<V6, [u32; 2]> = LpmTrie::with_max_entries(MAX_NETWORKS, 0);
#[map]
static PAIRS_V4: HashMap<PairV4, u32> = HashMap::with_max_entries(MAX_PAIRS, BPF_F_NO_PREALLOC);
#[map]
static PAIRS_V6: HashMap<PairV6, u32> = HashMap::with_max_entries(MAX_PAIRS, BPF_F_NO_PREALLOC);
#[map]
static PAIR_RECORDS_V4: Array<PairRecord<PairV4>> = Array::with_max_entries(MAX_PAIRS, 0);
#[map]
static PAIR_RECORDS_V6: Array<PairRecord<PairV6>> = Array::with_max_entries(MAX_PAIRS, 0);

/// [`decide::row_at`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn row_of_segment(first: u32, segments: u32, rest: u32, position: u32) -> u32 {
    let policy = Policy { first, segments, rest, pairs: 0 };
    decide::row_at(|index| SEGMENTS.get(index).copied(), &policy, position)
}

/// 1: [`decide::meet`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rows_meet(row: *const Row, bits: *const Row) -> u32 {
    // SAFETY: each caller's are to values of maps, or there are none.
    let (Some(row), Some(bits)) = (unsafe { (row.as_ref(), bits.as_ref()) }) else { return 0 };
    decide::meet(row, bits).into()
}

/// The maps of IPv4.
pub(crate) struct Ipv4;
/// The maps of IPv6.
pub(crate) struct Ipv6;

macro_rules! lookups {
    ($family:ty, $address:ty, $places:ident, $records:ident, $networks:ident, $pairs:ident, $pair_records:ident) => {
        impl Lookups<$address, WORDS> for $family {
            type Row = &'static Row;

            #[inline(always)]
            fn generation(&self) -> Generation {
                match GENERATION.get_ptr(0) {
                    // SAFETY: the kernel gave the pointer, and the map lives as long as the program. Volatile, because
                    // user space writes it meanwhile: it is read once.
                    Some(generation) => unsafe { generation.read_volatile() },
                    None => 0,
                }
            }
            #[inline(always)]
            fn place(&self, address: &$address) -> Option<u32> {
                // SAFETY: the value may be another key's by now: whoever asks looks at whose record it leads to.
                unsafe { $places.get(address) }.copied()
            }
            #[inline(always)]
            fn record(&self, place: u32) -> Option<Record<$address>> {
                $records.get(place).copied()
            }
            #[inline(always)]
            fn network(&self, address: &$address) -> Option<[u32; 2]> {
                $networks.get(Key::new(<$address as Address>::BITS, *address)).copied()
            }
            #[inline(always)]
            fn pair_place(&self, pair: &<$address as Address>::Pair) -> Option<u32> {
                // SAFETY: as for places.
                unsafe { $pairs.get(pair) }.copied()
            }
            #[inline(always)]
            fn pair_record(&self, place: u32) -> Option<PairRecord<<$address as Address>::Pair>> {
                $pair_records.get(place).copied()
            }
            #[inline(always)]
            fn policy(&self, id: u32) -> Option<Policy> {
                POLICIES.get(id).copied()
            }
            #[inline(always)]
            fn row(&self, index: u32) -> Option<&'static Row> {
                ROWS.get(index)
            }
            #[inline(always)]
            fn row_at(&self, policy: &Policy, position: u32) -> u32 {
                row_of_segment(policy.first, policy.segments, policy.rest, position)
            }
            #[inline(always)]
            fn meet(&self, row: &Row, bits: &Row) -> bool {
                rows_meet(row, bits) == 1
            }
        }
    };
}

lookups!(Ipv4, V4, PLACES_V4, RECORDS_V4, NETWORKS_V4, PAIRS_V4, PAIR_RECORDS_V4);
lookups!(Ipv6, V6, PLACES_V6, RECORDS_V6, NETWORKS_V6, PAIRS_V6, PAIR_RECORDS_V6);
