//! What a Goal says of a flow: the compiled rules, interpreted.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::compile::in_block;
use crate::flow::{Decision, Flow, Judgement, Transport, Verdict};
use crate::goal::{Clause, Family, Goal, Member, PeerMatch, PortMatch, SetKey};
use crate::model::PolicyKey;

impl Goal {
    /// What this node's rules say of a flow. An end that is no pod of this node is not isolated here.
    pub fn verdict(&self, flow: &Flow) -> Verdict {
        if self.is_to_itself(flow) {
            return Verdict { ingress: Judgement::NotIsolated, egress: Judgement::NotIsolated };
        }
        let mut ingress = Direction::default();
        let mut egress = Direction::default();
        for (key, program) in &self.programs {
            if let Some(clauses) = &program.ingress
                && self.contains(&program.subjects, flow.destination)
            {
                ingress.add(key, self.decide(clauses, flow.source, flow));
            }
            if let Some(clauses) = &program.egress
                && self.contains(&program.subjects, flow.source)
            {
                egress.add(key, self.decide(clauses, flow.destination, flow));
            }
        }
        Verdict { ingress: ingress.judgement(), egress: egress.judgement() }
    }

    fn is_to_itself(&self, flow: &Flow) -> bool {
        let both = |held: &BTreeSet<IpAddr>| held.contains(&flow.source) && held.contains(&flow.destination);
        flow.source == flow.destination || self.subjects.values().any(both)
    }

    fn decide(&self, clauses: &[Clause], peer: IpAddr, flow: &Flow) -> Decision {
        match clauses.iter().any(|clause| self.matches(clause, peer, flow)) {
            true => Decision::Allow,
            false => Decision::Deny,
        }
    }

    fn matches(&self, clause: &Clause, peer: IpAddr, flow: &Flow) -> bool {
        let peer_matches = match &clause.peers {
            PeerMatch::Any => true,
            PeerMatch::Sets(sets) => sets.iter().any(|set| self.contains(set, peer)),
        };
        peer_matches
            && match &clause.ports {
                PortMatch::Any => true,
                PortMatch::Only { ranges, named } => match flow.transport {
                    Transport::Portless(_) => false,
                    Transport::Port(protocol, port) => {
                        ranges.iter().any(|range| {
                            range.protocol == protocol && (range.first..=range.last).contains(&port)
                        }) || named.iter().any(|named| {
                            named.protocol == protocol
                                && self.has(&named.set, Member::Port(flow.destination, protocol, port))
                        })
                    }
                },
            }
    }

    /// Whether an address is in a set of addresses.
    pub fn contains(&self, set: &SetKey, address: IpAddr) -> bool {
        match set {
            SetKey::Pods(_) | SetKey::Local(_) => self.has(set, Member::Address(address)),
            SetKey::Block(block) => self.sets.contains_key(set) && in_block(block, address),
            SetKey::Ports { .. } => false,
        }
    }

    fn has(&self, set: &SetKey, member: Member) -> bool {
        let family: Family = member.family();
        self.sets.get(set).is_some_and(|set| set.family(family).contains(&member))
    }
}

#[derive(Default)]
struct Direction {
    selected_by: BTreeSet<PolicyKey>,
    allowed_by: BTreeSet<PolicyKey>,
}

impl Direction {
    fn add(&mut self, policy: &PolicyKey, decision: Decision) {
        self.selected_by.insert(policy.clone());
        if decision == Decision::Allow {
            self.allowed_by.insert(policy.clone());
        }
    }

    fn judgement(self) -> Judgement {
        if self.selected_by.is_empty() {
            Judgement::NotIsolated
        } else if self.allowed_by.is_empty() {
            Judgement::Denied { selected_by: self.selected_by }
        } else {
            Judgement::Allowed { by: self.allowed_by }
        }
    }
}
