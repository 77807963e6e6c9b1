//! Goal -> what the maps must hold, as data. Pure: it asks no kernel.
//!
//! - A peer set (an expression, an ipBlock) is a bit. A pod's row of `members` holds the bits of the expressions that it
//!   matches *and* of the blocks that cover it, so that a flow needs one look. Other addresses have `networks`: the row
//!   of a prefix holds the bits of all blocks that cover it, less those whose excepts do, so the longest prefix hides
//!   none of the shorter ones.
//! - An isolated address has a policy for each direction: the union of all programs that select it. Equal unions are one
//!   policy.
//! - Named ports in ingress are the endpoint's own numbers: plain ports of its policy. In egress they are the other
//!   end's, so who and which port are one question: (address, protocol, port) has a row in `pairs`, whose bits count
//!   like the address's own, for this flow only. So a rule's named ports may stand in every row of a policy, and cut no
//!   range of ports in two.
//! - What does not fit is an error. Nothing is left out.

mod peers;
mod union;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use npm_common::decide::{self, Lookups, Verdict};
use npm_common::layout::{
    Address, Bits, Endpoint, MAX_POLICIES, MAX_ROWS, MAX_SEGMENTS, NOBODY, NOT_ISOLATED, Policy, Segment, V4,
    V6, WORDS, position,
};
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::{Clause, Goal, Member, PortMatch, Program};
use npm_policy::model::Protocol;

use peers::Peers;
pub use peers::{Bit, FamilyMaps, OfFamily, Prefix};
use union::Union;

/// What the maps must hold for a goal, with rows of `W` words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lowered<const W: usize = WORDS> {
    /// IPv4's maps.
    pub v4: FamilyMaps<V4, W>,
    /// IPv6's maps.
    pub v6: FamilyMaps<V6, W>,
    /// By id; the first is nobody's.
    pub policies: Vec<Policy>,
    /// By index.
    pub segments: Vec<Segment>,
    /// By index; the first allows nobody.
    pub rows: Vec<Bits<W>>,
    /// What each bit means, by number.
    pub bits: Vec<Bit>,
}

/// A map that has a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MapName {
    /// The isolated addresses of a family.
    Endpoints,
    /// The pods' addresses of a family.
    Members,
    /// The prefixes of a family.
    Networks,
    /// The named ports of a family.
    Pairs,
    /// The policies.
    Policies,
    /// The policies' segments.
    Segments,
    /// The rows.
    Rows,
}

impl fmt::Display for MapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Endpoints => "endpoints",
            Self::Members => "members",
            Self::Networks => "networks",
            Self::Pairs => "pairs",
            Self::Policies => "policies",
            Self::Segments => "segments",
            Self::Rows => "rows",
        })
    }
}

/// Why a goal does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// The policies of the node name more peer sets than a row has bits.
    #[error("the node's policies need {needed} bits for their peers, rows have {available}")]
    Peers {
        /// Peer sets, and any peer.
        needed: usize,
        /// 64 times the words of a row.
        available: usize,
    },
    /// More entries than a map takes.
    #[error("the map of {map} needs {needed} entries and takes {limit}")]
    Entries {
        /// The map.
        map: MapName,
        /// How many there would be.
        needed: usize,
        /// How many there can be.
        limit: u32,
    },
}

/// Which of a program's parts.
#[derive(Clone, Copy)]
enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    fn clauses(self, program: &Program) -> Option<&[Clause]> {
        match self {
            Self::Ingress => program.ingress.as_deref(),
            Self::Egress => program.egress.as_deref(),
        }
    }
}

/// The maps of a goal.
///
/// # Errors
/// The goal does not fit into maps with rows of `W` words.
pub fn lower<const W: usize>(goal: &Goal) -> Result<Lowered<W>, LowerError> {
    let peers = Peers::of(goal)?;
    let mut lowered = Lowered {
        v4: peers.family(goal),
        v6: peers.family(goal),
        policies: vec![Policy::default()],
        segments: Vec::new(),
        rows: vec![[0; W]],
        bits: Vec::new(),
    };
    let mut shared = Shared::default();
    for (address, (pod, programs)) in endpoints(goal) {
        let mut id = |direction| {
            let union = union(goal, &peers, address, &programs, direction)?;
            Some(shared.id(&mut lowered, &peers, union))
        };
        let ingress = id(Direction::Ingress).unwrap_or(NOT_ISOLATED);
        let egress = id(Direction::Egress).unwrap_or(NOT_ISOLATED);
        let endpoint = Endpoint { ingress, egress, pod, pad: 0 };
        match address {
            IpAddr::V4(address) => drop(lowered.v4.endpoints.insert(address.octets(), endpoint)),
            IpAddr::V6(address) => drop(lowered.v6.endpoints.insert(address.octets(), endpoint)),
        }
    }
    lowered.bits = peers.bits;
    lowered.fits()?;
    Ok(lowered)
}

/// The isolated addresses, each with its pod's number (from 1) and the programs that select it.
fn endpoints(goal: &Goal) -> BTreeMap<IpAddr, (u32, Vec<&Program>)> {
    let mut endpoints = BTreeMap::new();
    let mut number = 0;
    for addresses in goal.subjects.values() {
        number += 1;
        endpoints.extend(addresses.iter().map(|address| (*address, (number, Vec::new()))));
    }
    for program in goal.programs.values() {
        let Some(subjects) = goal.sets.get(&program.subjects) else { continue };
        for member in subjects.v4.iter().chain(&subjects.v6) {
            match member {
                Member::Address(address) => {
                    let (_, programs) = endpoints.entry(*address).or_insert_with(|| {
                        number += 1;
                        (number, Vec::new())
                    });
                    programs.push(&**program);
                }
                // No members of a set of subjects.
                Member::Port(..) | Member::Include(_) | Member::Except(_) => {}
            }
        }
    }
    endpoints
}

/// What the programs that select an address allow together; `None`: none of them isolates it in this direction.
fn union<const W: usize>(
    goal: &Goal,
    peers: &Peers<W>,
    address: IpAddr,
    programs: &[&Program],
    direction: Direction,
) -> Option<Union<W>> {
    let mut isolating = programs.iter().filter_map(|program| direction.clauses(program)).peekable();
    isolating.peek()?;
    let mut union = Union::default();
    for clause in isolating.flatten() {
        let who = peers.row(&clause.peers);
        match &clause.ports {
            PortMatch::Any => union.allow_everything(&who),
            PortMatch::Only { ranges, named } => {
                for range in ranges {
                    let number = range.protocol.number();
                    union.allow(position(number, range.first), position(number, range.last), &who);
                }
                for port in named {
                    match direction {
                        Direction::Ingress => {
                            for own in peers::ports_at(goal, &port.set, address, port.protocol) {
                                let at = position(port.protocol.number(), own);
                                union.allow(at, at, &who);
                            }
                        }
                        // The bit says which port: whatever row a flow meets may hold it.
                        Direction::Egress => union.allow_everything(&peers.pairs(port, &clause.peers)),
                    }
                }
            }
        }
    }
    Some(union)
}

/// What policies share by content.
struct Shared<const W: usize> {
    rows: BTreeMap<Bits<W>, u32>,
    policies: BTreeMap<Union<W>, u32>,
}

impl<const W: usize> Default for Shared<W> {
    fn default() -> Self {
        Self { rows: BTreeMap::from([([0; W], NOBODY)]), policies: BTreeMap::new() }
    }
}

impl<const W: usize> Shared<W> {
    fn id(&mut self, lowered: &mut Lowered<W>, peers: &Peers<W>, union: Union<W>) -> u32 {
        let union = union.disjoint();
        if let Some(id) = self.policies.get(&union) {
            return *id;
        }
        let id = index(lowered.policies.len());
        let first = index(lowered.segments.len());
        let mut names_pairs = false;
        let mut row = |bits: &Bits<W>| {
            names_pairs |= peers.has_pairs(bits);
            *self.rows.entry(*bits).or_insert_with(|| {
                lowered.rows.push(*bits);
                index(lowered.rows.len() - 1)
            })
        };
        let rest = row(&union.rest);
        for (&(first, last), bits) in &union.spans {
            lowered.segments.push(Segment { first, last, row: row(bits), pad: 0 });
        }
        let segments = index(union.spans.len());
        lowered.policies.push(Policy { first, segments, rest, pairs: u32::from(names_pairs) });
        self.policies.insert(union, id);
        id
    }
}

/// An index as maps have it. What is past the end of every map is found when the limits are checked.
fn index(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

impl<const W: usize> Lowered<W> {
    fn fits(&self) -> Result<(), LowerError> {
        let check = |map, needed, limit| match needed {
            needed if index(needed) > limit => Err(LowerError::Entries { map, needed, limit }),
            _ => Ok(()),
        };
        self.v4.fits(check)?;
        self.v6.fits(check)?;
        check(MapName::Policies, self.policies.len(), MAX_POLICIES)?;
        check(MapName::Segments, self.segments.len(), MAX_SEGMENTS)?;
        check(MapName::Rows, self.rows.len(), MAX_ROWS)
    }

    /// What the maps say of a flow: the kernel's own function, in user space. An end that is no isolated pod of this
    /// node is not isolated here.
    pub fn decide(&self, flow: &Flow) -> Verdict {
        match (flow.source, flow.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.judge(&self.v4, source.octets(), destination.octets(), flow.transport)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.judge(&self.v6, source.octets(), destination.octets(), flow.transport)
            }
            // No packet is of two families.
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Verdict::default(),
        }
    }

    fn judge<A: Address>(
        &self,
        family: &FamilyMaps<A, W>,
        source: A,
        destination: A,
        transport: Transport,
    ) -> Verdict {
        let port = match transport {
            Transport::Port(protocol, port) => Some((protocol.number(), port)),
            Transport::Portless(_) => None,
        };
        decide::decide(&View { family, shared: self }, &decide::Flow { source, destination, port })
    }
}

/// The decision of a verdict.
pub fn decision(verdict: Verdict) -> Decision {
    match verdict.allows() {
        true => Decision::Allow,
        false => Decision::Deny,
    }
}

/// The protocol with an IANA number.
pub(super) fn protocol(number: u8) -> Option<Protocol> {
    Protocol::ALL.into_iter().find(|protocol| protocol.number() == number)
}

/// One family's maps and those that both share.
struct View<'a, A: Address, const W: usize> {
    family: &'a FamilyMaps<A, W>,
    shared: &'a Lowered<W>,
}

impl<A: Address, const W: usize> Lookups<A, W> for View<'_, A, W> {
    fn endpoint(&self, address: &A) -> Option<Endpoint> {
        self.family.endpoints.get(address).copied()
    }

    fn members(&self, address: &A) -> Option<&Bits<W>> {
        self.family.members.get(address)
    }

    fn networks(&self, address: &A) -> Option<&Bits<W>> {
        self.family.longest(*address)
    }

    fn pairs(&self, pair: &A::Pair) -> Option<&Bits<W>> {
        self.family.pairs.get(pair)
    }

    fn policy(&self, id: u32) -> Option<Policy> {
        self.shared.policies.get(usize::try_from(id).ok()?).copied()
    }

    fn segment(&self, index: u32) -> Option<Segment> {
        self.shared.segments.get(usize::try_from(index).ok()?).copied()
    }

    fn row(&self, index: u32) -> Option<&Bits<W>> {
        self.shared.rows.get(usize::try_from(index).ok()?)
    }
}

#[cfg(test)]
mod tests;
