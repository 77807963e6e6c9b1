//! A world as the Kubernetes objects that mean it: the way back from the model, for tests that go through manifests.

use std::collections::BTreeMap;
use std::sync::Arc;

use npm_policy::model::{
    Block, NamespaceScope, Operator, Peer, Peers, Pod, PodNetwork, PodPhase, Policy, Port, Ports,
    Requirement, Rule, Selector,
};
use npm_policy::world::World;
use serde_json::{Value, json};

/// All objects as one `List`. Namespaces come with the labels they have; `kubernetes.io/metadata.name` is left to
/// the reader.
pub fn list(world: &World) -> Value {
    let namespaces = world.namespaces().map(|namespace| {
        json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": *namespace.name, "labels": map(&namespace.labels)},
        })
    });
    let pods = world.pods().map(|one| pod(one));
    let policies = world.policies().map(|one| policy(one));
    let items: Vec<Value> = namespaces.chain(pods).chain(policies).collect();
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

fn map(labels: &BTreeMap<Arc<str>, Arc<str>>) -> Value {
    labels.iter().map(|(key, value)| (key.to_string(), Value::from(&**value))).collect()
}

/// A pod. Its creation time is whole seconds.
pub fn pod(pod: &Pod) -> Value {
    let phase = match pod.phase {
        PodPhase::Active => "Running",
        PodPhase::Pending => "Pending",
        PodPhase::Ended => "Succeeded",
    };
    let ips: Vec<Value> = pod.addresses.iter().map(|address| json!({"ip": address.to_string()})).collect();
    let ports: Vec<Value> = pod
        .ports
        .iter()
        .map(|port| json!({"name": *port.name, "protocol": port.protocol.to_string(), "containerPort": port.port}))
        .collect();
    let mut value = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": *pod.key.namespace, "name": *pod.key.name, "labels": map(&pod.labels),
            "creationTimestamp": timestamp(pod.created),
        },
        "spec": {
            "hostNetwork": pod.network == PodNetwork::Host,
            "containers": [{"name": "main", "image": "example", "ports": ports}],
        },
        "status": {"phase": phase, "podIPs": ips},
    });
    if let Some(node) = &pod.node {
        value["spec"]["nodeName"] = json!(**node);
    }
    if let Some(first) = pod.addresses.first() {
        value["status"]["podIP"] = json!(first.to_string());
    }
    value
}

/// RFC 3339, for the first minutes of 1970: all that tests need.
fn timestamp(seconds: i64) -> String {
    let seconds = seconds.clamp(0, 3599);
    format!("1970-01-01T00:{:02}:{:02}Z", seconds / 60, seconds % 60)
}

/// A policy.
///
/// # Panics
/// A list of peers or ports that is there and empty allows nothing in the model; the API has no way to say that.
pub fn policy(policy: &Policy) -> Value {
    let mut types = Vec::new();
    let mut spec = json!({"podSelector": selector(&policy.subjects)});
    for (name, key, peers, rules) in
        [("Ingress", "ingress", "from", &policy.ingress), ("Egress", "egress", "to", &policy.egress)]
    {
        if let Some(rules) = rules {
            types.push(name);
            spec[key] = rules.iter().map(|one| rule(one, peers)).collect();
        }
    }
    assert!(!types.is_empty(), "{}: a policy of no type can't be written", policy.key);
    spec["policyTypes"] = json!(types);
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": *policy.key.namespace, "name": *policy.key.name},
        "spec": spec,
    })
}

fn rule(rule: &Rule, peers_key: &str) -> Value {
    let mut value = json!({});
    match &rule.peers {
        Peers::Any => {}
        Peers::Only(peers) => {
            assert!(!peers.is_empty(), "an empty list of peers means everybody to the API");
            value[peers_key] = peers.iter().map(peer).collect();
        }
    }
    match &rule.ports {
        Ports::Any => {}
        Ports::Only(ports) => {
            assert!(!ports.is_empty(), "an empty list of ports means all to the API");
            value["ports"] = ports.iter().map(port).collect();
        }
    }
    value
}

fn peer(peer: &Peer) -> Value {
    match peer {
        Peer::Block(Block { cidr, except }) => {
            let except: Vec<String> = except.iter().map(ToString::to_string).collect();
            json!({"ipBlock": {"cidr": cidr.to_string(), "except": except}})
        }
        Peer::Pods { namespaces, pods } => match namespaces {
            // The policy's own namespace has no selector; another one is named by the label that all have.
            NamespaceScope::Named(name) => json!({
                "namespaceSelector": {"matchLabels": {npm_policy::model::NAMESPACE_NAME_LABEL: **name}},
                "podSelector": selector(pods),
            }),
            NamespaceScope::Matching(namespaces) => {
                json!({"namespaceSelector": selector(namespaces), "podSelector": selector(pods)})
            }
        },
    }
}

fn port(port: &Port) -> Value {
    match port {
        Port::Range { protocol, first: 0, last: u16::MAX } => json!({"protocol": protocol.to_string()}),
        Port::Range { protocol, first, last } if first == last => {
            json!({"protocol": protocol.to_string(), "port": first})
        }
        Port::Range { protocol, first, last } => {
            json!({"protocol": protocol.to_string(), "port": first, "endPort": last})
        }
        Port::Named { protocol, name } => json!({"protocol": protocol.to_string(), "port": **name}),
    }
}

fn selector(selector: &Selector) -> Value {
    let requirements: Vec<Value> = selector.requirements().map(requirement).collect();
    json!({"matchExpressions": requirements})
}

fn requirement(requirement: &Requirement) -> Value {
    let (operator, values) = match &requirement.operator {
        Operator::In(values) => ("In", Some(values)),
        Operator::NotIn(values) => ("NotIn", Some(values)),
        Operator::Exists => ("Exists", None),
        Operator::DoesNotExist => ("DoesNotExist", None),
    };
    let mut value = json!({"key": *requirement.key, "operator": operator});
    if let Some(values) = values {
        value["values"] = values.iter().map(|value| Value::from(&**value)).collect();
    }
    value
}
