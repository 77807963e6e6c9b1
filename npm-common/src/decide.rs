//! Whether a flow may start: the one function that the kernel's program and user space both run, on whatever holds the
//! maps.
//!
//! It reads the generation once and then sees one state of the maps, whatever is written meanwhile ([`crate::layout`] says
//! how). It allocates nothing and its loops have constant bounds. Where the maps contradict themselves (an id that leads
//! nowhere, a record that stays another's) it denies.

use core::ops::Deref;

use crate::layout::{
    ANY_PEER, Address, Bits, Generation, Known, MAX_SEGMENTS, NO_POD, NOBODY, NOT_ISOLATED, PairRecord,
    Policy, Record, Segment, half_of, pick, position,
};
use crate::packet::{Fragment, Packet, ParseError};

/// The maps of one family: [`crate::layout`] says what they hold.
pub trait Lookups<A: Address, const W: usize> {
    /// A row as the maps give it.
    type Row: Deref<Target = Bits<W>>;

    /// The generation that packets use now.
    fn generation(&self) -> Generation;
    /// The place of a pod's address.
    fn place(&self, address: &A) -> Option<u32>;
    /// The record at a place.
    fn record(&self, place: u32) -> Option<Record<A>>;
    /// The rows of the longest prefix that covers the address, by generation: of all blocks that hold it, shorter ones
    /// included.
    fn network(&self, address: &A) -> Option<[u32; 2]>;
    /// The place of a port at an address.
    fn pair_place(&self, pair: &A::Pair) -> Option<u32>;
    /// The record at a place of pairs.
    fn pair_record(&self, place: u32) -> Option<PairRecord<A::Pair>>;
    /// The policy with an id.
    fn policy(&self, id: u32) -> Option<Policy>;
    /// The row at an index.
    fn row(&self, index: u32) -> Option<Self::Row>;

    /// [`row_at`] by these maps. In the kernel a function that the verifier checks apart: walked in line, its steps are
    /// multiplied by all ways that lead there.
    fn row_at(&self, policy: &Policy, position: u32) -> u32;
    /// [`meet`], in the kernel apart too.
    fn meet(&self, row: &Bits<W>, bits: &Bits<W>) -> bool;
}

/// How often a record is looked for. That it is another's once says that its place was given away just then; the next
/// look finds the new place or none.
const LOOKS: u32 = 4;

/// A record was another's at every look.
struct Lost;

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

/// What a packet with the same pod at both ends is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    /// The pod's, to itself.
    Free,
    /// Somebody else's that says it is the pod's.
    Forged,
}

impl Own {
    /// As a number that one function of the kernel's side leaves for another.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        match self {
            Self::Free => 1,
            Self::Forged => 0,
        }
    }

    /// What the number says.
    #[inline(always)]
    pub const fn of(number: u32) -> Self {
        if number == 1 { Self::Free } else { Self::Forged }
    }
}

/// What the maps say of a flow. Both directions are judged, whichever of the ends is on this node.
#[inline(always)]
pub fn decide<A: Address, const W: usize>(lookups: &impl Lookups<A, W>, flow: &Flow<A>) -> Verdict {
    decide_with(lookups, flow, Own::Free)
}

/// As [`decide`], for a packet of which it is known whether it may be a pod's to itself.
#[inline(always)]
pub fn decide_with<A: Address, const W: usize>(
    lookups: &impl Lookups<A, W>,
    flow: &Flow<A>,
    own: Own,
) -> Verdict {
    let half = half_of(lookups.generation());
    let (Ok(source), Ok(destination)) =
        (known(lookups, half, &flow.source), known(lookups, half, &flow.destination))
    else {
        return Verdict { ingress: Judgement::Denied, egress: Judgement::Denied };
    };
    if own == Own::Free && source.pod != NO_POD && source.pod == destination.pod {
        return Verdict::FREE;
    }
    let ingress = match destination.ingress {
        NOT_ISOLATED => Judgement::NotIsolated,
        policy => judge(lookups, half, policy, (&flow.source, source.row), flow),
    };
    let egress = match source.egress {
        NOT_ISOLATED => Judgement::NotIsolated,
        policy => judge(lookups, half, policy, (&flow.destination, destination.row), flow),
    };
    Verdict { ingress, egress }
}

/// What is known of an address.
#[inline(always)]
fn known<A: Address, const W: usize>(
    lookups: &impl Lookups<A, W>,
    half: usize,
    address: &A,
) -> Result<Known, Lost> {
    for _ in 0..LOOKS {
        let Some(place) = lookups.place(address) else { return Ok(Known::NOTHING) };
        let Some(record) = lookups.record(place) else { return Err(Lost) };
        if record.address.is(address) {
            return Ok(pick(record.halves, half));
        }
    }
    Err(Lost)
}

/// The row of a port at an address.
#[inline(always)]
fn pair_row<A: Address, const W: usize>(
    lookups: &impl Lookups<A, W>,
    half: usize,
    pair: &A::Pair,
) -> Result<u32, Lost> {
    for _ in 0..LOOKS {
        let Some(place) = lookups.pair_place(pair) else { return Ok(NOBODY) };
        let Some(record) = lookups.pair_record(place) else { return Err(Lost) };
        if A::is_pair(&record.pair, pair) {
            return Ok(pick(record.rows, half));
        }
    }
    Err(Lost)
}

/// What a policy says of a flow with this peer: its address, and the row that is known of it.
#[inline(always)]
fn judge<A: Address, const W: usize>(
    lookups: &impl Lookups<A, W>,
    half: usize,
    policy: u32,
    (peer, known): (&A, u32),
    flow: &Flow<A>,
) -> Judgement {
    let Some(policy) = lookups.policy(policy) else { return Judgement::Denied };
    let row = match flow.port {
        Some((protocol, port)) => lookups.row_at(&policy, position(protocol, port)),
        None => policy.rest,
    };
    let Some(row) = lookups.row(row) else { return Judgement::Denied };
    if row[ANY_PEER / 64] & 1 << (ANY_PEER % 64) != 0 {
        return Judgement::Allowed;
    }
    let of_peer = match known {
        NOBODY => lookups.network(peer).map_or(NOBODY, |rows| pick(rows, half)),
        known => known,
    };
    if of_peer != NOBODY
        && let Some(bits) = lookups.row(of_peer)
        && lookups.meet(&row, &bits)
    {
        return Judgement::Allowed;
    }
    if policy.pairs != 0
        && let Some((protocol, port)) = flow.port
        && let Ok(of_pair) = pair_row(lookups, half, &flow.destination.pair(protocol, port))
        && of_pair != NOBODY
        && let Some(bits) = lookups.row(of_pair)
        && lookups.meet(&row, &bits)
    {
        return Judgement::Allowed;
    }
    Judgement::Denied
}

/// Whether the two have a bit in common. All words are looked at: a branch a word costs more than the words.
#[inline(always)]
pub fn meet<const W: usize>(row: &Bits<W>, bits: &Bits<W>) -> bool {
    let mut common = 0;
    for word in 0..W {
        common |= row[word] & bits[word];
    }
    common != 0
}

/// Halvings that leave nothing of the longest run of segments.
const MAX_STEPS: u32 = u32::BITS - MAX_SEGMENTS.leading_zeros();

/// The row of the policy's segment that holds a position, or of what is in none; segments are looked up by index.
#[inline(always)]
pub fn row_at(segments: impl Fn(u32) -> Option<Segment>, policy: &Policy, position: u32) -> u32 {
    find(segments, policy, position).map_or(policy.rest, |segment| segment.row)
}

#[inline(always)]
fn find(segments: impl Fn(u32) -> Option<Segment>, policy: &Policy, position: u32) -> Option<Segment> {
    let mut first = policy.first;
    let mut left = policy.segments;
    for _ in 0..MAX_STEPS {
        if left == 0 {
            return None;
        }
        let half = left / 2;
        let middle = first.wrapping_add(half);
        let segment = segments(middle)?;
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
