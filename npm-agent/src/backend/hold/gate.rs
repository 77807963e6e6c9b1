//! What holds in the kernel: a chain of FORWARD, and the set of the addresses that are known, of each family.
//!
//! ```text
//! FORWARD: ! ctstate RELATED,ESTABLISHED ─► NPM-AGENT-HOLD
//!          in by a pod's interface,  source not known       ─► DROP
//!          out by a pod's interface, destination not known  ─► DROP
//! ```
//!
//! Neither begins as the iptables backend's chains and sets do: they are none of its, and stay while one backend follows
//! another.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use npm_common::packet::NEIGHBOUR_TYPES;
use npm_policy::goal::Family;

use crate::backend::BackendError;
use crate::backend::iptables::layout::{FORWARD, is_our_jump};
use crate::backend::iptables::text;
use crate::backend::iptables::variant::Variant;
use crate::exec::Tools;
use crate::interfaces::pods::PodInterfaces;

/// The chain.
pub const CHAIN: &str = "NPM-AGENT-HOLD";

/// The rule of FORWARD that leads to it, as both forms of `iptables-save` print it. What an allowed connection vouches
/// for is not asked about.
const JUMP: &str = "-m conntrack ! --ctstate RELATED,ESTABLISHED -j NPM-AGENT-HOLD";

/// As `-w` takes it: how long to wait for the lock that users of iptables share.
const LOCK_WAIT_SECONDS: &str = "5";

/// How often a set is destroyed in vain: rules let go of it some time after they are gone.
const DESTRUCTIONS: u32 = 8;

/// The pause after the first time; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The set of a family's known addresses.
pub fn set_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "npm-agent-hold-4",
        Family::V6 => "npm-agent-hold-6",
    }
}

/// The programs that make it.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    pub(super) tools: Tools,
    pub(super) variant: Variant,
}

/// One family's state as found.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Found {
    /// The chain's rules as they are printed, without `-A CHAIN`; `None`: there is no such chain.
    pub(super) rules: Option<Vec<String>>,
    /// The rules of FORWARD.
    forward: Vec<String>,
    /// The known addresses; `None`: there is no such set.
    pub(super) known: Option<BTreeSet<IpAddr>>,
}

impl Found {
    /// Whether packets come to the chain.
    pub(super) fn is_entered(&self) -> bool {
        self.forward.iter().any(|rule| leads_here(rule))
    }

    /// Whether every packet does, before any rule that is not ours may accept it.
    pub(super) fn is_in_place(&self, family: Family) -> bool {
        let jumps: Vec<usize> =
            (0..self.forward.len()).filter(|index| leads_here(&self.forward[*index])).collect();
        jumps == [self.place(family)] && self.forward[jumps[0]] == JUMP
    }

    /// Behind the other jumps of ours that stand first: whose place that is is for them to say, and they accept nothing.
    fn place(&self, family: Family) -> usize {
        let ours = |rule: &&String| is_our_jump(&text::parse_line(family, rule));
        self.forward.iter().filter(|rule| !leads_here(rule)).take_while(ours).count()
    }
}

fn leads_here(rule: &str) -> bool {
    [" -j ", " -g "].iter().any(|option| rule.ends_with(&format!("{option}{CHAIN}")))
}

/// A write to the sets.
pub(super) enum SetOp {
    Create(Family),
    Add(IpAddr),
    Delete(IpAddr),
}

/// The chain's rules.
pub(super) fn rules(family: Family, interfaces: &PodInterfaces) -> Vec<String> {
    let set = set_name(family);
    // What no address of a pod is in, and pods on a bridge say to each other before they have one; and its answer.
    let (anonymous, groups): (Vec<String>, &[&str]) = match family {
        Family::V4 => (
            vec!["-s 0.0.0.0/32 -d 255.255.255.255/32 -j RETURN".to_owned()],
            &[
                "-d 224.0.0.0/4 -j RETURN",
                "-d 255.255.255.255/32 -j RETURN",
                "-p udp -m udp --sport 67 --dport 68 -j RETURN",
            ],
        ),
        Family::V6 => {
            let neighbours = NEIGHBOUR_TYPES
                .map(|number| format!("-p ipv6-icmp -m icmp6 --icmpv6-type {number} -j RETURN"));
            let link = ["-s fe80::/10 -j RETURN", "-d fe80::/10 -j RETURN"].map(str::to_owned);
            (neighbours.into_iter().chain(link).collect(), &["-d ff00::/8 -j RETURN"])
        }
    };
    let held = |option: &str, side: &str| -> Vec<String> {
        interfaces
            .iter()
            .map(|interface| {
                let interface = interface.for_iptables();
                format!("{option} {interface} -m set ! --match-set {set} {side} -j DROP")
            })
            .collect()
    };
    let groups = groups.iter().map(|&rule| rule.to_owned()).collect();
    [anonymous, held("-i", "src"), groups, held("-o", "dst")].concat()
}

impl Gate {
    /// Reads a family's state.
    ///
    /// # Errors
    /// A program could not be run, or printed what it is not known to print.
    pub(super) fn read(&self, family: Family) -> Result<Found, BackendError> {
        Ok(Found { known: known(&self.tools, family)?, ..chains(&self.tools, self.variant, family)? })
    }

    /// Carries writes to the sets out, in order. One that changes nothing is none.
    ///
    /// # Errors
    /// A part may be done.
    pub(super) fn write_sets(&self, ops: &[SetOp]) -> Result<(), BackendError> {
        let line = |op: &SetOp| match op {
            SetOp::Create(family) => {
                let inet = match family {
                    Family::V4 => "inet",
                    Family::V6 => "inet6",
                };
                format!("create {} hash:ip family {inet}\n", set_name(*family))
            }
            SetOp::Add(address) => format!("add {} {address}\n", set_name(Family::of(*address))),
            SetOp::Delete(address) => format!("del {} {address}\n", set_name(Family::of(*address))),
        };
        self.tools.write("ipset", &["restore", "-exist"], &ops.iter().map(line).collect::<String>())
    }

    /// Gives the chain these rules, and leads packets there, at once.
    ///
    /// # Errors
    /// All is as it was.
    pub(super) fn write_rules(
        &self,
        family: Family,
        rules: &[String],
        found: &Found,
    ) -> Result<(), BackendError> {
        let mut lines = vec!["*filter".to_owned(), format!(":{CHAIN} - [0:0]")];
        if !found.is_in_place(family) {
            lines.extend(deletions(found));
            lines.push(format!("-I {FORWARD} {} {JUMP}", found.place(family) + 1));
        }
        lines.extend(rules.iter().map(|rule| format!("-A {CHAIN} {rule}")));
        lines.push("COMMIT\n".to_owned());
        restore(&self.tools, self.variant, family, &lines.join("\n"))
    }
}

/// Removes the chains of one variant; gives how many there were.
///
/// # Errors
/// One is still there.
pub(super) fn remove_chains(tools: &Tools, variant: Variant) -> Result<usize, BackendError> {
    let mut removed = 0;
    for family in Family::BOTH.into_iter().filter(|family| variant.has_table(*family, "filter")) {
        let found = match chains(tools, variant, family) {
            Ok(found) => found,
            // It is not installed.
            Err(BackendError::Spawn { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                continue;
            }
            Err(error) => return Err(error),
        };
        if found.rules.is_some() {
            let mut lines = vec!["*filter".to_owned(), format!(":{CHAIN} - [0:0]")];
            lines.extend(deletions(&found));
            lines.extend([format!("-X {CHAIN}"), "COMMIT\n".to_owned()]);
            restore(tools, variant, family, &lines.join("\n"))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Removes the sets, which no rule may name any more; gives how many there were.
///
/// # Errors
/// One is still there.
pub(super) fn remove_sets(tools: &Tools) -> Result<usize, BackendError> {
    let listed = match tools.run("ipset", &["list", "-name"], "") {
        Ok(listed) => listed,
        Err(BackendError::Spawn { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(0);
        }
        Err(error) => return Err(error),
    };
    let is_there = |set: &&str| listed.lines().any(|line| line == *set);
    let sets: Vec<&str> = Family::BOTH.map(set_name).into_iter().filter(is_there).collect();
    for set in &sets {
        let mut attempt = 0;
        while let Err(error) = tools.write("ipset", &["destroy", set], "") {
            attempt += 1;
            if attempt == DESTRUCTIONS {
                return Err(error);
            }
            std::thread::sleep(FIRST_PAUSE * 2_u32.pow(attempt - 1));
        }
    }
    Ok(sets.len())
}

fn deletions(found: &Found) -> impl Iterator<Item = String> {
    found.forward.iter().filter(|rule| leads_here(rule)).map(|rule| format!("-D {FORWARD} {rule}"))
}

fn restore(tools: &Tools, variant: Variant, family: Family, text: &str) -> Result<(), BackendError> {
    tools.write(&variant.restore(family), &["--noflush", "-w", LOCK_WAIT_SECONDS], text)
}

fn chains(tools: &Tools, variant: Variant, family: Family) -> Result<Found, BackendError> {
    let saved = tools.run(&variant.save(family), &["-t", "filter"], "")?;
    let mut found = Found::default();
    for line in saved.lines() {
        if line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) == Some(CHAIN) {
            found.rules.get_or_insert_default();
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
            match chain {
                CHAIN => found.rules.get_or_insert_default().push(rule.to_owned()),
                FORWARD => found.forward.push(rule.to_owned()),
                _ => {}
            }
        }
    }
    Ok(found)
}

fn known(tools: &Tools, family: Family) -> Result<Option<BTreeSet<IpAddr>>, BackendError> {
    let set = set_name(family);
    let saved = match tools.run("ipset", &["save", set], "") {
        Ok(saved) => saved,
        Err(BackendError::Refused { stderr, .. }) if stderr.contains("does not exist") => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut known = BTreeSet::new();
    for line in saved.lines() {
        let unreadable =
            || BackendError::Unreadable { program: format!("ipset save {set}"), detail: line.to_owned() };
        match line.strip_prefix("add ") {
            Some(member) => {
                let address = member.strip_prefix(set).map(str::trim).and_then(|word| word.parse().ok());
                known.insert(address.ok_or_else(unreadable)?);
            }
            None if line.starts_with("create ") => {}
            None => return Err(unreadable()),
        }
    }
    Ok(Some(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(forward: &[&str]) -> Found {
        Found { forward: forward.iter().map(|&rule| rule.to_owned()).collect(), ..Found::default() }
    }

    const POLICIES: &str = "-m conntrack ! --ctstate RELATED,ESTABLISHED -j AZURE-NPM";
    const SERVICES: &str = "-m conntrack --ctstate NEW -j KUBE-SERVICES";

    #[test]
    fn it_stands_before_whatever_may_accept() {
        for (forward, place, in_place) in [
            (vec![], 0, false),
            (vec![JUMP], 0, true),
            (vec![POLICIES, JUMP, SERVICES], 1, true),
            (vec![JUMP, POLICIES], 1, false),
            (vec![JUMP, SERVICES, POLICIES], 0, true),
            (vec![SERVICES, JUMP], 0, false),
            (vec![JUMP, JUMP], 0, false),
            (vec!["-i eth0 -j NPM-AGENT-HOLD"], 0, false),
        ] {
            let found = found(&forward);
            assert_eq!(
                (found.place(Family::V4), found.is_in_place(Family::V4)),
                (place, in_place),
                "{forward:?}"
            );
        }
        assert!(!found(&["-j NPM-AGENT-HOLD-ON", SERVICES]).is_entered());
    }

    #[test]
    fn rules_of_the_defaults() {
        let v4 = rules(Family::V4, &"azv*,cbr0".parse().unwrap());
        assert_eq!(
            v4,
            [
                "-s 0.0.0.0/32 -d 255.255.255.255/32 -j RETURN",
                "-i azv+ -m set ! --match-set npm-agent-hold-4 src -j DROP",
                "-i cbr0 -m set ! --match-set npm-agent-hold-4 src -j DROP",
                "-d 224.0.0.0/4 -j RETURN",
                "-d 255.255.255.255/32 -j RETURN",
                "-p udp -m udp --sport 67 --dport 68 -j RETURN",
                "-o azv+ -m set ! --match-set npm-agent-hold-4 dst -j DROP",
                "-o cbr0 -m set ! --match-set npm-agent-hold-4 dst -j DROP",
            ]
        );
        assert_eq!(rules(Family::V6, &"azv*".parse().unwrap()).len(), NEIGHBOUR_TYPES.len() + 5);
    }
}
