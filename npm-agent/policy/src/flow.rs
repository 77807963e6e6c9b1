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

    /// The verdict for an operator: what was decided of `flow`, in which direction, by which policies. The ends are
    /// shown as their addresses; [`Verdict::explain_as`] takes names.
    pub fn explain(&self, flow: &Flow) -> String {
        self.explain_as(&flow.source, &flow.destination, flow.transport)
    }

    /// [`Verdict::explain`] with names for the ends, such as `default/web`:
    /// `denied: ingress of default/web: selected by default/deny-all and default/web; none allows TCP/443 from default/a`.
    pub fn explain_as(
        &self,
        source: &dyn fmt::Display,
        destination: &dyn fmt::Display,
        transport: Transport,
    ) -> String {
        let egress = self
            .egress
            .explain(&format_args!("egress of {source}"), &format_args!("{transport} to {destination}"));
        let ingress = self
            .ingress
            .explain(&format_args!("ingress of {destination}"), &format_args!("{transport} from {source}"));
        // What denies comes alone: an allowing direction beside it explains nothing.
        let (word, parts) = match (&self.egress, &self.ingress) {
            (Judgement::Denied { .. }, Judgement::Denied { .. }) => ("denied", vec![egress, ingress]),
            (Judgement::Denied { .. }, Judgement::Allowed { .. } | Judgement::NotIsolated) => {
                ("denied", vec![egress])
            }
            (Judgement::Allowed { .. } | Judgement::NotIsolated, Judgement::Denied { .. }) => {
                ("denied", vec![ingress])
            }
            (
                Judgement::Allowed { .. } | Judgement::NotIsolated,
                Judgement::Allowed { .. } | Judgement::NotIsolated,
            ) => ("allowed", vec![egress, ingress]),
        };
        format!("{word}: {}", parts.join(". "))
    }
}

/// The verdict without its flow: the word, and the policies that decided.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.decision() {
            Decision::Deny => "denied",
            Decision::Allow => "allowed",
        };
        write!(f, "{word} (egress {}, ingress {})", self.egress, self.ingress)
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

impl Judgement {
    /// One clause: `end` as "egress of default/a", `what` as "TCP/80 to default/b".
    fn explain(&self, end: &dyn fmt::Display, what: &dyn fmt::Display) -> String {
        match self {
            Self::Denied { selected_by } if selected_by.len() == 1 => {
                format!("{end}: selected by {}, which does not allow {what}", Listed(selected_by))
            }
            Self::Denied { selected_by } => {
                format!("{end}: selected by {}; none allows {what}", Listed(selected_by))
            }
            Self::Allowed { by } => format!("{end}: {what} is allowed by {}", Listed(by)),
            Self::NotIsolated => format!("{end}: not isolated"),
        }
    }
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied { selected_by } => write!(f, "denied: selected by {}", Listed(selected_by)),
            Self::Allowed { by } => write!(f, "allowed by {}", Listed(by)),
            Self::NotIsolated => f.write_str("not isolated"),
        }
    }
}

/// Policies in a sentence: `a`, `a and b`, `a, b and c`.
struct Listed<'a>(&'a BTreeSet<PolicyKey>);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.0.len().saturating_sub(1);
        for (place, policy) in self.0.iter().enumerate() {
            match place {
                0 => {}
                _ if place == last => f.write_str(" and ")?,
                _ => f.write_str(", ")?,
            }
            write!(f, "{policy}")?;
        }
        Ok(())
    }
}
