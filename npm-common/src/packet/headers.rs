//! What the parser read as one block of memory, so that in the kernel one function can leave it for another: the
//! verifier checks the parser once and apart, and a program that reads the block starts from one state, not from one
//! for each way through the parser.

use super::{Addresses, Family, Fragment, Packet, ParseError, Ports, Protocol};

/// [`Packet`] as integers and bytes. What there is none of is zero.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Headers {
    /// Source and destination as the packet has them: of IPv4 in the first 8 bytes, of IPv6 in all.
    addresses: [u8; 32],
    /// In host byte order.
    source_port: u16,
    /// In host byte order.
    destination_port: u16,
    /// IANA's number.
    pub(super) protocol: u8,
    /// [`IPV6`] and so on.
    flags: u8,
    icmpv6_type: u8,
    pad: u8,
}

const _: () = assert!(size_of::<Headers>() == 40 && align_of::<Headers>() == 8);

/// Who sends to whom, and where to. An IPv4 address is in the first four bytes; what is behind it means nothing. Addresses
/// are at multiples of four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends<'a> {
    /// The source address.
    pub source: &'a [u8; 16],
    /// The destination address.
    pub destination: &'a [u8; 16],
    /// IANA's number of the protocol, and the destination port; `None`: there is no port.
    pub port: Option<(u8, u16)>,
}

const IPV6: u8 = 1;
const PORTS: u8 = 2;
const ICMPV6_TYPE: u8 = 4;
const FIRST: u8 = 8;
const LATER: u8 = 16;
const ADDRESSES: u8 = 32;

impl Headers {
    /// The ends and the port that policies judge.
    #[inline(always)]
    pub fn ends(&self) -> Ends<'_> {
        let [from, to] = match self.family() {
            // Only the first four bytes of each count.
            Family::V4 => [0, 4],
            Family::V6 => [0, 16],
        };
        let (Some(source), Some(destination)) =
            (self.addresses[from..].first_chunk(), self.addresses[to..].first_chunk())
        else {
            unreachable!("32 bytes hold 16 from 16 on")
        };
        Ends { source, destination, port: self.port() }
    }

    /// The memory of one that a program has made.
    pub const fn from_bytes(bytes: &[u8; 40]) -> Self {
        let [addresses @ .., a, b, c, d, protocol, flags, icmpv6_type, pad] = *bytes;
        Self {
            addresses,
            source_port: u16::from_ne_bytes([a, b]),
            destination_port: u16::from_ne_bytes([c, d]),
            protocol,
            flags,
            icmpv6_type,
            pad,
        }
    }

    /// What the first packet of a flow says, as far as policies judge it.
    #[inline(always)]
    pub fn of_ends(family: Family, Ends { source, destination, port }: Ends<'_>, protocol: u8) -> Self {
        let mut headers = Self { flags: ADDRESSES, protocol, ..Self::default() };
        match family {
            Family::V4 => {
                headers.addresses[..4].copy_from_slice(&source[..4]);
                headers.addresses[4..8].copy_from_slice(&destination[..4]);
            }
            Family::V6 => {
                headers.flags |= IPV6;
                headers.addresses[..16].copy_from_slice(source);
                headers.addresses[16..].copy_from_slice(destination);
            }
        }
        if let Some((_, port)) = port {
            headers.flags |= PORTS;
            headers.destination_port = port;
        }
        headers
    }

    const fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Which IP.
    #[inline(always)]
    pub const fn family(&self) -> Family {
        if self.is(IPV6) { Family::V6 } else { Family::V4 }
    }

    /// Whether the addresses were read, as they are of each packet that holds the fixed part of its header, also when the
    /// rest can't be read.
    #[inline(always)]
    pub const fn has_addresses(&self) -> bool {
        self.is(ADDRESSES)
    }

    /// The source and the destination of an IPv4 packet, in network order; of an IPv6 packet they mean nothing.
    #[inline(always)]
    pub fn v4(&self) -> ([u8; 4], [u8; 4]) {
        let [a, b, c, d, e, f, g, h, ..] = self.addresses;
        ([a, b, c, d], [e, f, g, h])
    }

    /// The source and the destination of an IPv6 packet; of an IPv4 packet they mean nothing.
    #[inline(always)]
    pub fn v6(&self) -> ([u8; 16], [u8; 16]) {
        let (mut source, mut destination) = ([0; 16], [0; 16]);
        let (first, second) = self.addresses.split_at(16);
        source.copy_from_slice(first);
        destination.copy_from_slice(second);
        (source, destination)
    }

    /// The upper protocol: see [`Packet::protocol`].
    #[inline(always)]
    pub const fn protocol(&self) -> Protocol {
        Protocol(self.protocol)
    }

    /// The ports: see [`Packet::ports`].
    #[inline(always)]
    pub const fn ports(&self) -> Option<Ports> {
        if self.is(PORTS) {
            Some(Ports { source: self.source_port, destination: self.destination_port })
        } else {
            None
        }
    }

    /// The protocol and destination port that policies judge; `None`: the packet carries no port.
    #[inline(always)]
    pub const fn port(&self) -> Option<(u8, u16)> {
        if self.is(PORTS) { Some((self.protocol, self.destination_port)) } else { None }
    }

    /// Whether it is a part of a packet.
    #[inline(always)]
    pub const fn fragment(&self) -> Fragment {
        if self.is(LATER) {
            Fragment::Later
        } else if self.is(FIRST) {
            Fragment::First
        } else {
            Fragment::None
        }
    }

    /// The type of an ICMPv6 message: see [`Packet::icmpv6_type`].
    #[inline(always)]
    pub const fn icmpv6_type(&self) -> Option<u8> {
        if self.is(ICMPV6_TYPE) { Some(self.icmpv6_type) } else { None }
    }

    /// Whether it is for neighbour discovery or multicast listener discovery, which no policy judges.
    #[inline(always)]
    pub const fn is_neighbour_discovery(&self) -> bool {
        is_neighbour_discovery(self.icmpv6_type())
    }

    /// A number that two that differ seldom share (FNV-1a over the bytes as they lie): a test's program returns it.
    #[inline(always)]
    pub fn digest(&self) -> u32 {
        let Self { addresses, source_port, destination_port, protocol, flags, icmpv6_type, pad } = self;
        let mut digest = 0x811c_9dc5;
        let mut add = |byte: u8| digest = (digest ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        addresses.iter().for_each(|byte| add(*byte));
        source_port.to_le_bytes().into_iter().for_each(&mut add);
        destination_port.to_le_bytes().into_iter().for_each(&mut add);
        [*protocol, *flags, *icmpv6_type, *pad].into_iter().for_each(add);
        digest
    }

    /// The packet that they are of.
    pub fn packet(&self) -> Packet {
        let addresses = match self.family() {
            Family::V4 => {
                let (source, destination) = self.v4();
                Addresses::V4 { source: source.into(), destination: destination.into() }
            }
            Family::V6 => {
                let (source, destination) = self.v6();
                Addresses::V6 { source: source.into(), destination: destination.into() }
            }
        };
        Packet {
            addresses,
            protocol: self.protocol(),
            ports: self.ports(),
            icmpv6_type: self.icmpv6_type(),
            fragment: self.fragment(),
        }
    }

    /// Where the addresses of an IPv4 packet are written.
    #[inline(always)]
    pub(super) fn v4_mut(&mut self) -> &mut [u8; 8] {
        // The block of addresses is longer than 8 bytes, so there always is a first chunk.
        match self.addresses.first_chunk_mut() {
            Some(addresses) => addresses,
            None => unreachable!("32 bytes hold 8"),
        }
    }

    /// Makes it IPv6; gives where the addresses are written.
    #[inline(always)]
    pub(super) fn v6_mut(&mut self) -> &mut [u8; 32] {
        self.flags |= IPV6;
        &mut self.addresses
    }

    #[inline(always)]
    pub(super) fn add_addresses(&mut self) {
        self.flags |= ADDRESSES;
    }

    #[inline(always)]
    pub(super) fn add_ports(&mut self, ports: Ports) {
        self.flags |= PORTS;
        self.source_port = ports.source;
        self.destination_port = ports.destination;
    }

    #[inline(always)]
    pub(super) fn add_icmpv6_type(&mut self, kind: u8) {
        self.flags |= ICMPV6_TYPE;
        self.icmpv6_type = kind;
    }

    #[inline(always)]
    pub(super) fn add_fragment(&mut self, fragment: Fragment) {
        self.flags |= match fragment {
            Fragment::None => 0,
            Fragment::First => FIRST,
            Fragment::Later => LATER,
        };
    }
}

/// Whether no policy judges an ICMPv6 message of this type: [`super::NEIGHBOUR_TYPES`].
#[inline(always)]
pub(super) const fn is_neighbour_discovery(icmpv6_type: Option<u8>) -> bool {
    matches!(icmpv6_type, Some(130..=137 | 143))
}

/// What a parsing function of the kernel's programs returns: 0 when the headers were read, or why not.
#[inline(always)]
pub const fn code(outcome: Result<(), ParseError>) -> u32 {
    match outcome {
        Ok(()) => 0,
        Err(ParseError::Truncated) => 1,
        Err(ParseError::NotIp) => 2,
        Err(ParseError::TooManyTags) => 3,
        Err(ParseError::BadHeader) => 4,
        Err(ParseError::TooManyExtensions) => 5,
    }
}

/// What a [`code`] says; a number that is none is [`ParseError::BadHeader`].
///
/// # Errors
/// The code is not 0.
#[inline(always)]
pub const fn outcome(code: u32) -> Result<(), ParseError> {
    match code {
        0 => Ok(()),
        1 => Err(ParseError::Truncated),
        2 => Err(ParseError::NotIp),
        3 => Err(ParseError::TooManyTags),
        5 => Err(ParseError::TooManyExtensions),
        _ => Err(ParseError::BadHeader),
    }
}
