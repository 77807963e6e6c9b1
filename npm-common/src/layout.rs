//! What the eBPF maps hold: keys and values as the kernel's side and user space both lay them out.
//!
//! ```text
//! address ─► endpoints ─► ingress policy id, egress policy id, pod          the pods of this node that are isolated
//!        └─► members  (pods), else networks (longest prefix) ─► peer bits   which peer sets the address is in
//! (address, protocol, port) ─► pairs ─► peer bits                           which named ports of peers it is
//! policy id ─► policies ─► a run of segments, the row for everything else
//!              segments ─► protocol, first port, last port, row
//!              rows ─► peer bits: whom the ports of the segment allow
//! ```
//!
//! A flow is allowed in a direction when the peer's bits and the row's bits meet: `peer & row != 0`, bit 0 standing for
//! any peer. Endpoints, members, networks and pairs exist once a family; policies, segments and rows serve both.
//!
//! Everything is integers of the machine's byte order and byte arrays, without padding. Addresses and ports in keys are
//! bytes in network order, as packets have them.

use core::fmt::Debug;

/// Changes whenever what maps hold, or how they belong together, does: a process of another schema does not go on with
/// them.
pub const SCHEMA: u32 = 1;

/// Words of a row: 64 times as many peer sets, and any peer, can be told apart on a node.
pub const WORDS: usize = 16;

/// Peer sets as bits: bit `n` is bit `n % 64` of word `n / 64`.
pub type Bits<const W: usize> = [u64; W];

/// The bit that every peer has, hosts outside the cluster included.
pub const ANY_PEER: usize = 0;

/// The id of no policy: the endpoint is not isolated for the direction.
pub const NOT_ISOLATED: u32 = 0;

/// The row that allows nobody.
pub const NOBODY: u32 = 0;

/// Entries of each family's map of endpoints.
pub const MAX_ENDPOINTS: u32 = 4096;
/// Entries of each family's map of members: addresses of the cluster's pods that are in some peer set.
pub const MAX_MEMBERS: u32 = 32_768;
/// Entries of each family's map of networks: prefixes of blocks and of their excepts.
pub const MAX_NETWORKS: u32 = 32_768;
/// Entries of each family's map of pairs.
pub const MAX_PAIRS: u32 = 32_768;
/// Policy ids, [`NOT_ISOLATED`] included.
pub const MAX_POLICIES: u32 = 4096;
/// Segments of all policies together.
pub const MAX_SEGMENTS: u32 = 65_536;
/// Rows of all segments together, [`NOBODY`] included.
pub const MAX_ROWS: u32 = 8192;
/// Entries of the map of proofs: connections that were allowed, the least recently used going first.
pub const MAX_PROOFS: u32 = 65_536;
/// Entries of the map of denied connections: those that wait for user space to delete the kernel's entry.
pub const MAX_DENIED: u32 = 65_536;

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
pub trait Address: Copy + Ord + Debug {
    /// The key of (address, protocol, port): the address, the port in network order, the protocol, a zero.
    type Pair: Copy + Ord + Debug;

    /// Bits of an address.
    const BITS: u32;

    /// The key of a port at this address. `protocol` is the IANA number.
    fn pair(self, protocol: u8, port: u16) -> Self::Pair;

    /// The address with all bits behind the first `length` cleared.
    fn truncated(self, length: u32) -> Self;
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
}

/// What is known of an address of an isolated pod of this node.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Endpoint {
    /// The policy of what comes in, or [`NOT_ISOLATED`].
    pub ingress: u32,
    /// The policy of what goes out, or [`NOT_ISOLATED`].
    pub egress: u32,
    /// Which pod it is, from 1: a pod reaches itself, at each of its addresses.
    pub pod: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = assert!(size_of::<Endpoint>() == 16 && align_of::<Endpoint>() == 4);

impl Endpoint {
    /// The value as user space writes it.
    pub const fn words(self) -> [u32; 4] {
        [self.ingress, self.egress, self.pod, self.pad]
    }
}

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

impl Policy {
    /// The value as user space writes it.
    pub const fn words(self) -> [u32; 4] {
        [self.first, self.segments, self.rest, self.pairs]
    }
}

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

impl Segment {
    /// The value as user space writes it.
    pub const fn words(self) -> [u32; 4] {
        [self.first, self.last, self.row, self.pad]
    }
}

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
