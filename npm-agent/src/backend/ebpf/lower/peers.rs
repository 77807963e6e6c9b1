//! Which bit is which peer set, and the maps that say which bits an address has.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use npm_common::layout::{ANY_PEER, Address, Bits, V4, V6, set_bit};
use npm_policy::goal::{Family, Goal, Member, NamedMatch, PeerMatch, PortMatch, Program, SetKey};
use npm_policy::model::{Block, Protocol};
use npm_policy::names::{fingerprint, set_name};

use super::LowerError;
use super::numbers::Numbers;
use super::union::join;

/// What a bit stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bit {
    /// Any peer: bit 0, which no row of an address holds because all addresses have it.
    Any,
    /// The peer's address is in the set.
    Peer(SetKey),
    /// The destination's (address, protocol, port) is in the set, and its address is one of the peers.
    Pairs {
        /// The protocol that the rule names.
        protocol: Protocol,
        /// A [`SetKey::Ports`].
        set: SetKey,
        /// Whose.
        peers: PeerMatch,
    },
}

impl Bit {
    /// The bit in words, which tell it from all others.
    pub fn name(&self) -> String {
        match self {
            Self::Any => "anybody".to_owned(),
            Self::Peer(set) => set_name(set),
            Self::Pairs { protocol, set, peers: PeerMatch::Any } => {
                format!("{protocol} {}", set_name(set))
            }
            Self::Pairs { protocol, set, peers: PeerMatch::Sets(of) } => {
                let of: Vec<String> = of.iter().map(set_name).collect();
                format!("{protocol} {} of {}", set_name(set), of.join(" or "))
            }
        }
    }

    /// What a process that finds the maps knows the bit by.
    pub fn fingerprint(&self) -> u128 {
        fingerprint(&self.name())
    }
}

/// An isolated address of this node. The policies are indices of [`super::Lowered::policies`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The policy of what comes in, or [`npm_common::layout::NOT_ISOLATED`].
    pub ingress: u32,
    /// The policy of what goes out, or [`npm_common::layout::NOT_ISOLATED`].
    pub egress: u32,
    /// Which pod it is, from 1.
    pub pod: u32,
}

/// A prefix of addresses: what is behind its length is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix<A> {
    /// In bits.
    pub length: u32,
    /// Its first address.
    pub address: A,
}

/// The maps that exist once a family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyMaps<A: Address, const W: usize> {
    /// The isolated addresses of this node's pods.
    pub endpoints: BTreeMap<A, Endpoint>,
    /// The addresses of pods that are in some peer set.
    pub members: BTreeMap<A, Bits<W>>,
    /// The prefixes that blocks and excepts name.
    pub networks: BTreeMap<Prefix<A>, Bits<W>>,
    /// The named ports of peers.
    pub pairs: BTreeMap<A::Pair, Bits<W>>,
}

impl<A: Address, const W: usize> Default for FamilyMaps<A, W> {
    fn default() -> Self {
        Self {
            endpoints: BTreeMap::new(),
            members: BTreeMap::new(),
            networks: BTreeMap::new(),
            pairs: BTreeMap::new(),
        }
    }
}

impl<A: Address, const W: usize> FamilyMaps<A, W> {
    /// The row of the longest prefix that covers an address.
    pub fn longest(&self, address: A) -> Option<&Bits<W>> {
        longest(&self.networks, address, A::BITS).map(|(_, row)| row)
    }
}

/// The longest prefix of at most `length` bits that covers an address.
pub fn longest<A: Address, T>(
    networks: &BTreeMap<Prefix<A>, T>,
    address: A,
    mut length: u32,
) -> Option<(&Prefix<A>, &T)> {
    loop {
        let wanted = Prefix { length, address: address.truncated(length) };
        let (found, value) = networks.range(..=wanted).next_back()?;
        if *found == wanted {
            return Some((found, value));
        }
        // Lengths that no prefix has are passed over.
        length = if found.length < length { found.length } else { length.checked_sub(1)? };
    }
}

/// An address of one family as the standard library has it, and back.
pub trait OfFamily: Address {
    /// The family.
    const FAMILY: Family;

    /// The address, if it is of this family.
    fn of(address: IpAddr) -> Option<Self>;

    /// The address for people.
    fn ip(self) -> IpAddr;
}

impl OfFamily for V4 {
    const FAMILY: Family = Family::V4;

    fn of(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(address) => Some(address.octets()),
            IpAddr::V6(_) => None,
        }
    }

    fn ip(self) -> IpAddr {
        self.into()
    }
}

impl OfFamily for V6 {
    const FAMILY: Family = Family::V6;

    fn of(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address.octets()),
        }
    }

    fn ip(self) -> IpAddr {
        self.into()
    }
}

impl<A: OfFamily> Prefix<A> {
    fn of(net: IpNet) -> Option<Self> {
        Some(Self { length: u32::from(net.prefix_len()), address: A::of(net.network())? })
    }
}

impl<A: OfFamily> fmt::Display for Prefix<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address.ip(), self.length)
    }
}

/// Whatever the goal's programs name, but for any peer.
pub(super) fn named(goal: &Goal) -> BTreeSet<Bit> {
    goal.programs.values().flat_map(|program| named_by(program)).collect()
}

/// Whatever one program names, but for any peer.
pub(in crate::backend::ebpf) fn named_by(program: &Program) -> BTreeSet<Bit> {
    let mut bits = BTreeSet::new();
    for clause in program.ingress.iter().chain(&program.egress).flatten() {
        match &clause.peers {
            PeerMatch::Any => {}
            PeerMatch::Sets(sets) => bits.extend(sets.iter().cloned().map(Bit::Peer)),
        }
    }
    for clause in program.egress.iter().flatten() {
        match &clause.ports {
            PortMatch::Any => {}
            PortMatch::Only { ranges: _, named } => {
                bits.extend(named.iter().map(|port| pairs_bit(port, &clause.peers)));
            }
        }
    }
    bits
}

/// The numbers of the peer sets.
#[derive(Debug)]
pub(in crate::backend::ebpf) struct Peers<const W: usize> {
    pub(super) bits: BTreeMap<usize, Bit>,
    numbers: BTreeMap<Bit, usize>,
    /// All bits that are [`Bit::Pairs`].
    pairs: Bits<W>,
}

impl<const W: usize> Peers<W> {
    /// Numbers whatever the goal's programs name. What had a number keeps it.
    pub(super) fn of(goal: &Goal, kept: &Numbers) -> Result<Self, LowerError> {
        let bits = named(goal);
        let (needed, available) = (bits.len() + 1, 64 * W);
        if needed > available {
            return Err(LowerError::Peers { needed, available });
        }
        let mut numbers = kept.number_bits(bits, available);
        numbers.insert(Bit::Any, ANY_PEER);
        Ok(Self::numbered(numbers.into_iter().map(|(bit, number)| (number, bit)).collect()))
    }

    /// Those of these numbers, [`Bit::Any`] included.
    fn numbered(bits: BTreeMap<usize, Bit>) -> Self {
        let mut peers = Self { bits: BTreeMap::new(), numbers: BTreeMap::new(), pairs: [0; W] };
        bits.into_iter().for_each(|(number, bit)| peers.give(number, bit));
        peers
    }

    /// Nothing has a number.
    pub(in crate::backend::ebpf) fn none() -> Self {
        Self::numbered(BTreeMap::new())
    }

    /// Gives a number that nothing has to a bit that has none.
    pub(in crate::backend::ebpf) fn give(&mut self, number: usize, bit: Bit) {
        match &bit {
            Bit::Any | Bit::Peer(_) => {}
            Bit::Pairs { .. } => drop(set_bit(&mut self.pairs, number)),
        }
        self.numbers.insert(bit.clone(), number);
        self.bits.insert(number, bit);
    }

    /// Takes a bit's number from it.
    pub(in crate::backend::ebpf) fn take(&mut self, bit: &Bit) -> Option<usize> {
        let number = self.numbers.remove(bit)?;
        self.bits.remove(&number);
        clear_bit(&mut self.pairs, number);
        Some(number)
    }

    /// The number of a bit.
    pub(in crate::backend::ebpf) fn number(&self, bit: &Bit) -> Option<usize> {
        self.numbers.get(bit).copied()
    }

    /// Whether nothing has this number.
    pub(in crate::backend::ebpf) fn is_free(&self, number: usize) -> bool {
        !self.bits.contains_key(&number)
    }

    fn add(&self, row: &mut Bits<W>, bit: &Bit) {
        // Every bit that a clause names has a number, and the number fits: `of` made it so.
        if let Some(number) = self.numbers.get(bit) {
            set_bit(row, *number);
        }
    }

    /// The row that allows these peers.
    pub(super) fn row(&self, peers: &PeerMatch) -> Bits<W> {
        let mut row = [0; W];
        match peers {
            PeerMatch::Any => self.add(&mut row, &Bit::Any),
            PeerMatch::Sets(sets) => {
                sets.iter().for_each(|set| self.add(&mut row, &Bit::Peer(set.clone())));
            }
        }
        row
    }

    /// The row that allows a named port of these peers.
    pub(super) fn pairs(&self, port: &NamedMatch, peers: &PeerMatch) -> Bits<W> {
        let mut row = [0; W];
        self.add(&mut row, &pairs_bit(port, peers));
        row
    }

    /// Whether a row allows a named port of peers.
    pub(in crate::backend::ebpf) fn has_pairs(&self, row: &Bits<W>) -> bool {
        row.iter().zip(&self.pairs).any(|(row, pairs)| row & pairs != 0)
    }

    /// The maps of a family, but for its endpoints.
    pub(super) fn family<A: OfFamily>(&self, goal: &Goal) -> FamilyMaps<A, W> {
        let mut maps = FamilyMaps { networks: self.networks(goal), ..FamilyMaps::default() };
        for (number, bit) in &self.bits {
            let number = *number;
            match bit {
                Bit::Any => {}
                Bit::Peer(set) => {
                    for member in members::<A>(goal, set) {
                        match member {
                            Member::Address(address) => {
                                if let Some(address) = A::of(*address) {
                                    set_bit(maps.members.entry(address).or_insert([0; W]), number);
                                }
                            }
                            // Blocks are in the networks; a port is no peer by itself.
                            Member::Include(_) | Member::Except(_) | Member::Port(..) => {}
                        }
                    }
                }
                Bit::Pairs { protocol: wanted, set, peers } => {
                    for member in members::<A>(goal, set) {
                        match member {
                            Member::Port(ip, protocol, port)
                                if protocol == wanted && is_peer(goal, peers, *ip) =>
                            {
                                if let Some(address) = A::of(*ip) {
                                    let pair = address.pair(protocol.number(), *port);
                                    set_bit(maps.pairs.entry(pair).or_insert([0; W]), number);
                                }
                            }
                            Member::Port(..)
                            | Member::Address(_)
                            | Member::Include(_)
                            | Member::Except(_) => {}
                        }
                    }
                }
            }
        }
        let mut members = std::mem::take(&mut maps.members);
        for (address, row) in &mut members {
            if let Some(blocks) = maps.longest(*address) {
                join(row, blocks);
            }
        }
        maps.members = members;
        maps
    }

    /// The row of every prefix that a block or an except begins at: of all blocks that hold the whole of it. Between
    /// a prefix and the next longer ones nothing changes, so the longest that covers an address says all.
    fn networks<A: OfFamily>(&self, goal: &Goal) -> BTreeMap<Prefix<A>, Bits<W>> {
        // By address, then by length: each behind those that cover it.
        let mut turns: BTreeMap<(A, u32), Turn> = BTreeMap::new();
        for (number, bit) in &self.bits {
            let Bit::Peer(key @ SetKey::Block(block)) = bit else { continue };
            if !goal.sets.contains_key(key) {
                continue;
            }
            let Block { cidr, except } = block;
            let place =
                |net: &IpNet| Prefix::<A>::of(*net).map(|Prefix { length, address }| (address, length));
            if let Some(place) = place(cidr) {
                let is_nothing = except.iter().any(|except| except.contains(cidr));
                turns.entry(place).or_default().begins.extend((!is_nothing).then_some(*number));
            }
            for place in except.iter().filter_map(place) {
                turns.entry(place).or_default().ends.push(*number);
            }
        }
        let mut covering: Vec<(Prefix<A>, Bits<W>)> = Vec::new();
        let mut networks = BTreeMap::new();
        for ((address, length), Turn { begins, ends }) in turns {
            while covering.pop_if(|(above, _)| address.truncated(above.length) != above.address).is_some() {}
            let mut row = covering.last().map_or([0; W], |(_, row)| *row);
            begins.iter().for_each(|number| {
                set_bit(&mut row, *number);
            });
            ends.iter().for_each(|number| clear_bit(&mut row, *number));
            let prefix = Prefix { length, address };
            covering.push((prefix, row));
            networks.insert(prefix, row);
        }
        networks
    }
}

/// The blocks that begin, and those that are excepted, at a prefix.
#[derive(Default)]
struct Turn {
    begins: Vec<usize>,
    ends: Vec<usize>,
}

/// Takes a bit out of a row.
pub(in crate::backend::ebpf) fn clear_bit<const W: usize>(row: &mut Bits<W>, number: usize) {
    if let Some(word) = row.get_mut(number / 64) {
        *word &= !(1 << (number % 64));
    }
}

fn pairs_bit(port: &NamedMatch, peers: &PeerMatch) -> Bit {
    Bit::Pairs { protocol: port.protocol, set: port.set.clone(), peers: peers.clone() }
}

pub(in crate::backend::ebpf) fn is_peer(goal: &Goal, peers: &PeerMatch, address: IpAddr) -> bool {
    match peers {
        PeerMatch::Any => true,
        PeerMatch::Sets(sets) => sets.iter().any(|set| goal.contains(set, address)),
    }
}

fn members<'a, A: OfFamily>(goal: &'a Goal, set: &SetKey) -> impl Iterator<Item = &'a Member> {
    goal.sets.get(set).into_iter().flat_map(|set| set.family(A::FAMILY))
}

/// The numbers that a set of named ports holds for an address and a protocol.
pub(super) fn ports_at(goal: &Goal, set: &SetKey, address: IpAddr, protocol: Protocol) -> Vec<u16> {
    let Some(set) = goal.sets.get(set) else { return Vec::new() };
    let of_protocol = Member::Port(address, protocol, 0)..=Member::Port(address, protocol, u16::MAX);
    let port = |member: &Member| match member {
        Member::Port(_, _, port) => Some(*port),
        Member::Address(_) | Member::Include(_) | Member::Except(_) => None,
    };
    set.family(Family::of(address)).range(of_protocol).filter_map(port).collect()
}
