//! The parser: finds the IP header and reads what a judgement looks at.
//!
//! It allocates nothing, every loop has a constant bound, and every read is checked by the [`Bytes`] it reads from. It
//! reads whole headers and writes what it finds to where it stays: each read is a branch for the verifier, and
//! each value that is carried on makes more states of it.

use super::headers::Headers;
use super::{
    Bytes, ETHERNET_LEN_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN,
    Fragment, ICMPV6_LEN_BYTES, IPV4_LEN_BYTES, IPV4_MORE_FRAGMENTS, IPV4_OFFSET, IPV6_LEN_BYTES,
    IPV6_MORE_FRAGMENTS, IPV6_OFFSET, MAX_EXTENSIONS, MAX_VLAN_TAGS, PORTS_LEN_BYTES, ParseError, Ports,
    Protocol, VLAN_LEN_BYTES,
};

/// Offsets past this are not read: no chain of headers that the parser follows is longer, and the verifier wants a bound.
pub const MAX_OFFSET: usize = 0x7fff;

/// Where a packet's IP header is, and which IP the layer below says that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The EtherType, in host byte order.
    pub ethertype: u16,
    /// Of the IP header in the packet's bytes.
    pub offset: usize,
}

/// Finds the IP header of a packet that begins with an Ethernet header, VLAN tags or not.
///
/// # Errors
/// [`ParseError::Truncated`], or [`ParseError::TooManyTags`].
#[inline(always)]
pub fn behind_ethernet(bytes: &impl Bytes) -> Result<Network, ParseError> {
    let mut offset = ETHERNET_LEN_BYTES;
    let mut ethertype = word(bytes, offset - 2)?;
    for _ in 0..MAX_VLAN_TAGS {
        if !is_tag(ethertype) {
            break;
        }
        offset += VLAN_LEN_BYTES;
        ethertype = word(bytes, offset - 2)?;
    }
    if is_tag(ethertype) { Err(ParseError::TooManyTags) } else { Ok(Network { ethertype, offset }) }
}

const fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN)
}

/// Reads a packet that begins with an Ethernet header.
///
/// # Errors
/// [`ParseError`]: what can't be read.
#[inline(always)]
pub fn parse_ethernet(bytes: &impl Bytes) -> Result<Headers, ParseError> {
    parse_network(bytes, behind_ethernet(bytes)?)
}

/// Reads a packet from its IP header on.
///
/// # Errors
/// [`ParseError`]: what can't be read.
#[inline(always)]
pub fn parse_network(bytes: &impl Bytes, network: Network) -> Result<Headers, ParseError> {
    let mut headers = Headers::default();
    read(bytes, network, &mut headers)?;
    Ok(headers)
}

/// Reads a packet from its IP header on. A device without Ethernet headers has it at offset 0.
///
/// # Errors
/// [`ParseError`]: what can't be read. [`ParseError::NotIp`]: the EtherType is of neither IP. `headers` then hold what
/// was read until there: [`Headers::has_addresses`].
#[inline(always)]
pub fn read(bytes: &impl Bytes, network: Network, headers: &mut Headers) -> Result<(), ParseError> {
    *headers = Headers::default();
    let Network { ethertype, offset } = network;
    if offset > MAX_OFFSET {
        return Err(ParseError::Truncated);
    }
    let Upper { offset, len, protocol, fragment } = match ethertype {
        ETHERTYPE_IPV4 => ipv4(bytes, offset, headers)?,
        ETHERTYPE_IPV6 => ipv6(bytes, offset, headers)?,
        _ => return Err(ParseError::NotIp),
    };
    headers.protocol = protocol.0;
    headers.add_fragment(fragment);
    if fragment == Fragment::Later {
        return Ok(());
    }
    // Bytes past the IP packet's end are padding, and no header.
    let holds =
        |needed| if len.is_some_and(|len| len < needed) { Err(ParseError::BadHeader) } else { Ok(()) };
    if protocol.has_ports() {
        holds(PORTS_LEN_BYTES)?;
        let [a, b, c, d] = bytes.array(offset).ok_or(ParseError::Truncated)?;
        let (source, destination) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        headers.add_ports(Ports { source, destination });
    } else if protocol == Protocol::ICMPV6 && ethertype == ETHERTYPE_IPV6 {
        holds(ICMPV6_LEN_BYTES)?;
        let header: [u8; ICMPV6_LEN_BYTES] = bytes.array(offset).ok_or(ParseError::Truncated)?;
        headers.add_icmpv6_type(header[0]);
    }
    Ok(())
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
fn ipv4(bytes: &impl Bytes, offset: usize, headers: &mut Headers) -> Result<Upper, ParseError> {
    let start: [u8; IPV4_LEN_BYTES - 2 * 4] = bytes.array(offset).ok_or(ParseError::Truncated)?;
    bytes.copy(offset + start.len(), headers.v4_mut()).ok_or(ParseError::Truncated)?;
    headers.add_addresses();
    let [version_and_length, _, t0, t1, _, _, f0, f1, _, protocol, _, _] = start;
    let header_len = usize::from(version_and_length & 0xf) * 4;
    if version_and_length >> 4 != 4 || header_len < IPV4_LEN_BYTES {
        return Err(ParseError::BadHeader);
    }
    let total_len = usize::from(u16::from_be_bytes([t0, t1]));
    let fragment = u16::from_be_bytes([f0, f1]);
    let fragment = match (fragment & IPV4_OFFSET, fragment & IPV4_MORE_FRAGMENTS) {
        (0, 0) => Fragment::None,
        (0, _) => Fragment::First,
        _ => Fragment::Later,
    };
    // 0 is what the kernel writes for aggregates of more than 64 KiB (BIG TCP): the length is elsewhere.
    let len = match total_len {
        0 => None,
        _ => Some(total_len.checked_sub(header_len).ok_or(ParseError::BadHeader)?),
    };
    Ok(Upper { offset: offset + header_len, len, protocol: Protocol(protocol), fragment })
}

#[inline(always)]
fn ipv6(bytes: &impl Bytes, offset: usize, headers: &mut Headers) -> Result<Upper, ParseError> {
    let start: [u8; IPV6_LEN_BYTES - 2 * 16] = bytes.array(offset).ok_or(ParseError::Truncated)?;
    bytes.copy(offset + start.len(), headers.v6_mut()).ok_or(ParseError::Truncated)?;
    headers.add_addresses();
    let [first, _, _, _, p0, p1, next, _] = start;
    if first >> 4 != 6 {
        return Err(ParseError::BadHeader);
    }
    let payload_len = usize::from(u16::from_be_bytes([p0, p1]));
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
    let fragment = match (fragment & IPV6_OFFSET, fragment & IPV6_MORE_FRAGMENTS) {
        (0, 0) => Fragment::None,
        (0, _) => Fragment::First,
        _ => Fragment::Later,
    };
    Ok(Upper { offset, len, protocol, fragment })
}

/// Where a chain of extension headers leads.
struct Chain {
    protocol: Protocol,
    /// Of the header that `protocol` names.
    offset: usize,
    /// What the fragment headers say, all together: [`IPV6_OFFSET`], [`IPV6_MORE_FRAGMENTS`].
    fragment: u16,
}

/// Follows the extension headers that Linux follows (`ipv6_ext_hdr`, net/ipv6/exthdrs_core.c), `next` at `offset`
/// first. Stops at a fragment header of a later fragment: what follows is payload.
#[inline(always)]
fn follow_extensions(bytes: &impl Bytes, next: Protocol, offset: usize) -> Result<Chain, ParseError> {
    let mut chain = Chain { protocol: next, offset, fragment: 0 };
    for _ in 0..MAX_EXTENSIONS {
        if !chain.protocol.is_extension() || chain.fragment & IPV6_OFFSET != 0 {
            return Ok(chain);
        }
        // Each is of 8 bytes at least.
        let [next, len, high, low, _, _, _, _] = bytes.array(chain.offset).ok_or(ParseError::Truncated)?;
        let len = usize::from(len);
        chain.offset += match chain.protocol {
            Protocol::FRAGMENT => {
                chain.fragment |= u16::from_be_bytes([high, low]);
                8
            }
            // RFC 4302 §2.2: in units of 4 bytes, minus 2.
            Protocol::AUTHENTICATION => (len + 2) * 4,
            // RFC 8200 §4: in units of 8 bytes, without the first.
            _ => (len + 1) * 8,
        };
        if chain.offset > MAX_OFFSET {
            return Err(ParseError::Truncated);
        }
        chain.protocol = Protocol(next);
    }
    if chain.protocol.is_extension() && chain.fragment & IPV6_OFFSET == 0 {
        return Err(ParseError::TooManyExtensions);
    }
    Ok(chain)
}

#[inline(always)]
fn word(bytes: &impl Bytes, offset: usize) -> Result<u16, ParseError> {
    bytes.array(offset).map(u16::from_be_bytes).ok_or(ParseError::Truncated)
}
