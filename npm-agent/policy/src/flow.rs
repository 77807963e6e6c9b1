//! A flow and a verdict on it: the common language of oracle, goal and backends.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use crate::model::{PolicyKey, Protocol};

/// A new connection, as the node's FORWARD hook sees it: the source not yet rewritten, the destination already
/// translated. Traffic between a pod and its own node is never forwarded and so is no flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// The source address.
    pub source: IpAddr,
    /// The destination address, of the same family.
    pub destination: IpAddr,
    /// What is above IP.
    pub transport: Transport,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} {}", self.source, self.destination, self.transport)
    }
}

/// What a flow carries above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// A protocol that policies can name, and the destination port.
    Port(Protocol, u16),
    /// Any other protocol, by its IANA number (1 ICMP, 58 ICMPv6): matches rules without a port list only.
    Portless(u8),
}

impl Transport {
    /// An ICMP echo request of `address`'s family.
    pub fn echo(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Portless(1),
            IpAddr::V6(_) => Self::Portless(58),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(protocol, port) => write!(f, "{protocol}/{port}"),
            Self::Portless(1 | 58) => f.write_str("ICMP"),
            Self::Portless(number) => write!(f, "protocol {number}"),
        }
    }
}

/// Whether a flow may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Decision {
    /// It may not.
    #[default]
    Deny,
    /// It may.
    Allow,
}

/// What policies say of a flow: both directions must allow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The destination pod's ingress.
    pub ingress: Judgement,
    /// The source pod's egress.
    pub egress: Judgement,
}

impl Verdict {
    /// Allowed iff no direction denies.
    pub fn decision(&self) -> Decision {
        match (&self.ingress, &self.egress) {
            (Judgement::Denied { .. }, _) | (_, Judgement::Denied { .. }) => Decision::Deny,
            (
                Judgement::NotIsolated | Judgement::Allowed { .. },
                Judgement::NotIsolated | Judgement::Allowed { .. },
            ) => Decision::Allow,
        }
    }
}

/// One direction's part of a verdict, with the policies that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The end is isolated and no policy allows the flow.
    Denied {
        /// The policies that isolate the end.
        selected_by: BTreeSet<PolicyKey>,
    },
    /// The end is isolated and these policies allow the flow.
    Allowed {
        /// Every policy with a rule that matches.
        by: BTreeSet<PolicyKey>,
    },
    /// No policy isolates the end for this direction: it is no pod of ours, no policy selects it, or it
    /// talks to itself.
    NotIsolated,
}
