//! The observer's counters: which slot of the kernel's array a packet is counted in, and what a slot holds.

use crate::packet::{Family, Fragment, Headers, ParseError, Protocol};

/// What a packet is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Read to its upper protocol.
    Read {
        /// Which IP.
        family: Family,
        /// Which protocol.
        kind: Kind,
        /// Whether the ports, or what the protocol has instead, are in another packet.
        part: Part,
    },
    /// Not read.
    Unread(Unread),
}

/// Protocols that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP in IPv4, ICMPv6 in IPv6.
    Icmp,
    /// Anything else.
    Other,
}

/// Whether a packet carries its upper header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A whole packet, or its first fragment.
    WithHeader,
    /// A later fragment.
    Later,
}

/// Why a packet was not read: [`ParseError`]'s variants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unread {
    /// [`ParseError::Truncated`].
    Truncated,
    /// [`ParseError::NotIp`].
    NotIp,
    /// [`ParseError::BadHeader`].
    BadHeader,
    /// [`ParseError::TooManyExtensions`].
    TooManyExtensions,
    /// [`ParseError::TooManyTags`].
    TooManyTags,
}

const KINDS: [Kind; 5] = [Kind::Tcp, Kind::Udp, Kind::Sctp, Kind::Icmp, Kind::Other];
const PARTS: [Part; 2] = [Part::WithHeader, Part::Later];
const UNREAD: [Unread; 5] =
    [Unread::Truncated, Unread::NotIp, Unread::BadHeader, Unread::TooManyExtensions, Unread::TooManyTags];

/// Slots of the array.
pub const SLOTS: u32 = (2 * KINDS.len() * PARTS.len() + UNREAD.len()) as u32;

impl Class {
    /// The class of what the parser gave.
    #[inline(always)]
    pub fn of(parsed: Result<&Headers, &ParseError>) -> Self {
        match parsed {
            Ok(headers) => {
                let family = headers.family();
                let kind = match (family, headers.protocol()) {
                    (_, Protocol::TCP) => Kind::Tcp,
                    (_, Protocol::UDP) => Kind::Udp,
                    (_, Protocol::SCTP) => Kind::Sctp,
                    (Family::V4, Protocol::ICMP) | (Family::V6, Protocol::ICMPV6) => Kind::Icmp,
                    (Family::V4 | Family::V6, _) => Kind::Other,
                };
                let part = match headers.fragment() {
                    Fragment::None | Fragment::First => Part::WithHeader,
                    Fragment::Later => Part::Later,
                };
                Self::Read { family, kind, part }
            }
            Err(ParseError::Truncated) => Self::Unread(Unread::Truncated),
            Err(ParseError::NotIp) => Self::Unread(Unread::NotIp),
            Err(ParseError::BadHeader) => Self::Unread(Unread::BadHeader),
            Err(ParseError::TooManyExtensions) => Self::Unread(Unread::TooManyExtensions),
            Err(ParseError::TooManyTags) => Self::Unread(Unread::TooManyTags),
        }
    }

    /// The array's index, below [`SLOTS`]; every class has its own.
    #[inline(always)]
    pub const fn slot(self) -> u32 {
        match self {
            Self::Unread(why) => why as u32,
            Self::Read { family, kind, part } => {
                let family = match family {
                    Family::V4 => 0,
                    Family::V6 => 1,
                };
                UNREAD.len() as u32
                    + (family * KINDS.len() as u32 + kind as u32) * PARTS.len() as u32
                    + part as u32
            }
        }
    }

    /// Every class, in the order of the slots.
    pub fn all() -> impl Iterator<Item = Self> {
        let unread = UNREAD.into_iter().map(Self::Unread);
        let read = [Family::V4, Family::V6].into_iter().flat_map(|family| {
            KINDS
                .into_iter()
                .flat_map(move |kind| PARTS.into_iter().map(move |part| Self::Read { family, kind, part }))
        });
        unread.chain(read)
    }
}

/// What a slot holds, for each CPU.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// Packets; one segmented later (GSO) counts once.
    pub packets: u64,
    /// Their bytes, with the link layer's header.
    pub bytes: u64,
}

const _: () = assert!(size_of::<Count>() == 16 && align_of::<Count>() == 8);

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn every_class_has_its_own_slot() {
        let slots: std::vec::Vec<u32> = Class::all().map(Class::slot).collect();
        let expected: std::vec::Vec<u32> = (0..SLOTS).collect();
        assert_eq!(slots, expected);
    }

    #[test]
    fn icmp_of_the_other_family_is_not_icmp() {
        use crate::packet::{ETHERTYPE_IPV6, Network, parse_network};
        let mut packet = [0; 40];
        (packet[0], packet[6]) = (0x60, Protocol::ICMP.0);
        let headers = parse_network(&packet.as_slice(), Network { ethertype: ETHERTYPE_IPV6, offset: 0 });
        let expected = Class::Read { family: Family::V6, kind: Kind::Other, part: Part::WithHeader };
        assert_eq!(Class::of(headers.as_ref()), expected);
    }
}
