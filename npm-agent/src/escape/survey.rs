//! One look at the node: every reason that can be seen from the kernel's state.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use npm_policy::goal::Family;

use super::{Escape, Place, Subject, ingress, ipsec, ipvs, legacy, nftables, routes};
use crate::exec::Tools;
use crate::interfaces::{AdminState, Index, Interface, Kind};
use crate::netlink::Socket;

/// Looks at the calling thread's network namespace. What can't be looked at is in the answer.
pub(super) fn survey(
    interfaces: &BTreeMap<Index, Interface>,
    protected: &BTreeSet<IpAddr>,
    tools: &Tools,
) -> BTreeSet<Escape> {
    let looks = [
        bridges(interfaces, protected),
        ipvs_services().map_err(|error| (Subject::Ipvs, error.to_string())),
        ipsec::escapes(protected).map_err(|error| (Subject::Ipsec, error.to_string())),
        nftables::escapes().map_err(|error| (Subject::Nftables, error.to_string())),
        legacy_rules(tools),
        ingress::filters(interfaces).map_err(|error| (Subject::Filters, error.to_string())),
    ];
    let mut escapes = BTreeSet::new();
    for look in looks {
        match look {
            Ok(found) => escapes.extend(found),
            Err((subject, reason)) => _ = escapes.insert(Escape::Unknown { subject, reason }),
        }
    }
    escapes
}

type Look = Result<BTreeSet<Escape>, (Subject, String)>;

/// Bridges that pass packets between ports without showing them to netfilter.
fn bridges(interfaces: &BTreeMap<Index, Interface>, protected: &BTreeSet<IpAddr>) -> Look {
    let mut unseen = Vec::new();
    for family in Family::BOTH {
        let shows_all =
            shows_bridged(family).map_err(|error| (Subject::BridgeSettings, error.to_string()))?;
        let bridges = interfaces.values().filter(|interface| interface.kind == Kind::Bridge);
        let silent = bridges.filter(|bridge| !shows_all && !bridge.asks_filter.contains(&family));
        unseen.extend(silent.filter(|bridge| passes(bridge, interfaces)).map(|bridge| (family, bridge)));
    }
    if unseen.is_empty() {
        return Ok(BTreeSet::new());
    }
    let behind = pods_behind(protected).map_err(|error| (Subject::Routes, error.to_string()))?;
    let escapes = unseen.into_iter().map(|(family, bridge)| Escape::Bridged {
        family,
        bridge: bridge.name.clone(),
        pods: behind.get(&(family, bridge.index)).copied().unwrap_or_default(),
    });
    Ok(escapes.collect())
}

/// Whether the node shows all bridged packets of a family to iptables. Without the setting there is no br_netfilter, and
/// none are shown.
fn shows_bridged(family: Family) -> io::Result<bool> {
    let path = match family {
        Family::V4 => "/proc/sys/net/bridge/bridge-nf-call-iptables",
        Family::V6 => "/proc/sys/net/bridge/bridge-nf-call-ip6tables",
    };
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim() != "0"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a bridge has two ports to pass packets between.
fn passes(bridge: &Interface, interfaces: &BTreeMap<Index, Interface>) -> bool {
    let is_port = |interface: &&Interface| {
        interface.state == AdminState::Up
            && interface.master.as_ref().is_some_and(|master| master.index == bridge.index)
    };
    bridge.state == AdminState::Up && interfaces.values().filter(is_port).count() >= 2
}

/// How many addresses are reached through which interface.
fn pods_behind(protected: &BTreeSet<IpAddr>) -> io::Result<BTreeMap<(Family, Index), usize>> {
    let mut socket = Socket::open(None, 0)?;
    let mut behind = BTreeMap::new();
    for address in protected {
        if let Some(index) = routes::interface_towards(&mut socket, *address)? {
            *behind.entry((Family::of(*address), index)).or_default() += 1;
        }
    }
    Ok(behind)
}

fn ipvs_services() -> io::Result<BTreeSet<Escape>> {
    let services = match std::fs::read_to_string("/proc/thread-self/net/ip_vs") {
        Ok(text) => ipvs::services(&text),
        // No such module.
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    Ok((services > 0).then_some(Escape::Ipvs { services }).into_iter().collect())
}

fn legacy_rules(tools: &Tools) -> Look {
    let mut escapes = BTreeSet::new();
    for (family, names, program) in [
        (Family::V4, "ip_tables_names", "iptables-legacy-save"),
        (Family::V6, "ip6_tables_names", "ip6tables-legacy-save"),
    ] {
        // The table comes into being when it is first asked for, which is no question to put to a node without it.
        let names = std::fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
        if !names.lines().any(|name| name == "raw") {
            continue;
        }
        let saved =
            tools.run(program, &["-t", "raw"], "").map_err(|error| (Subject::Legacy, error.to_string()))?;
        let legacy::Rules { zones, no_track } = legacy::rules(&saved);
        let place = || Place::Legacy(family);
        escapes.extend((zones > 0).then(|| Escape::Zones { place: place(), rules: zones }));
        escapes.extend((no_track > 0).then(|| Escape::NoTrack { place: place(), rules: no_track }));
    }
    Ok(escapes)
}
