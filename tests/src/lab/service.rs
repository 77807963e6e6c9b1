//! Services as kube-proxy's iptables mode makes them on a node: translation of the destination, masquerade for
//! hairpin and node ports, and the KUBE-FORWARD chain that accepts what carries the masquerade mark.
//!
//! The rules follow `pkg/proxy/iptables/proxier.go` of Kubernetes 1.33, one backend a Service.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Context, Result};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;

use super::netns::Netns;

/// Which of the two kinds of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dialect {
    /// `iptables-nft`.
    Nft,
    /// `iptables-legacy`.
    Legacy,
}

impl Dialect {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Nft, Self::Legacy];

    /// The word in the programs' names, and in the agent's settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }

    /// The name of a program: `iptables-nft-restore` for the suffix `-restore`.
    pub fn program(self, family: Family, suffix: &str) -> String {
        let program = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        format!("{program}-{}{suffix}", self.name())
    }
}

/// A Service with one port and one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The ClusterIP.
    pub address: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The Service's port.
    pub port: u16,
    /// The pod, by its address of the same family.
    pub backend: IpAddr,
    /// The pod's port.
    pub target: u16,
    /// The port on every node's own addresses, if the Service has one.
    pub node_port: Option<u16>,
}

/// Makes these the Services of a node, in place of all that it had.
///
/// # Errors
/// iptables is missing or refuses a rule.
pub fn install(node: &Netns, dialect: Dialect, services: &[Service]) -> Result<()> {
    for family in Family::BOTH {
        let of_family: Vec<_> =
            services.iter().filter(|service| Family::of(service.address) == family).collect();
        let nat = render_nat(&of_family).context("rendering Services")?;
        // Without --noflush: the node's nat table holds nothing but this.
        node.exec_with_input(&dialect.program(family, "-restore"), &["-w"], &nat)?;
        let filter = dialect.program(family, "");
        if node.exec(&filter, &["-w", "-C", "FORWARD", "-j", "KUBE-FORWARD"]).is_err() {
            node.exec_with_input(&dialect.program(family, "-restore"), &["-w", "--noflush"], FORWARD)?;
        }
    }
    Ok(())
}

const FORWARD: &str = "\
*filter
:KUBE-FORWARD - [0:0]
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -j KUBE-FORWARD
COMMIT
";

fn render_nat(services: &[&Service]) -> Result<String> {
    let mut rules = "\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
"
    .to_owned();
    for Service { address, protocol, port, backend, target, node_port } in services.iter().copied() {
        let protocol = protocol.to_string().to_lowercase();
        let to = match backend {
            IpAddr::V4(_) => format!("{backend}:{target}"),
            IpAddr::V6(_) => format!("[{backend}]:{target}"),
        };
        let service = format!("-A KUBE-SERVICES -d {address} -p {protocol} -m {protocol} --dport {port}");
        writeln!(rules, "{service} -s {backend} -j KUBE-MARK-MASQ")?;
        writeln!(rules, "{service} -j DNAT --to-destination {to}")?;
        if let Some(port) = node_port {
            let node_port = format!("-A KUBE-NODEPORTS -p {protocol} -m {protocol} --dport {port}");
            writeln!(rules, "{node_port} -j KUBE-MARK-MASQ")?;
            writeln!(rules, "{node_port} -j DNAT --to-destination {to}")?;
        }
    }
    rules.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n");
    Ok(rules)
}
