//! What bits mean, by the sets that goals name; and where rows and policies are in the maps, by their content.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;

use npm_common::layout::{Bits, Meaning, NOBODY, NOT_ISOLATED, Policy, Segment, set_bit};
use npm_policy::goal::{Goal, Member, PeerMatch, Program, SetKey};
use npm_policy::model::Protocol;

use crate::backend::ebpf::held::{Held, Limits, Write};
use crate::backend::ebpf::lower::{Bit, OfFamily, Peers, Union, clear_bit, is_peer, named_by};
use crate::backend::ebpf::plan::content::{InUse, PolicyKey, gaps, key, take};

/// What bits mean, and how many programs need each to.
#[derive(Debug)]
pub(super) struct Meanings<const W: usize> {
    pub(super) peers: Peers<W>,
    /// How many programs name a bit; [`Bit::Any`] is not counted.
    uses: BTreeMap<Bit, usize>,
    /// What a process that finds the maps knows bits by.
    fingerprints: BTreeMap<usize, u128>,
    /// The bits of expressions.
    expressions: BTreeMap<SetKey, usize>,
    /// All of them.
    pub(super) of_expressions: Bits<W>,
    /// The bits that are (address, protocol, port) of peers.
    pairs: Vec<Pairs>,
    /// The expressions that say whose they are, and of how many of these bits.
    peers_of_pairs: BTreeMap<SetKey, usize>,
}

/// A bit of named ports.
#[derive(Debug)]
struct Pairs {
    number: usize,
    protocol: Protocol,
    set: SetKey,
    peers: PeerMatch,
}

/// Bits that programs name from now on, and bits that they do not any more.
#[derive(Debug, Default)]
pub(super) struct Turnover {
    pub(super) come: Vec<(usize, Bit)>,
    pub(super) gone: Vec<(usize, Bit)>,
}

impl<const W: usize> Meanings<W> {
    /// Those of a goal's bits, by their numbers. `None`: these are not the goal's.
    pub(super) fn of(bits: BTreeMap<usize, Bit>, goal: &Goal) -> Option<Self> {
        let mut meanings = Self {
            peers: Peers::none(),
            uses: BTreeMap::new(),
            fingerprints: BTreeMap::new(),
            expressions: BTreeMap::new(),
            of_expressions: [0; W],
            pairs: Vec::new(),
            peers_of_pairs: BTreeMap::new(),
        };
        bits.into_iter().for_each(|(number, bit)| meanings.give(number, bit));
        for program in goal.programs.values() {
            for bit in named_by(program) {
                meanings.peers.number(&bit)?;
                *meanings.uses.entry(bit).or_default() += 1;
            }
        }
        Some(meanings)
    }

    /// Goes over from the programs that are no more to those that are new. What has a number keeps it; no number that is
    /// given away now was another's until now, so an address can tell what it has entered from what it has left.
    /// `None`: a block comes or goes, whose bit is in the rows of addresses that no set lists; or there is no number left.
    pub(super) fn turn_over(
        &mut self,
        old: &[&Program],
        new: &[&Program],
        held: &Held<W>,
    ) -> Option<Turnover> {
        let mut turnover = Turnover::default();
        let mut known = None;
        for bit in new.iter().flat_map(|program| named_by(program)) {
            let uses = self.uses.entry(bit.clone()).or_default();
            *uses += 1;
            if *uses == 1 {
                let known: &BTreeMap<u128, usize> = known.get_or_insert_with(|| held.numbers_of_bits());
                let had = known.get(&bit.fingerprint()).copied();
                let is_free = |number: &usize| (1..64 * W).contains(number) && self.peers.is_free(*number);
                let number = had.filter(is_free).or_else(|| (1..64 * W).find(is_free))?;
                self.give(number, bit.clone());
                turnover.come.push((number, bit));
            }
        }
        // After what is new: a bit that both name was counted for both, and stays.
        for bit in old.iter().flat_map(|program| named_by(program)) {
            let uses = self.uses.get_mut(&bit)?;
            *uses = uses.checked_sub(1)?;
            if *uses == 0 {
                self.uses.remove(&bit);
                turnover.gone.push((self.take(&bit)?, bit));
            }
        }
        let blocks = turnover.come.iter().chain(&turnover.gone);
        let mut blocks = blocks.filter(|(_, bit)| matches!(bit, Bit::Peer(SetKey::Block(_))));
        blocks.next().is_none().then_some(turnover)
    }

    fn give(&mut self, number: usize, bit: Bit) {
        match &bit {
            Bit::Peer(key @ SetKey::Pods(_)) => {
                self.expressions.insert(key.clone(), number);
                set_bit(&mut self.of_expressions, number);
            }
            Bit::Pairs { protocol, set, peers } => {
                let (protocol, set, peers) = (*protocol, set.clone(), peers.clone());
                for key in sets(&peers) {
                    *self.peers_of_pairs.entry(key.clone()).or_default() += 1;
                }
                self.pairs.push(Pairs { number, protocol, set, peers });
            }
            Bit::Any | Bit::Peer(SetKey::Block(_) | SetKey::Local(_) | SetKey::Ports { .. }) => {}
        }
        self.fingerprints.insert(number, bit.fingerprint());
        self.peers.give(number, bit);
    }

    fn take(&mut self, bit: &Bit) -> Option<usize> {
        let number = self.peers.take(bit)?;
        self.fingerprints.remove(&number);
        match bit {
            Bit::Peer(key @ SetKey::Pods(_)) => {
                self.expressions.remove(key);
                clear_bit(&mut self.of_expressions, number);
            }
            Bit::Pairs { protocol: _, set: _, peers } => {
                for key in sets(peers) {
                    let uses = self.peers_of_pairs.get_mut(key)?;
                    *uses = uses.checked_sub(1)?;
                    if *uses == 0 {
                        self.peers_of_pairs.remove(key);
                    }
                }
                self.pairs.retain(|pairs| pairs.number != number);
            }
            Bit::Any | Bit::Peer(SetKey::Block(_) | SetKey::Local(_) | SetKey::Ports { .. }) => {}
        }
        Some(number)
    }

    /// What the map of meanings has to say otherwise. No packet reads it.
    pub(super) fn writes(&self, held: &Held<W>) -> impl Iterator<Item = Write<W>> {
        self.fingerprints.iter().filter_map(|(number, fingerprint)| {
            let meaning: Meaning = [(fingerprint >> 64) as u64, *fingerprint as u64];
            let number = u32::try_from(*number).ok()?;
            (held.meanings.get(&number) != Some(&meaning)).then_some(Write::Meaning(number, meaning))
        })
    }

    /// The bit of an expression.
    pub(super) fn expression(&self, key: &SetKey) -> Option<usize> {
        self.expressions.get(key).copied()
    }

    /// Whether named ports depend on who is in the set.
    pub(super) fn is_peer_of_pairs(&self, key: &SetKey) -> bool {
        self.peers_of_pairs.contains_key(key)
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

fn sets(peers: &PeerMatch) -> impl Iterator<Item = &SetKey> {
    match peers {
        PeerMatch::Any => None,
        PeerMatch::Sets(sets) => Some(sets),
    }
    .into_iter()
    .flatten()
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

    /// Has something else written with what was given a place.
    pub(super) fn also(&mut self, writes: impl IntoIterator<Item = Write<W>>) {
        self.writes.extend(writes);
    }

    /// What is to be written before anything leads to it.
    pub(super) fn take_writes(&mut self) -> Vec<Write<W>> {
        std::mem::take(&mut self.writes)
    }
}
