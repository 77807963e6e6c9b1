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

mod numbers;
mod peers;
mod union;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use npm_common::decide::Verdict;
use npm_common::layout::{Bits, NARROW_WORDS, NOBODY, NOT_ISOLATED, Policy, Segment, V4, V6, position};
use npm_policy::flow::Decision;
use npm_policy::goal::{Clause, Goal, Member, PortMatch, Program, SetKey};
use npm_policy::model::Protocol;

pub use numbers::Numbers;
pub use peers::{Bit, Endpoint, FamilyMaps, OfFamily, Prefix, longest};
pub(in crate::backend::ebpf) use peers::{Peers, clear_bit, is_peer, named_by};
pub(in crate::backend::ebpf) use union::{Union, join};

/// What the maps must hold for a goal, with rows of `W` words. Policies, segments and rows have indices of their own
/// here, which are not those of the kernel's maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lowered<const W: usize = NARROW_WORDS> {
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
    pub bits: BTreeMap<usize, Bit>,
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
}

/// Which of a program's parts.
#[derive(Clone, Copy)]
pub(in crate::backend::ebpf) enum Direction {
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

/// The maps of a goal, numbered afresh.
///
/// # Errors
/// The goal names more peer sets than rows of `W` words have bits.
pub fn lower<const W: usize>(goal: &Goal) -> Result<Lowered<W>, LowerError> {
    lower_with(goal, &Numbers::default())
}

/// The maps of a goal. What has a number keeps it.
///
/// # Errors
/// As [`lower`].
pub fn lower_with<const W: usize>(goal: &Goal, numbers: &Numbers) -> Result<Lowered<W>, LowerError> {
    let peers = Peers::of(goal, numbers)?;
    let mut lowered = Lowered {
        v4: peers.family(goal),
        v6: peers.family(goal),
        policies: vec![Policy::default()],
        segments: Vec::new(),
        rows: vec![[0; W]],
        bits: BTreeMap::new(),
    };
    let mut shared = Shared::default();
    for (address, (pod, programs)) in endpoints(goal, numbers) {
        let mut id = |direction| {
            let union = union(goal, &peers, address, &programs, direction)?;
            Some(shared.id(&mut lowered, &peers, union))
        };
        let ingress = id(Direction::Ingress).unwrap_or(NOT_ISOLATED);
        let egress = id(Direction::Egress).unwrap_or(NOT_ISOLATED);
        let endpoint = Endpoint { ingress, egress, pod };
        match address {
            IpAddr::V4(address) => drop(lowered.v4.endpoints.insert(address.octets(), endpoint)),
            IpAddr::V6(address) => drop(lowered.v6.endpoints.insert(address.octets(), endpoint)),
        }
    }
    lowered.bits = peers.bits;
    Ok(lowered)
}

/// How many bits a goal's peer sets need, any peer included.
pub fn needed_bits(goal: &Goal) -> usize {
    peers::named(goal).len() + 1
}

/// At least as many: it counts the sets that a goal has, which are those that its programs name, and named ports as often
/// as they are named.
pub fn most_bits(goal: &Goal) -> usize {
    let peers = goal.sets.keys().filter(|key| matches!(key, SetKey::Pods(_) | SetKey::Block(_)));
    let named = |clause: &Clause| match &clause.ports {
        PortMatch::Any => 0,
        PortMatch::Only { ranges: _, named } => named.len(),
    };
    let clauses = goal.programs.values().flat_map(|program| program.egress.iter().flatten());
    peers.count() + clauses.map(named).sum::<usize>() + 1
}

/// The directions that an address is isolated in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Directions {
    /// Of what comes in.
    pub ingress: bool,
    /// Of what goes out.
    pub egress: bool,
    /// Whose address it is: a number for each pod, of this goal alone.
    pub pod: u32,
}

/// Addresses of this node's pods.
pub type Isolated = BTreeMap<IpAddr, Directions>;

/// Whom a goal isolates, whatever it allows.
pub fn isolated(goal: &Goal) -> Isolated {
    let mut isolated = Isolated::new();
    for (address, (pod, programs)) in endpoints(goal, &Numbers::default()) {
        isolated.insert(
            address,
            Directions {
                pod,
                ingress: programs.iter().any(|program| program.ingress.is_some()),
                egress: programs.iter().any(|program| program.egress.is_some()),
            },
        );
    }
    isolated
}

/// The isolated addresses, each with its pod's number (from 1) and the programs that select it.
fn endpoints<'a>(goal: &'a Goal, numbers: &Numbers) -> BTreeMap<IpAddr, (u32, Vec<&'a Program>)> {
    let mut selected: BTreeMap<IpAddr, Vec<&Program>> = BTreeMap::new();
    for program in goal.programs.values() {
        let Some(subjects) = goal.sets.get(&program.subjects) else { continue };
        for member in subjects.v4.iter().chain(&subjects.v6) {
            match member {
                Member::Address(address) => selected.entry(*address).or_default().push(program),
                // No members of a set of subjects.
                Member::Port(..) | Member::Include(_) | Member::Except(_) => {}
            }
        }
    }
    let owned: BTreeSet<IpAddr> = goal.subjects.values().flatten().copied().collect();
    // An address without a pod would be a pod of its own.
    let alone: Vec<BTreeSet<IpAddr>> =
        selected.keys().filter(|it| !owned.contains(it)).map(|it| [*it].into()).collect();
    let mut endpoints = BTreeMap::new();
    for (addresses, number) in numbers.number_pods(goal.subjects.values().chain(&alone)) {
        for address in addresses {
            endpoints.insert(*address, (number, selected.remove(address).unwrap_or_default()));
        }
    }
    endpoints
}

/// What the programs that select an address allow together; `None`: none of them isolates it in this direction.
pub(in crate::backend::ebpf) fn union<const W: usize>(
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

#[cfg(test)]
mod tests;
