//! What the eBPF maps hold: keys and values as the kernel's side and user space both lay them out.
//!
//! ```text
//! address ─► places ─► records ─► ingress policy id, egress policy id, pod, row of peer bits     the addresses of pods
//!        └─► networks (longest prefix) ─► row of peer bits                                       all other addresses
//! (address, protocol, port) ─► pairs ─► pair records ─► row of peer bits                        named ports of peers
//! policy id ─► policies ─► a run of segments, the row for everything else
//!              segments ─► protocol, first port, last port, row
//!              rows ─► peer bits
//! ```
//!
//! A flow is allowed in a direction when the bits of the peer's row and of the policy's row meet: `peer & row != 0`, bit
//! 0 standing for any peer. Places, records, networks and pairs exist once a family; policies, segments and rows serve
//! both.
//!
//! **Halves.** Whatever says something of an address (a record, a network, a pair record) says it twice, and one number,
//! the generation, says which of the two halves packets use. Who changes the maps writes the halves that no packet uses
//! and then the generation, with one store: a packet sees one whole state or the other. Policies, segments and rows are
//! never changed while a half that packets use leads to them.
//!
//! **Places.** A hash map's value may change under a reader: the kernel gives an element that is deleted or replaced to
//! the next key at once, and a program that has found the element reads the next key's value from it (Linux 6.1 and
//! later, kernel/bpf/hashtab.c, htab_elem_free; with preallocation every version). So a hash map gives a place only, and
//! the record there, in an array, names its key: a reader that finds another's record looks again. Records are reused
//! only when every program that may have known the place has ended. The nodes of longest-prefix tries are freed after
//! such a period by the kernel itself (kernel/bpf/lpm_trie.c: kfree_rcu, since 6.14 bpf_mem_cache_free_rcu).
//!
//! Everything is integers of the machine's byte order and byte arrays, without padding inside. Addresses and ports in
//! keys are bytes in network order, as packets have them.

use core::fmt::Debug;

/// Changes whenever what maps hold, or how they belong together, does: a process of another schema does not go on with
/// them.
pub const SCHEMA: u32 = 2;

/// Words of a row in the narrow object: 64 times as many peer sets, any peer included, can be told apart on a node.
pub const NARROW_WORDS: usize = 16;
/// Words of a row in the wide object.
pub const WIDE_WORDS: usize = 160;

/// Peer sets as bits: bit `n` is bit `n % 64` of word `n / 64`.
pub type Bits<const W: usize> = [u64; W];

/// The bit that every peer has, hosts outside the cluster included.
pub const ANY_PEER: usize = 0;

/// The id of no policy: the endpoint is not isolated for the direction.
pub const NOT_ISOLATED: u32 = 0;

/// The row that allows nobody, and is nobody's: of an address it says that the networks are to be asked.
pub const NOBODY: u32 = 0;

/// What no pod's number is.
pub const NO_POD: u32 = 0;

/// Entries of each family's maps of places and of records: addresses of pods.
pub const MAX_RECORDS: u32 = 32_768;
/// Entries of each family's map of networks: prefixes of blocks and of their excepts.
pub const MAX_NETWORKS: u32 = 32_768;
/// Entries of each family's maps of pairs and of their records.
pub const MAX_PAIRS: u32 = 16_384;
/// Policy ids, [`NOT_ISOLATED`] included.
pub const MAX_POLICIES: u32 = 4096;
/// Segments of all policies together.
pub const MAX_SEGMENTS: u32 = 65_536;
/// Rows of addresses and segments together, [`NOBODY`] included.
pub const MAX_ROWS: u32 = 32_768;
/// Entries of the map of proofs: connections that were allowed, the least recently used going first.
pub const MAX_PROOFS: u32 = 24_576;
/// Places for connections that were proven lately, as a power of two: a place is found without a search.
pub const RECENT_PLACES: u32 = 13;
/// Entries of the map of denied connections: those that wait for user space to delete the kernel's entry.
pub const MAX_DENIED: u32 = 32_768;

/// Sets a bit; `false` when the row is too narrow for it.
pub fn set_bit<const W: usize>(bits: &mut Bits<W>, bit: usize) -> bool {
    match bits.get_mut(bit / 64) {
        Some(word) => {
            *word |= 1 << (bit % 64);
            true
        }
        None => false,
    }
}

/// An address of one family as a map's key: bytes in network order.
pub trait Address: Copy + Default + Ord + Debug + 'static {
    /// The key of (address, protocol, port): the address, the port in network order, the protocol, a zero.
    type Pair: Copy + Default + Ord + Debug + 'static;

    /// Bits of an address.
    const BITS: u32;

    /// The key of a port at this address. `protocol` is the IANA number.
    fn pair(self, protocol: u8, port: u16) -> Self::Pair;

    /// The address with all bits behind the first `length` cleared.
    fn truncated(self, length: u32) -> Self;

    /// Whether two addresses are one.
    fn is(&self, other: &Self) -> bool;

    /// Whether two keys of pairs are one.
    fn is_pair(pair: &Self::Pair, other: &Self::Pair) -> bool;
}

/// An IPv4 address.
pub type V4 = [u8; 4];
/// An IPv6 address.
pub type V6 = [u8; 16];

impl Address for V4 {
    type Pair = [u8; 8];

    const BITS: u32 = 32;

    #[inline(always)]
    fn pair(self, protocol: u8, port: u16) -> Self::Pair {
        let [a, b, c, d] = self;
        let [high, low] = port.to_be_bytes();
        [a, b, c, d, high, low, protocol, 0]
    }

    fn truncated(self, length: u32) -> Self {
        let mask = u32::MAX.checked_shl(Self::BITS.saturating_sub(length)).unwrap_or(0);
        (u32::from_be_bytes(self) & mask).to_be_bytes()
    }

    #[inline(always)]
    fn is(&self, other: &Self) -> bool {
        u32::from_ne_bytes(*self) == u32::from_ne_bytes(*other)
    }

    #[inline(always)]
    fn is_pair(pair: &Self::Pair, other: &Self::Pair) -> bool {
        u64::from_ne_bytes(*pair) == u64::from_ne_bytes(*other)
    }
}

impl Address for V6 {
    type Pair = [u8; 20];

    const BITS: u32 = 128;

    #[inline(always)]
    fn pair(self, protocol: u8, port: u16) -> Self::Pair {
        let mut pair = [0; 20];
        let (address, rest) = pair.split_at_mut(16);
        address.copy_from_slice(&self);
        let [high, low] = port.to_be_bytes();
        rest.copy_from_slice(&[high, low, protocol, 0]);
        pair
    }

    fn truncated(self, length: u32) -> Self {
        let mask = u128::MAX.checked_shl(Self::BITS.saturating_sub(length)).unwrap_or(0);
        (u128::from_be_bytes(self) & mask).to_be_bytes()
    }

    #[inline(always)]
    fn is(&self, other: &Self) -> bool {
        u128::from_ne_bytes(*self) == u128::from_ne_bytes(*other)
    }

    #[inline(always)]
    fn is_pair(pair: &Self::Pair, other: &Self::Pair) -> bool {
        let mut differs = 0;
        for byte in 0..20 {
            differs |= pair[byte] ^ other[byte];
        }
        differs == 0
    }
}

/// Which halves packets use: 0 or 1. The only entry of its map.
pub type Generation = u32;

/// The half of a generation.
#[inline(always)]
pub const fn half_of(generation: Generation) -> usize {
    (generation & 1) as usize
}

/// One of two halves. By a branch: the verifier takes no index into what a program has copied.
#[inline(always)]
pub const fn pick<T: Copy>([even, odd]: [T; 2], half: usize) -> T {
    if half == 0 { even } else { odd }
}

/// What is known of a pod's address.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Known {
    /// The policy of what comes in, or [`NOT_ISOLATED`].
    pub ingress: u32,
    /// The policy of what goes out, or [`NOT_ISOLATED`].
    pub egress: u32,
    /// Which pod it is, of those of this node that policies select, or [`NO_POD`]: a pod reaches itself, at each of its
    /// addresses.
    pub pod: u32,
    /// The row of the peer sets that the address is in, those of blocks included; or [`NOBODY`]: the networks say.
    pub row: u32,
}

const _: () = assert!(size_of::<Known>() == 16 && align_of::<Known>() == 4);

impl Known {
    /// Nothing is known: like an address that has no place.
    pub const NOTHING: Self = Self { ingress: NOT_ISOLATED, egress: NOT_ISOLATED, pod: NO_POD, row: NOBODY };
}

/// What a place holds.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Record<A> {
    /// Whose it is.
    pub address: A,
    /// By generation.
    pub halves: [Known; 2],
}

const _: () = assert!(size_of::<Record<V4>>() == 36 && size_of::<Record<V6>>() == 48);

/// What a pair's place holds.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PairRecord<P> {
    /// Whose it is.
    pub pair: P,
    /// The rows, by generation.
    pub rows: [u32; 2],
}

const _: () = assert!(size_of::<PairRecord<[u8; 8]>>() == 16 && size_of::<PairRecord<[u8; 20]>>() == 28);

/// What the policies that select an endpoint allow together, in one direction. Policies are shared by content.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Policy {
    /// The index of its first segment.
    pub first: u32,
    /// How many segments it has, one behind the other: disjoint and in order.
    pub segments: u32,
    /// The row of everything that is in no segment, protocols without ports included. What it allows, the rows of
    /// the segments allow too.
    pub rest: u32,
    /// Whether a row of it allows named ports of peers: 0 no (the pairs need no look), 1 yes.
    pub pairs: u32,
}

const _: () = assert!(size_of::<Policy>() == 16 && align_of::<Policy>() == 4);

/// What a bit means, as two numbers made from its name: written for a process that finds the maps, read by no program.
/// Zeroes: nothing yet.
pub type Meaning = [u64; 2];

/// A range of destination ports of one protocol, and whom it allows.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Segment {
    /// The [`position`] of its first port.
    pub first: u32,
    /// The [`position`] of its last port, of the same protocol.
    pub last: u32,
    /// The row.
    pub row: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = assert!(size_of::<Segment>() == 16 && align_of::<Segment>() == 4);

/// A port of a protocol as one number, the protocol first. `protocol` is the IANA number.
#[inline(always)]
pub const fn position(protocol: u8, port: u16) -> u32 {
    (protocol as u32) << 16 | port as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_network_order() {
        assert_eq!([10, 0, 0, 1].pair(6, 8080), [10, 0, 0, 1, 0x1f, 0x90, 6, 0]);
        let mut pair = [0xfd; 20];
        pair[16..].copy_from_slice(&[0, 80, 132, 0]);
        assert_eq!([0xfd; 16].pair(132, 80), pair);
    }

    #[test]
    fn addresses_are_truncated_to_prefixes() {
        let v4 = [10, 1, 255, 255];
        for (length, expected) in
            [(0, [0, 0, 0, 0]), (8, [10, 0, 0, 0]), (17, [10, 1, 128, 0]), (32, v4), (40, v4)]
        {
            assert_eq!(v4.truncated(length), expected, "/{length}");
        }
        let v6 = [0xff; 16];
        assert_eq!(v6.truncated(0), [0; 16]);
        assert_eq!(v6.truncated(128), v6);
        assert_eq!(v6.truncated(1)[..2], [0x80, 0]);
    }

    #[test]
    fn keys_are_compared_whole() {
        let v6: V6 = [7; 16];
        let pair = v6.pair(6, 80);
        assert!(v6.is(&v6) && V6::is_pair(&pair, &pair));
        for byte in 0..16 {
            let mut other = v6;
            other[byte] ^= 1;
            assert!(!v6.is(&other));
        }
        for byte in 0..20 {
            let mut other = pair;
            other[byte] ^= 1;
            assert!(!V6::is_pair(&pair, &other));
        }
        assert!([10, 0, 0, 1].is(&[10, 0, 0, 1]) && ![10, 0, 0, 1].is(&[10, 0, 0, 2]));
        assert!(!V4::is_pair(&[1; 8], &[1, 1, 1, 1, 1, 1, 1, 2]));
    }

    #[test]
    fn bits_end_with_the_row() {
        let mut bits: Bits<2> = [0; 2];
        assert!(set_bit(&mut bits, 0) && set_bit(&mut bits, 64) && set_bit(&mut bits, 127));
        assert_eq!(bits, [1, 1 | 1 << 63]);
        assert!(!set_bit(&mut bits, 128));
        assert_eq!(bits, [1, 1 | 1 << 63]);
    }

    #[test]
    fn positions_order_by_protocol_first() {
        assert!(position(6, 65535) < position(17, 0));
        assert_eq!(position(17, 53), 17 << 16 | 53);
    }
}
