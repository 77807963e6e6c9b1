//! Reads the headers that a judgement looks at: Ethernet and VLAN tags, IPv4, IPv6 with its extension headers, and
//! the ports behind them.
//!
//! It allocates nothing, every loop has a constant bound, and every read is checked by the [`Bytes`] it reads from; so
//! the same code runs on a slice in user space and on a packet in the kernel. It knows nothing of what is allowed.

mod headers;
mod parse;

pub use headers::{Ends, Headers, code, outcome};
pub use parse::{MAX_OFFSET, Network, behind_ethernet, parse_ethernet, parse_network, read};

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

/// Where a packet's bytes come from.
pub trait Bytes {
    /// Copies the `N` bytes from `offset` on; `None` when not all of them are there, and `to` may then hold some.
    fn copy<const N: usize>(&self, offset: usize, to: &mut [u8; N]) -> Option<()>;

    /// The `N` bytes from `offset` on, or `None` when not all of them are there.
    #[inline(always)]
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut array = [0; N];
        self.copy(offset, &mut array)?;
        Some(array)
    }
}

impl Bytes for &[u8] {
    fn copy<const N: usize>(&self, offset: usize, to: &mut [u8; N]) -> Option<()> {
        *to = *self.get(offset..)?.first_chunk()?;
        Some(())
    }
}

/// EtherType of IPv4 (IANA "IEEE 802 Numbers").
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6 (RFC 2464 §3).
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// EtherType of a VLAN tag (IEEE 802.1Q).
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of a service VLAN tag (IEEE 802.1ad).
pub const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

/// Two addresses and an EtherType (IEEE 802.3).
pub const ETHERNET_LEN_BYTES: usize = 14;
/// A tag and the EtherType behind it (IEEE 802.1Q).
pub const VLAN_LEN_BYTES: usize = 4;
/// An IPv4 header without options (RFC 791 §3.1).
pub const IPV4_LEN_BYTES: usize = 20;
/// The fixed IPv6 header (RFC 8200 §3).
pub const IPV6_LEN_BYTES: usize = 40;
/// The ports at the beginning of TCP, UDP and SCTP.
const PORTS_LEN_BYTES: usize = 4;
/// The shortest ICMPv6 message; what is shorter ip6tables can't match and drops (icmp6_match, net/ipv6/netfilter).
const ICMPV6_LEN_BYTES: usize = 8;

/// VLAN tags that are looked behind: a service tag and a customer tag.
pub const MAX_VLAN_TAGS: usize = 2;
/// IPv6 extension headers that are looked behind. RFC 8200 §4.1 lets each occur once, destination options twice: 7.
pub const MAX_EXTENSIONS: usize = 8;

/// IPv4's "more fragments" (RFC 791 §3.1), in the 16 bits that also hold the offset.
const IPV4_MORE_FRAGMENTS: u16 = 0x2000;
/// IPv4's fragment offset, in units of 8 bytes.
const IPV4_OFFSET: u16 = 0x1fff;
/// IPv6's "more fragments" (RFC 8200 §4.5), in the 16 bits that also hold the offset.
const IPV6_MORE_FRAGMENTS: u16 = 0x0001;
/// IPv6's fragment offset, in units of 8 bytes; these bits are the offset in bytes.
const IPV6_OFFSET: u16 = 0xfff8;

/// A protocol number as IPv4's Protocol and IPv6's Next Header have it (IANA "Protocol Numbers").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Protocol(pub u8);

impl Protocol {
    /// IPv6 Hop-by-Hop Options (RFC 8200 §4.3).
    pub const HOP_BY_HOP: Self = Self(0);
    /// ICMP (RFC 792).
    pub const ICMP: Self = Self(1);
    /// TCP (RFC 9293).
    pub const TCP: Self = Self(6);
    /// UDP (RFC 768).
    pub const UDP: Self = Self(17);
    /// IPv6 Routing Header (RFC 8200 §4.4).
    pub const ROUTING: Self = Self(43);
    /// IPv6 Fragment Header (RFC 8200 §4.5).
    pub const FRAGMENT: Self = Self(44);
    /// Authentication Header (RFC 4302).
    pub const AUTHENTICATION: Self = Self(51);
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: Self = Self(58);
    /// IPv6 Destination Options (RFC 8200 §4.6).
    pub const DESTINATION_OPTIONS: Self = Self(60);
    /// SCTP (RFC 9260).
    pub const SCTP: Self = Self(132);

    /// Whether its header begins with a source and a destination port, as those that NetworkPolicy names do.
    #[inline(always)]
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP)
    }

    /// Whether an IPv6 next header of this number is an extension header that Linux looks behind (`ipv6_ext_hdr`,
    /// net/ipv6/exthdrs_core.c), and not the upper protocol.
    #[inline(always)]
    pub const fn is_extension(self) -> bool {
        matches!(
            self,
            Self::HOP_BY_HOP
                | Self::ROUTING
                | Self::FRAGMENT
                | Self::AUTHENTICATION
                | Self::DESTINATION_OPTIONS
        )
    }
}

/// Which IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// From where to where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses {
    /// Of an IPv4 packet.
    V4 {
        /// The sender's.
        source: Ipv4Addr,
        /// The receiver's.
        destination: Ipv4Addr,
    },
    /// Of an IPv6 packet. With a routing header the destination is that of the fixed header: the next hop's.
    V6 {
        /// The sender's.
        source: Ipv6Addr,
        /// The receiver's.
        destination: Ipv6Addr,
    },
}

impl Addresses {
    /// The family of both.
    #[inline(always)]
    pub const fn family(&self) -> Family {
        match self {
            Self::V4 { .. } => Family::V4,
            Self::V6 { .. } => Family::V6,
        }
    }
}

/// The ports of TCP, UDP and SCTP, in host byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// The sender's.
    pub source: u16,
    /// The receiver's.
    pub destination: u16,
}

/// Whether a packet is a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// The first of several: it carries the upper header.
    First,
    /// Not the first: it carries no upper header.
    Later,
    /// A whole packet (an IPv6 fragment header that says "first and last" included, RFC 6946).
    None,
}

/// What the headers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// From where to where.
    pub addresses: Addresses,
    /// The upper protocol. Of a later IPv6 fragment it is the first header of the fragmented part, which may be an
    /// extension header: what follows it is in the first fragment only.
    pub protocol: Protocol,
    /// `None` when the protocol has none, or the fragment does not carry them.
    pub ports: Option<Ports>,
    /// The type of an ICMPv6 message; `None` when the protocol is another, or the fragment does not carry it.
    pub icmpv6_type: Option<u8>,
    /// Whether it is a part of a packet.
    pub fragment: Fragment,
}

/// ICMPv6 types that no policy judges: multicast listener discovery (130-132, 143; RFC 2710, 3810) and neighbour
/// discovery (133-137; RFC 4861). On a bridge they cross the node like any packet, without a connection.
pub const NEIGHBOUR_TYPES: [u8; 9] = [130, 131, 132, 133, 134, 135, 136, 137, 143];

impl Packet {
    /// Whether it is one of [`NEIGHBOUR_TYPES`], so that no policy judges it.
    #[inline(always)]
    pub const fn is_neighbour_discovery(&self) -> bool {
        headers::is_neighbour_discovery(self.icmpv6_type)
    }
}

/// Why the headers can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParseError {
    /// The bytes end before the headers do.
    Truncated,
    /// Neither IPv4 nor IPv6.
    NotIp,
    /// More than [`MAX_VLAN_TAGS`] VLAN tags: what is behind them may be IP.
    TooManyTags,
    /// A header contradicts itself: version, header length, total length.
    BadHeader,
    /// More than [`MAX_EXTENSIONS`] IPv6 extension headers.
    TooManyExtensions,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "the packet ends before its headers do",
            Self::NotIp => "neither IPv4 nor IPv6",
            Self::TooManyTags => "too many VLAN tags",
            Self::BadHeader => "a header contradicts itself",
            Self::TooManyExtensions => "too many IPv6 extension headers",
        })
    }
}

impl core::error::Error for ParseError {}

#[cfg(test)]
mod tests;
