//! What became of a packet at the hook: the counters' slots.

use crate::decide::{Judgement, Verdict};
use crate::packet::{Headers, ParseError};

/// What became of a packet, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Passed: not IP.
    NotIp,
    /// Passed: the node itself sent it.
    Local,
    /// Passed: neighbour discovery or multicast listeners' reports, without which no policy could be enforced at all.
    Neighbour,
    /// Passed: of a connection that was judged and allowed.
    Proven,
    /// Passed: neither end is isolated.
    NotIsolated,
    /// Passed: the destination's ingress allows it, the source's egress is not isolated.
    IngressAllowed,
    /// Passed: the source's egress allows it, the destination's ingress is not isolated.
    EgressAllowed,
    /// Passed: both allow it.
    BothAllowed,
    /// Dropped: the destination's ingress denies it.
    Ingress,
    /// Dropped: the source's egress denies it.
    Egress,
    /// Dropped: both do.
    Both,
    /// Dropped: of an isolated pod, and it ends before its headers do.
    Truncated,
    /// Dropped: of an isolated pod, and a header contradicts itself.
    BadHeader,
    /// Dropped: of an isolated pod, and it has too many IPv6 extension headers.
    TooManyExtensions,
    /// Dropped: it has too many VLAN tags for anybody to say whose it is.
    TooManyTags,
    /// Dropped: the kernel would not show its connection.
    NoConnection,
}

/// Slots of the counters.
pub const OUTCOMES: u32 = Outcome::ALL.len() as u32;

impl Outcome {
    /// All, in the order of their slots.
    pub const ALL: [Self; 16] = [
        Self::NotIp,
        Self::Local,
        Self::Neighbour,
        Self::Proven,
        Self::NotIsolated,
        Self::IngressAllowed,
        Self::EgressAllowed,
        Self::BothAllowed,
        Self::Ingress,
        Self::Egress,
        Self::Both,
        Self::Truncated,
        Self::BadHeader,
        Self::TooManyExtensions,
        Self::TooManyTags,
        Self::NoConnection,
    ];

    /// Its counter's index, below [`OUTCOMES`].
    #[inline(always)]
    pub const fn slot(self) -> u32 {
        self as u32
    }

    /// The outcome with this slot; a number that is none is [`Outcome::Both`].
    #[inline(always)]
    pub const fn at(slot: u32) -> Self {
        // Spelt out: the kernel would not let a program read a table at a place that it has not seen checked.
        match slot {
            0 => Self::NotIp,
            1 => Self::Local,
            2 => Self::Neighbour,
            3 => Self::Proven,
            4 => Self::NotIsolated,
            5 => Self::IngressAllowed,
            6 => Self::EgressAllowed,
            7 => Self::BothAllowed,
            8 => Self::Ingress,
            9 => Self::Egress,
            11 => Self::Truncated,
            12 => Self::BadHeader,
            13 => Self::TooManyExtensions,
            14 => Self::TooManyTags,
            15 => Self::NoConnection,
            _ => Self::Both,
        }
    }

    /// Whether the packet goes on.
    #[inline(always)]
    pub const fn passes(self) -> bool {
        match self {
            Self::NotIp
            | Self::Local
            | Self::Neighbour
            | Self::Proven
            | Self::NotIsolated
            | Self::IngressAllowed
            | Self::EgressAllowed
            | Self::BothAllowed => true,
            Self::Ingress
            | Self::Egress
            | Self::Both
            | Self::Truncated
            | Self::BadHeader
            | Self::TooManyExtensions
            | Self::TooManyTags
            | Self::NoConnection => false,
        }
    }

    /// What a verdict makes of a packet.
    #[inline(always)]
    pub const fn of(verdict: Verdict) -> Self {
        match (verdict.ingress, verdict.egress) {
            (Judgement::Denied, Judgement::Denied) => Self::Both,
            (Judgement::Denied, Judgement::Allowed | Judgement::NotIsolated) => Self::Ingress,
            (Judgement::Allowed | Judgement::NotIsolated, Judgement::Denied) => Self::Egress,
            (Judgement::NotIsolated, Judgement::NotIsolated) => Self::NotIsolated,
            (Judgement::Allowed, Judgement::NotIsolated) => Self::IngressAllowed,
            (Judgement::NotIsolated, Judgement::Allowed) => Self::EgressAllowed,
            (Judgement::Allowed, Judgement::Allowed) => Self::BothAllowed,
        }
    }

    /// What becomes of an isolated pod's packet that can't be read.
    #[inline(always)]
    pub const fn unread(error: ParseError) -> Self {
        match error {
            ParseError::Truncated => Self::Truncated,
            ParseError::NotIp => Self::NotIp,
            ParseError::BadHeader => Self::BadHeader,
            ParseError::TooManyExtensions => Self::TooManyExtensions,
            ParseError::TooManyTags => Self::TooManyTags,
        }
    }

    /// Its name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotIp => "not_ip",
            Self::Local => "local",
            Self::Neighbour => "neighbour",
            Self::Proven => "established",
            Self::NotIsolated => "not_isolated",
            Self::IngressAllowed => "ingress_allowed",
            Self::EgressAllowed => "egress_allowed",
            Self::BothAllowed => "both_allowed",
            Self::Ingress => "ingress_denied",
            Self::Egress => "egress_denied",
            Self::Both => "both_denied",
            Self::Truncated => "truncated",
            Self::BadHeader => "bad_header",
            Self::TooManyExtensions => "too_many_extensions",
            Self::TooManyTags => "too_many_tags",
            Self::NoConnection => "no_connection",
        }
    }

    /// Its name, with spaces behind it: all are as long.
    pub const fn padded(self) -> [u8; NAME_BYTES] {
        let (name, mut padded, mut at) = (self.name().as_bytes(), [b' '; NAME_BYTES], 0);
        while at < name.len() {
            padded[at] = name[at];
            at += 1;
        }
        padded
    }
}

/// As long as the longest [`Outcome::name`], in bytes.
pub const NAME_BYTES: usize = 19;

/// A packet that was dropped, as the ring buffer has it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// What was judged.
    pub headers: Headers,
    /// [`Outcome::slot`].
    pub outcome: u32,
    /// The number of the interface that it was to leave by.
    pub interface: u32,
}

const _: () = assert!(size_of::<Dropped>() == DROPPED_BYTES);

/// Bytes of a [`Dropped`].
pub const DROPPED_BYTES: usize = 48;

/// Bytes of the ring buffer: a power of two, and pages. The kernel puts 8 before each event.
pub const RING_BYTES: u32 = 128 << 10;

impl Dropped {
    /// The memory of one.
    pub fn from_bytes(bytes: &[u8; DROPPED_BYTES]) -> Self {
        let [headers @ .., a, b, c, d, e, f, g, h] = *bytes;
        Self {
            headers: Headers::from_bytes(&headers),
            outcome: u32::from_ne_bytes([a, b, c, d]),
            interface: u32::from_ne_bytes([e, f, g, h]),
        }
    }
}

/// Whether the hook drops what it denies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// It judges, records proofs of what it allows, and drops nothing.
    Mark,
    /// It drops what it denies.
    Enforce,
}

impl Mode {
    /// The number in the map of settings. A map that was just made holds [`Mode::Mark`]: nothing was enforced before.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        match self {
            Self::Mark => 0,
            Self::Enforce => 1,
        }
    }

    /// The mode with this number. Anything unknown enforces.
    #[inline(always)]
    pub const fn of(number: u32) -> Self {
        match number {
            0 => Self::Mark,
            _ => Self::Enforce,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_slot_and_name() {
        for (slot, outcome) in (0..).zip(Outcome::ALL) {
            assert_eq!(outcome.slot(), slot);
            assert_eq!(Outcome::at(slot), outcome);
            assert!(Outcome::ALL.iter().filter(|other| other.name() == outcome.name()).count() == 1);
            assert_eq!(core::str::from_utf8(&outcome.padded()).map(str::trim_end), Ok(outcome.name()));
        }
    }

    #[test]
    fn what_a_verdict_denies_does_not_pass() {
        let all = [Judgement::Denied, Judgement::Allowed, Judgement::NotIsolated];
        for ingress in all {
            for egress in all {
                let verdict = Verdict { ingress, egress };
                assert_eq!(Outcome::of(verdict).passes(), verdict.allows(), "{verdict:?}");
            }
        }
    }

    /// As a program writes it and user space reads it.
    #[test]
    fn an_event_is_its_memory() {
        let mut bytes = [0; DROPPED_BYTES];
        bytes[..8].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        bytes[34..36].copy_from_slice(&443_u16.to_ne_bytes());
        // Its flags: ports, addresses.
        (bytes[36], bytes[37]) = (6, 2 | 32);
        bytes[40..44].copy_from_slice(&Outcome::Egress.slot().to_ne_bytes());
        bytes[44..].copy_from_slice(&7_u32.to_ne_bytes());
        let Dropped { headers, outcome, interface } = Dropped::from_bytes(&bytes);
        assert_eq!(headers.v4(), ([10, 0, 0, 1], [10, 0, 0, 2]));
        assert_eq!((headers.port(), headers.has_addresses()), (Some((6, 443)), true));
        assert_eq!((Outcome::at(outcome), interface), (Outcome::Egress, 7));
        let again = Headers::of_ends(headers.family(), headers.ends(), 6);
        assert_eq!(again, headers, "as a program makes it of a connection");
    }

    #[test]
    fn a_mode_is_its_number() {
        for mode in [Mode::Mark, Mode::Enforce] {
            assert_eq!(Mode::of(mode.number()), mode);
        }
        assert_eq!(Mode::of(77), Mode::Enforce);
    }
}
