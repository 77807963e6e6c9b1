//! Kubernetes objects to the policy model: the only place (with the sources themselves) that reads k8s types.
//!
//! Missing, null, empty and default are decided here, once ([`npm_policy::model`] cannot express the question), and
//! objects are validated as the API server does: what it would have refused never widens what is allowed. Each
//! object gives at most one [`Change`], and a [`Problem`] for whatever could not be taken as it stands.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use npm_policy::model::{
    Labels, NamedPort, Namespace, Pod, PodKey, PodNetwork, PodPhase, PolicyKey, Protocol,
};
use npm_policy::world::Change;
use serde_json::Value;

use self::findings::{Findings, quoted};
use super::Problem;

mod cidr;
mod findings;
mod kind;
mod node;
mod path;
mod policy;
mod shape;
mod spelling;
mod trim;
mod validate;

pub use self::kind::{Document, Kind, Received, document, received};
pub use self::node::Node;

/// What an object gives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Object {
    /// The object as it is from now on; `None` if not even its name could be read.
    pub change: Option<Change>,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

/// What is done with a policy that is not good.
const STRICT: &str = "the policy isolates its pods and allows nothing";

/// What is done with the bad part of any other object.
const LEFT_OUT: &str = "left out";

/// Converts a policy.
pub fn policy(policy: &networking::NetworkPolicy) -> Object {
    typed_policy(policy, Findings::default())
}

fn policy_value(mut value: Value, mut findings: Findings) -> Object {
    let namespace = value.pointer("/metadata/namespace");
    if let Some(namespace @ (Value::Array(_) | Value::Object(_))) = namespace {
        findings
            .note("metadata.namespace", &format!("must be a string, not {}", shape::described(namespace)));
        return unplaced(findings);
    }
    // It was given twice, and taken out.
    if namespace.is_none() && findings.areas().any(|area| matches!(area, "metadata" | "metadata.namespace")) {
        return unplaced(findings);
    }
    spell_out(&mut value, &mut findings);
    name_the_nameless(&mut value, &mut findings);
    match serde_json::from_value(shape::fit(value, &shape::POLICY, &mut findings)) {
        Ok(policy) => typed_policy(&policy, findings),
        Err(error) => unreadable("NetworkPolicy", &error),
    }
}

/// A policy that selects pods of a namespace that nobody knows.
fn unplaced(findings: Findings) -> Object {
    let consequence = "the policy is left out, as nobody knows whom it isolates";
    Object { change: None, problems: findings.into_problems("NetworkPolicy", consequence) }
}

fn typed_policy(policy: &networking::NetworkPolicy, mut findings: Findings) -> Object {
    let metadata = &policy.metadata;
    let name = object_name(metadata, validate::subdomain, &mut findings);
    let namespace = object_namespace(metadata, &mut findings);
    labels(metadata, &mut findings);
    let key = PolicyKey::new(namespace, name);
    let object = format!("NetworkPolicy {key}");
    let policy = policy::convert(key.clone(), policy, &mut findings);
    Object {
        change: Some(Change::Policy(key, Some(policy))),
        problems: findings.into_problems(&object, STRICT),
    }
}

/// A policy of which nothing but the name is known: it isolates its namespace in both directions.
pub fn unknown_policy(namespace: &str, name: &str) -> Object {
    let both = serde_json::json!(["Ingress", "Egress"]);
    let value = serde_json::json!({
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"podSelector": {}, "policyTypes": both},
    });
    policy_value(value, Findings::default())
}

/// Converts a namespace.
pub fn namespace(namespace: &core::Namespace) -> Object {
    typed_namespace(namespace, Findings::default())
}

fn namespace_value(mut value: Value, mut findings: Findings) -> Object {
    spell_out(&mut value, &mut findings);
    match serde_json::from_value(shape::fit(value, &shape::NAMESPACE, &mut findings)) {
        Ok(namespace) => typed_namespace(&namespace, findings),
        Err(error) => unreadable("Namespace", &error),
    }
}

fn typed_namespace(namespace: &core::Namespace, mut findings: Findings) -> Object {
    let metadata = &namespace.metadata;
    if metadata.name.as_deref().unwrap_or_default().is_empty() {
        findings.note("metadata.name", "must not be empty");
        return Object {
            change: None,
            problems: findings.into_problems("Namespace", "the namespace is left out"),
        };
    }
    let name: Arc<str> = object_name(metadata, validate::namespace_name, &mut findings).into();
    let labels = labels(metadata, &mut findings);
    let problems = findings.into_problems(&format!("Namespace {name}"), LEFT_OUT);
    let namespace = Namespace::new(Arc::clone(&name), labels);
    Object { change: Some(Change::Namespace(name, Some(namespace))), problems }
}

/// Converts a pod.
pub fn pod(pod: &core::Pod) -> Object {
    typed_pod(pod, Findings::default())
}

fn pod_value(mut value: Value, mut findings: Findings) -> Object {
    spell_out(&mut value, &mut findings);
    match serde_json::from_value(shape::fit(value, &shape::POD, &mut findings)) {
        Ok(pod) => typed_pod(&pod, findings),
        Err(error) => unreadable("Pod", &error),
    }
}

fn typed_pod(pod: &core::Pod, mut findings: Findings) -> Object {
    let metadata = &pod.metadata;
    if metadata.name.as_deref().unwrap_or_default().is_empty() {
        findings.note("metadata.name", "must not be empty");
        return Object { change: None, problems: findings.into_problems("Pod", "the pod is left out") };
    }
    let name = object_name(metadata, validate::subdomain, &mut findings);
    let key = PodKey::new(object_namespace(metadata, &mut findings), name);
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let node = spec.and_then(|spec| spec.node_name.as_deref()).filter(|node| !node.is_empty());
    let on_host = spec.and_then(|spec| spec.host_network).unwrap_or(false);
    let converted = Pod {
        key: key.clone(),
        node: node.map(Arc::from),
        labels: labels(metadata, &mut findings),
        addresses: addresses(status, &mut findings),
        network: if on_host { PodNetwork::Host } else { PodNetwork::Own },
        phase: match status.and_then(|status| status.phase.as_deref()) {
            Some("Succeeded" | "Failed") => PodPhase::Ended,
            Some("Pending") => PodPhase::Pending,
            Some(_) | None => PodPhase::Active,
        },
        ports: spec.map(|spec| named_ports(spec, &mut findings)).unwrap_or_default().into(),
        created: metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
    };
    Object {
        problems: findings.into_problems(&format!("Pod {key}"), LEFT_OUT),
        change: Some(Change::Pod(key, Some(converted))),
    }
}

/// `status.podIPs` and `status.podIP`, which the API server keeps the same as the first of them.
fn addresses(status: Option<&core::PodStatus>, findings: &mut Findings) -> BTreeSet<IpAddr> {
    let mut addresses = BTreeSet::new();
    let Some(status) = status else { return addresses };
    let listed = status.pod_ips.iter().flatten().enumerate();
    let listed = listed.map(|(i, ip)| (format!("status.podIPs[{i}].ip"), ip.ip.as_str()));
    let single = status.pod_ip.as_deref().map(|ip| ("status.podIP".to_owned(), ip));
    for (path, text) in listed.chain(single).filter(|(_, text)| !text.is_empty()) {
        match cidr::address(text) {
            Some(address) => drop(addresses.insert(address)),
            None => findings.note(&path, &format!("{} is not an IP address", quoted(text))),
        }
    }
    addresses
}

fn named_ports(spec: &core::PodSpec, findings: &mut Findings) -> BTreeSet<NamedPort> {
    let containers = spec.containers.iter().enumerate().map(|(i, c)| (format!("spec.containers[{i}]"), c));
    let init = spec.init_containers.iter().flatten().enumerate();
    let init = init.map(|(i, c)| (format!("spec.initContainers[{i}]"), c));
    let mut ports = BTreeSet::new();
    for (path, container) in containers.chain(init) {
        for (i, port) in container.ports.iter().flatten().enumerate() {
            let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) else { continue };
            let path = format!("{path}.ports[{i}]");
            let refusal = validate::port_name(name);
            findings.check(&format!("{path}.name"), name, refusal);
            let protocol = protocol(port.protocol.as_deref(), &format!("{path}.protocol"), findings);
            let number = port_number(port.container_port, &format!("{path}.containerPort"), findings);
            if let (None, Some(protocol), Some(port)) = (refusal, protocol, number) {
                ports.insert(NamedPort { name: name.into(), protocol, port });
            }
        }
    }
    ports
}

/// A protocol's name; missing means TCP.
fn protocol(name: Option<&str>, path: &str, findings: &mut Findings) -> Option<Protocol> {
    match name {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => {
            findings.note(path, &format!("{} is not TCP, UDP or SCTP", quoted(other)));
            None
        }
    }
}

fn port_number(number: i32, path: &str, findings: &mut Findings) -> Option<u16> {
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    if port.is_none() {
        findings.note(path, &format!("{number} is not a port from 1 to 65535"));
    }
    port
}

fn labels(metadata: &ObjectMeta, findings: &mut Findings) -> Labels {
    let mut labels = Labels::new();
    for (key, value) in metadata.labels.iter().flatten() {
        findings.check("metadata.labels", key, validate::label_key(key));
        findings.check(
            &format!("metadata.labels[{}]", findings::brief(key)),
            value,
            validate::label_value(value),
        );
        labels.insert(key.as_str().into(), value.as_str().into());
    }
    labels
}

fn object_name(
    metadata: &ObjectMeta,
    rule: fn(&str) -> Option<&'static str>,
    findings: &mut Findings,
) -> String {
    let name = metadata.name.as_deref().unwrap_or_default();
    let refusal = rule(name);
    findings.check("metadata.name", name, refusal);
    if refusal.is_none() { name.to_owned() } else { safe_name(name) }
}

fn object_namespace(metadata: &ObjectMeta, findings: &mut Findings) -> String {
    match metadata.namespace.as_deref() {
        None | Some("") => "default".to_owned(),
        Some(name) => {
            let refusal = validate::namespace_name(name);
            findings.check("metadata.namespace", name, refusal);
            if refusal.is_none() { name.to_owned() } else { safe_name(name) }
        }
    }
}

/// A name that stands for one that the API server would refuse: free of whatever a log, a rule's comment or a file
/// of ours could stumble over, and as unlikely to be another object's as a hash of 64 bits.
fn safe_name(name: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') { c } else { '_' };
    let shown: String = name.chars().take(32).map(safe).collect();
    format!("{shown}_{:016x}", fnv1a(name.as_bytes()))
}

/// FNV-1a, 64 bits: the same on every machine and in every version, unlike std's hashers.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Takes numbers and booleans for the names that they were surely meant to be (YAML reads `namespace: 123` so).
fn spell_out(value: &mut Value, findings: &mut Findings) {
    for field in ["name", "namespace"] {
        let Some(name) = value.pointer_mut(&format!("/metadata/{field}")) else { continue };
        if let Value::Number(_) | Value::Bool(_) = name {
            findings.note(
                &format!("metadata.{field}"),
                &format!("must be a string, not {}", shape::described(name)),
            );
            *name = Value::String(name.to_string());
        }
    }
}

/// Gives a policy that has no readable name one that is made of its content, so that two of them do not replace each
/// other: each isolates.
fn name_the_nameless(value: &mut Value, findings: &mut Findings) {
    let name = value.pointer("/metadata/name").unwrap_or(&Value::Null);
    let reason = match name {
        Value::String(name) if !name.is_empty() => return,
        Value::Null | Value::String(_) => "must not be missing or empty",
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => "must be a string",
    };
    findings.note("metadata.name", reason);
    let name = format!("unnamed-{:016x}", fnv1a(value.to_string().as_bytes()));
    let Some(fields) = value.as_object_mut() else { return };
    let metadata = fields.entry("metadata").or_insert_with(|| Value::Object(serde_json::Map::new()));
    if !metadata.is_object() {
        *metadata = Value::Object(serde_json::Map::new());
    }
    metadata["name"] = Value::String(name);
}

/// [`shape::fit`] leaves only what deserialises, so this tells of a gap between the two.
fn unreadable(kind: &str, error: &serde_json::Error) -> Object {
    let problem = Problem { object: kind.to_owned(), message: format!("{error}; the object is left out") };
    Object { change: None, problems: vec![problem] }
}

#[cfg(test)]
mod tests;
