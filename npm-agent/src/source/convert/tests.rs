//! What each form of an object means once converted.

use npm_policy::model::*;
use serde_json::json;

use super::*;

fn converted(spec: Value) -> (Policy, Vec<String>) {
    let value = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "x"},
        "spec": spec,
    });
    let Document { objects, broken, ignored } = document(value.into());
    assert_eq!(broken, []);
    assert_eq!((objects.len(), ignored), (1, 0));
    let Object { change, problems } = objects.into_iter().next().unwrap();
    let Some(Change::Policy(key, Some(policy))) = change else { panic!("{problems:?}") };
    assert_eq!(key, policy.key);
    (policy, problems.into_iter().map(|problem| problem.message).collect())
}

fn good(spec: Value) -> Policy {
    let (policy, problems) = converted(spec);
    assert_eq!(problems, Vec::<String>::new());
    policy
}

const ALL: [Rule; 1] = [Rule { peers: Peers::Any, ports: Ports::Any }];

#[test]
fn directions_are_defaulted() {
    let check = |spec: Value, ingress: Option<&[Rule]>, egress: Option<&[Rule]>| {
        let policy = good(spec.clone());
        assert_eq!((policy.ingress.as_deref(), policy.egress.as_deref()), (ingress, egress), "{spec}");
    };
    check(json!(null), Some(&[]), None);
    check(json!({}), Some(&[]), None);
    check(json!({"policyTypes": []}), Some(&[]), None);
    check(json!({"policyTypes": null, "egress": []}), Some(&[]), None);
    check(json!({"egress": null, "ingress": null}), Some(&[]), None);
    check(json!({"egress": [{}]}), Some(&[]), Some(&ALL));
    check(json!({"policyTypes": [], "egress": [{}]}), Some(&[]), Some(&ALL));
    check(json!({"ingress": [{}], "policyTypes": ["Egress"]}), None, Some(&[]));
    check(json!({"egress": [{}], "policyTypes": ["Ingress"]}), Some(&[]), None);
    check(json!({"policyTypes": ["Ingress", "Ingress"], "ingress": [{}]}), Some(&ALL), None);
    check(json!({"policyTypes": ["Egress", "Ingress"]}), Some(&[]), Some(&[]));
    check(json!({"ingress": [{"from": [], "ports": []}]}), Some(&ALL), None);
    check(json!({"ingress": [{"from": null, "ports": null}]}), Some(&ALL), None);
}

#[test]
fn ports_are_defaulted() {
    let check = |port: Value, expected: Port| {
        let policy = good(json!({"ingress": [{"ports": [port]}]}));
        let rule = Rule { peers: Peers::Any, ports: Ports::Only(vec![expected]) };
        assert_eq!(policy.ingress, Some(vec![rule]));
    };
    let range = |protocol, first, last| Port::Range { protocol, first, last };
    check(json!({}), range(Protocol::Tcp, 0, 65535));
    check(json!({"protocol": null, "port": null, "endPort": null}), range(Protocol::Tcp, 0, 65535));
    check(json!({"protocol": "UDP"}), range(Protocol::Udp, 0, 65535));
    check(json!({"protocol": "SCTP", "port": 9}), range(Protocol::Sctp, 9, 9));
    check(json!({"port": 80}), range(Protocol::Tcp, 80, 80));
    check(json!({"port": 1, "endPort": 65535}), range(Protocol::Tcp, 1, 65535));
    check(json!({"port": 80, "endPort": 80}), range(Protocol::Tcp, 80, 80));
    let named = |protocol, name: &str| Port::Named { protocol, name: name.into() };
    check(json!({"port": "http"}), named(Protocol::Tcp, "http"));
    check(json!({"port": "dns", "protocol": "UDP"}), named(Protocol::Udp, "dns"));
}

#[test]
fn peers_mean_what_the_text_says() {
    let check = |peer: Value, expected: Peer| {
        let policy = good(json!({"policyTypes": ["Egress"], "egress": [{"to": [peer]}]}));
        let rule = Rule { peers: Peers::Only(vec![expected]), ports: Ports::Any };
        assert_eq!(policy.egress, Some(vec![rule]));
    };
    let set = |values: &[&str]| values.iter().map(|value| Arc::from(*value)).collect::<BTreeSet<Arc<str>>>();
    let one = |key: &str, operator| Selector::new([Requirement { key: key.into(), operator }]);
    let own = || NamespaceScope::Named("x".into());
    let everything = Selector::everything;
    check(json!({"podSelector": {}}), Peer::Pods { namespaces: own(), pods: everything() });
    let all = NamespaceScope::Matching(everything());
    check(json!({"namespaceSelector": {}}), Peer::Pods { namespaces: all, pods: everything() });
    let labels = json!({"podSelector": {"matchLabels": {"a": ""}}, "namespaceSelector": {"matchExpressions": [
        {"key": "b", "operator": "NotIn", "values": ["c", "d", "c"]},
    ]}});
    let namespaces = NamespaceScope::Matching(one("b", Operator::NotIn(set(&["c", "d"]))));
    check(labels, Peer::Pods { namespaces, pods: one("a", Operator::In(set(&[""]))) });
    let exists =
        json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": []}]}});
    check(exists, Peer::Pods { namespaces: own(), pods: one("a", Operator::Exists) });
    let block = |cidr: &str, except: &[&str]| {
        let except = except.iter().map(|net| net.parse().unwrap()).collect();
        Peer::Block(Block { cidr: cidr.parse().unwrap(), except })
    };
    let cidr = json!({"ipBlock": {"cidr": "10.1.2.3/08", "except": ["10.001.0.9/16", "10.1.1.0/24"]}});
    check(cidr, block("10.0.0.0/8", &["10.1.0.0/16", "10.1.1.0/24"]));
    check(json!({"ipBlock": {"cidr": "::/0", "except": null}}), block("::/0", &[]));
}

#[test]
fn what_the_api_refuses_is_strict() {
    let check = |mut spec: Value, message: &str| {
        spec["podSelector"] = json!({"matchLabels": {"app": "web"}});
        let (policy, problems) = converted(spec.clone());
        assert_eq!(problems, [format!("{message}; {STRICT}")], "{spec}");
        assert_eq!(policy.subjects.requirements().len(), 1, "{spec}");
        assert_eq!((policy.ingress, policy.egress), (Some(vec![]), None), "{spec}");
    };
    let port = |port: Value, message: &str| {
        check(json!({"ingress": [{}, {"ports": [port]}]}), &format!("spec.ingress[1].ports[0]{message}"));
    };
    port(json!({"port": "80"}), ".port: \"80\" must contain a letter");
    port(json!({"port": 0}), ".port: 0 is not a port from 1 to 65535");
    port(json!({"port": -1}), ".port: -1 is not a port from 1 to 65535");
    port(json!({"port": 65536}), ".port: 65536 is not a port from 1 to 65535");
    port(json!({"port": 90, "endPort": 80}), ".endPort: 80 is below port 90");
    port(json!({"port": "a", "endPort": 80}), ".endPort: may not be given when port is a name");
    port(json!({"endPort": 80}), ".endPort: may not be given without port");
    port(
        json!({"port": 80, "endPort": "90"}),
        ".endPort: must be an integer of 32 bits, not the string \"90\"",
    );
    port(json!({"protocol": "tcp"}), ".protocol: \"tcp\" is not TCP, UDP or SCTP");
    port(json!({"protocol": ""}), ".protocol: \"\" is not TCP, UDP or SCTP");
    port(json!({"ports": 1}), ".ports: unknown field");
    let peer = |peer: Value, message: &str| {
        check(
            json!({"ingress": [{"from": [{"podSelector": {}}, peer]}]}),
            &format!("spec.ingress[0].from[1]{message}"),
        );
    };
    peer(json!({}), ": must name a peer: podSelector, namespaceSelector or ipBlock");
    peer(json!({"podSelector": null}), ": must name a peer: podSelector, namespaceSelector or ipBlock");
    let both = json!({"podSelector": {}, "ipBlock": {"cidr": "::/0"}});
    peer(both, ": may not have both ipBlock and a selector");
    peer(json!({"ipBlock": {}}), ".ipBlock.cidr: must not be empty");
    peer(json!({"ipBlock": {"cidr": "x"}}), ".ipBlock.cidr: \"x\" is not a CIDR as 10.0.0.0/8 or fd00::/64");
    let except = json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}});
    peer(except, ".ipBlock.except[0]: \"10.0.0.0/8\" must be inside cidr 10.0.0.0/8 and smaller");
    peer(json!({"podSelector": {}, "serviceSelector": {}}), ".serviceSelector: unknown field");
    let operator =
        json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}});
    let message =
        ".podSelector.matchExpressions[0].operator: \"Gt\" is not In, NotIn, Exists or DoesNotExist";
    peer(operator, message);
    check(json!({"ingress": "foo"}), "spec.ingress: must be a list, not the string \"foo\"");
    check(json!({"ingress": [null]}), "spec.ingress[0]: must be a map, not null");
}

#[test]
fn what_cannot_be_read_isolates_more() {
    let check = |spec: Value, requirements: usize, egress: bool| {
        let (policy, problems) = converted(spec.clone());
        assert!(!problems.is_empty(), "{spec}");
        assert_eq!(policy.subjects.requirements().len(), requirements, "{spec}");
        assert_eq!((policy.ingress, policy.egress), (Some(vec![]), egress.then(Vec::new)), "{spec}");
    };
    check(json!("foo"), 0, true);
    check(json!({"podSelector": "foo"}), 0, false);
    check(json!({"podSelector": {"matchLabels": {"a": 1, "b": "c"}}}), 1, false);
    check(json!({"podSelector": {"matchLabel": {"a": "b"}}}), 0, false);
    let expressions = json!([
        {"key": "a", "operator": "In"},
        {"key": "b", "operator": "Exists", "values": ["c"]},
        {"key": "d", "operator": "exists"},
        {"key": "-", "operator": "Exists"},
        {"key": "e", "operator": "In", "values": ["f", "g/"]},
        {"key": "h", "operator": "DoesNotExist"},
        "foo",
    ]);
    check(json!({"podSelector": {"matchExpressions": expressions}}), 1, false);
    check(json!({"policyTypes": ["Ingress", "Both"]}), 0, true);
    check(json!({"policyTypes": ["ingress"], "ingress": [{}]}), 0, true);
    check(json!({"policyTypes": ["Ingress", "Ingress", "Ingress"]}), 0, true);
    check(json!({"policyTypes": "Ingress"}), 0, true);
    check(json!({"policyTypes": [1]}), 0, true);
    check(json!({"policytypes": ["Egress"]}), 0, true);
    check(json!({"policytypes": ["Egress"], "policyTypes": ["Ingress"]}), 0, false);
    check(json!({"egress": "foo"}), 0, true);
    check(json!({"egress": [null]}), 0, true);
    check(json!({"egress": [null], "policyTypes": ["Ingress"]}), 0, false);
}

#[test]
fn policies_without_a_good_name_isolate_too() {
    let check = |metadata: Value, namespace: &str, message: &str| {
        let value = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata,
            "spec": {"ingress": [{}]},
        });
        let objects = document(value.into()).objects;
        let [Object { change: Some(Change::Policy(key, Some(policy))), problems }] = objects.as_slice()
        else {
            panic!("{objects:?}");
        };
        assert_eq!(&*key.namespace, namespace);
        assert_eq!(policy.ingress, Some(vec![]));
        assert!(
            problems.iter().any(|problem| problem.message == format!("{message}; {STRICT}")),
            "{problems:?}"
        );
        key.clone()
    };
    let missing = "metadata.name: must not be missing or empty";
    let first = check(json!({"namespace": "x"}), "x", missing);
    let second = check(json!({"namespace": "x", "labels": {"a": "b"}}), "x", missing);
    assert_ne!(first, second);
    check(json!({"name": ""}), "default", missing);
    check(json!(null), "default", missing);
    check(json!("foo"), "default", missing);
    check(json!({"name": 7}), "default", "metadata.name: must be a string, not the number 7");
    check(
        json!({"name": "a", "namespace": 7}),
        "7",
        "metadata.namespace: must be a string, not the number 7",
    );
    check(json!({"name": "a", "namspace": "x"}), "default", "metadata.namspace: unknown field");
    let hostile = "metadata.name: \"a\\n-A FORWARD\\0\" must be lower case letters, digits, '-' and '.', each part \
                   starting and ending with a letter or digit";
    let key = check(json!({"name": "a\n-A FORWARD\0"}), "default", hostile);
    assert!(key.name.starts_with("a_-A_FORWARD__"), "{key}");
}

fn converted_pod(value: Value) -> (Pod, Vec<String>) {
    let mut value = value;
    value["apiVersion"] = "v1".into();
    value["kind"] = "Pod".into();
    let objects = document(value.into()).objects;
    let Object { change, problems } = objects.into_iter().next().unwrap();
    let Some(Change::Pod(_, Some(pod))) = change else { panic!("{problems:?}") };
    (pod, problems.into_iter().map(|problem| problem.message).collect())
}

#[test]
fn pods() {
    let value = json!({
        "metadata": {"name": "a", "labels": {"l": ""}, "creationTimestamp": "1970-01-01T00:01:00Z",
            "deletionTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {"nodeName": "n", "containers": [{"ports": [{"containerPort": 80, "name": "http"},
            {"containerPort": 81}]}], "initContainers": [{"restartPolicy": "Always", "ports": [
            {"containerPort": 53, "name": "dns", "protocol": "UDP"}]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "::ffff:10.0.0.1"}, {"ip": "fd00::1"}]},
    });
    let (pod, problems) = converted_pod(value);
    assert_eq!(problems, Vec::<String>::new());
    let port = |name: &str, protocol, port| NamedPort { name: name.into(), protocol, port };
    let expected = Pod {
        key: PodKey::new("default", "a"),
        node: Some("n".into()),
        labels: Labels::from([("l".into(), "".into())]),
        addresses: ["10.0.0.1", "fd00::1"].map(|ip| ip.parse().unwrap()).into(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [port("http", Protocol::Tcp, 80), port("dns", Protocol::Udp, 53)].into(),
        created: 60,
    };
    assert_eq!(pod, expected);

    let (pod, problems) = converted_pod(json!({"metadata": {"name": "a", "namespace": ""}}));
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!((pod.node, pod.network, pod.phase, pod.created), (None, PodNetwork::Own, PodPhase::Active, 0));

    for phase in ["Succeeded", "Failed"] {
        let (pod, _) = converted_pod(json!({"metadata": {"name": "a"}, "status": {"phase": phase}}));
        assert_eq!(pod.phase, PodPhase::Ended);
    }
    for (phase, expected) in
        [("Pending", PodPhase::Pending), ("Running", PodPhase::Active), ("Unknown", PodPhase::Active)]
    {
        let (pod, _) = converted_pod(json!({"metadata": {"name": "a"}, "status": {"phase": phase}}));
        assert_eq!(pod.phase, expected);
    }
    let (pod, _) = converted_pod(json!({"metadata": {"name": "a"}, "spec": {"hostNetwork": true}}));
    assert_eq!(pod.network, PodNetwork::Host);
}

#[test]
fn bad_parts_of_pods_are_left_out() {
    let value = json!({
        "metadata": {"name": "a", "labels": {"l": true, "m": "n"}, "creationTimestamp": "yesterday"},
        "spec": {"hostNetwork": "maybe", "containers": [{"image": 3, "ports": [
            {"containerPort": 70000, "name": "big"}, {"containerPort": 80, "name": "80"},
            {"containerPort": 80, "name": "icmp", "protocol": "ICMP"}, {"containerPort": 80, "name": "good"}]}]},
        "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.256"}, {"ip": 3}, "fd00::1", {"ip": "fd00::2"}]},
    });
    let (pod, problems) = converted_pod(value);
    assert_eq!(pod.addresses.len(), 2);
    assert_eq!(pod.ports.iter().map(|port| &*port.name).collect::<Vec<_>>(), ["good"]);
    assert_eq!((pod.labels.len(), pod.network, pod.created), (1, PodNetwork::Own, 0));
    let expected = [
        "metadata.creationTimestamp: must be a time as 2006-01-02T15:04:05Z, not the string \"yesterday\"",
        "metadata.labels[l]: must be a string, not the boolean true",
        "spec.hostNetwork: must be true or false, not the string \"maybe\"",
        "status.podIPs[1].ip: must be a string, not the number 3",
        "status.podIPs[2]: must be a map, not the string \"fd00::1\"",
        "status.podIPs[0].ip: \"10.0.0.256\" is not an IP address",
        "spec.containers[0].ports[0].containerPort: 70000 is not a port from 1 to 65535",
        "spec.containers[0].ports[1].name: \"80\" must contain a letter",
    ];
    let expected: Vec<_> = expected.iter().map(|message| format!("{message}; left out")).collect();
    assert_eq!(problems[..8], expected);
    assert_eq!(problems[8], "and 1 more of this object; left out");
}

#[test]
fn kinds_and_lists() {
    let namespace = |name: &str| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
    let list = json!({"kind": "List", "apiVersion": "v1", "items": [
        namespace("a"),
        {"kind": "NamespaceList", "items": [{"metadata": {"name": "b", "labels": {"kubernetes.io/metadata.name": "c"}}}]},
        {"kind": "Deployment", "apiVersion": "apps/v1"},
        {"kind": "ServiceList", "apiVersion": "v1", "items": [1]},
        {"kind": "PodList", "items": []},
        {"kind": "PodList", "items": null},
        {"kind": "PodList"},
        {"kind": "PodList", "items": 7},
        null,
        {"metadata": {}},
        {"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy", "metadata": {"name": "x", "namespace": "y"}},
        {"apiVersion": "extensions/v1beta1", "kind": "NetworkPolicy", "metadata": {"name": "x"}},
        {"kind": "Namespace", "metadata": {"name": "d"}},
        {"apiVersion": "v1", "kind": "namespace", "metadata": {"name": "e"}},
        {"kind": "Deployment"},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "f"}},
    ]});
    let Document { objects, broken, ignored } = document(list.into());
    assert_eq!(ignored, 2);
    let broken: Vec<_> =
        broken.iter().map(|problem| (problem.object.as_str(), problem.message.as_str())).collect();
    let no_list = ("", "PodList: items must be a list; left out");
    let expected = [
        no_list,
        no_list,
        no_list,
        ("", "not a Kubernetes object: kind must be a string; left out"),
        ("", "kind \"namespace\" is not known; Namespace is; left out"),
        ("", "kind \"Deployment\" has no apiVersion, so it may be cut short; left out"),
        ("", "a Pod that can't be told from others may be cut short"),
    ];
    assert_eq!(broken, expected);
    let said: Vec<_> = objects.iter().flat_map(|object| &object.problems).collect();
    let said: Vec<_> =
        said.iter().map(|problem| (problem.object.as_str(), problem.message.as_str())).collect();
    let expected = [
        (
            "NetworkPolicy y/x",
            "apiVersion \"projectcalico.org/v3\" is another API's, not networking.k8s.io/v1; left out",
        ),
        (
            "NetworkPolicy default/x",
            "apiVersion: \"extensions/v1beta1\" is not networking.k8s.io/v1; the policy isolates its pods and allows \
             nothing",
        ),
        ("Namespace d", "apiVersion: must be v1; left out"),
        ("Pod", "metadata.name: must not be empty; the pod is left out"),
    ];
    assert_eq!(said, expected);
    let named = |object: &Object| match &object.change {
        Some(Change::Namespace(name, Some(namespace))) => {
            assert_eq!(namespace.labels.get(NAMESPACE_NAME_LABEL), Some(name));
            Some(name.to_string())
        }
        Some(Change::Namespace(_, None) | Change::Pod(..) | Change::Policy(..)) | None => None,
    };
    assert_eq!(objects.iter().filter_map(named).collect::<Vec<_>>(), ["a", "b", "d"]);
}
