//! Whether a flow may start: the one function that the kernel's program and user space both run, on whatever holds the
//! maps.
//!
//! It allocates nothing and its loops have constant bounds. Where the maps contradict themselves (an id that leads
//! nowhere) it denies.

use crate::layout::{
    ANY_PEER, Address, Bits, Endpoint, MAX_SEGMENTS, NOT_ISOLATED, Policy, Segment, position,
};
use crate::packet::{Fragment, Packet, ParseError};

/// The maps of one family: [`crate::layout`] says what they hold.
pub trait Lookups<A: Address, const W: usize> {
    /// The endpoint at an address.
    fn endpoint(&self, address: &A) -> Option<Endpoint>;
    /// The peer bits of a pod's address: of the expressions that the pod matches and of the blocks that cover it.
    fn members(&self, address: &A) -> Option<&Bits<W>>;
    /// The peer bits of the longest prefix that covers the address: of all blocks that hold it, shorter ones included.
    fn networks(&self, address: &A) -> Option<&Bits<W>>;
    /// The peer bits of a port at an address.
    fn pairs(&self, pair: &A::Pair) -> Option<&Bits<W>>;
    /// The policy with an id.
    fn policy(&self, id: u32) -> Option<Policy>;
    /// The segment at an index.
    fn segment(&self, index: u32) -> Option<Segment>;
    /// The row at an index.
    fn row(&self, index: u32) -> Option<&Bits<W>>;
}

/// A new connection: source not yet rewritten, destination already translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow<A> {
    /// The source address.
    pub source: A,
    /// The destination address.
    pub destination: A,
    /// The protocol and the destination port. `None`: a protocol without ports, or a fragment that does not carry
    /// them. Only what is allowed with every protocol and port allows it.
    pub port: Option<(u8, u16)>,
}

/// The protocol and port of a packet that policies judge.
#[inline(always)]
pub fn port_of(packet: &Packet) -> Option<(u8, u16)> {
    match (packet.fragment, packet.ports) {
        (Fragment::None | Fragment::First, Some(ports)) => Some((packet.protocol.0, ports.destination)),
        (Fragment::Later, Some(_)) | (_, None) => None,
    }
}

/// One direction's part of a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Judgement {
    /// The end is isolated, and nothing allows the flow.
    #[default]
    Denied,
    /// The end is isolated, and something allows the flow.
    Allowed,
    /// The end is no isolated pod of this node, or it talks to itself.
    NotIsolated,
}

impl Judgement {
    const fn code(self) -> u32 {
        match self {
            Self::Denied => 1,
            Self::Allowed => 2,
            Self::NotIsolated => 3,
        }
    }

    const fn of(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Denied),
            2 => Some(Self::Allowed),
            3 => Some(Self::NotIsolated),
            _ => None,
        }
    }
}

/// What this node's maps say of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Verdict {
    /// The destination's ingress.
    pub ingress: Judgement,
    /// The source's egress.
    pub egress: Judgement,
}

/// Begins the codes of verdicts, so that nothing else that a program may return is taken for one.
const VERDICT: u32 = 0x6e70_6d00;

impl Verdict {
    /// Neither end is isolated.
    pub const FREE: Self = Self { ingress: Judgement::NotIsolated, egress: Judgement::NotIsolated };

    /// Whether no direction denies.
    pub const fn allows(self) -> bool {
        !matches!(self.ingress, Judgement::Denied) && !matches!(self.egress, Judgement::Denied)
    }

    /// The number that the program returns for it.
    #[inline(always)]
    pub const fn code(self) -> u32 {
        VERDICT | self.ingress.code() << 4 | self.egress.code()
    }

    /// The verdict with this code; `None`: it is no verdict's.
    pub const fn of(code: u32) -> Option<Self> {
        match (code & !0xff, Judgement::of(code >> 4 & 0xf), Judgement::of(code & 0xf)) {
            (VERDICT, Some(ingress), Some(egress)) => Some(Self { ingress, egress }),
            _ => None,
        }
    }
}

/// Begins the codes of packets that can't be read.
const UNREAD: u32 = 0x6e70_7500;

/// The number that the program returns for a packet that can't be read.
#[inline(always)]
pub const fn unread(error: ParseError) -> u32 {
    UNREAD
        | match error {
            ParseError::Truncated => 1,
            ParseError::NotIp => 2,
            ParseError::BadHeader => 3,
            ParseError::TooManyExtensions => 4,
            ParseError::TooManyTags => 5,
        }
}

/// What the maps say of a flow. Both directions are judged, whichever of the ends is on this node.
#[inline(always)]
pub fn decide<A: Address, const W: usize>(lookups: &impl Lookups<A, W>, flow: &Flow<A>) -> Verdict {
    let source = lookups.endpoint(&flow.source);
    let destination = lookups.endpoint(&flow.destination);
    // An address that is nobody's is judged by nobody; so only a pod can talk to itself here.
    if let (Some(source), Some(destination)) = (source, destination)
        && source.pod == destination.pod
    {
        return Verdict::FREE;
    }
    let ingress = match destination {
        Some(Endpoint { ingress, .. }) if ingress != NOT_ISOLATED => {
            judge(lookups, ingress, &flow.source, flow)
        }
        Some(_) | None => Judgement::NotIsolated,
    };
    let egress = match source {
        Some(Endpoint { egress, .. }) if egress != NOT_ISOLATED => {
            judge(lookups, egress, &flow.destination, flow)
        }
        Some(_) | None => Judgement::NotIsolated,
    };
    Verdict { ingress, egress }
}

/// What a policy says of a flow with this peer.
#[inline(always)]
fn judge<A: Address, const W: usize>(
    lookups: &impl Lookups<A, W>,
    policy: u32,
    peer: &A,
    flow: &Flow<A>,
) -> Judgement {
    let Some(policy) = lookups.policy(policy) else { return Judgement::Denied };
    let row = match flow.port {
        Some((protocol, port)) => {
            find(lookups, &policy, position(protocol, port)).map_or(policy.rest, |it| it.row)
        }
        None => policy.rest,
    };
    let Some(row) = lookups.row(row) else { return Judgement::Denied };
    if row[ANY_PEER / 64] & 1 << (ANY_PEER % 64) != 0 {
        return Judgement::Allowed;
    }
    if let Some(bits) = lookups.members(peer).or_else(|| lookups.networks(peer))
        && meet(row, bits)
    {
        return Judgement::Allowed;
    }
    if policy.pairs != 0
        && let Some((protocol, port)) = flow.port
        && let Some(bits) = lookups.pairs(&flow.destination.pair(protocol, port))
        && meet(row, bits)
    {
        return Judgement::Allowed;
    }
    Judgement::Denied
}

/// Whether the two have a bit in common. All words are looked at: a branch a word costs more than the words.
#[inline(always)]
fn meet<const W: usize>(row: &Bits<W>, bits: &Bits<W>) -> bool {
    let mut common = 0;
    for word in 0..W {
        common |= row[word] & bits[word];
    }
    common != 0
}

/// Halvings that leave nothing of the longest run of segments.
const MAX_STEPS: u32 = u32::BITS - MAX_SEGMENTS.leading_zeros();

/// The policy's segment that holds a position.
#[inline(always)]
fn find<A: Address, const W: usize>(
    lookups: &impl Lookups<A, W>,
    policy: &Policy,
    position: u32,
) -> Option<Segment> {
    let mut first = policy.first;
    let mut left = policy.segments;
    for _ in 0..MAX_STEPS {
        if left == 0 {
            return None;
        }
        let half = left / 2;
        let middle = first.wrapping_add(half);
        let segment = lookups.segment(middle)?;
        if position < segment.first {
            left = half;
        } else if position > segment.last {
            first = middle.wrapping_add(1);
            left -= half + 1;
        } else {
            return Some(segment);
        }
    }
    None
}

#[cfg(test)]
mod tests;
