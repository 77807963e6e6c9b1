//! The oracle: what the NetworkPolicy API says of a flow, read literally and slowly.
//!
//! It answers from the objects alone. It looks at every pod and every policy, uses no index of [`World`], and knows
//! nothing of sets, subjects, nodes or anything else that the compiler makes; selectors, prefixes and ports are matched
//! here by code of its own, so that a mistake there and a mistake here are two mistakes. The text it reads is the API
//! reference of networking.k8s.io/v1 (NetworkPolicySpec and below) and the concept page "Network Policies".

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::flow::{Flow, Judgement, Transport, Verdict};
use crate::model::{
    Block, Labels, NamespaceScope, Operator, Peer, Peers, Pod, PodNetwork, PodPhase, Port, Ports,
    Requirement, Rule, Selector,
};
use crate::world::World;

#[cfg(test)]
mod tests;

/// What the policies of `world` say of `flow`: egress of the pod that holds the source, ingress of the pod that holds
/// the destination.
pub fn oracle(world: &World, flow: &Flow) -> Verdict {
    let ends = Ends { source: holder(world, flow.source), destination: holder(world, flow.destination) };
    // "A pod cannot block access to itself" (concept page, its list of the entities that a pod can talk to): by
    // whichever of its addresses.
    if flow.source == flow.destination || ends.same_pod() {
        return Verdict { ingress: Judgement::NotIsolated, egress: Judgement::NotIsolated };
    }
    Verdict {
        ingress: judge(world, flow, &ends, Direction::Ingress),
        egress: judge(world, flow, &ends, Direction::Egress),
    }
}

/// The pods at the two ends of a flow; `None` is no pod of the cluster, or one on its node's network.
struct Ends<'a> {
    source: Option<&'a Pod>,
    destination: Option<&'a Pod>,
}

impl Ends<'_> {
    fn same_pod(&self) -> bool {
        match (self.source, self.destination) {
            (Some(source), Some(destination)) => source.key == destination.key,
            (None, _) | (_, None) => false,
        }
    }
}

/// Which rules of a policy are asked.
#[derive(Clone, Copy)]
enum Direction {
    /// `spec.ingress`: the subject is the destination, the peer the source.
    Ingress,
    /// `spec.egress`: the subject is the source, the peer the destination.
    Egress,
}

/// The pod that holds an address: see [`World::holder`], whose rule this is and whose index this does not use.
fn holder(world: &World, address: IpAddr) -> Option<&Pod> {
    let mut holder: Option<&Pod> = None;
    for pod in world.pods() {
        let takes_part = match (pod.network, pod.phase) {
            (PodNetwork::Own, PodPhase::Pending | PodPhase::Active) => true,
            (PodNetwork::Own, PodPhase::Ended) => false,
            (PodNetwork::Host, PodPhase::Ended | PodPhase::Pending | PodPhase::Active) => false,
        };
        if !takes_part || !pod.addresses.iter().any(|claimed| *claimed == address) {
            continue;
        }
        let later = holder.is_none_or(|other| (pod.created, &pod.key) > (other.created, &other.key));
        if later {
            holder = Some(pod);
        }
    }
    holder
}

/// One direction: whether its subject is isolated, and if so whether any rule of any policy allows the flow.
fn judge(world: &World, flow: &Flow, ends: &Ends<'_>, direction: Direction) -> Judgement {
    let (subject, peer, peer_address) = match direction {
        Direction::Ingress => (ends.destination, ends.source, flow.source),
        Direction::Egress => (ends.source, ends.destination, flow.destination),
    };
    let Some(subject) = subject else {
        return Judgement::NotIsolated;
    };
    let mut selected_by = BTreeSet::new();
    let mut by = BTreeSet::new();
    for policy in world.policies() {
        let selects =
            policy.key.namespace == subject.key.namespace && selector(&policy.subjects, &subject.labels);
        let rules = match direction {
            Direction::Ingress => &policy.ingress,
            Direction::Egress => &policy.egress,
        };
        let (true, Some(rules)) = (selects, rules) else {
            continue;
        };
        selected_by.insert(policy.key.clone());
        let allows = |rule: &Rule| {
            peers(world, &rule.peers, peer_address, peer)
                && ports(&rule.ports, flow.transport, ends.destination)
        };
        if rules.iter().any(allows) {
            by.insert(policy.key.clone());
        }
    }
    match (selected_by.is_empty(), by.is_empty()) {
        (true, _) => Judgement::NotIsolated,
        (false, true) => Judgement::Denied { selected_by },
        (false, false) => Judgement::Allowed { by },
    }
}

/// Whether `from` or `to` names the other end: its address, or the pod there.
fn peers(world: &World, peers: &Peers, address: IpAddr, pod: Option<&Pod>) -> bool {
    match peers {
        Peers::Any => true,
        Peers::Only(list) => list.iter().any(|peer| match (peer, pod) {
            (Peer::Block(it), _) => block(it, address),
            (Peer::Pods { namespaces, pods }, Some(pod)) => {
                scope(world, namespaces, pod) && selector(pods, &pod.labels)
            }
            (Peer::Pods { .. }, None) => false,
        }),
    }
}

/// Whether the pod's namespace is one of these.
fn scope(world: &World, scope: &NamespaceScope, pod: &Pod) -> bool {
    match scope {
        NamespaceScope::Named(name) => pod.key.namespace == *name,
        NamespaceScope::Matching(it) => selector(it, &world.namespace_labels(&pod.key.namespace)),
    }
}

/// "The result of matchLabels and matchExpressions are ANDed. An empty label selector matches all objects."
fn selector(selector: &Selector, labels: &Labels) -> bool {
    selector.requirements().all(|it| requirement(it, labels))
}

/// One requirement, as `labels.Requirement.Matches` of apimachinery decides it.
fn requirement(requirement: &Requirement, labels: &Labels) -> bool {
    let value = labels.iter().find(|(key, _)| **key == requirement.key).map(|(_, value)| value);
    match (&requirement.operator, value) {
        (Operator::In(values), Some(value)) => values.iter().any(|it| it == value),
        (Operator::In(_), None) => false,
        (Operator::NotIn(values), Some(value)) => values.iter().all(|it| it != value),
        (Operator::NotIn(_), None) => true,
        (Operator::Exists, value) => value.is_some(),
        (Operator::DoesNotExist, value) => value.is_none(),
    }
}

/// In `cidr` and in none of the block's own excepts.
fn block(block: &Block, address: IpAddr) -> bool {
    let cidr = prefix(block.cidr.addr(), block.cidr.prefix_len(), address);
    cidr && !block.except.iter().any(|except| prefix(except.addr(), except.prefix_len(), address))
}

/// Whether the first `length` bits of both addresses are the same. Families do not mix: `0.0.0.0/0` says nothing of
/// IPv6, nor `::/0` of IPv4.
fn prefix(network: IpAddr, length: u8, address: IpAddr) -> bool {
    let (difference, bits) = match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            (u128::from(u32::from(network) ^ u32::from(address)), 32_u32)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => (u128::from(network) ^ u128::from(address), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    let host_bits = bits.saturating_sub(u32::from(length));
    // A shift by the whole width (::/0) leaves nothing that could differ.
    difference.checked_shr(host_bits).is_none_or(|rest| rest == 0)
}

/// Whether `ports` names what the flow carries. A name means what it means on the destination pod: the subject itself
/// for ingress, the peer for egress. Where no pod holds the destination, a name means nothing.
fn ports(ports: &Ports, transport: Transport, destination: Option<&Pod>) -> bool {
    match (ports, transport) {
        (Ports::Any, _) => true,
        (Ports::Only(_), Transport::Portless(_)) => false,
        (Ports::Only(list), Transport::Port(carried, number)) => list.iter().any(|port| match port {
            Port::Range { protocol, first, last } => {
                *protocol == carried && *first <= number && number <= *last
            }
            Port::Named { protocol, name } => destination.is_some_and(|pod| {
                pod.ports.iter().any(|it| {
                    it.name == *name && it.protocol == *protocol && carried == *protocol && it.port == number
                })
            }),
        }),
    }
}
