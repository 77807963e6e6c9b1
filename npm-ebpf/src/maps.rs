//! The maps that verdicts are looked up in; npm_common::layout says what they hold.
//!
//! Hash maps take memory for an entry when it is written (`BPF_F_NO_PREALLOC`), so room for large clusters costs little
//! on small nodes.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap};
use npm_common::decide::Lookups;
use npm_common::layout::{
    Address, Bits, Endpoint, MAX_ENDPOINTS, MAX_MEMBERS, MAX_NETWORKS, MAX_PAIRS, MAX_POLICIES, MAX_ROWS,
    MAX_SEGMENTS, Policy, Segment, V4, V6, WORDS,
};

type Row = Bits<WORDS>;

#[map]
static ENDPOINTS_V4: HashMap<V4, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);
#[map]
static ENDPOINTS_V6: HashMap<V6, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);
#[map]
static MEMBERS_V4: HashMap<V4, Row> = HashMap::with_max_entries(MAX_MEMBERS, BPF_F_NO_PREALLOC);
#[map]
static MEMBERS_V6: HashMap<V6, Row> = HashMap::with_max_entries(MAX_MEMBERS, BPF_F_NO_PREALLOC);
#[map]
static NETWORKS_V4: LpmTrie<V4, Row> = LpmTrie::with_max_entries(MAX_NETWORKS, 0);
#[map]
static NETWORKS_V6: LpmTrie<V6, Row> = LpmTrie::with_max_entries(MAX_NETWORKS, 0);
#[map]
static PAIRS_V4: HashMap<<V4 as Address>::Pair, Row> =
    HashMap::with_max_entries(MAX_PAIRS, BPF_F_NO_PREALLOC);
#[map]
static PAIRS_V6: HashMap<<V6 as Address>::Pair, Row> =
    HashMap::with_max_entries(MAX_PAIRS, BPF_F_NO_PREALLOC);
#[map]
static POLICIES: Array<Policy> = Array::with_max_entries(MAX_POLICIES, 0);
#[map]
static SEGMENTS: Array<Segment> = Array::with_max_entries(MAX_SEGMENTS, 0);
#[map]
static ROWS: Array<Row> = Array::with_max_entries(MAX_ROWS, 0);

/// The maps of IPv4.
pub(crate) struct Ipv4;
/// The maps of IPv6.
pub(crate) struct Ipv6;

macro_rules! lookups {
    ($family:ty, $address:ty, $endpoints:ident, $members:ident, $networks:ident, $pairs:ident) => {
        impl Lookups<$address, WORDS> for $family {
            #[inline(always)]
            fn endpoint(&self, address: &$address) -> Option<Endpoint> {
                // SAFETY: the kernel keeps a value that was found until the program has ended.
                unsafe { $endpoints.get(address) }.copied()
            }
            #[inline(always)]
            fn members(&self, address: &$address) -> Option<&Row> {
                // SAFETY: the kernel keeps a value that was found until the program has ended.
                unsafe { $members.get(address) }
            }
            #[inline(always)]
            fn networks(&self, address: &$address) -> Option<&Row> {
                $networks.get(Key::new(<$address as Address>::BITS, *address))
            }
            #[inline(always)]
            fn pairs(&self, pair: &<$address as Address>::Pair) -> Option<&Row> {
                // SAFETY: the kernel keeps a value that was found until the program has ended.
                unsafe { $pairs.get(pair) }
            }
            #[inline(always)]
            fn policy(&self, id: u32) -> Option<Policy> {
                POLICIES.get(id).copied()
            }
            #[inline(always)]
            fn segment(&self, index: u32) -> Option<Segment> {
                SEGMENTS.get(index).copied()
            }
            #[inline(always)]
            fn row(&self, index: u32) -> Option<&Row> {
                ROWS.get(index)
            }
        }
    };
}

lookups!(Ipv4, V4, ENDPOINTS_V4, MEMBERS_V4, NETWORKS_V4, PAIRS_V4);
lookups!(Ipv6, V6, ENDPOINTS_V6, MEMBERS_V6, NETWORKS_V6, PAIRS_V6);
