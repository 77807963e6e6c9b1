//! The maps in words, for people: names of sets and pods for numbers of bits.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use npm_common::layout::{ANY_PEER, Address, Bits, NOT_ISOLATED, Policy};
use npm_policy::goal::{Family, Goal};

use super::lower::{FamilyMaps, Lowered, OfFamily, protocol};

/// Names where maps have numbers.
struct Words<'a, const W: usize> {
    lowered: &'a Lowered<W>,
    pods: BTreeMap<IpAddr, String>,
}

/// The maps of a goal as text. Lines that begin with `#` explain.
pub fn text<const W: usize>(goal: &Goal, lowered: &Lowered<W>, families: &[Family]) -> String {
    let pods = goal
        .subjects
        .iter()
        .flat_map(|(pod, addresses)| addresses.iter().map(move |address| (*address, pod.to_string())))
        .collect();
    let words = Words { lowered, pods };
    let mut out = String::new();
    words.policies(&mut out);
    for family in families {
        match family {
            Family::V4 => words.family(&mut out, "IPv4", &lowered.v4, v4_pair),
            Family::V6 => words.family(&mut out, "IPv6", &lowered.v6, v6_pair),
        }
    }
    out
}

fn v4_pair([a, b, c, d, high, low, protocol, _]: &[u8; 8]) -> (IpAddr, u8, u16) {
    ([*a, *b, *c, *d].into(), *protocol, u16::from_be_bytes([*high, *low]))
}

fn v6_pair(pair: &[u8; 20]) -> (IpAddr, u8, u16) {
    let mut address = [0; 16];
    address.copy_from_slice(&pair[..16]);
    (address.into(), pair[18], u16::from_be_bytes([pair[16], pair[17]]))
}

/// Writing to a String cannot fail.
fn line(out: &mut String, text: &dyn std::fmt::Display) {
    let _ = writeln!(out, "{text}");
}

impl<const W: usize> Words<'_, W> {
    fn policies(&self, out: &mut String) {
        line(out, &"# policies: \"any\" is every port and every protocol; a port allows those and its own");
        let ids = (0..).zip(&self.lowered.policies);
        for (id, policy) in ids.filter(|(id, _)| *id != NOT_ISOLATED) {
            let Policy { first, segments, rest, pairs: _ } = policy;
            line(out, &format_args!("policy {id}"));
            line(out, &format_args!("  any: {}", self.row(*rest, None)));
            for index in *first..first.saturating_add(*segments) {
                let Some(segment) = self.lowered.segments.get(index as usize) else { continue };
                let (first, last) = (segment.first & 0xffff, segment.last & 0xffff);
                let name = protocol_name((segment.first >> 16) as u8);
                let ports = match (first, last) {
                    (0, 0xffff) => name,
                    _ if first == last => format!("{name}/{first}"),
                    _ => format!("{name}/{first}-{last}"),
                };
                line(out, &format_args!("  {ports}: {}", self.row(segment.row, Some(*rest))));
            }
        }
    }

    fn family<A: OfFamily>(
        &self,
        out: &mut String,
        name: &str,
        maps: &FamilyMaps<A, W>,
        pair: impl Fn(&<A as Address>::Pair) -> (IpAddr, u8, u16),
    ) {
        let FamilyMaps { endpoints, members, networks, pairs } = maps;
        line(out, &format_args!("\n# {name} endpoints: the isolated addresses of this node's pods"));
        for (address, endpoint) in endpoints {
            let direction = |id| match id {
                NOT_ISOLATED => "not isolated".to_owned(),
                id => format!("policy {id}"),
            };
            let ip = address.ip();
            // A name comes from a manifest: it must not end the line.
            let pod = self.pods.get(&ip).map(|pod| format!(" ({})", pod.escape_debug())).unwrap_or_default();
            let (ingress, egress) = (direction(endpoint.ingress), direction(endpoint.egress));
            line(out, &format_args!("{ip}{pod}: ingress {ingress}, egress {egress}"));
        }
        line(out, &format_args!("\n# {name} members: the peer sets of pods' addresses"));
        for (address, bits) in members {
            line(out, &format_args!("{}: {}", address.ip(), self.peers(bits)));
        }
        line(out, &format_args!("\n# {name} networks: the peer sets of other addresses, longest prefix"));
        for (prefix, bits) in networks {
            line(out, &format_args!("{prefix}: {}", self.peers(bits)));
        }
        line(out, &format_args!("\n# {name} pairs: the peer sets of named ports"));
        for (key, bits) in pairs {
            let (ip, number, port) = pair(key);
            line(out, &format_args!("{ip} {}/{port}: {}", protocol_name(number), self.peers(bits)));
        }
    }

    /// The peers of a row, without those of another.
    fn row(&self, index: u32, without: Option<u32>) -> String {
        let bits = |index: u32| self.lowered.rows.get(index as usize).copied();
        let without = without.and_then(bits).unwrap_or([0; W]);
        let Some(mut row) = bits(index) else { return format!("row {index}, which is not there") };
        row.iter_mut().zip(without).for_each(|(word, without)| *word &= !without);
        self.peers(&row)
    }

    fn peers(&self, bits: &Bits<W>) -> String {
        let is_set = |number: &usize| bits[number / 64] & 1 << (number % 64) != 0;
        let names: Vec<String> = (0..64 * W).filter(is_set).map(|number| self.name(number)).collect();
        if names.is_empty() { "nobody".to_owned() } else { names.join(", ") }
    }

    fn name(&self, number: usize) -> String {
        match self.lowered.bits.get(&number) {
            Some(bit) => bit.name(),
            None => format!("bit {number}, which is nobody's"),
        }
    }
}

fn protocol_name(number: u8) -> String {
    protocol(number).map_or_else(|| format!("protocol {number}"), |protocol| protocol.to_string())
}

const _: () = assert!(ANY_PEER == 0, "the first of the sorted bits is Bit::Any");
