//! Which features of the API decide a flow: a feature decides it if the verdict changes once the feature is taken out
//! of the world.
//!
//! The agreement test asserts that random worlds give every feature its share: agreement over flows that a feature
//! never decides would say nothing of that feature.

use std::collections::BTreeSet;

use npm_policy::model::{
    NAMESPACE_NAME_LABEL, NamespaceScope, Operator, Peer, Peers, Pod, PodNetwork, PodPhase, Policy, Port,
    Ports, Protocol, Requirement, Rule, Selector,
};
use npm_policy::world::{Change, World};

/// A feature, and the world without it.
pub struct Feature {
    /// Its name, for people.
    pub name: &'static str,
    pod: fn(&mut Pod),
    policy: fn(&mut Policy),
}

impl Feature {
    /// The same world, had the feature never been invented.
    pub fn knocked_out(&self, world: &World) -> World {
        let mut without = World::default();
        for namespace in world.namespaces() {
            without.apply(Change::Namespace(namespace.name.clone(), Some((**namespace).clone())));
        }
        for pod in world.pods() {
            let mut pod = (**pod).clone();
            (self.pod)(&mut pod);
            without.apply(Change::Pod(pod.key.clone(), Some(pod)));
        }
        for policy in world.policies() {
            let mut policy = (**policy).clone();
            (self.policy)(&mut policy);
            without.apply(Change::Policy(policy.key.clone(), Some(policy)));
        }
        without
    }
}

/// Every feature that decides.
pub const FEATURES: &[Feature] = &[
    of_policy("ingress", |policy| policy.ingress = None),
    of_policy("egress", |policy| policy.egress = None),
    of_policy("no rules", |policy| {
        for direction in [&mut policy.ingress, &mut policy.egress] {
            if direction.as_ref().is_some_and(Vec::is_empty) {
                *direction = None;
            }
        }
    }),
    of_policy("spec.podSelector", |policy| policy.subjects = Selector::everything()),
    of_policy("any peer", |policy| {
        rules(policy, |rule| {
            if rule.peers == Peers::Any {
                rule.peers = Peers::Only(Vec::new());
            }
        });
    }),
    of_policy("peer podSelector", |policy| {
        peers(policy, |peer| {
            if let Peer::Pods { pods, .. } = peer {
                *pods = Selector::everything();
            }
        });
    }),
    of_policy("peer own namespace", |policy| {
        peers(policy, |peer| {
            if let Peer::Pods { namespaces: namespaces @ NamespaceScope::Named(_), .. } = peer {
                *namespaces = NamespaceScope::Matching(Selector::everything());
            }
        });
    }),
    of_policy("peer namespaceSelector", |policy| {
        peers(policy, |peer| {
            if let Peer::Pods { namespaces: NamespaceScope::Matching(selector), .. } = peer {
                *selector = Selector::everything();
            }
        });
    }),
    of_policy("kubernetes.io/metadata.name", |policy| {
        requirements(policy, |requirement| *requirement.key != *NAMESPACE_NAME_LABEL);
    }),
    of_policy("In", |policy| {
        requirements(policy, |requirement| !matches!(requirement.operator, Operator::In(_)))
    }),
    of_policy("NotIn", |policy| {
        requirements(policy, |requirement| !matches!(requirement.operator, Operator::NotIn(_)));
    }),
    of_policy("Exists", |policy| {
        requirements(policy, |requirement| requirement.operator != Operator::Exists)
    }),
    of_policy("DoesNotExist", |policy| {
        requirements(policy, |requirement| requirement.operator != Operator::DoesNotExist);
    }),
    of_pod("empty label value", |pod| pod.labels.retain(|_, value| !value.is_empty())),
    of_policy("ipBlock", |policy| {
        rules(policy, |rule| {
            if let Peers::Only(peers) = &mut rule.peers {
                peers.retain(|peer| !matches!(peer, Peer::Block(_)));
            }
        });
    }),
    of_policy("except", |policy| {
        peers(policy, |peer| {
            if let Peer::Block(block) = peer {
                block.except = BTreeSet::new();
            }
        });
    }),
    of_policy("no port list", |policy| {
        rules(policy, |rule| {
            if rule.ports == Ports::Any {
                rule.ports = Ports::Only(Vec::new());
            }
        });
    }),
    of_policy("protocol without port", |policy| {
        ports(policy, |port| !matches!(port, Port::Range { first: 0, last: u16::MAX, .. }));
    }),
    of_policy("single port", |policy| {
        ports(policy, |port| !matches!(port, Port::Range { first, last, .. } if first == last));
    }),
    of_policy("endPort", |policy| {
        rules(policy, |rule| {
            if let Ports::Only(ports) = &mut rule.ports {
                for port in ports {
                    if let Port::Range { first: first @ 1.., last, .. } = port {
                        *last = *first;
                    }
                }
            }
        });
    }),
    of_policy("named port", |policy| ports(policy, |port| !matches!(port, Port::Named { .. }))),
    of_policy("UDP", |policy| ports(policy, |port| protocol(port) != Protocol::Udp)),
    of_policy("SCTP", |policy| ports(policy, |port| protocol(port) != Protocol::Sctp)),
    of_pod("hostNetwork", |pod| pod.network = PodNetwork::Own),
    of_pod("ended phase", |pod| pod.phase = PodPhase::Active),
    of_pod("claimed twice: the newer holds", |pod| pod.created = -pod.created),
    of_pod("second address", |pod| {
        while pod.addresses.len() > 1 {
            pod.addresses.pop_last();
        }
    }),
];

const fn of_policy(name: &'static str, policy: fn(&mut Policy)) -> Feature {
    Feature { name, pod: |_| {}, policy }
}

const fn of_pod(name: &'static str, pod: fn(&mut Pod)) -> Feature {
    Feature { name, pod, policy: |_| {} }
}

fn rules(policy: &mut Policy, change: impl Fn(&mut Rule)) {
    policy.ingress.iter_mut().chain(&mut policy.egress).flatten().for_each(change);
}

fn peers(policy: &mut Policy, change: impl Fn(&mut Peer)) {
    rules(policy, |rule| {
        if let Peers::Only(peers) = &mut rule.peers {
            peers.iter_mut().for_each(&change);
        }
    });
}

fn ports(policy: &mut Policy, keep: impl Fn(&Port) -> bool) {
    rules(policy, |rule| {
        if let Ports::Only(ports) = &mut rule.ports {
            ports.retain(&keep);
        }
    });
}

fn protocol(port: &Port) -> Protocol {
    match port {
        Port::Range { protocol, .. } | Port::Named { protocol, .. } => *protocol,
    }
}

fn requirements(policy: &mut Policy, keep: impl Fn(&Requirement) -> bool) {
    let filtered =
        |selector: &Selector| Selector::new(selector.requirements().filter(|one| keep(one)).cloned());
    policy.subjects = filtered(&policy.subjects);
    peers(policy, |peer| {
        if let Peer::Pods { namespaces, pods } = peer {
            *pods = filtered(pods);
            if let NamespaceScope::Matching(selector) = namespaces {
                *selector = filtered(selector);
            }
        }
    });
}
