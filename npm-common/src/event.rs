//! What became of a packet at the hook: the counters' slots.

use crate::decide::{Judgement, Verdict};
use crate::packet::ParseError;

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
    /// Passed: an end is isolated, and a policy allows it.
    Allowed,
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
    pub const ALL: [Self; 14] = [
        Self::NotIp,
        Self::Local,
        Self::Neighbour,
        Self::Proven,
        Self::NotIsolated,
        Self::Allowed,
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
            5 => Self::Allowed,
            6 => Self::Ingress,
            7 => Self::Egress,
            9 => Self::Truncated,
            10 => Self::BadHeader,
            11 => Self::TooManyExtensions,
            12 => Self::TooManyTags,
            13 => Self::NoConnection,
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
            | Self::Allowed => true,
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
            (Judgement::Allowed, Judgement::Allowed | Judgement::NotIsolated)
            | (Judgement::NotIsolated, Judgement::Allowed) => Self::Allowed,
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
            Self::Allowed => "allowed",
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

    #[test]
    fn a_mode_is_its_number() {
        for mode in [Mode::Mark, Mode::Enforce] {
            assert_eq!(Mode::of(mode.number()), mode);
        }
        assert_eq!(Mode::of(77), Mode::Enforce);
    }
}
