//! The table: a bad thing a row, and what is said of it.

use super::{is_strict, policies, read_among_neighbours, said};

/// `spec` of a policy, and what is said of it.
const SPECS: &[(&str, &str)] = &[
    // Types.
    ("foo", "spec: must be a map, not the string \"foo\""),
    ("[]", "spec: must be a map, not a list"),
    ("7", "spec: must be a map, not the number 7"),
    ("{podSelector: foo}", "spec.podSelector: must be a map, not the string \"foo\""),
    ("{podSelector: []}", "spec.podSelector: must be a map, not a list"),
    ("{policyTypes: Ingress}", "spec.policyTypes: must be a list, not the string \"Ingress\""),
    ("{policyTypes: {a: b}}", "spec.policyTypes: must be a list, not a map"),
    ("{policyTypes: [1]}", "spec.policyTypes[0]: must be a string, not the number 1"),
    ("{ingress: foo}", "spec.ingress: must be a list, not the string \"foo\""),
    ("{ingress: {from: []}}", "spec.ingress: must be a list, not a map"),
    ("{ingress: [foo]}", "spec.ingress[0]: must be a map, not the string \"foo\""),
    ("{ingress: [[]]}", "spec.ingress[0]: must be a map, not a list"),
    ("{ingress: [{from: {}}]}", "spec.ingress[0].from: must be a list, not a map"),
    ("{ingress: [{from: [1]}]}", "spec.ingress[0].from[0]: must be a map, not the number 1"),
    ("{ingress: [{ports: 80}]}", "spec.ingress[0].ports: must be a list, not the number 80"),
    ("{ingress: [{ports: [80]}]}", "spec.ingress[0].ports[0]: must be a map, not the number 80"),
    ("{egress: [{to: x}]}", "spec.egress[0].to: must be a list, not the string \"x\""),
    ("{egress: true}", "spec.egress: must be a list, not the boolean true"),
    // Nulls where there must be something.
    ("{ingress: [null]}", "spec.ingress[0]: must be a map, not null"),
    ("{ingress: [{from: [null]}]}", "spec.ingress[0].from[0]: must be a map, not null"),
    ("{ingress: [{ports: [null]}]}", "spec.ingress[0].ports[0]: must be a map, not null"),
    ("{policyTypes: [null]}", "spec.policyTypes[0]: must be a string, not null"),
    (
        "{podSelector: {matchLabels: {a: null}}}",
        "spec.podSelector.matchLabels[a]: must be a string, not null",
    ),
    (
        "{podSelector: {matchExpressions: [null]}}",
        "spec.podSelector.matchExpressions[0]: must be a map, not null",
    ),
    ("{ingress: [{from: [{ipBlock: {cidr: null}}]}]}", "ipBlock.cidr: must not be empty"),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [null]}}]}]}",
        "except[0]: must be a string, not null",
    ),
    // Policy types.
    ("{policyTypes: [Both]}", "spec.policyTypes[0]: \"Both\" is not Ingress or Egress"),
    ("{policyTypes: [ingress]}", "spec.policyTypes[0]: \"ingress\" is not Ingress or Egress"),
    ("{policyTypes: ['']}", "spec.policyTypes[0]: \"\" is not Ingress or Egress"),
    ("{policyTypes: [Ingress, Egress, Ingress]}", "spec.policyTypes: may not name more than two types"),
    // Unknown fields.
    ("{policyType: [Egress]}", "spec.policyType: unknown field"),
    ("{ingres: []}", "spec.ingres: unknown field"),
    ("{ingress: [{to: []}]}", "spec.ingress[0].to: unknown field"),
    ("{egress: [{from: []}]}", "spec.egress[0].from: unknown field"),
    ("{ingress: [{from: [{podselector: {}}]}]}", "spec.ingress[0].from[0].podselector: unknown field"),
    ("{ingress: [{from: [{podSelector: {}, x: 1}]}]}", "spec.ingress[0].from[0].x: unknown field"),
    ("{ingress: [{ports: [{port: 80, name: a}]}]}", "spec.ingress[0].ports[0].name: unknown field"),
    ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, excepts: []}}]}]}", "ipBlock.excepts: unknown field"),
    ("{podSelector: {app: web}}", "spec.podSelector.app: unknown field"),
    ("{podSelector: {matchLabel: {a: b}}}", "spec.podSelector.matchLabel: unknown field"),
    // Ports.
    ("{ingress: [{ports: [{port: 0}]}]}", "ports[0].port: 0 is not a port from 1 to 65535"),
    ("{ingress: [{ports: [{port: -1}]}]}", "ports[0].port: -1 is not a port from 1 to 65535"),
    ("{ingress: [{ports: [{port: 65536}]}]}", "ports[0].port: 65536 is not a port from 1 to 65535"),
    ("{ingress: [{ports: [{port: 70000}]}]}", "ports[0].port: 70000 is not a port from 1 to 65535"),
    (
        "{ingress: [{ports: [{port: 4294967376}]}]}",
        "must be an integer of 32 bits or a string, not the number 4294967376",
    ),
    ("{ingress: [{ports: [{port: 99999999999999999999999}]}]}", "ports[0].port: "),
    (
        "{ingress: [{ports: [{port: 80.5}]}]}",
        "must be an integer of 32 bits or a string, not the number 80.5",
    ),
    (
        "{ingress: [{ports: [{port: true}]}]}",
        "must be an integer of 32 bits or a string, not the boolean true",
    ),
    ("{ingress: [{ports: [{port: [80]}]}]}", "must be an integer of 32 bits or a string, not a list"),
    (
        "{ingress: [{ports: [{port: .inf}]}]}",
        "ports[0].port: \".inf\" must be lower case letters, digits and '-'",
    ),
    ("{ingress: [{ports: [{port: '80'}]}]}", "ports[0].port: \"80\" must contain a letter"),
    ("{ingress: [{ports: [{port: ''}]}]}", "ports[0].port: \"\" must be lower case letters, digits and '-'"),
    ("{ingress: [{ports: [{port: HTTP}]}]}", "ports[0].port: \"HTTP\" must be lower case"),
    ("{ingress: [{ports: [{port: abcdefghijklmnop}]}]}", "must be no more than 15 characters"),
    ("{ingress: [{ports: [{port: a--b}]}]}", "must not contain '--'"),
    ("{ingress: [{ports: [{port: a-}]}]}", "must not start or end with '-'"),
    ("{ingress: [{ports: [{port: \"a\\0b\"}]}]}", "ports[0].port: \"a\\0b\" must be lower case"),
    ("{ingress: [{ports: [{endPort: 80}]}]}", "ports[0].endPort: may not be given without port"),
    ("{ingress: [{ports: [{port: 80, endPort: 79}]}]}", "ports[0].endPort: 79 is below port 80"),
    (
        "{ingress: [{ports: [{port: 80, endPort: 65536}]}]}",
        "ports[0].endPort: 65536 is not a port from 1 to 65535",
    ),
    ("{ingress: [{ports: [{port: 80, endPort: -1}]}]}", "ports[0].endPort: -1 is not a port from 1 to 65535"),
    (
        "{ingress: [{ports: [{port: 80, endPort: '90'}]}]}",
        "ports[0].endPort: must be an integer of 32 bits, not the string",
    ),
    (
        "{ingress: [{ports: [{port: http, endPort: 90}]}]}",
        "ports[0].endPort: may not be given when port is a name",
    ),
    ("{egress: [{ports: [{protocol: ICMP}]}]}", "ports[0].protocol: \"ICMP\" is not TCP, UDP or SCTP"),
    ("{egress: [{ports: [{protocol: tcp}]}]}", "ports[0].protocol: \"tcp\" is not TCP, UDP or SCTP"),
    ("{egress: [{ports: [{protocol: ''}]}]}", "ports[0].protocol: \"\" is not TCP, UDP or SCTP"),
    ("{egress: [{ports: [{protocol: 6}]}]}", "ports[0].protocol: must be a string, not the number 6"),
    // Peers.
    ("{ingress: [{from: [{}]}]}", "from[0]: must name a peer: podSelector, namespaceSelector or ipBlock"),
    ("{ingress: [{from: [{podSelector: null}]}]}", "from[0]: must name a peer"),
    ("{egress: [{to: [{podSelector: {}}, {}]}]}", "to[1]: must name a peer"),
    (
        "{ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
        "from[0]: may not have both ipBlock and a selector",
    ),
    (
        "{ingress: [{from: [{namespaceSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
        "from[0]: may not have both ipBlock",
    ),
    // Blocks.
    ("{ingress: [{from: [{ipBlock: {}}]}]}", "ipBlock.cidr: must not be empty"),
    ("{ingress: [{from: [{ipBlock: {cidr: ''}}]}]}", "ipBlock.cidr: must not be empty"),
    ("{ingress: [{from: [{ipBlock: 10.0.0.0/8}]}]}", "ipBlock: must be a map, not the string \"10.0.0.0/8\""),
    ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}", "cidr: \"10.0.0.0\" is not a CIDR"),
    ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}", "cidr: \"10.0.0.0/33\" is not a CIDR"),
    ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/-1}}]}]}", "cidr: \"10.0.0.0/-1\" is not a CIDR"),
    ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8/8}}]}]}", "cidr: \"10.0.0.0/8/8\" is not a CIDR"),
    ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0/8}}]}]}", "cidr: \"10.0.0/8\" is not a CIDR"),
    ("{ingress: [{from: [{ipBlock: {cidr: 0x0a.0.0.0/8}}]}]}", "cidr: \"0x0a.0.0.0/8\" is not a CIDR"),
    ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.256/8}}]}]}", "cidr: \"10.0.0.256/8\" is not a CIDR"),
    ("{ingress: [{from: [{ipBlock: {cidr: 'fd00::/129'}}]}]}", "cidr: \"fd00::/129\" is not a CIDR"),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 'fe80::1%eth0/64'}}]}]}",
        "cidr: \"fe80::1%eth0/64\" is not a CIDR",
    ),
    ("{ingress: [{from: [{ipBlock: {cidr: example.com}}]}]}", "cidr: \"example.com\" is not a CIDR"),
    ("{ingress: [{from: [{ipBlock: {cidr: ' 10.0.0.0/8'}}]}]}", "cidr: \" 10.0.0.0/8\" is not a CIDR"),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: 10.0.0.0/9}}]}]}",
        "except: must be a list, not the string",
    ),
    ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [x]}}]}]}", "except[0]: \"x\" is not a CIDR"),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
        "except[0]: \"10.0.0.0/8\" must be inside cidr 10.0.0.0/8 and smaller",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/7]}}]}]}",
        "except[0]: \"10.0.0.0/7\" must be inside",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}",
        "except[0]: \"11.0.0.0/16\" must be inside",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['fd00::/16']}}]}]}",
        "except[0]: \"fd00::/16\" must be inside",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: '::/0', except: [10.0.0.0/8]}}]}]}",
        "except[0]: \"10.0.0.0/8\" must be inside cidr ::/0",
    ),
    // Selectors.
    ("{podSelector: {matchLabels: [a]}}", "spec.podSelector.matchLabels: must be a map, not a list"),
    (
        "{podSelector: {matchLabels: {a: 1}}}",
        "spec.podSelector.matchLabels[a]: must be a string, not the number 1",
    ),
    (
        "{podSelector: {matchLabels: {a: true}}}",
        "spec.podSelector.matchLabels[a]: must be a string, not the boolean true",
    ),
    ("{podSelector: {matchLabels: {'': b}}}", "spec.podSelector.matchLabels: \"\" must not be empty"),
    ("{podSelector: {matchLabels: {a/b/c: d}}}", "spec.podSelector.matchLabels: \"a/b/c\" must be letters"),
    ("{podSelector: {matchLabels: {A_B/c: d}}}", "its prefix must be a DNS subdomain"),
    (
        "{podSelector: {matchLabels: {a: b c}}}",
        "spec.podSelector.matchLabels[a]: \"b c\" must be empty or letters",
    ),
    (
        "{podSelector: {matchLabels: {a: bü}}}",
        "spec.podSelector.matchLabels[a]: \"bü\" must be empty or letters",
    ),
    (
        "{podSelector: {matchLabels: {a: \"b\\0\"}}}",
        "spec.podSelector.matchLabels[a]: \"b\\0\" must be empty or letters",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}}",
        "operator: \"Gt\" is not In, NotIn, Exists or DoesNotExist",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}",
        "operator: \"in\" is not In, NotIn",
    ),
    ("{podSelector: {matchExpressions: [{key: a}]}}", "operator: \"\" is not In, NotIn"),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: In}]}}",
        "values: must not be empty with operator In",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: NotIn, values: []}]}}",
        "values: must not be empty with operator NotIn",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
        "values: must be empty with operator Exists",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: DoesNotExist, values: [b]}]}}",
        "values: must be empty with operator DoesNotExist",
    ),
    (
        "{podSelector: {matchExpressions: [{operator: Exists}]}}",
        "matchExpressions[0].key: \"\" must not be empty",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: In, values: [b, '-']}]}}",
        "values[1]: \"-\" must be empty or letters",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: In, values: b}]}}",
        "values: must be a list, not the string \"b\"",
    ),
    ("{podSelector: {matchExpressions: {key: a}}}", "matchExpressions: must be a list, not a map"),
    (
        "{ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: In}]}}]}]}",
        "namespaceSelector.matchExpressions[0].values: must not be empty",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: b}]}}",
        "values: must be a list, not the string \"b\"",
    ),
    // Duplicate keys.
    (
        "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [], values: [b]}]}}",
        "spec.podSelector.matchExpressions[0].values: given twice",
    ),
    ("{ingress: [], ingress: [{}]}", "spec.ingress: given twice"),
    ("{podSelector: {matchLabels: {a: b}}, podSelector: {}}", "spec.podSelector: given twice"),
    ("{podSelector: {matchLabels: {a: b, a: c}}}", "spec.podSelector.matchLabels.a: given twice"),
    ("{policyTypes: [Ingress], policyTypes: [Egress]}", "spec.policyTypes: given twice"),
    ("{ingress: [{ports: [{port: 80, port: 81}]}]}", "spec.ingress[0].ports[0].port: given twice"),
    ("{ingress: [{from: [], from: []}]}", "spec.ingress[0].from: given twice"),
];

/// Other documents, and what is said of them.
const DOCUMENTS: &[(&str, &str)] = &[
    ("foo", "file.yaml: not a Kubernetes object but the string \"foo\"; left out"),
    ("42", "not a Kubernetes object but the number 42"),
    ("[a, b]", "not a Kubernetes object but a list"),
    ("{}", "kind must be a string"),
    ("{kind: 7}", "kind must be a string"),
    ("{kind: List, items: 7}", "List: items must be a list"),
    ("{apiVersion: v1, kind: List}", "List: items must be a list"),
    ("apiVersion: networking.k8s.io/v1", "kind must be a string"),
    (
        "{apiVersion: networking.k8s.io/v1, kind: Networkpolicy, metadata: {name: a}}",
        "file.yaml: kind \"Networkpolicy\" is not known; NetworkPolicy is; left out",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPol}",
        "kind \"NetworkPol\" is not known; NetworkPolicy is",
    ),
    ("{apiVersion: networking.k8s.io/v1, kind: Policy}", "kind \"Policy\" is none of networking.k8s.io"),
    ("{apiVersion: v1, kind: pod, metadata: {name: a}}", "kind \"pod\" is not known; Pod is"),
    (
        "{apiVersion: v1, kind: namespace, metadata: {name: a}}",
        "kind \"namespace\" is not known; Namespace is",
    ),
    ("{kind: Policy, metadata: {name: a}}", "kind \"Policy\" has no apiVersion, so it may be cut short"),
    ("{kind: List, items: [7, {}]}", "not a Kubernetes object but the number 7"),
    ("kind: [", "file.yaml: line "),
    ("kind: {a: b", "the document is left out"),
    ("a: b: c", "file.yaml: line 5, column "),
    ("kind: \"Pod", "the document is left out"),
    ("kind: *nobody", "file.yaml: line "),
    ("kind: !!int foo", "file.yaml: "),
    ("a: &a [*a]", "file.yaml: "),
    ("%YAML 3.0\nkind: Pod", "file.yaml: line "),
    ("kind: Pod\u{0}", "file.yaml: line "),
    ("\u{7}", "file.yaml: line "),
    ("{apiVersion: v1, kind: Pod}", "Pod: metadata.name: must not be empty; the pod is left out"),
    ("{apiVersion: v1, kind: Pod, metadata: foo}", "Pod: metadata: must be a map, not the string \"foo\""),
    ("{apiVersion: v1, kind: Pod, metadata: {name: [a]}}", "metadata.name: must be a string, not a list"),
    ("{apiVersion: v2, kind: Pod, metadata: {name: a}}", "Pod default/a: apiVersion: \"v2\" is not v1"),
    ("{kind: Pod, metadata: {name: a}}", "Pod default/a: apiVersion: must be v1"),
    ("{apiVersion: v1, kind: Pod, metadata: {name: A}}", "metadata.name: \"A\" must be lower case letters"),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: a.b}}",
        "metadata.namespace: \"a.b\" must be lower case",
    ),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIP: x}}",
        "status.podIP: \"x\" is not an IP address",
    ),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIPs: [{ip: 10.0.0.1/8}]}}",
        "status.podIPs[0].ip: \"10.0.0.1/8\" is not an IP address",
    ),
    ("{apiVersion: v1, kind: Pod, metadata: {name: a}, status: []}", "status: must be a map, not a list"),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {hostNetwork: 1}}",
        "spec.hostNetwork: must be true or false",
    ),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {a: 1}}}",
        "metadata.labels[a]: must be a string, not the number 1",
    ),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {a: b, a: c}}}",
        "metadata.labels.a: given twice",
    ),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, creationTimestamp: now}}",
        "metadata.creationTimestamp: must be a time",
    ),
    ("{apiVersion: v1, kind: Namespace}", "Namespace: metadata.name: must not be empty"),
    ("{apiVersion: v1, kind: Namespace, metadata: {name: a.b}}", "metadata.name: \"a.b\" must be lower case"),
    ("{apiVersion: v1, kind: Namespace, metadata: {name: a, labels: foo}}", "metadata.labels: must be a map"),
    (
        "{apiVersion: v1, kind: Namespace, metadata: {name: a, labels: {-: b}}}",
        "metadata.labels: \"-\" must be letters",
    ),
    (
        "{apiVersion: projectcalico.org/v3, kind: NetworkPolicy, metadata: {name: a}}",
        "NetworkPolicy a: apiVersion \"projectcalico.org/v3\" is another API's",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a, namespace: [b]}}",
        "nobody knows whom it isolates",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a, namespace: b, namespace: c}}",
        "nobody knows whom it isolates",
    ),
];

/// Whole policies that are recognised: each isolates, and allows nothing.
const POLICIES: &[(&str, &str)] = &[
    (
        "{apiVersion: networking.k8s.io/v1beta1, kind: NetworkPolicy, metadata: {name: a}, spec: {ingress: [{}]}}",
        "apiVersion: \"networking.k8s.io/v1beta1\" is not networking.k8s.io/v1",
    ),
    (
        "{apiVersion: extensions/v1beta1, kind: NetworkPolicy, metadata: {name: a}, spec: {ingress: [{}]}}",
        "apiVersion: \"extensions/v1beta1\" is not",
    ),
    (
        "{kind: NetworkPolicy, metadata: {name: a}, spec: {ingress: [{}]}}",
        "apiVersion: must be networking.k8s.io/v1",
    ),
    (
        "{apiVersion: 1, kind: NetworkPolicy, metadata: {name: a}, spec: {ingress: [{}]}}",
        "apiVersion: must be networking.k8s.io/v1",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, spec: {ingress: [{}]}}",
        "metadata.name: must not be missing or empty",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: {}}, spec: {ingress: [{}]}}",
        "metadata.name: must be a string",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: 80}, spec: {ingress: [{}]}}",
        "metadata.name: must be a string, not the number 80",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a, namspace: b}, spec: {ingress: [{}]}}",
        "metadata.namspace: unknown field",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a}, Spec: {}, spec: {ingress: [{}]}}",
        "Spec: unknown field",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: \"a\\n-A FORWARD -j ACCEPT\"}, spec: {ingress: [{}]}}",
        "metadata.name: \"a\\n-A FORWARD -j ACCEPT\" must be lower case",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a, labels: {a: 1}}, spec: {ingress: [{}]}}",
        "metadata.labels[a]: must be a string",
    ),
];

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: bad, namespace: x}}\nspec: {spec}\n"
    )
}

#[test]
fn the_table_is_long() {
    assert!(SPECS.len() + DOCUMENTS.len() + POLICIES.len() >= 150);
}

#[test]
fn bad_specs_are_strict() {
    for (spec, message) in SPECS {
        let reading = read_among_neighbours(spec, &policy(spec));
        let said = said(&reading);
        assert!(said.contains(message), "{spec}: {said}");
        assert!(said.lines().all(|line| line.starts_with("NetworkPolicy x/bad: ")), "{spec}: {said}");
        assert!(said.contains("; the policy isolates its pods and allows nothing"), "{spec}: {said}");
        let policies = policies(&reading);
        assert_eq!((policies.len(), reading.changes.len()), (1, 1), "{spec}");
        assert!(is_strict(policies[0]), "{spec}: {:?}", policies[0]);
        assert_eq!(policies[0].key.to_string(), "x/bad");
        // No row has a requirement that is good beside one that is bad.
        assert_eq!(policies[0].subjects.requirements().len(), 0, "{spec}");
    }
}

#[test]
fn bad_policies_are_strict() {
    for (text, message) in POLICIES {
        let reading = read_among_neighbours(text, text);
        let said = said(&reading);
        assert!(said.contains(message), "{text}: {said}");
        let policies = policies(&reading);
        assert_eq!(policies.len(), 1, "{text}");
        assert!(is_strict(policies[0]), "{text}: {:?}", policies[0]);
    }
}

#[test]
fn bad_documents_are_named() {
    for (text, message) in DOCUMENTS {
        let reading = read_among_neighbours(text, text);
        let said = said(&reading);
        assert!(said.contains(message), "{text:?}: {said}");
        assert!(policies(&reading).is_empty(), "{text:?}");
    }
}
