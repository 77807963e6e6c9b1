//! Policy -> Program: what one policy means, in sets and ports. Depends on the policy alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Warning;
use crate::goal::{
    Clause, Expression, Holders, NamedMatch, PeerMatch, PortMatch, PortRange, Program, SetKey,
};
use crate::model::{NamespaceScope, Peer, Peers, Policy, Port, Ports, Protocol, Rule};

/// The most sets that the named ports of one egress rule may need: peers times names. Objects of the size that an
/// API server takes (1.5 MiB) could ask for a hundred million; people ask for a handful.
pub(crate) const MAX_NAMED_SETS: usize = 4096;

/// Compiles one policy.
pub(super) fn program(policy: &Policy) -> (Program, Vec<Warning>) {
    let mut warnings = Vec::new();
    let subjects = Expression {
        namespaces: NamespaceScope::Named(Arc::clone(&policy.key.namespace)),
        pods: policy.subjects.clone(),
    };
    let ingress = policy.ingress.as_ref().map(|rules| {
        let clauses: BTreeSet<_> = rules.iter().filter_map(|rule| ingress_clause(rule, &subjects)).collect();
        clauses.into_iter().collect()
    });
    let egress = policy.egress.as_ref().map(|rules| {
        let mut clauses = BTreeSet::new();
        for rule in rules {
            match egress_clauses(rule) {
                Ok(of_rule) => clauses.extend(of_rule),
                Err(TooMany { product, without_named }) => {
                    warnings.push(Warning::TooManyNamedPorts { policy: policy.key.clone(), product });
                    clauses.extend(without_named);
                }
            }
        }
        clauses.into_iter().collect()
    });
    (Program { subjects: SetKey::Local(subjects), ingress, egress }, warnings)
}

impl Program {
    /// Whether it isolates for any direction.
    pub fn isolates(&self) -> bool {
        self.ingress.is_some() || self.egress.is_some()
    }

    /// Every set that the program names, its subjects included.
    pub fn sets(&self) -> BTreeSet<SetKey> {
        let mut sets = BTreeSet::from([self.subjects.clone()]);
        for clause in self.ingress.iter().chain(&self.egress).flatten() {
            match &clause.peers {
                PeerMatch::Sets(peers) => sets.extend(peers.iter().cloned()),
                PeerMatch::Any => {}
            }
            match &clause.ports {
                PortMatch::Only { ranges: _, named } => {
                    sets.extend(named.iter().map(|port| port.set.clone()))
                }
                PortMatch::Any => {}
            }
        }
        sets
    }
}

/// Named ports of an ingress rule are the subject's own, whoever the peer is.
fn ingress_clause(rule: &Rule, subjects: &Expression) -> Option<Clause> {
    let peers = peer_match(&rule.peers)?;
    let ports = match &rule.ports {
        Ports::Any => PortMatch::Any,
        Ports::Only(ports) => {
            let (ranges, names) = split(ports);
            let of = || Holders::Local(subjects.clone());
            let named = names
                .into_iter()
                .map(|(protocol, name)| NamedMatch { protocol, set: SetKey::Ports { name, of: of() } })
                .collect::<BTreeSet<_>>();
            if ranges.is_empty() && named.is_empty() {
                return None;
            }
            PortMatch::Only { ranges, named }
        }
    };
    Some(Clause { peers, ports })
}

struct TooMany {
    product: usize,
    without_named: Option<Clause>,
}

/// Named ports of an egress rule are each destination pod's: a set of (address, port) pairs for each peer, which
/// says who and which port at once. Without `to` these are all pods, and no host outside.
fn egress_clauses(rule: &Rule) -> Result<Vec<Clause>, TooMany> {
    let Some(peers) = peer_match(&rule.peers) else { return Ok(Vec::new()) };
    let ports = match &rule.ports {
        Ports::Any => return Ok(vec![Clause { peers, ports: PortMatch::Any }]),
        Ports::Only(ports) => ports,
    };
    let (ranges, names) = split(ports);
    let plain = (!ranges.is_empty())
        .then(|| Clause { peers, ports: PortMatch::Only { ranges, named: BTreeSet::new() } });
    let holders: BTreeSet<Holders> = match &rule.peers {
        Peers::Any => BTreeSet::from([Holders::Pods(Expression::everything())]),
        Peers::Only(peers) => peers.iter().map(holders).collect(),
    };
    let product = holders.len().saturating_mul(names.len());
    if product > MAX_NAMED_SETS {
        return Err(TooMany { product, without_named: plain });
    }
    let named: BTreeSet<NamedMatch> = holders
        .iter()
        .flat_map(|of| {
            names.iter().map(move |(protocol, name)| NamedMatch {
                protocol: *protocol,
                set: SetKey::Ports { name: Arc::clone(name), of: of.clone() },
            })
        })
        .collect();
    let pairs = (!named.is_empty())
        .then(|| Clause { peers: PeerMatch::Any, ports: PortMatch::Only { ranges: BTreeSet::new(), named } });
    Ok(plain.into_iter().chain(pairs).collect())
}

/// `None`: no peer at all, so the rule allows nothing.
fn peer_match(peers: &Peers) -> Option<PeerMatch> {
    match peers {
        Peers::Any => Some(PeerMatch::Any),
        Peers::Only(peers) => {
            let sets: BTreeSet<SetKey> = peers.iter().map(peer_set).collect();
            (!sets.is_empty()).then_some(PeerMatch::Sets(sets))
        }
    }
}

fn peer_set(peer: &Peer) -> SetKey {
    match peer {
        Peer::Pods { namespaces, pods } => {
            SetKey::Pods(Expression { namespaces: namespaces.clone(), pods: pods.clone() })
        }
        Peer::Block(block) => SetKey::Block(block.clone()),
    }
}

fn holders(peer: &Peer) -> Holders {
    match peer {
        Peer::Pods { namespaces, pods } => {
            Holders::Pods(Expression { namespaces: namespaces.clone(), pods: pods.clone() })
        }
        Peer::Block(block) => Holders::Block(block.clone()),
    }
}

/// Ranges, merged, and names.
fn split(ports: &[Port]) -> (BTreeSet<PortRange>, BTreeSet<(Protocol, Arc<str>)>) {
    let mut ranges = Vec::new();
    let mut names = BTreeSet::new();
    for port in ports {
        match port {
            Port::Range { protocol, first, last } => {
                ranges.push(PortRange { protocol: *protocol, first: *first, last: *last });
            }
            Port::Named { protocol, name } => drop(names.insert((*protocol, Arc::clone(name)))),
        }
    }
    ranges.sort();
    let mut merged: Vec<PortRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            // A range that touches or overlaps the one before continues it.
            Some(last)
                if last.protocol == range.protocol && u32::from(range.first) <= u32::from(last.last) + 1 =>
            {
                last.last = last.last.max(range.last);
            }
            Some(_) | None => merged.push(range),
        }
    }
    (merged.into_iter().collect(), names)
}
