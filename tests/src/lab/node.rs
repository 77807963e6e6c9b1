//! Links, addresses and routes: how a node's pods, other nodes and the outside reach each other.
//!
//! ```text
//!  pod ── veth ──┐                                        ┌── veth ── external
//!  pod ── veth ──┤ node (forwards, filters) ── uplink ── fabric ── uplink ── node ── pods
//!  pod ── veth ──┘                                        (a router that filters nothing)
//! ```
//!
//! Every end has its address with a host prefix and a default route through a link-local gateway (169.254.1.1,
//! fe80::1), as Azure CNI's transparent mode gives it, so any address can stand anywhere. In the bridged layout the
//! node's pods share a bridge and have on-link routes to each other: what passes between them crosses FORWARD
//! through br_netfilter, neighbour discovery included.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Context, Result};

use super::netns::{Netns, on_fresh_thread};
use crate::exec;

/// How a node's pods are joined to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A veth for each pod and a route to it.
    Routed,
    /// One bridge; `bridge-nf-call-iptables` shows its packets to iptables.
    Bridged,
}

/// The gateway of everything behind a node, and the one of what is behind the fabric.
const NODE_GATEWAY: Gateway = Gateway { v4: "169.254.1.1", v6: "fe80::1" };
const FABRIC_GATEWAY: Gateway = Gateway { v4: "169.254.2.1", v6: "fe80::2" };

#[derive(Clone, Copy)]
struct Gateway {
    v4: &'static str,
    v6: &'static str,
}

/// What hangs on a router.
pub(super) struct Leaf<'a> {
    /// Its namespace.
    pub(super) netns: &'a Netns,
    /// Its own addresses.
    pub(super) addresses: Vec<IpAddr>,
    /// What else is reached through it.
    pub(super) behind: Vec<IpAddr>,
}

/// Settings that every namespace gets before it has links, which inherit them.
const EVERYWHERE: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

const ROUTERS: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
];

const BRIDGES: &[(&str, &str)] =
    &[("net/bridge/bridge-nf-call-iptables", "1"), ("net/bridge/bridge-nf-call-ip6tables", "1")];

/// What a namespace does with packets that are not its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Drops them.
    Host,
    /// Forwards them.
    Router,
}

/// Sets the kernel's settings of a namespace, and brings `lo` up.
pub(super) fn prepare(netns: &Netns, role: Role) -> Result<()> {
    netns.run(|| {
        for (key, value) in EVERYWHERE {
            write_setting(key, value)?;
        }
        if role == Role::Router {
            for (key, value) in ROUTERS {
                write_setting(key, value)?;
            }
        }
        exec::run("ip", &["link", "set", "lo", "up"]).map(drop)
    })
}

/// Writes a setting of the calling thread's network namespace.
///
/// # Errors
/// The kernel has no such setting or refuses the value.
pub fn write_setting(key: &str, value: &str) -> Result<()> {
    std::fs::write(format!("/proc/sys/{key}"), value).with_context(|| format!("setting {key} to {value}"))
}

/// Joins pods to their node.
pub(super) fn join_pods(node: &Netns, pods: &[Leaf<'_>], layout: Layout) -> Result<()> {
    if layout == Layout::Bridged {
        node.run(|| BRIDGES.iter().try_for_each(|(key, value)| write_setting(key, value)))
            .context("bridged pods need br_netfilter")?;
    }
    join(node, pods, layout, NODE_GATEWAY, "veth")
}

/// Joins nodes and hosts outside the cluster to the fabric.
pub(super) fn join_fabric(fabric: &Netns, leaves: &[Leaf<'_>]) -> Result<()> {
    join(fabric, leaves, Layout::Routed, FABRIC_GATEWAY, "link")
}

fn join(router: &Netns, leaves: &[Leaf<'_>], layout: Layout, gateway: Gateway, port: &str) -> Result<()> {
    // The leaf's end of its veth pair.
    let device = if port == "link" { "up0" } else { "eth0" };
    let mut batch = format!("addr add {}/32 dev lo\n", gateway.v4);
    if layout == Layout::Bridged {
        batch.push_str("link add cbr0 type bridge mcast_snooping 0\nlink set cbr0 up\n");
        writeln!(batch, "addr add {}/64 dev cbr0 nodad", gateway.v6)?;
    }
    for (index, leaf) in leaves.iter().enumerate() {
        let host = format!("{port}{index}");
        writeln!(batch, "link add {host} type veth peer name {device} netns {}", leaf.netns.name())?;
        let routed_by = match layout {
            Layout::Routed => {
                writeln!(batch, "link set {host} up\naddr add {}/64 dev {host} nodad", gateway.v6)?;
                host
            }
            Layout::Bridged => {
                writeln!(
                    batch,
                    "link set {host} master cbr0 up\nlink set {host} type bridge_slave hairpin on"
                )?;
                "cbr0".to_owned()
            }
        };
        for address in &leaf.addresses {
            writeln!(batch, "route add {} dev {routed_by}", host_prefix(*address))?;
        }
    }
    router.exec_with_input("ip", &["-batch", "-"], &batch).context("joining a router to its leaves")?;
    on_fresh_thread(|| {
        for leaf in leaves {
            leaf.netns.enter()?;
            exec::run_with_input("ip", &["-batch", "-"], &leaf_batch(leaf, leaves, layout, gateway, device)?)
                .with_context(|| format!("setting up {}", leaf.netns.name()))?;
        }
        Ok(())
    })?;
    // Only when the leaf's addresses are reachable can something be routed through them.
    let mut batch = String::new();
    for (index, leaf) in leaves.iter().enumerate() {
        for address in &leaf.behind {
            let via = leaf.addresses.iter().find(|own| own.is_ipv4() == address.is_ipv4());
            let via = via.with_context(|| format!("no address of {address}'s family leads to it"))?;
            writeln!(batch, "route add {} via {via} dev {port}{index} onlink", host_prefix(*address))?;
        }
    }
    router.exec_with_input("ip", &["-batch", "-"], &batch).context("adding routes through leaves").map(drop)
}

fn leaf_batch(
    leaf: &Leaf<'_>,
    all: &[Leaf<'_>],
    layout: Layout,
    gateway: Gateway,
    device: &str,
) -> Result<String> {
    let mut batch = format!("link set {device} up\n");
    for address in &leaf.addresses {
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        writeln!(batch, "addr add {} dev {device}{nodad}", host_prefix(*address))?;
    }
    if layout == Layout::Bridged {
        let others = all.iter().filter(|other| other.netns.name() != leaf.netns.name());
        for address in others.flat_map(|other| &other.addresses) {
            writeln!(batch, "route add {} dev {device}", host_prefix(*address))?;
        }
    }
    if leaf.addresses.iter().any(IpAddr::is_ipv4) {
        writeln!(batch, "route add {} dev {device} scope link", gateway.v4)?;
        writeln!(batch, "route add default via {} dev {device}", gateway.v4)?;
    }
    if leaf.addresses.iter().any(IpAddr::is_ipv6) {
        writeln!(batch, "route add ::/0 via {} dev {device}", gateway.v6)?;
    }
    Ok(batch)
}

fn host_prefix(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}/32"),
        IpAddr::V6(address) => format!("{address}/128"),
    }
}
