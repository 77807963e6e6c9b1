//! What objects of a cluster have in common, kept once: names of namespaces and nodes, labels, ports, selectors.

use std::collections::BTreeSet;
use std::sync::Arc;

use npm_policy::model::{
    Labels, NamedPort, Namespace, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, Policy, PolicyKey,
    Port, Ports, Requirement, Rule, Selector,
};
use npm_policy::shared::{Pool, Shared};
use npm_policy::world::Change;

/// Sets of more than this are kept by their object alone: few are that large, those are hardly alike, and a pool keeps some for
/// a while that nobody has any more.
const LARGEST: usize = 64;

/// Values that objects share.
#[derive(Debug, Default)]
pub(super) struct Pools {
    texts: Pool<Arc<str>>,
    labels: Pool<Labels>,
    ports: Pool<Shared<BTreeSet<NamedPort>>>,
    requirements: Pool<Shared<BTreeSet<Requirement>>>,
}

impl Pools {
    /// The same change, with what others have too in common with them.
    pub(super) fn shared(&mut self, change: Change) -> Change {
        match change {
            Change::Pod(key, pod) => {
                let key = PodKey { namespace: self.text(key.namespace), ..key };
                let pod = pod.map(|pod| self.pod(&key, pod));
                Change::Pod(key, pod)
            }
            Change::Namespace(name, namespace) => {
                let name = self.text(name);
                let namespace = namespace.map(|Namespace { name: _, labels }| Namespace {
                    name: Arc::clone(&name),
                    labels: self.labels(labels),
                });
                Change::Namespace(name, namespace)
            }
            Change::Policy(key, policy) => {
                let key = PolicyKey { namespace: self.text(key.namespace), ..key };
                let policy = policy.map(|policy| self.policy(&key, policy));
                Change::Policy(key, policy)
            }
        }
    }

    fn text(&mut self, text: Arc<str>) -> Arc<str> {
        self.texts.shared(text)
    }

    fn pod(&mut self, key: &PodKey, pod: Pod) -> Pod {
        Pod {
            key: key.clone(),
            node: pod.node.map(|node| self.text(node)),
            labels: self.labels(pod.labels),
            ports: if pod.ports.len() > LARGEST { pod.ports } else { self.ports.shared(pod.ports) },
            ..pod
        }
    }

    fn labels(&mut self, labels: Labels) -> Labels {
        if labels.len() > LARGEST {
            return labels;
        }
        // Of sets of labels that nobody has yet, the words are mostly known.
        let shared = self.labels.get(&labels).cloned();
        shared.unwrap_or_else(|| {
            let words = labels.iter();
            let words = words.map(|(key, value)| (self.text(Arc::clone(key)), self.text(Arc::clone(value))));
            let labels = words.collect();
            self.labels.shared(labels)
        })
    }

    fn policy(&mut self, key: &PolicyKey, policy: Policy) -> Policy {
        let Policy { key: _, subjects, ingress, egress } = policy;
        let mut rules = |rules: Option<Vec<Rule>>| {
            rules.map(|rules| rules.into_iter().map(|rule| self.rule(rule)).collect())
        };
        let (ingress, egress) = (rules(ingress), rules(egress));
        Policy { key: key.clone(), subjects: self.selector(&subjects), ingress, egress }
    }

    fn rule(&mut self, Rule { peers, ports }: Rule) -> Rule {
        let peers = match peers {
            Peers::Any => Peers::Any,
            Peers::Only(peers) => Peers::Only(peers.into_iter().map(|peer| self.peer(peer)).collect()),
        };
        let ports = match ports {
            Ports::Any => Ports::Any,
            Ports::Only(ports) => Ports::Only(ports.into_iter().map(|port| self.port(port)).collect()),
        };
        Rule { peers, ports }
    }

    fn peer(&mut self, peer: Peer) -> Peer {
        match peer {
            Peer::Block(block) => Peer::Block(block),
            Peer::Pods { namespaces, pods } => Peer::Pods {
                namespaces: match namespaces {
                    NamespaceScope::Named(name) => NamespaceScope::Named(self.text(name)),
                    NamespaceScope::Matching(selector) => NamespaceScope::Matching(self.selector(&selector)),
                },
                pods: self.selector(&pods),
            },
        }
    }

    fn port(&mut self, port: Port) -> Port {
        match port {
            Port::Range { .. } => port,
            Port::Named { protocol, name } => Port::Named { protocol, name: self.text(name) },
        }
    }

    fn selector(&mut self, selector: &Selector) -> Selector {
        let words = selector.requirements().map(|requirement| match &requirement.operator {
            Operator::In(values) | Operator::NotIn(values) => 1 + values.len(),
            Operator::Exists | Operator::DoesNotExist => 1,
        });
        if words.sum::<usize>() > LARGEST {
            selector.clone()
        } else {
            selector.shared(&mut self.requirements)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::source::convert::{Kind, received};

    fn read(kind: Kind, value: &serde_json::Value) -> Change {
        received(kind, &value.to_string()).unwrap().object.change.unwrap()
    }

    /// What was read, and the same with what others have.
    fn check(pools: &mut Pools, kind: Kind, value: &serde_json::Value) -> Change {
        let shared = pools.shared(read(kind, value));
        assert_eq!(shared, read(kind, value), "nothing is another");
        shared
    }

    #[test]
    fn what_objects_have_in_common_is_kept_once() {
        let mut pools = Pools::default();
        let pod = |name: &str| {
            json!({
                "metadata": {"namespace": "x", "name": name, "labels": {"app": "web", "tier": name}},
                "spec": {"nodeName": "n", "containers": [{"ports": [{"name": "http", "containerPort": 80}]}]},
                "status": {"podIP": "10.0.0.1"},
            })
        };
        let mut two = ["a", "b"].map(|name| {
            let Change::Pod(_, Some(pod)) = check(&mut pools, Kind::Pod, &pod(name)) else { panic!() };
            pod
        });
        let [a, b] = &mut two;
        assert!(Arc::ptr_eq(&a.key.namespace, &b.key.namespace));
        assert!(Arc::ptr_eq(a.node.as_ref().unwrap(), b.node.as_ref().unwrap()));
        assert!(Arc::ptr_eq(&a.labels["app"], &b.labels["app"]));
        assert!(std::ptr::eq(&*a.ports, &*b.ports));
        let policy = |name: &str| {
            let own = json!({"podSelector": {"matchLabels": {"app": "web"}}});
            let all = json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}});
            let block = json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}});
            json!({
                "metadata": {"namespace": "x", "name": name},
                "spec": {
                    "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress", "Egress"],
                    "ingress": [{"from": [own, all, block], "ports": [{"port": "http"}, {"port": 1, "endPort": 9}]}],
                    "egress": [{}, {"to": [own]}],
                },
            })
        };
        for name in ["p", "q"] {
            check(&mut pools, Kind::NetworkPolicy, &policy(name));
        }
        assert_eq!(pools.requirements.len(), 2, "one that names a label and one that names nothing");
        let namespace = json!({"metadata": {"name": "x", "labels": {"team": "a"}}});
        check(&mut pools, Kind::Namespace, &namespace);
    }

    /// Whoever may label pods could fill every node's memory otherwise: a pool lets go of a value some time after its object.
    #[test]
    fn large_sets_are_not_kept() {
        let mut pools = Pools::default();
        for round in 0..3 {
            let many = |of: char| (0..=LARGEST).map(move |number| format!("{of}{round}-{number}"));
            let labels: serde_json::Map<String, Value> = many('l').map(|key| (key, json!("v"))).collect();
            let ports: Vec<Value> = many('p')
                .zip(1..)
                .map(|(name, number)| json!({"name": name, "containerPort": number}))
                .collect();
            let pod = json!({
                "metadata": {"namespace": "x", "name": "a", "labels": labels},
                "spec": {"nodeName": "n", "containers": [{"ports": ports}]},
                "status": {"podIP": "10.0.0.1"},
            });
            check(&mut pools, Kind::Pod, &pod);
            let values: Vec<String> = many('v').collect();
            let selector = json!({"matchExpressions": [{"key": "app", "operator": "In", "values": values}]});
            let policy = json!({"metadata": {"namespace": "x", "name": "p"}, "spec": {"podSelector": selector, "ingress": []}});
            check(&mut pools, Kind::NetworkPolicy, &policy);
        }
        assert_eq!((pools.labels.len(), pools.ports.len(), pools.requirements.len()), (0, 0, 0));
        assert_eq!(pools.texts.len(), 2, "a namespace and a node");
    }
}
