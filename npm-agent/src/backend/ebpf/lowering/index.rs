//! What bits mean, by the sets that goals name; and where rows and policies are in the maps, by their content.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;

use npm_common::layout::{Bits, NOBODY, NOT_ISOLATED, Policy, Segment, set_bit};
use npm_policy::goal::{Goal, Member, PeerMatch, SetKey};
use npm_policy::model::Protocol;

use crate::backend::ebpf::held::{Held, Limits, Write};
use crate::backend::ebpf::lower::{Bit, OfFamily, Peers, Union, is_peer};
use crate::backend::ebpf::plan::content::{InUse, PolicyKey, gaps, key, take};

/// What bits mean.
#[derive(Debug)]
pub(super) struct Meanings<const W: usize> {
    pub(super) peers: Peers<W>,
    /// The bits of expressions.
    expressions: BTreeMap<SetKey, usize>,
    /// All of them.
    pub(super) of_expressions: Bits<W>,
    /// The bits that are (address, protocol, port) of peers.
    pairs: Vec<Pairs>,
    /// The expressions that say whose they are.
    peers_of_pairs: BTreeSet<SetKey>,
}

/// A bit of named ports.
#[derive(Debug)]
struct Pairs {
    number: usize,
    protocol: Protocol,
    set: SetKey,
    peers: PeerMatch,
}

impl<const W: usize> Meanings<W> {
    pub(super) fn of(bits: BTreeMap<usize, Bit>) -> Self {
        let (mut expressions, mut of_expressions) = (BTreeMap::new(), [0; W]);
        let (mut pairs, mut peers_of_pairs) = (Vec::new(), BTreeSet::new());
        for (number, bit) in &bits {
            let number = *number;
            match bit {
                Bit::Peer(key @ SetKey::Pods(_)) => {
                    expressions.insert(key.clone(), number);
                    set_bit(&mut of_expressions, number);
                }
                Bit::Pairs { protocol, set, peers } => {
                    let (protocol, set, peers) = (*protocol, set.clone(), peers.clone());
                    match &peers {
                        PeerMatch::Any => {}
                        PeerMatch::Sets(sets) => peers_of_pairs.extend(sets.iter().cloned()),
                    }
                    pairs.push(Pairs { number, protocol, set, peers });
                }
                Bit::Any | Bit::Peer(SetKey::Block(_) | SetKey::Local(_) | SetKey::Ports { .. }) => {}
            }
        }
        Self { peers: Peers::numbered(bits), expressions, of_expressions, pairs, peers_of_pairs }
    }

    /// The bit of an expression.
    pub(super) fn expression(&self, key: &SetKey) -> Option<usize> {
        self.expressions.get(key).copied()
    }

    /// Whether named ports depend on who is in the set.
    pub(super) fn is_peer_of_pairs(&self, key: &SetKey) -> bool {
        self.peers_of_pairs.contains(key)
    }

    /// The named ports of peers at an address.
    pub(super) fn pairs_at<A: OfFamily>(&self, goal: &Goal, address: A) -> BTreeMap<A::Pair, Bits<W>> {
        let ip: IpAddr = address.ip();
        let mut found = BTreeMap::new();
        for Pairs { number, protocol, set, peers } in &self.pairs {
            let Some(set) = goal.sets.get(set) else { continue };
            let of_protocol = Member::Port(ip, *protocol, 0)..=Member::Port(ip, *protocol, u16::MAX);
            for member in set.family(A::FAMILY).range(of_protocol) {
                if let Member::Port(_, _, port) = member
                    && is_peer(goal, peers, ip)
                {
                    let pair = address.pair(protocol.number(), *port);
                    set_bit(found.entry(pair).or_insert([0; W]), *number);
                }
            }
        }
        found
    }
}

/// Where rows and policies are.
#[derive(Debug)]
pub(super) struct Content<const W: usize> {
    rows: HashMap<Bits<W>, u32>,
    policies: HashMap<PolicyKey, u32>,
    free_rows: VecDeque<u32>,
    free_policies: VecDeque<u32>,
    free_segments: BTreeSet<(u32, u32)>,
    /// What is to be written of what was given a place.
    writes: Vec<Write<W>>,
}

impl<const W: usize> Content<W> {
    /// What the half in use leads to has its place; all else is free.
    pub(super) fn of(held: &Held<W>, limits: &Limits) -> Self {
        let used = InUse::of(held);
        let mut rows = HashMap::from([([0; W], NOBODY)]);
        for index in used.rows.iter().filter(|index| **index != NOBODY) {
            rows.entry(held.rows.get(index).copied().unwrap_or([0; W])).or_insert(*index);
        }
        let mut policies = HashMap::new();
        for id in used.policies.iter().filter(|id| **id != NOT_ISOLATED) {
            let policy = held.policies.get(id).copied().unwrap_or_default();
            let run = policy.first..policy.first.saturating_add(policy.segments);
            let segments = run.map(|index| held.segments.get(&index).copied().unwrap_or_default());
            policies.entry(key(&policy, segments)).or_insert(*id);
        }
        Self {
            rows,
            policies,
            free_rows: (1..limits.rows).filter(|index| !used.rows.contains(index)).collect(),
            free_policies: (1..limits.policies).filter(|id| !used.policies.contains(id)).collect(),
            free_segments: gaps(&used.runs, limits.segments),
            writes: Vec::new(),
        }
    }

    /// Where a row is, or will be; `None`: there is no room.
    pub(super) fn row(&mut self, bits: &Bits<W>) -> Option<u32> {
        if let Some(index) = self.rows.get(bits) {
            return Some(*index);
        }
        let index = self.free_rows.pop_front()?;
        self.rows.insert(*bits, index);
        self.writes.push(Write::Row(index, Box::new(*bits)));
        Some(index)
    }

    /// Where a policy is, or will be; `None`: there is no room.
    pub(super) fn policy(&mut self, peers: &Peers<W>, union: &Union<W>) -> Option<u32> {
        let union = union.disjoint();
        let mut names_pairs = peers.has_pairs(&union.rest);
        let rest = self.row(&union.rest)?;
        let mut segments = Vec::new();
        for (&(first, last), bits) in &union.spans {
            names_pairs |= peers.has_pairs(bits);
            segments.push(Segment { first, last, row: self.row(bits)?, pad: 0 });
        }
        let length = u32::try_from(segments.len()).ok()?;
        let policy = Policy { first: 0, segments: length, rest, pairs: u32::from(names_pairs) };
        let key = key(&policy, segments.iter().copied());
        if let Some(id) = self.policies.get(&key) {
            return Some(*id);
        }
        let id = self.free_policies.pop_front()?;
        let first = take(&mut self.free_segments, length)?;
        self.writes.extend((first..).zip(segments).map(|(index, segment)| Write::Segment(index, segment)));
        self.writes.push(Write::Policy(id, Policy { first, ..policy }));
        self.policies.insert(key, id);
        Some(id)
    }

    /// What is to be written before anything leads to it.
    pub(super) fn take_writes(&mut self) -> Vec<Write<W>> {
        std::mem::take(&mut self.writes)
    }
}
