//! Whether what is to hold pods can: a name in the configuration that fits no interface holds nobody, in silence.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use imbl::OrdSet;

use super::{Escape, Subject, routes};
use crate::interfaces::pods::PodInterfaces;
use crate::interfaces::{Index, Interface};
use crate::netlink::Socket;

/// A reason, if the node has routes to its pods and not one leads through an interface of `held`. That some do not is no
/// mistake: where a pod has just gone, the route to its address is the one to the outside.
pub(super) fn escapes(
    interfaces: &BTreeMap<Index, Interface>,
    held: &PodInterfaces,
    locals: &OrdSet<IpAddr>,
) -> Option<Escape> {
    match other_way(interfaces, held, locals) {
        Ok(way) => way.map(|interface| Escape::NotHeld { interface, pods: locals.len() }),
        Err(error) => Some(Escape::Unknown { subject: Subject::Routes, reason: error.to_string() }),
    }
}

/// An interface that leads to a pod, if none of those do that are held.
fn other_way(
    interfaces: &BTreeMap<Index, Interface>,
    held: &PodInterfaces,
    locals: &OrdSet<IpAddr>,
) -> io::Result<Option<String>> {
    let mut other = None;
    if locals.is_empty() {
        return Ok(None);
    }
    let mut socket = Socket::open(None, 0)?;
    for address in locals {
        let Some(index) = routes::interface_towards(&mut socket, *address)? else { continue };
        let Some(interface) = interfaces.get(&index) else { continue };
        if held.matches(&interface.name) {
            return Ok(None);
        }
        other.get_or_insert_with(|| interface.name.clone());
    }
    Ok(other)
}
