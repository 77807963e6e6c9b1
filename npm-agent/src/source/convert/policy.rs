//! NetworkPolicy: defaults decided, validated as the API server does, strict where it would be refused.
//!
//! A policy that the API server would refuse isolates the pods it selects in the directions it names, and allows
//! nothing. What of its selector or directions can't be read is taken the way that isolates more.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use npm_policy::model::{
    Block, NamespaceScope, Operator, Peer, Peers, Policy, PolicyKey, Port, Ports, Requirement, Rule, Selector,
};

use super::findings::{Findings, quoted};
use super::{cidr, validate};

/// Converts a policy. `findings` holds what was wrong with it before it had a type, and gets what else is.
pub(super) fn convert(key: PolicyKey, policy: &NetworkPolicy, findings: &mut Findings) -> Policy {
    let unspecified = NetworkPolicySpec::default();
    let spec = policy.spec.as_ref().unwrap_or(&unspecified);
    let subjects = selector(spec.pod_selector.as_ref(), "spec.podSelector", findings);
    // Both are read whatever the directions are: the API server validates what it then does not use.
    let ingress = spec.ingress.iter().flatten().enumerate().map(|(i, rule)| {
        let path = format!("spec.ingress[{i}]");
        Rule {
            peers: peers(&key.namespace, rule.from.as_deref(), &format!("{path}.from"), findings),
            ports: ports(rule.ports.as_deref(), &format!("{path}.ports"), findings),
        }
    });
    let ingress: Vec<_> = ingress.collect();
    let egress = spec.egress.iter().flatten().enumerate().map(|(i, rule)| {
        let path = format!("spec.egress[{i}]");
        Rule {
            peers: peers(&key.namespace, rule.to.as_deref(), &format!("{path}.to"), findings),
            ports: ports(rule.ports.as_deref(), &format!("{path}.ports"), findings),
        }
    });
    let egress: Vec<_> = egress.collect();
    let directions = directions(spec, findings);
    let rules =
        |named: bool, rules: Vec<Rule>| named.then(|| if findings.is_empty() { rules } else { Vec::new() });
    Policy {
        key,
        subjects,
        ingress: rules(directions.ingress, ingress),
        egress: rules(directions.egress, egress),
    }
}

/// The directions that a policy isolates.
struct Directions {
    ingress: bool,
    egress: bool,
}

/// Explicit types win over the rules that are there; without types it is ingress, and egress iff there is an egress
/// rule (API text of `policyTypes`).
fn directions(spec: &NetworkPolicySpec, findings: &mut Findings) -> Directions {
    const PATH: &str = "spec.policyTypes";
    let types = spec.policy_types.as_deref().unwrap_or_default();
    if types.len() > 2 {
        findings.note(PATH, "may not name more than two types");
    }
    for (i, name) in types.iter().enumerate() {
        if name != "Ingress" && name != "Egress" {
            findings.note(&format!("{PATH}[{i}]"), &format!("{} is not Ingress or Egress", quoted(name)));
        }
    }
    let known = |area: &str| {
        area.starts_with("metadata")
            || matches!(area, "" | "apiVersion" | "spec.podSelector" | "spec.ingress" | "spec.egress")
    };
    let unclear = |area: &str| area == PATH || (types.is_empty() && !known(area));
    if findings.areas().any(unclear) {
        return Directions { ingress: true, egress: true };
    }
    if types.is_empty() {
        let unreadable_egress = findings.areas().any(|area| area == "spec.egress");
        let egress = unreadable_egress || spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
        return Directions { ingress: true, egress };
    }
    let named = |direction| types.iter().any(|name| name == direction);
    Directions { ingress: named("Ingress"), egress: named("Egress") }
}

/// Requirements that the API server would refuse are noted and left out, so that what is left matches more.
fn selector(selector: Option<&LabelSelector>, path: &str, findings: &mut Findings) -> Selector {
    let Some(selector) = selector else { return Selector::everything() };
    let mut requirements = Vec::new();
    for (key, value) in selector.match_labels.iter().flatten() {
        let path = format!("{path}.matchLabels");
        let refusal = (validate::label_key(key), validate::label_value(value));
        findings.check(&path, key, refusal.0);
        findings.check(&format!("{path}[{}]", super::findings::brief(key)), value, refusal.1);
        if refusal == (None, None) {
            let values = BTreeSet::from([Arc::from(value.as_str())]);
            requirements.push(Requirement { key: key.as_str().into(), operator: Operator::In(values) });
        }
    }
    for (i, expression) in selector.match_expressions.iter().flatten().enumerate() {
        requirements.extend(requirement(expression, &format!("{path}.matchExpressions[{i}]"), findings));
    }
    Selector::new(requirements)
}

fn requirement(
    expression: &LabelSelectorRequirement,
    path: &str,
    findings: &mut Findings,
) -> Option<Requirement> {
    let texts = expression.values.as_deref().unwrap_or_default();
    let mut usable = true;
    let mut check = |path: &str, text: &str, refusal: Option<&str>| {
        usable &= refusal.is_none();
        findings.check(path, text, refusal);
    };
    check(&format!("{path}.key"), &expression.key, validate::label_key(&expression.key));
    for (i, text) in texts.iter().enumerate() {
        check(&format!("{path}.values[{i}]"), text, validate::label_value(text));
    }
    let values = || texts.iter().map(|text| Arc::from(text.as_str())).collect::<BTreeSet<_>>();
    let operator = match (expression.operator.as_str(), texts.is_empty()) {
        ("In", false) => Operator::In(values()),
        ("NotIn", false) => Operator::NotIn(values()),
        ("Exists", true) => Operator::Exists,
        ("DoesNotExist", true) => Operator::DoesNotExist,
        (operator @ ("In" | "NotIn"), true) => {
            findings.note(&format!("{path}.values"), &format!("must not be empty with operator {operator}"));
            return None;
        }
        (operator @ ("Exists" | "DoesNotExist"), false) => {
            findings.note(&format!("{path}.values"), &format!("must be empty with operator {operator}"));
            return None;
        }
        (operator, _) => {
            let operator = quoted(operator);
            findings.note(
                &format!("{path}.operator"),
                &format!("{operator} is not In, NotIn, Exists or DoesNotExist"),
            );
            return None;
        }
    };
    usable.then(|| Requirement { key: expression.key.as_str().into(), operator })
}

fn peers(
    namespace: &Arc<str>,
    peers: Option<&[NetworkPolicyPeer]>,
    path: &str,
    findings: &mut Findings,
) -> Peers {
    let peers = peers.unwrap_or_default();
    if peers.is_empty() {
        return Peers::Any;
    }
    let peers = peers.iter().enumerate();
    Peers::Only(peers.filter_map(|(i, p)| peer(namespace, p, &format!("{path}[{i}]"), findings)).collect())
}

fn peer(namespace: &Arc<str>, peer: &NetworkPolicyPeer, path: &str, findings: &mut Findings) -> Option<Peer> {
    let NetworkPolicyPeer { ip_block, namespace_selector, pod_selector } = peer;
    let mut read = |part: &Option<LabelSelector>, name: &str| {
        part.as_ref().map(|part| selector(Some(part), &format!("{path}.{name}"), findings))
    };
    let namespaces = read(namespace_selector, "namespaceSelector");
    let pods = read(pod_selector, "podSelector");
    match (ip_block, namespaces, pods) {
        (None, None, None) => {
            findings.note(path, "must name a peer: podSelector, namespaceSelector or ipBlock");
            None
        }
        (Some(_), Some(_), _) | (Some(_), _, Some(_)) => {
            findings.note(path, "may not have both ipBlock and a selector");
            None
        }
        (Some(ip_block), None, None) => {
            block(ip_block, &format!("{path}.ipBlock"), findings).map(Peer::Block)
        }
        (None, namespaces, pods) => Some(Peer::Pods {
            namespaces: match namespaces {
                Some(namespaces) => NamespaceScope::Matching(namespaces),
                None => NamespaceScope::Named(Arc::clone(namespace)),
            },
            pods: pods.unwrap_or_default(),
        }),
    }
}

fn block(block: &IPBlock, path: &str, findings: &mut Findings) -> Option<Block> {
    let Some(outer) = cidr::network(&block.cidr) else {
        let reason = if block.cidr.is_empty() {
            "must not be empty".to_owned()
        } else {
            format!("{} is not a CIDR as 10.0.0.0/8 or fd00::/64", quoted(&block.cidr))
        };
        findings.note(&format!("{path}.cidr"), &reason);
        return None;
    };
    let mut except = BTreeSet::new();
    for (i, text) in block.except.iter().flatten().enumerate() {
        match cidr::network(text) {
            Some(inner) if cidr::is_strict_subset(&inner, &outer) => drop(except.insert(inner)),
            Some(_) => findings.note(
                &format!("{path}.except[{i}]"),
                &format!("{} must be inside cidr {outer} and smaller", quoted(text)),
            ),
            None => findings.note(
                &format!("{path}.except[{i}]"),
                &format!("{} is not a CIDR as 10.0.0.0/8 or fd00::/64", quoted(text)),
            ),
        }
    }
    Some(Block { cidr: outer, except })
}

fn ports(ports: Option<&[NetworkPolicyPort]>, path: &str, findings: &mut Findings) -> Ports {
    let ports = ports.unwrap_or_default();
    if ports.is_empty() {
        return Ports::Any;
    }
    let ports = ports.iter().enumerate();
    Ports::Only(ports.filter_map(|(i, p)| port(p, &format!("{path}[{i}]"), findings)).collect())
}

fn port(port: &NetworkPolicyPort, path: &str, findings: &mut Findings) -> Option<Port> {
    let NetworkPolicyPort { end_port, port, protocol } = port;
    let protocol = super::protocol(protocol.as_deref(), &format!("{path}.protocol"), findings)?;
    match (port, end_port) {
        (None, None) => Some(Port::Range { protocol, first: 0, last: u16::MAX }),
        (Some(IntOrString::Int(first)), last) => {
            let first = super::port_number(*first, &format!("{path}.port"), findings);
            let last = match last {
                Some(last) => super::port_number(*last, &format!("{path}.endPort"), findings),
                None => first,
            };
            let (first, last) = (first?, last?);
            if last < first {
                findings.note(&format!("{path}.endPort"), &format!("{last} is below port {first}"));
                return None;
            }
            Some(Port::Range { protocol, first, last })
        }
        (Some(IntOrString::String(name)), None) => {
            let refusal = validate::port_name(name);
            findings.check(&format!("{path}.port"), name, refusal);
            refusal.is_none().then(|| Port::Named { protocol, name: name.as_str().into() })
        }
        (Some(IntOrString::String(_)), Some(_)) => {
            findings.note(&format!("{path}.endPort"), "may not be given when port is a name");
            None
        }
        (None, Some(_)) => {
            findings.note(&format!("{path}.endPort"), "may not be given without port");
            None
        }
    }
}
