//! The documents of a small world, word for word.

use npm_policy::model::{Namespace, PodKey, PolicyKey, Protocol};
use npm_policy::world::Change;
use serde_json::{Value, json};

use super::*;
use crate::http::view::fixture::view;
use crate::reconcile::fake::NODE;

/// Two pods that differ in everything, and a policy with every form of peer and port.
fn changes() -> Vec<Change> {
    let pod = |name: &str, addresses: &[&str], network, phase| {
        let key = PodKey::new("x", name);
        let pod = Pod {
            key: key.clone(),
            node: Some(NODE.into()),
            labels: Labels::from([("app".into(), name.into())]),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            network,
            phase,
            ports: [NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
            created: 5,
        };
        Change::Pod(key, Some(pod))
    };
    let app = |value: &str| {
        let operator = Operator::In([Arc::from(value)].into());
        Selector::new([Requirement { key: "app".into(), operator }])
    };
    let key = PolicyKey::new("x", "p");
    let policy = Policy {
        key: key.clone(),
        subjects: app("web"),
        ingress: Some(vec![Rule {
            peers: Peers::Only(vec![
                Peer::Pods { namespaces: NamespaceScope::Named("x".into()), pods: app("<b>") },
                Peer::Block(Block {
                    cidr: "10.9.0.0/16".parse().unwrap(),
                    except: ["10.9.1.0/24".parse().unwrap()].into(),
                }),
            ]),
            ports: Ports::Only(vec![
                Port::Range { protocol: Protocol::Udp, first: 53, last: 54 },
                Port::Named { protocol: Protocol::Tcp, name: "http".into() },
            ]),
        }]),
        egress: Some(vec![Rule { peers: Peers::Any, ports: Ports::Any }]),
    };
    vec![
        Change::Namespace("x".into(), Some(Namespace::new("x", Labels::from([("team".into(), "a".into())])))),
        pod("web", &["10.0.0.2", "fd00::2"], PodNetwork::Own, PodPhase::Active),
        pod("<b>", &["10.0.0.3"], PodNetwork::Own, PodPhase::Pending),
        pod("host", &["192.0.2.1"], PodNetwork::Host, PodPhase::Active),
        pod("done", &["10.0.0.4"], PodNetwork::Own, PodPhase::Ended),
        Change::Policy(key, Some(policy)),
    ]
}

fn document(document: Document) -> Value {
    serde_json::from_str(&document.render(&view(changes()))).unwrap()
}

/// As `npmcachev2.json` of Azure NPM has it: capital letters, `PodIP`, ports as in the API, no other key.
#[test]
fn azure_npms_tools_find_what_they_look_for() {
    let found = document(Document::Manager);
    let http = json!([{"name": "http", "containerPort": 8080, "protocol": "TCP"}]);
    let expected = json!({
        "NodeName": NODE,
        "NsMap": {"x": {"Name": "x", "LabelsMap": {"kubernetes.io/metadata.name": "x", "team": "a"}}},
        "PodMap": {
            "x/web": {"Name": "web", "Namespace": "x", "PodIP": "10.0.0.2", "Labels": {"app": "web"},
                "ContainerPorts": http, "Phase": "Running"},
            "x/<b>": {"Name": "<b>", "Namespace": "x", "PodIP": "10.0.0.3", "Labels": {"app": "<b>"},
                "ContainerPorts": http, "Phase": "Pending"},
        },
        "SetMap": found["SetMap"],
    });
    assert_eq!(found, expected);
    // Kernel name to name, of each family that a set can hold.
    let sets = found["SetMap"].as_object().unwrap();
    for (kernel, name) in sets {
        let name = name.as_str().unwrap();
        let v4 = npm_policy::names::kernel_set_name(name, Family::V4);
        assert!(*kernel == v4 || *kernel == format!("{v4}6"), "{kernel}: {name}");
    }
    assert!(sets.values().any(|name| name == "cidr-10.9.0.0/16-except-10.9.1.0/24"), "{sets:?}");
    let blocks = sets.values().filter(|name| *name == "cidr-10.9.0.0/16-except-10.9.1.0/24").count();
    assert_eq!(blocks, 1, "a block has one family");
}

#[test]
fn the_world_says_no_more_and_no_less_than_the_model() {
    let found = document(Document::World);
    assert_eq!(found["node"], NODE);
    assert_eq!(found["pods"].as_array().map(Vec::len), Some(4));
    let web = json!({"namespace": "x", "name": "web", "node": NODE, "labels": {"app": "web"},
        "addresses": ["10.0.0.2", "fd00::2"], "host_network": false, "phase": "active",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}], "created": 5});
    assert_eq!(found["pods"][3], web);
    let app = |value: &str| json!([{"key": "app", "operator": "In", "values": [value]}]);
    let policy = json!({"namespace": "x", "name": "p", "pod_selector": app("web"),
        "ingress": [{
            "peers": [
                {"namespace": "x", "pod_selector": app("<b>")},
                {"cidr": "10.9.0.0/16", "except": ["10.9.1.0/24"]},
            ],
            "ports": [
                {"protocol": "UDP", "first": 53, "last": 54},
                {"protocol": "TCP", "name": "http"},
            ],
        }],
        "egress": [{"peers": "any", "ports": "any"}]});
    assert_eq!(found["policies"], json!([policy]));
}

#[test]
fn goal_and_sets_speak_of_the_same_sets() {
    let (goal, sets) = (document(Document::Goal), document(Document::Sets));
    assert_eq!(goal["subjects"], json!({"x/web": ["10.0.0.2", "fd00::2"]}));
    let program = &goal["policies"]["x/p"];
    assert_eq!(program["subjects"], "local-ns-x-AND-podlabel-app:web");
    assert_eq!(program["egress"], json!([{"peers": "any", "ports": "any"}]));
    let members = |set: &str, family: &str| sets["sets"][set]["members"][family].clone();
    assert_eq!(members("local-ns-x-AND-podlabel-app:web", "ipv6"), json!(["fd00::2"]));
    assert_eq!(
        members("cidr-10.9.0.0/16-except-10.9.1.0/24", "ipv4"),
        json!(["10.9.0.0/16", "10.9.1.0/24 nomatch"])
    );
    for clause in program["ingress"].as_array().unwrap() {
        for set in clause["peers"].as_array().unwrap() {
            assert!(sets["sets"].get(set.as_str().unwrap()).is_some(), "{set}");
        }
        for port in clause["ports"].as_array().unwrap().iter().filter_map(|port| port.get("set")) {
            let found = members(port.as_str().unwrap(), "ipv4");
            assert_eq!(found, json!(["10.0.0.2,tcp:8080"]));
        }
    }
}

/// A direction that is not isolated is not one that allows nothing, and nobody is not anybody.
#[test]
fn nothing_any_and_not_at_all_are_three_things() {
    let rule = |peers| Rule { peers, ports: Ports::Any };
    let text = |rules: Option<Vec<Rule>>| {
        let policy = Policy {
            key: PolicyKey::new("x", "p"),
            subjects: Selector::everything(),
            ingress: rules,
            egress: None,
        };
        serde_json::to_value(PolicyJson::of(&policy)).unwrap()["ingress"].clone()
    };
    assert_eq!(text(None), Value::Null);
    assert_eq!(text(Some(vec![])), json!([]));
    assert_eq!(text(Some(vec![rule(Peers::Any)])), json!([{"peers": "any", "ports": "any"}]));
    assert_eq!(text(Some(vec![rule(Peers::Only(vec![]))])), json!([{"peers": [], "ports": "any"}]));
}
