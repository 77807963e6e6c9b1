//! Which interfaces need the program: all, but loopback and what the configuration excludes.
//!
//! A forwarded packet leaves the node, or enters a pod, through the egress of an interface of the node's namespace. Which
//! of them a CNI uses for that is its own affair and may change; so none is left out for its name or its kind.

use std::fmt;
use std::str::FromStr;

use glob::Pattern;

use super::{Interface, Kind};

/// Kinds that wrap packets into packets of the node's own (`IFLA_INFO_KIND`).
const TUNNELS: [&str; 14] = [
    "vxlan",
    "geneve",
    "ipip",
    "ip6tnl",
    "sit",
    "gre",
    "gretap",
    "ip6gre",
    "ip6gretap",
    "erspan",
    "ip6erspan",
    "vti",
    "wireguard",
    "xfrm",
];

/// Kinds that send through a device below them.
const UPPERS: [&str; 8] = ["vlan", "bond", "team", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec"];

/// Whether an interface needs the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// It does, for forwarded packets leave there.
    Program(Way),
    /// It does not, or must not have it.
    Nothing(Exemption),
}

/// What leaves through an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Packets to a pod, or to another namespace.
    Veth,
    /// Bridged packets, which pass no other interface of the node; and routed ones, judged at the bridge before.
    BridgePort,
    /// Packets that are routed to what is behind a bridge; judged again at its port.
    Bridge,
    /// Packets from a bond or its likes, judged there before.
    LowerPort,
    /// Packets before they are wrapped. Wrapped they count as the node's own and pass.
    Tunnel,
    /// Packets that are judged again at the device below, unless they carry a VLAN's tag there.
    Upper,
    /// Packets to other nodes and the outside.
    Uplink,
    /// Packets of whatever kind.
    Other,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Veth => "leads to a pod or another namespace",
            Self::BridgePort => "bridged packets leave here only",
            Self::Bridge => "packets are routed to a bridge's ports here",
            Self::LowerPort => "port of another device, which judges before",
            Self::Tunnel => "packets leave here before they are wrapped",
            Self::Upper => "sends through another device, which judges again",
            Self::Uplink => "leads to other nodes",
            Self::Other => "packets may leave here",
        })
    }
}

/// Why an interface gets no program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exemption {
    /// What the node says to itself is never judged.
    Loopback,
    /// The configuration says so: what leaves there is judged by nobody.
    Excluded {
        /// The pattern that its name matches.
        pattern: String,
    },
}

impl fmt::Display for Exemption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("the node talks to itself here"),
            Self::Excluded { pattern } => write!(f, "excluded by the configuration: {pattern}"),
        }
    }
}

/// What the configuration says of interfaces: patterns of names with `*`, `?` and `[abc]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Interfaces that match any of these get no program.
    pub excluded: Vec<Pattern>,
}

impl Selection {
    /// Whether an interface needs the program, and why.
    pub fn need(&self, interface: &Interface) -> Need {
        if interface.kind == Kind::Loopback {
            return Need::Nothing(Exemption::Loopback);
        }
        if let Some(pattern) = self.excluded.iter().find(|pattern| pattern.matches(&interface.name)) {
            return Need::Nothing(Exemption::Excluded { pattern: pattern.to_string() });
        }
        Need::Program(way(interface))
    }
}

fn way(interface: &Interface) -> Way {
    match interface.master.as_ref().map(|master| master.port.as_deref()) {
        Some(Some("bridge")) => return Way::BridgePort,
        // A virtual function below a paravirtual device has a master that does not say what it makes of it.
        Some(None | Some("bond" | "team")) => return Way::LowerPort,
        // Packets pass a VRF on the way in, or when they are the node's own.
        Some(Some(_)) | None => {}
    }
    match &interface.kind {
        Kind::Veth => Way::Veth,
        Kind::Bridge => Way::Bridge,
        Kind::Device => Way::Uplink,
        Kind::Other(kind) if TUNNELS.contains(&kind.as_str()) => Way::Tunnel,
        Kind::Other(kind) if UPPERS.contains(&kind.as_str()) => Way::Upper,
        Kind::Other(_) | Kind::Loopback => Way::Other,
    }
}

/// Why a text is no selection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no pattern of interface names: {reason}")]
pub struct PatternError {
    /// What is there.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// Patterns with commas between them; an empty text excludes nothing.
impl FromStr for Selection {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let parts = text.split(',').map(str::trim);
        let parts = parts.filter(|part| !part.is_empty() || !text.trim().is_empty());
        let excluded = parts.map(|part| {
            let bad = |reason| PatternError { text: part.to_owned(), reason };
            if part.is_empty() {
                return Err(bad("it is empty"));
            }
            Pattern::new(part).map_err(|error| bad(error.msg))
        });
        Ok(Self { excluded: excluded.collect::<Result<_, _>>()? })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::interfaces::{AdminState, Framing, Index, Master};

    fn interface(name: &str, kind: Kind, port: Option<Option<&str>>) -> Interface {
        Interface {
            index: Index(7),
            name: name.to_owned(),
            kind,
            state: AdminState::Up,
            master: port.map(|port| Master { index: Index(3), port: port.map(str::to_owned) }),
            framing: Framing::Ethernet,
            asks_filter: BTreeSet::new(),
        }
    }

    fn other(kind: &str) -> Kind {
        Kind::Other(kind.to_owned())
    }

    #[test]
    fn every_interface_of_the_known_networks_gets_the_program() {
        for (network, name, kind, port, way) in [
            ("Azure CNI", "azv1b2c3d4e5f6", Kind::Veth, None, Way::Veth),
            ("Azure CNI", "eth0", Kind::Device, None, Way::Uplink),
            ("Azure CNI, accelerated", "enP5s1", Kind::Device, Some(None), Way::LowerPort),
            ("kubenet", "cbr0", Kind::Bridge, None, Way::Bridge),
            ("kubenet", "veth12ab34cd", Kind::Veth, Some(Some("bridge")), Way::BridgePort),
            ("flannel", "cni0", Kind::Bridge, None, Way::Bridge),
            ("flannel", "flannel.1", other("vxlan"), None, Way::Tunnel),
            ("Calico", "cali0123456789a", Kind::Veth, None, Way::Veth),
            ("Calico", "tunl0", other("ipip"), None, Way::Tunnel),
            ("bond", "bond0", other("bond"), None, Way::Upper),
            ("bond", "eth1", Kind::Device, Some(Some("bond")), Way::LowerPort),
            ("vlan", "eth0.100", other("vlan"), None, Way::Upper),
            ("vrf", "eth2", Kind::Device, Some(Some("vrf")), Way::Uplink),
            ("unknown", "x0", other("brand-new"), None, Way::Other),
        ] {
            let need = Selection::default().need(&interface(name, kind, port));
            assert_eq!(need, Need::Program(way), "{network}: {name}");
        }
        let need = Selection::default().need(&interface("lo", Kind::Loopback, None));
        assert_eq!(need, Need::Nothing(Exemption::Loopback));
    }

    #[test]
    fn what_is_excluded_gets_none() {
        let selection: Selection = "docker*, mgmt[01]".parse().unwrap();
        for (name, pattern) in
            [("docker0", Some("docker*")), ("mgmt1", Some("mgmt[01]")), ("mgmt2", None), ("xdocker0", None)]
        {
            let need = selection.need(&interface(name, Kind::Bridge, None));
            let expected = match pattern {
                Some(pattern) => Need::Nothing(Exemption::Excluded { pattern: pattern.to_owned() }),
                None => Need::Program(Way::Bridge),
            };
            assert_eq!(need, expected, "{name}");
        }
        assert_eq!(" ".parse(), Ok(Selection::default()));
        for bad in ["eth0,,eth1", "eth[", "a**b"] {
            assert!(bad.parse::<Selection>().is_err(), "{bad}");
        }
    }
}
