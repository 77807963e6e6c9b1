//! What nftables holds that bends conntrack or goes past it: flowtables, and rules before conntrack that put connections
//! into zones or keep them from being tracked. iptables-nft's rules are nftables' too.
//!
//! Over netlink, so that no `nft` program is needed (linux/netfilter/nf_tables.h). Only the tables that have a chain before
//! conntrack are read: others hold many thousand rules on some nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use netlink_packet_core::NLM_F_DUMP;
use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;

use super::{Escape, Offload, Place};
use crate::netlink::{Socket, array, attribute, attributes, malformed, text};

const SUBSYSTEM: u16 = 10 << 8;
const NEWCHAIN: u16 = SUBSYSTEM | 3;
const GETCHAIN: u16 = SUBSYSTEM | 4;
const NEWRULE: u16 = SUBSYSTEM | 6;
const GETRULE: u16 = SUBSYSTEM | 7;
const NEWFLOWTABLE: u16 = SUBSYSTEM | 22;
const GETFLOWTABLE: u16 = SUBSYSTEM | 23;
/// Objects of every kind name their table first.
const TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const CT_KEY: u16 = 2;
const CT_SOURCE: u16 = 4;
const CT_ZONE: u32 = 17;
const TARGET_NAME: u16 = 1;
const TARGET_INFO: u16 = 3;
const FLOWTABLE_NAME: u16 = 2;
const FLOWTABLE_FLAGS: u16 = 7;
const FLOWTABLE_HARDWARE: u32 = 1;
/// `struct nfgenmsg`.
const HEADER_LEN: usize = 4;
/// linux/netfilter.h: NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6; the others do not carry what we judge.
const FAMILIES: [(u8, &str); 3] = [(1, "inet"), (2, "ip"), (10, "ip6")];
const PREROUTING: u32 = 0;
/// Conntrack's place among the hooks (NF_IP_PRI_CONNTRACK): what comes behind finds the connection made.
const CONNTRACK: i32 = -200;
/// linux/netfilter/xt_CT.h.
const XT_CT_NOTRACK: u16 = 1;
const XT_CT_NOTRACK_ALIAS: u16 = 2;
const XT_CT_ZONE_MARK: u16 = 16;

/// A table, by its family's number and its name.
type Table = (u8, String);

/// Everything of the kind that the namespace has.
///
/// # Errors
/// The kernel does not let itself be asked. One without nftables or flowtables has none.
pub(super) fn escapes() -> io::Result<BTreeSet<Escape>> {
    let mut socket = match Socket::open(Some(NETFILTER), 0) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::PROTONOSUPPORT) => {
            return Ok(BTreeSet::new());
        }
        opened => opened?,
    };
    let mut escapes = BTreeSet::new();
    list(&mut socket, GETFLOWTABLE, 0, None, |kind, payload| {
        if kind == NEWFLOWTABLE {
            escapes.extend(flowtable(payload)?);
        }
        Ok(())
    })?;
    let mut early: BTreeMap<Table, BTreeSet<String>> = BTreeMap::new();
    let mut hooked: BTreeMap<Table, BTreeSet<String>> = BTreeMap::new();
    list(&mut socket, GETCHAIN, 0, None, |kind, payload| {
        if kind == NEWCHAIN {
            let (table, chain) = chain(payload)?;
            match chain {
                Chain::BeforeConntrack(name) => _ = early.entry(table).or_default().insert(name),
                Chain::Hooked(name) => _ = hooked.entry(table).or_default().insert(name),
                Chain::Unhooked => {}
            }
        }
        Ok(())
    })?;
    for table in early.keys() {
        let elsewhere = hooked.get(table);
        let mut rules = Rules::default();
        list(&mut socket, GETRULE, table.0, Some(&table.1), |kind, payload| {
            if kind == NEWRULE {
                rules.count(payload, |chain| elsewhere.is_some_and(|hooked| hooked.contains(chain)))?;
            }
            Ok(())
        })?;
        let Rules { zones, no_track } = rules;
        let place = || Place::Nftables(format!("{} {}", family_name(table.0), table.1));
        escapes.extend((zones > 0).then(|| Escape::Zones { place: place(), rules: zones }));
        escapes.extend((no_track > 0).then(|| Escape::NoTrack { place: place(), rules: no_track }));
    }
    Ok(escapes)
}

/// Lists objects of a kind. A list that changed meanwhile is taken as it is: the next look is not far.
fn list(
    socket: &mut Socket,
    kind: u16,
    family: u8,
    table: Option<&str>,
    each: impl FnMut(u16, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut body = vec![family, 0, 0, 0];
    if let Some(table) = table {
        body.extend(attribute(TABLE, &[table.as_bytes(), &[0]].concat()));
    }
    match socket.ask(kind, NLM_F_DUMP, &body, each) {
        Ok(_listed) => Ok(()),
        Err(error) => match Errno::from_io_error(&error) {
            // No nftables, no such kind of object, no such table any more.
            Some(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOENT) => Ok(()),
            Some(_) | None => Err(error),
        },
    }
}

/// Attributes by their kind.
fn by_kind(bytes: &[u8]) -> io::Result<BTreeMap<u16, &[u8]>> {
    attributes(bytes).collect()
}

fn object(payload: &[u8]) -> io::Result<(u8, BTreeMap<u16, &[u8]>)> {
    let header: [u8; HEADER_LEN] = array(payload, 0).ok_or_else(|| malformed("an object of nftables"))?;
    Ok((header[0], by_kind(&payload[HEADER_LEN..])?))
}

fn name(attributes: &BTreeMap<u16, &[u8]>, kind: u16) -> String {
    attributes.get(&kind).map(|bytes| text(bytes)).unwrap_or_default()
}

/// A number: nftables' are big-endian.
fn number(attributes: &BTreeMap<u16, &[u8]>, kind: u16) -> Option<u32> {
    attributes.get(&kind).and_then(|bytes| array(bytes, 0)).map(u32::from_be_bytes)
}

fn family_name(family: u8) -> &'static str {
    FAMILIES.iter().find(|(number, _)| *number == family).map_or("?", |(_, name)| name)
}

fn flowtable(payload: &[u8]) -> io::Result<Option<Escape>> {
    let (family, flowtable) = object(payload)?;
    let flags = number(&flowtable, FLOWTABLE_FLAGS).unwrap_or_default();
    let offload = if flags & FLOWTABLE_HARDWARE == 0 { Offload::Software } else { Offload::Hardware };
    let (table, own) = (name(&flowtable, TABLE), name(&flowtable, FLOWTABLE_NAME));
    Ok(Some(Escape::Flowtable { name: format!("{} {table} {own}", family_name(family)), offload }))
}

enum Chain {
    BeforeConntrack(String),
    Hooked(String),
    Unhooked,
}

fn chain(payload: &[u8]) -> io::Result<(Table, Chain)> {
    let (family, chain) = object(payload)?;
    let table = (family, name(&chain, TABLE));
    let Some(hook) = chain.get(&CHAIN_HOOK) else { return Ok((table, Chain::Unhooked)) };
    let hook = by_kind(hook)?;
    let own = name(&chain, CHAIN_NAME);
    let priority = number(&hook, HOOK_PRIORITY).map(u32::cast_signed);
    let is_early = FAMILIES.iter().any(|(number, _)| *number == family)
        && number(&hook, HOOK_NUMBER) == Some(PREROUTING)
        && priority.is_some_and(|priority| priority < CONNTRACK);
    Ok((table, if is_early { Chain::BeforeConntrack(own) } else { Chain::Hooked(own) }))
}

#[derive(Default)]
struct Rules {
    zones: usize,
    no_track: usize,
}

impl Rules {
    /// Counts a rule by what it does, unless its chain is hooked elsewhere.
    fn count(&mut self, payload: &[u8], is_elsewhere: impl Fn(&str) -> bool) -> io::Result<()> {
        let (_, rule) = object(payload)?;
        if is_elsewhere(&name(&rule, RULE_CHAIN)) {
            return Ok(());
        }
        let (mut zones, mut no_track) = (0, 0);
        for expression in attributes(rule.get(&RULE_EXPRESSIONS).copied().unwrap_or_default()) {
            let (_, expression) = expression?;
            let expression = by_kind(expression)?;
            let held = by_kind(expression.get(&EXPRESSION_DATA).copied().unwrap_or_default());
            match name(&expression, EXPRESSION_NAME).as_str() {
                "notrack" => no_track = 1,
                "ct" => {
                    let held = held?;
                    if number(&held, CT_KEY) == Some(CT_ZONE) && held.contains_key(&CT_SOURCE) {
                        zones = 1;
                    }
                }
                "target" => {
                    let held = held?;
                    let info = held.get(&TARGET_INFO).copied().unwrap_or_default();
                    let word = |at| array(info, at).map_or(0, u16::from_ne_bytes);
                    let (flags, zone) = (word(0), word(2));
                    match name(&held, TARGET_NAME).as_str() {
                        "NOTRACK" => no_track = 1,
                        "CT" if flags & (XT_CT_NOTRACK | XT_CT_NOTRACK_ALIAS) != 0 => no_track = 1,
                        "CT" if zone != 0 || flags & XT_CT_ZONE_MARK != 0 => zones = 1,
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        self.zones += zones;
        self.no_track += no_track;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel of the tests has no flowtables: an object as its header file lays it out.
    #[test]
    fn flowtables_are_read() {
        let of = |flags: Option<u32>| {
            let mut bytes = vec![1, 0, 0, 0];
            bytes.extend(attribute(TABLE, b"filter\0"));
            bytes.extend(attribute(FLOWTABLE_NAME, b"fast\0"));
            bytes.extend(attribute(3 | 0x8000, &attribute(HOOK_NUMBER, &0_u32.to_be_bytes())));
            if let Some(flags) = flags {
                bytes.extend(attribute(FLOWTABLE_FLAGS, &flags.to_be_bytes()));
            }
            flowtable(&bytes).unwrap()
        };
        let expected = |offload| Some(Escape::Flowtable { name: "inet filter fast".to_owned(), offload });
        assert_eq!(of(None), expected(Offload::Software));
        assert_eq!(of(Some(0)), expected(Offload::Software));
        assert_eq!(of(Some(3)), expected(Offload::Hardware));
    }

    #[test]
    fn cut_objects_are_errors() {
        assert!(flowtable(&[1, 0]).is_err());
        assert!(flowtable(&[1, 0, 0, 0, 200, 0, 1, 0]).is_err());
        assert!(chain(&[2, 0, 0, 0, 3, 0, 1, 0]).is_err());
    }
}
