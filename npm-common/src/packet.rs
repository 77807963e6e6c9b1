//! Reads the headers that a judgement looks at: Ethernet and VLAN tags, IPv4, IPv6 with its extension headers, and
//! the ports behind them.
//!
//! It allocates nothing, every loop has a constant bound, and every read is checked by the [`Bytes`] it reads from; so
//! the same code runs on a slice in user space and on a packet in the kernel. It knows nothing of what is allowed.

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

/// Where a packet's bytes come from.
pub trait Bytes {
    /// The `N` bytes from `offset` on, or `None` when not all of them are there.
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

impl Bytes for &[u8] {
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
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
    /// Whether it is a part of a packet.
    pub fragment: Fragment,
}

/// Why the headers can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParseError {
    /// The bytes end before the headers do.
    Truncated,
    /// Neither IPv4 nor IPv6.
    NotIp,
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
            Self::BadHeader => "a header contradicts itself",
            Self::TooManyExtensions => "too many IPv6 extension headers",
        })
    }
}

impl core::error::Error for ParseError {}

/// Reads a packet that begins with an Ethernet header.
///
/// # Errors
/// [`ParseError`]: what can't be read.
#[inline(always)]
pub fn parse_ethernet(bytes: &impl Bytes) -> Result<Packet, ParseError> {
    let mut offset = ETHERNET_LEN_BYTES;
    let mut ethertype = word(bytes, offset - 2)?;
    for _ in 0..MAX_VLAN_TAGS {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_SERVICE_VLAN {
            break;
        }
        offset += VLAN_LEN_BYTES;
        ethertype = word(bytes, offset - 2)?;
    }
    match ethertype {
        ETHERTYPE_IPV4 => parse_ipv4(bytes, offset),
        ETHERTYPE_IPV6 => parse_ipv6(bytes, offset),
        _ => Err(ParseError::NotIp),
    }
}

/// Reads a packet whose IP header begins at `offset`; its version says which IP.
///
/// # Errors
/// [`ParseError`]: what can't be read.
#[inline(always)]
pub fn parse_ip(bytes: &impl Bytes, offset: usize) -> Result<Packet, ParseError> {
    let [first] = bytes.array(offset).ok_or(ParseError::Truncated)?;
    match first >> 4 {
        4 => parse_ipv4(bytes, offset),
        6 => parse_ipv6(bytes, offset),
        _ => Err(ParseError::NotIp),
    }
}

/// Reads a packet whose IPv4 header begins at `offset`.
///
/// # Errors
/// [`ParseError`]: what can't be read.
#[inline(always)]
pub fn parse_ipv4(bytes: &impl Bytes, offset: usize) -> Result<Packet, ParseError> {
    let [version_and_length, _] = bytes.array(offset).ok_or(ParseError::Truncated)?;
    let header_len = usize::from(version_and_length & 0xf) * 4;
    if version_and_length >> 4 != 4 || header_len < IPV4_LEN_BYTES {
        return Err(ParseError::BadHeader);
    }
    let total_len = usize::from(word(bytes, offset + 2)?);
    let fragment = word(bytes, offset + 6)?;
    let [protocol] = bytes.array(offset + 9).ok_or(ParseError::Truncated)?;
    let source: [u8; 4] = bytes.array(offset + 12).ok_or(ParseError::Truncated)?;
    let destination: [u8; 4] = bytes.array(offset + 16).ok_or(ParseError::Truncated)?;

    let fragment = match (fragment & IPV4_OFFSET, fragment & IPV4_MORE_FRAGMENTS) {
        (0, 0) => Fragment::None,
        (0, _) => Fragment::First,
        _ => Fragment::Later,
    };
    let protocol = Protocol(protocol);
    // 0 is what the kernel writes for aggregates of more than 64 KiB (BIG TCP): the length is elsewhere.
    let payload_len = match total_len {
        0 => None,
        _ => Some(total_len.checked_sub(header_len).ok_or(ParseError::BadHeader)?),
    };
    Ok(Packet {
        addresses: Addresses::V4 { source: source.into(), destination: destination.into() },
        protocol,
        ports: ports(bytes, Upper { offset: offset + header_len, len: payload_len, protocol, fragment })?,
        fragment,
    })
}

/// Reads a packet whose IPv6 header begins at `offset`.
///
/// # Errors
/// [`ParseError`]: what can't be read.
#[inline(always)]
pub fn parse_ipv6(bytes: &impl Bytes, offset: usize) -> Result<Packet, ParseError> {
    let [version, _] = bytes.array(offset).ok_or(ParseError::Truncated)?;
    if version >> 4 != 6 {
        return Err(ParseError::BadHeader);
    }
    let payload_len = usize::from(word(bytes, offset + 4)?);
    let [next, _] = bytes.array(offset + 6).ok_or(ParseError::Truncated)?;
    let source: [u8; 16] = bytes.array(offset + 8).ok_or(ParseError::Truncated)?;
    let destination: [u8; 16] = bytes.array(offset + 24).ok_or(ParseError::Truncated)?;

    let chain = follow_extensions(bytes, Protocol(next), offset + IPV6_LEN_BYTES)?;
    // 0: a jumbogram (RFC 2675) or an aggregate of more than 64 KiB (BIG TCP): the length is elsewhere.
    let len = match payload_len {
        0 => None,
        _ => {
            let extensions_len = chain.offset - (offset + IPV6_LEN_BYTES);
            Some(payload_len.checked_sub(extensions_len).ok_or(ParseError::BadHeader)?)
        }
    };
    let Chain { protocol, offset, fragment } = chain;
    Ok(Packet {
        addresses: Addresses::V6 { source: source.into(), destination: destination.into() },
        protocol,
        ports: ports(bytes, Upper { offset, len, protocol, fragment })?,
        fragment,
    })
}

/// Where a chain of extension headers leads.
struct Chain {
    protocol: Protocol,
    /// Of the header that `protocol` names.
    offset: usize,
    fragment: Fragment,
}

/// Follows the extension headers that Linux follows (`ipv6_ext_hdr`, net/ipv6/exthdrs_core.c), `next` at `offset`
/// first. Stops at a fragment header of a later fragment: what follows is payload.
#[inline(always)]
fn follow_extensions(bytes: &impl Bytes, next: Protocol, offset: usize) -> Result<Chain, ParseError> {
    let mut chain = Chain { protocol: next, offset, fragment: Fragment::None };
    for _ in 0..MAX_EXTENSIONS {
        let is_fragment = chain.protocol == Protocol::FRAGMENT;
        let is_authentication = chain.protocol == Protocol::AUTHENTICATION;
        let is_options = matches!(
            chain.protocol,
            Protocol::HOP_BY_HOP | Protocol::ROUTING | Protocol::DESTINATION_OPTIONS
        );
        if !(is_fragment || is_authentication || is_options) {
            return Ok(chain);
        }
        let [next, len] = bytes.array(chain.offset).ok_or(ParseError::Truncated)?;
        let len = usize::from(len);
        if is_fragment {
            let word = word(bytes, chain.offset + 2)?;
            if word & IPV6_OFFSET != 0 {
                chain.fragment = Fragment::Later;
            } else if word & IPV6_MORE_FRAGMENTS != 0 {
                chain.fragment = Fragment::First;
            }
        }
        chain.offset += if is_fragment {
            8
        } else if is_authentication {
            // RFC 4302 §2.2: in units of 4 bytes, minus 2.
            (len + 2) * 4
        } else {
            // RFC 8200 §4: in units of 8 bytes, without the first.
            (len + 1) * 8
        };
        chain.protocol = Protocol(next);
        if chain.fragment == Fragment::Later {
            return Ok(chain);
        }
    }
    match chain.protocol {
        Protocol::HOP_BY_HOP
        | Protocol::ROUTING
        | Protocol::FRAGMENT
        | Protocol::AUTHENTICATION
        | Protocol::DESTINATION_OPTIONS => Err(ParseError::TooManyExtensions),
        _ => Ok(chain),
    }
}

/// The upper header and what is known of it.
struct Upper {
    offset: usize,
    /// Bytes from `offset` on that the IP header counts; `None` when it does not say.
    len: Option<usize>,
    protocol: Protocol,
    fragment: Fragment,
}

#[inline(always)]
fn ports(bytes: &impl Bytes, upper: Upper) -> Result<Option<Ports>, ParseError> {
    if !upper.protocol.has_ports() || upper.fragment == Fragment::Later {
        return Ok(None);
    }
    // Bytes past the IP packet's end are padding, not ports.
    if upper.len.is_some_and(|len| len < 4) {
        return Err(ParseError::BadHeader);
    }
    let [a, b, c, d] = bytes.array(upper.offset).ok_or(ParseError::Truncated)?;
    Ok(Some(Ports { source: u16::from_be_bytes([a, b]), destination: u16::from_be_bytes([c, d]) }))
}

#[inline(always)]
fn word(bytes: &impl Bytes, offset: usize) -> Result<u16, ParseError> {
    bytes.array(offset).map(u16::from_be_bytes).ok_or(ParseError::Truncated)
}

#[cfg(test)]
mod tests;
