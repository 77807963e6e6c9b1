//! The Goal: what a node must enforce, as data, whichever backend programs it.
//!
//! It holds only what this node needs: the policies that select a pod of the node, and the sets that those
//! policies name. A rule is a subject set, one set match for the peer and one port match, and rules only ever OR:
//! an address enters or leaves what a peer expression means with one write to one set.
//!
//! Maps and sets are persistent (imbl): a copy is a pointer, and a difference costs what differs.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use ipnet::IpNet;

use crate::model::{Block, NamespaceScope, PodKey, PolicyKey, Protocol, Selector};

/// What a node must enforce.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Goal {
    /// The sets that [`Goal::programs`] name, and no others.
    pub sets: OrdMap<SetKey, Set>,
    /// The policies that select at least one pod of this node.
    pub programs: OrdMap<PolicyKey, Arc<Program>>,
    /// The pods of this node that some program selects, with the addresses they hold. A pod always reaches itself:
    /// a flow between two addresses of one subject is allowed.
    pub subjects: OrdMap<PodKey, BTreeSet<IpAddr>>,
    /// The addresses that pods of this node hold, whether a policy selects them or not. No verdict depends on them: they
    /// are for who holds back what is not known yet. `None`: nobody asks, or not all of the cluster is known.
    pub locals: Option<OrdSet<IpAddr>>,
}

/// One policy, compiled. It depends on the policy alone, never on which pods there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The set of the addresses it applies to: a [`SetKey::Local`].
    pub subjects: SetKey,
    /// `None`: does not isolate for ingress. `Some`: isolates, and allows what some clause matches.
    pub ingress: Option<Vec<Clause>>,
    /// The same for egress.
    pub egress: Option<Vec<Clause>>,
}

/// Allows the flows whose peer is in one of `peers` AND whose destination port is one of `ports`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Clause {
    /// The peer: the source for ingress, the destination for egress.
    pub peers: PeerMatch,
    /// The destination's port.
    pub ports: PortMatch,
}

/// The peer part of a clause.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerMatch {
    /// The peer is in one of these sets ([`SetKey::Pods`] or [`SetKey::Block`]); never empty.
    Sets(BTreeSet<SetKey>),
    /// Any peer, hosts outside the cluster included.
    Any,
}

/// The port part of a clause.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortMatch {
    /// The destination port is in one of the ranges or the destination's (address, port) is in one of the sets;
    /// never both empty.
    Only {
        /// Disjoint, not adjacent, sorted.
        ranges: BTreeSet<PortRange>,
        /// Named ports.
        named: BTreeSet<NamedMatch>,
    },
    /// Any protocol, with or without ports.
    Any,
}

/// A range of destination ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// The protocol.
    pub protocol: Protocol,
    /// The first port.
    pub first: u16,
    /// The last port, inclusive.
    pub last: u16,
}

/// A named port: the destination's (address, protocol, port) is a [`Member::Port`] of the set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedMatch {
    /// The protocol that the rule names. The set holds the name's ports of every protocol.
    pub protocol: Protocol,
    /// A [`SetKey::Ports`].
    pub set: SetKey,
}

/// Which set: a set is named by what it means, so policies share sets by content.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetKey {
    /// The addresses of the cluster's pods that match. Members are [`Member::Address`].
    Pods(Expression),
    /// The addresses of this node's pods that match: the subjects of policies. Members are [`Member::Address`].
    Local(Expression),
    /// The named port of the holders' pods. Members are [`Member::Port`].
    Ports {
        /// The port's name.
        name: Arc<str>,
        /// Whose ports.
        of: Holders,
    },
    /// An ipBlock. Members are one [`Member::Include`] and a [`Member::Except`] for each except.
    Block(Block),
}

impl SetKey {
    /// Whether the set can have members of a family: a block has one family only.
    pub fn can_hold(&self, family: Family) -> bool {
        match self {
            Self::Block(block) | Self::Ports { of: Holders::Block(block), .. } => {
                Family::of(block.cidr.addr()) == family
            }
            Self::Pods(_) | Self::Local(_) | Self::Ports { of: Holders::Pods(_) | Holders::Local(_), .. } => {
                true
            }
        }
    }
}

/// Whose named ports a [`SetKey::Ports`] holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Holders {
    /// The cluster's pods that match.
    Pods(Expression),
    /// This node's pods that match.
    Local(Expression),
    /// The cluster's pods whose address is in the block.
    Block(Block),
}

/// A peer expression: pods that match `pods`, in the namespaces of `namespaces`. Hosts outside never match, however
/// negative the selectors are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Expression {
    /// Where the pods are.
    pub namespaces: NamespaceScope,
    /// Which of them.
    pub pods: Selector,
}

impl Expression {
    /// All pods of all namespaces.
    pub fn everything() -> Self {
        Self { namespaces: NamespaceScope::Matching(Selector::everything()), pods: Selector::everything() }
    }
}

/// A set's members, by family.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Set {
    /// IPv4 members.
    pub v4: OrdSet<Member>,
    /// IPv6 members.
    pub v6: OrdSet<Member>,
}

impl Set {
    /// The members of one family.
    pub fn family(&self, family: Family) -> &OrdSet<Member> {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// The members of one family, to change.
    pub fn family_mut(&mut self, family: Family) -> &mut OrdSet<Member> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// A member of a set. All members of one set are of one kind (a block's includes and excepts count as one).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    /// A pod's address.
    Address(IpAddr),
    /// A named port of a pod: (address, protocol, port).
    Port(IpAddr, Protocol, u16),
    /// Addresses of a block.
    Include(IpNet),
    /// Addresses that the block leaves out.
    Except(IpNet),
}

impl Member {
    /// The member's family.
    pub fn family(&self) -> Family {
        match self {
            Self::Address(address) | Self::Port(address, ..) => Family::of(*address),
            Self::Include(net) | Self::Except(net) => Family::of(net.addr()),
        }
    }
}
