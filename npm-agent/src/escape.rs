//! Why traffic of the node escapes judgement, or is judged otherwise than policies say: each reason as data, with a sentence
//! for people and what to do.
//!
//! ```text
//! watch (thread) ─ looks at the kernel ─┐
//! a backend ─ what it knows of itself ──┴─► Board ─► status, readiness, log on change
//! ```
//!
//! Only what is certain is claimed. What could not be looked at is a reason of its own, [`Escape::Unknown`].
//!
//! Rules in iptables-nft and in iptables-legacy at once are no reason: every packet passes the FORWARD of both, an ACCEPT
//! in one ends that one only, and our DROP holds in either.

mod board;
mod held;
mod ingress;
mod ipsec;
mod ipvs;
mod legacy;
mod nftables;
mod routes;
mod survey;
mod watch;

use std::fmt;

use npm_policy::goal::Family;

pub use self::board::{Board, Origin};
pub(crate) use self::ingress::{egress_filters, has_egress_hook};
pub use self::watch::start;

/// What judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Engine {
    /// Rules of FORWARD.
    Iptables,
    /// Programs where packets leave interfaces.
    Ebpf,
}

/// A reason.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Escape {
    /// A bridge passes packets between its ports without showing them to netfilter.
    Bridged {
        /// The family.
        family: Family,
        /// The bridge.
        bridge: String,
        /// How many addresses of pods that a policy selects are behind it.
        pods: usize,
    },
    /// The rule that makes the kernel track connections was gone at the last look, and is put back.
    ConntrackRuleGone {
        /// The family.
        family: Family,
    },
    /// IPVS has virtual services.
    Ipvs {
        /// How many.
        services: usize,
    },
    /// Policies of IPsec encrypt packets on their way out.
    Ipsec {
        /// How many.
        policies: usize,
        /// How many addresses of pods that a policy selects send such packets.
        pods: usize,
    },
    /// A flowtable takes connections past the netfilter hooks.
    Flowtable {
        /// `ip`, `ip6` or `inet`, its table, and its name.
        name: String,
        /// Where packets go past the kernel.
        offload: Offload,
    },
    /// Rules put connections into conntrack zones.
    Zones {
        /// Where they are.
        place: Place,
        /// How many.
        rules: usize,
    },
    /// Rules keep connections from being tracked.
    NoTrack {
        /// Where they are.
        place: Place,
        /// How many.
        rules: usize,
    },
    /// Filters of others act on what comes in through an interface, before netfilter.
    IngressFilter {
        /// The interface.
        interface: String,
        /// The programs' names, or the filters' kinds.
        filters: String,
    },
    /// An interface that needs the program and does not have it.
    WithoutProgram {
        /// The interface.
        interface: String,
        /// Why.
        reason: String,
    },
    /// Another's program runs before ours on an interface.
    ProgramBefore {
        /// The interface.
        interface: String,
        /// The program, as the kernel names it.
        program: String,
    },
    /// Pods are to be held until they are programmed, and no pod of the node is behind an interface that would be.
    NotHeld {
        /// Where the node's route to one of them leads.
        interface: String,
        /// How many addresses of pods the node has.
        pods: usize,
    },
    /// Something could not be looked at.
    Unknown {
        /// What.
        subject: Subject,
        /// Why not.
        reason: String,
    },
}

/// Who forwards the packets of a flowtable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Offload {
    /// The kernel.
    Software,
    /// Hardware, where it can.
    Hardware,
}

/// Where rules are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the raw table of iptables-legacy or ip6tables-legacy.
    Legacy(Family),
    /// In a table of nftables, by family and name; iptables-nft's are `ip raw` and `ip6 raw`.
    Nftables(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Legacy(Family::V4) => f.write_str("iptables-legacy's raw table"),
            Self::Legacy(Family::V6) => f.write_str("ip6tables-legacy's raw table"),
            Self::Nftables(table) => write!(f, "nftables' table {table}"),
        }
    }
}

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The interfaces, and with them bridges.
    Interfaces,
    /// The node's settings for bridges.
    BridgeSettings,
    /// The routes to pods.
    Routes,
    /// IPVS's services.
    Ipvs,
    /// IPsec's policies.
    Ipsec,
    /// The rules that make the kernel track connections.
    Tracking,
    /// nftables' tables.
    Nftables,
    /// iptables-legacy's raw tables.
    Legacy,
    /// The filters of interfaces.
    Filters,
    /// The programs that run beside ours.
    Programs,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interfaces => "the interfaces",
            Self::BridgeSettings => "the settings of bridges",
            Self::Routes => "the routes to pods",
            Self::Ipvs => "IPVS's services",
            Self::Ipsec => "IPsec's policies",
            Self::Tracking => "the rules that make the kernel track connections",
            Self::Nftables => "nftables' flowtables and rules",
            Self::Legacy => "iptables-legacy's raw tables",
            Self::Filters => "the filters of interfaces",
            Self::Programs => "the programs beside ours",
        })
    }
}

/// What a reason does to traffic that policies are about. The worst is last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// None that policies are about, as things stand.
    None,
    /// Packets are judged one by one, replies as well: what is allowed may be dropped.
    Stricter,
    /// Nobody knows.
    Unknown,
    /// It passes and is not judged.
    Unjudged,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Stricter => "stricter",
            Self::Unknown => "unknown",
            Self::Unjudged => "unjudged",
        })
    }
}

impl Escape {
    /// Every [`Escape::name`].
    pub const NAMES: [&'static str; 12] = [
        "bridged",
        "conntrack-rule-gone",
        "ipvs",
        "ipsec",
        "flowtable",
        "zones",
        "notrack",
        "ingress-filter",
        "without-program",
        "program-before",
        "not-held",
        "unknown",
    ];

    /// The reason's name, for metrics and scripts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bridged { .. } => "bridged",
            Self::ConntrackRuleGone { .. } => "conntrack-rule-gone",
            Self::Ipvs { .. } => "ipvs",
            Self::Ipsec { .. } => "ipsec",
            Self::Flowtable { .. } => "flowtable",
            Self::Zones { .. } => "zones",
            Self::NoTrack { .. } => "notrack",
            Self::IngressFilter { .. } => "ingress-filter",
            Self::WithoutProgram { .. } => "without-program",
            Self::ProgramBefore { .. } => "program-before",
            Self::NotHeld { .. } => "not-held",
            Self::Unknown { .. } => "unknown",
        }
    }

    /// What it does where this engine judges.
    pub fn effect(&self, engine: Engine) -> Effect {
        match (self, engine) {
            (Self::Bridged { pods: 0, .. }, _) => Effect::None,
            (Self::Bridged { .. }, Engine::Iptables) => Effect::Unjudged,
            // The program sees bridged packets, with no connection to them.
            (Self::Bridged { .. }, Engine::Ebpf) => Effect::Stricter,
            // A rule of FORWARD that is not there judges nothing.
            (Self::ConntrackRuleGone { .. }, Engine::Iptables) => Effect::Unjudged,
            (Self::ConntrackRuleGone { .. }, Engine::Ebpf) => Effect::Stricter,
            // Its packets go by LOCAL_IN and LOCAL_OUT. What conntrack says of them depends on IPVS's settings.
            (Self::Ipvs { .. }, Engine::Iptables) => Effect::Unjudged,
            (Self::Ipvs { .. }, Engine::Ebpf) => Effect::Unknown,
            // FORWARD sees packets before they are encrypted.
            (Self::Ipsec { .. }, Engine::Iptables) | (Self::Ipsec { pods: 0, .. }, Engine::Ebpf) => {
                Effect::None
            }
            (Self::Ipsec { .. }, Engine::Ebpf) => Effect::Unjudged,
            // A flow gets there only once it is confirmed, which no packet is that FORWARD has dropped.
            (Self::Flowtable { .. }, Engine::Iptables) => Effect::None,
            // Such packets leave with no connection to them, or not through the kernel at all.
            (Self::Flowtable { offload: Offload::Software, .. }, Engine::Ebpf) => Effect::Stricter,
            (Self::Flowtable { offload: Offload::Hardware, .. }, Engine::Ebpf) => Effect::Unknown,
            // A reply outside its connection's zone is new there.
            (Self::Zones { .. }, Engine::Iptables) => Effect::Stricter,
            // The proof is looked up by a tuple, which zones make ambiguous.
            (Self::Zones { .. }, Engine::Ebpf) => Effect::Unknown,
            (Self::NoTrack { .. }, Engine::Iptables | Engine::Ebpf) => Effect::Stricter,
            // They may redirect, or count, or mirror.
            (Self::IngressFilter { .. }, Engine::Iptables | Engine::Ebpf) => Effect::Unknown,
            (Self::WithoutProgram { .. } | Self::ProgramBefore { .. }, Engine::Iptables) => Effect::None,
            (Self::WithoutProgram { .. }, Engine::Ebpf) => Effect::Unjudged,
            // It may end the packet's way through the programs, or not.
            (Self::ProgramBefore { .. }, Engine::Ebpf) => Effect::Unknown,
            // Pods that are programmed are judged; new ones are open until they are, as without the setting.
            (Self::NotHeld { .. }, Engine::Iptables | Engine::Ebpf) => Effect::Unknown,
            (Self::Unknown { .. }, Engine::Iptables | Engine::Ebpf) => Effect::Unknown,
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Bridged { family: Family::V4, .. } => {
                "modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1"
            }
            Self::Bridged { family: Family::V6, .. } => {
                "modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-ip6tables=1"
            }
            Self::ConntrackRuleGone { .. } => "nothing: it is put back; find out who removes it",
            Self::Ipvs { .. } => "run kube-proxy with --proxy-mode=iptables or nftables",
            Self::Ipsec { .. } => {
                "use the iptables backend, or encrypt through an interface (xfrm, WireGuard)"
            }
            Self::Flowtable { .. } => "take the flowtable's rules away on nodes with policies",
            Self::Zones { .. } => "take the rules away, or have them match no pods",
            Self::NoTrack { .. } => "nothing if they match no pods (node-local DNS); else take them away",
            Self::IngressFilter { .. } => {
                "tc filter show dev INTERFACE ingress; nothing if they send no traffic of pods elsewhere"
            }
            Self::WithoutProgram { .. } => "see the reason; the agent tries again",
            Self::ProgramBefore { .. } => "find out what the program does; have it run after ours",
            Self::NotHeld { .. } => "name the interfaces that lead to pods in --pod-interfaces",
            Self::Unknown { .. } => "see the reason; the agent tries again",
        }
    }
}

/// One sentence for people.
impl fmt::Display for Escape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridged { family, bridge, pods } => {
                let family = family_name(*family);
                write!(f, "bridge {bridge} passes {family} packets between its ports unseen by netfilter")?;
                match pods {
                    0 => f.write_str("; no pod that a policy selects is behind it"),
                    pods => write!(f, "; addresses of pods that policies select behind it: {pods}"),
                }
            }
            Self::ConntrackRuleGone { family } => {
                write!(
                    f,
                    "the rule was gone that makes the kernel track {} connections, and is put back",
                    family_name(*family)
                )
            }
            Self::Ipvs { services } => {
                write!(
                    f,
                    "IPVS is in use (virtual services: {services}); its connections do not pass FORWARD"
                )
            }
            Self::Ipsec { policies, pods } => {
                write!(f, "policies of IPsec encrypt what leaves the node: {policies}")?;
                match pods {
                    0 => f.write_str("; no pod that a policy selects sends such packets"),
                    pods => write!(
                        f,
                        "; addresses of pods that policies select and that send such packets: {pods}"
                    ),
                }
            }
            Self::Flowtable { name, offload } => {
                let by = match offload {
                    Offload::Software => "",
                    Offload::Hardware => ", and the kernel where hardware can",
                };
                write!(f, "flowtable {name} takes established connections past netfilter{by}")
            }
            Self::Zones { place, rules } => {
                write!(f, "rules put connections into conntrack zones, in {place}: {rules}")
            }
            Self::NoTrack { place, rules } => {
                write!(f, "rules keep connections from being tracked, in {place}: {rules}")
            }
            Self::IngressFilter { interface, filters } => {
                write!(
                    f,
                    "filters of others act on what comes in on {interface}, before netfilter: {filters}"
                )
            }
            Self::WithoutProgram { interface, reason } => {
                write!(f, "interface {interface} has no program of ours: {reason}")
            }
            Self::ProgramBefore { interface, program } => {
                write!(f, "program {program} runs before ours on interface {interface}")
            }
            Self::NotHeld { interface, pods } => write!(
                f,
                "new pods are not held: of {pods} addresses of pods none is behind an interface of --pod-interfaces, \
                 but as {interface}"
            ),
            Self::Unknown { subject, reason } => write!(f, "cannot look at {subject}: {reason}"),
        }
    }
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TROUBLESHOOTING: &str = include_str!("../../docs/troubleshooting.md");

    fn one_of_each() -> Vec<Escape> {
        let place = || Place::Nftables("ip raw".to_owned());
        vec![
            Escape::Bridged { family: Family::V6, bridge: "cbr0".to_owned(), pods: 2 },
            Escape::ConntrackRuleGone { family: Family::V4 },
            Escape::Ipvs { services: 3 },
            Escape::Ipsec { policies: 1, pods: 2 },
            Escape::Flowtable { name: "inet filter fast".to_owned(), offload: Offload::Hardware },
            Escape::Zones { place: place(), rules: 1 },
            Escape::NoTrack { place: Place::Legacy(Family::V6), rules: 1 },
            Escape::IngressFilter { interface: "eth0".to_owned(), filters: "u32".to_owned() },
            Escape::WithoutProgram { interface: "eth0".to_owned(), reason: "refused".to_owned() },
            Escape::ProgramBefore { interface: "eth0".to_owned(), program: "cil_to_netdev".to_owned() },
            Escape::NotHeld { interface: "gke12ab".to_owned(), pods: 3 },
            Escape::Unknown { subject: Subject::Nftables, reason: "not permitted".to_owned() },
        ]
    }

    #[test]
    fn every_reason_has_a_name_of_its_own_and_a_row_in_the_docs() {
        let names: Vec<&str> = one_of_each().iter().map(Escape::name).collect();
        assert_eq!(names, Escape::NAMES);
        for name in names {
            assert!(
                TROUBLESHOOTING.contains(&format!("| `{name}` |")),
                "docs/troubleshooting.md lacks {name}"
            );
        }
    }

    /// What is claimed where: a change here is a change of what the status and readiness promise.
    #[test]
    fn effects_by_engine() {
        use Effect::{None, Stricter, Unjudged, Unknown};
        let effects = |engine| one_of_each().iter().map(|escape| escape.effect(engine)).collect::<Vec<_>>();
        assert_eq!(
            effects(Engine::Iptables),
            [
                Unjudged, Unjudged, Unjudged, None, None, Stricter, Stricter, Unknown, None, None, Unknown,
                Unknown
            ]
        );
        assert_eq!(
            effects(Engine::Ebpf),
            [
                Stricter, Stricter, Unknown, Unjudged, Unknown, Unknown, Stricter, Unknown, Unjudged,
                Unknown, Unknown, Unknown
            ]
        );
        let nobody = Escape::Bridged { family: Family::V4, bridge: "docker0".to_owned(), pods: 0 };
        for engine in [Engine::Iptables, Engine::Ebpf] {
            assert_eq!(nobody.effect(engine), None);
        }
    }

    #[test]
    fn the_board_keeps_origins_apart_and_puts_the_worst_first() {
        let board = Board::new(Engine::Ebpf, None).unwrap();
        let [bridged, .., without, _, _, unknown] = <[Escape; 12]>::try_from(one_of_each()).unwrap();
        board.replace(Origin::Node, [bridged.clone(), unknown.clone()].into());
        board.replace(Origin::Backend, [without.clone()].into());
        let known = |board: &Board| board.current().into_iter().map(|(_, escape)| escape).collect::<Vec<_>>();
        assert_eq!(known(&board), [without, unknown.clone(), bridged.clone()]);
        board.replace(Origin::Backend, [].into());
        assert_eq!(known(&board), [unknown, bridged]);
    }
}
