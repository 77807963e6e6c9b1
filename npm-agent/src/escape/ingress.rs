//! Filters of others on what comes in through an interface (tc(8), clsact and ingress): they act before netfilter and may
//! send packets past it. Ours are on what goes out.
//!
//! Programs that are attached as links (TCX) or for XDP do not show here.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use netlink_packet_core::NLM_F_DUMP;
use rustix::io::Errno;

use super::Escape;
use crate::interfaces::{Index, Interface};
use crate::netlink::{Socket, array, attributes, malformed, text};

// linux/rtnetlink.h
const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
// linux/pkt_cls.h
const TCA_BPF_NAME: u16 = 7;
/// Where filters of what comes in hang (TC_H_CLSACT, TC_H_MIN_INGRESS; linux/pkt_sched.h).
const INGRESS: u32 = 0xffff_fff2;
/// Where filters of what goes out hang (TC_H_MIN_EGRESS).
const EGRESS: u32 = 0xffff_fff3;
/// `struct tcmsg`, and where it has the interface's number, the filter's handle and the parent.
const HEADER_LEN: usize = 20;
const INTERFACE: usize = 4;
const HANDLE: usize = 8;
const PARENT: usize = 12;

/// The interfaces that have such filters.
///
/// # Errors
/// The kernel does not let itself be asked.
pub(super) fn filters(interfaces: &BTreeMap<Index, Interface>) -> io::Result<BTreeSet<Escape>> {
    let mut socket = Socket::open(None, 0)?;
    let mut hooked = BTreeSet::new();
    socket.ask(RTM_GETQDISC, NLM_F_DUMP, &[0; HEADER_LEN], |kind, payload| {
        if kind == RTM_NEWQDISC && ["clsact", "ingress"].contains(&kind_of(payload)?.as_str()) {
            hooked.insert(interface_of(payload)?);
        }
        Ok(())
    })?;
    let mut escapes = BTreeSet::new();
    for interface in hooked.iter().filter_map(|index| interfaces.get(index)) {
        let filters = filters_of(&mut socket, interface.index)?;
        if !filters.is_empty() {
            let filters = filters.into_iter().collect::<Vec<_>>().join(", ");
            escapes.insert(Escape::IngressFilter { interface: interface.name.clone(), filters });
        }
    }
    Ok(escapes)
}

/// Names of programs, or kinds of filters that have none.
fn filters_of(socket: &mut Socket, interface: Index) -> io::Result<BTreeSet<String>> {
    let filters = list(socket, interface, INGRESS)?;
    Ok(filters.into_iter().map(|(_, name)| name).collect())
}

/// The filters of what goes out through an interface, as they are asked: handles, and names as in [`filters_of`].
///
/// # Errors
/// The kernel does not let itself be asked.
pub(crate) fn egress_filters(interface: Index) -> io::Result<Vec<(u32, String)>> {
    let mut filters = list(&mut Socket::open(None, 0)?, interface, EGRESS)?;
    // Without a handle: what several filters of one priority are in.
    filters.retain(|(handle, _)| *handle != 0);
    Ok(filters)
}

/// Whether an interface has a hook for what goes out: the queueing discipline that is in its place on many nodes, `ingress`,
/// takes filters for what goes out and asks them of what comes in.
///
/// # Errors
/// The kernel does not let itself be asked.
pub(crate) fn has_egress_hook(interface: Index) -> io::Result<bool> {
    let mut found = false;
    Socket::open(None, 0)?.ask(RTM_GETQDISC, NLM_F_DUMP, &[0; HEADER_LEN], |kind, payload| {
        found |= kind == RTM_NEWQDISC && interface_of(payload)? == interface && kind_of(payload)? == "clsact";
        Ok(())
    })?;
    Ok(found)
}

fn list(socket: &mut Socket, interface: Index, parent: u32) -> io::Result<Vec<(u32, String)>> {
    let mut body = [0; HEADER_LEN];
    body[INTERFACE..INTERFACE + 4].copy_from_slice(&interface.0.to_ne_bytes());
    body[PARENT..PARENT + 4].copy_from_slice(&parent.to_ne_bytes());
    let mut filters = Vec::new();
    let asked = socket.ask(RTM_GETTFILTER, NLM_F_DUMP, &body, |kind, payload| {
        if kind == RTM_NEWTFILTER {
            let handle = array(payload, HANDLE).ok_or_else(|| malformed("the handle of a filter"))?;
            let name = program_of(payload)?.map_or_else(|| kind_of(payload), Ok)?;
            filters.push((u32::from_ne_bytes(handle), name));
        }
        Ok(())
    });
    match asked {
        Ok(_listed) => Ok(filters),
        Err(error) => match Errno::from_io_error(&error) {
            // The interface, or its hook, has gone meanwhile.
            Some(Errno::NODEV | Errno::INVAL) => Ok(Vec::new()),
            Some(_) | None => Err(error),
        },
    }
}

fn interface_of(payload: &[u8]) -> io::Result<Index> {
    let index = array(payload, INTERFACE).ok_or_else(|| malformed("the interface of a queue"))?;
    Ok(Index(u32::from_ne_bytes(index)))
}

fn attribute_of(payload: &[u8], wanted: u16) -> io::Result<Option<&[u8]>> {
    for attribute in attributes(payload.get(HEADER_LEN..).unwrap_or_default()) {
        let (kind, held) = attribute?;
        if kind == wanted {
            return Ok(Some(held));
        }
    }
    Ok(None)
}

fn kind_of(payload: &[u8]) -> io::Result<String> {
    Ok(attribute_of(payload, TCA_KIND)?.map(text).unwrap_or_default())
}

/// The name of a filter's program, if it has one.
fn program_of(payload: &[u8]) -> io::Result<Option<String>> {
    if kind_of(payload)? != "bpf" {
        return Ok(None);
    }
    for option in attributes(attribute_of(payload, TCA_OPTIONS)?.unwrap_or_default()) {
        let (kind, held) = option?;
        if kind == TCA_BPF_NAME {
            return Ok(Some(text(held)));
        }
    }
    Ok(None)
}
