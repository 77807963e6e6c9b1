//! The cluster that `cargo xtask bench control` measures with: 20,000 pods in 1,000 namespaces and 2,000 policies, as a
//! real API server sends them.
//!
//! A pod is 5 to 6 KiB of JSON: managed fields of two managers, owner, two containers with environments, probes, mounts
//! and resources, volumes, tolerations, conditions, container statuses. 110 pods are on the node, all of them selected.
//! Every pod of the cluster is in some peer set of the node's policies, so that every pod that comes or goes concerns it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use npm_policy::goal::{Expression, SetKey};
use npm_policy::model::{
    Block, Labels, NamedPort, Namespace, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork,
    PodPhase, Policy, PolicyKey, Port, Ports, Protocol, Requirement, Rule, Selector,
};
use npm_policy::world::Change;
use serde_json::{Value, json};

use crate::kubernetes;

/// The node that is measured.
pub const NODE: &str = "node-a";
/// Namespaces.
pub const NAMESPACES: u32 = 1000;
/// Pods in each of them.
pub const PODS: u32 = 20;
/// Pods of the node.
pub const LOCAL_PODS: u32 = 110;
/// Every so manieth pod is the node's, as long as there are to be more of them.
const LOCAL_STEP: u32 = 181;
/// Values of the namespaces' label.
const TEAMS: u32 = 20;
/// Values of a label of pods.
const TIERS: u32 = 3;

/// A part of the cluster, for tests; the whole has [`NAMESPACES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// How many namespaces.
    pub namespaces: u32,
}

/// What the kernel has to show of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// It is in a peer set of the node's policies.
    Peer,
    /// It is a pod of the node that is isolated.
    Subject,
    /// Neither.
    Nothing,
}

/// A change of one pod, and what the kernel shows when it is programmed.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The pod as it is from now on; `None`: it is gone.
    pub pod: Option<Pod>,
    /// Which pod.
    pub key: PodKey,
    /// Its address.
    pub address: Ipv4Addr,
    /// What is shown of the address.
    pub shown: Shown,
    /// The set that it enters or leaves.
    pub set: SetKey,
}

impl Probe {
    /// The pod as the server sends it.
    pub fn sent(&self) -> Option<Value> {
        self.pod.as_ref().map(|pod| as_sent(pod, Stage::Running))
    }
}

impl Cluster {
    /// The same as [`Cluster::objects`], as policy sees it.
    pub fn changes(self) -> impl Iterator<Item = Change> {
        (0..self.namespaces).flat_map(move |n| {
            let labels = Labels::from([("team".into(), (n % TEAMS).to_string().into())]);
            let namespace = Namespace::new(namespace_name(n), labels);
            let pods = (0..PODS).map(move |p| self.pod(n, p));
            let pods = pods.map(|pod| Change::Pod(pod.key.clone(), Some(pod)));
            let policies = policies(n).map(|policy| Change::Policy(policy.key.clone(), Some(policy)));
            std::iter::once(Change::Namespace(namespace_name(n), Some(namespace))).chain(pods).chain(policies)
        })
    }

    /// All objects, in an order in which a cluster may have made them.
    pub fn objects(self) -> impl Iterator<Item = Value> {
        (0..self.namespaces).flat_map(move |n| {
            let pods = (0..PODS).map(move |p| as_sent(&self.pod(n, p), Stage::Running));
            let policies = policies(n).map(|policy| kubernetes::policy(&policy));
            std::iter::once(namespace(n)).chain(pods).chain(policies)
        })
    }

    /// The pod of this number in a namespace.
    fn pod(self, n: u32, p: u32) -> Pod {
        let number = n * PODS + p;
        let is_local = number.is_multiple_of(LOCAL_STEP) && number < LOCAL_PODS * LOCAL_STEP;
        let node = if is_local { NODE.to_owned() } else { format!("node-{}", number % 180) };
        model(n, p, &format!("web-{p}"), &node, address(10, number))
    }

    /// One pod is replaced by another, in the events that a real one takes: the old one ends and is deleted, the new one is
    /// made, bound to a node, and started with the next address.
    pub fn replacement(self, turn: u32) -> Vec<(PodKey, Option<Value>)> {
        // A stride that visits all; pods of the node stay.
        let (n, p) = self.remote(turn.wrapping_mul(7919));
        let name = |generation: u32| match generation {
            0 => format!("web-{p}"),
            _ => format!("web-{p}-{generation}"),
        };
        let total = self.namespaces * PODS;
        let generation = turn / total;
        let old_address = match generation {
            0 => address(10, n * PODS + p),
            _ => address(11, turn - total),
        };
        let node = format!("node-{}", turn % 180);
        let old = model(n, p, &name(generation), &node, old_address);
        let new = model(n, p, &name(generation + 1), &node, address(11, turn));
        vec![
            (old.key.clone(), Some(as_sent(&old, Stage::Ending))),
            (old.key.clone(), None),
            (new.key.clone(), Some(as_sent(&new, Stage::Made))),
            (new.key.clone(), Some(as_sent(&new, Stage::Bound))),
            (new.key.clone(), Some(as_sent(&new, Stage::Running))),
        ]
    }

    /// A pod of another node, in a namespace without pods of the node.
    fn remote(self, turn: u32) -> (u32, u32) {
        let mut number = turn % (self.namespaces * PODS);
        while has_local(number / PODS) {
            number = (number + PODS) % (self.namespaces * PODS);
        }
        (number / PODS, number % PODS)
    }

    /// The change of this number: in turn a pod of another node comes and goes, one changes its labels and changes them
    /// back, and a pod of the node comes and goes.
    pub fn probe(self, number: u32) -> Probe {
        let (kind, back) = (number % 6 / 2, !number.is_multiple_of(2));
        let (n, p) = self.remote(number / 6 * 131 + 17);
        let address = address(12, number / 6 * 3 + kind);
        let name = format!("probe-{}", number / 6 * 3 + kind);
        let of_team = tier(n % TEAMS, p % 10 % TIERS);
        match kind {
            0 | 1 => {
                let mut pod = model(n, p, &name, "node-7", address);
                let labels_change = kind == 1;
                if labels_change && back {
                    pod.labels.insert("tier".into(), "none".into());
                }
                let is_there = labels_change || !back;
                Probe {
                    key: pod.key.clone(),
                    pod: is_there.then_some(pod),
                    address,
                    shown: if back { Shown::Nothing } else { Shown::Peer },
                    set: SetKey::Pods(of_team),
                }
            }
            _ => {
                // In a namespace whose policies are in force already.
                let local = number / 6 % (LOCAL_PODS.min(self.namespaces * PODS / LOCAL_STEP)).max(1);
                let n = local * LOCAL_STEP / PODS;
                let pod = model(n, p, &name, NODE, address);
                Probe {
                    key: pod.key.clone(),
                    pod: (!back).then_some(pod),
                    address,
                    shown: if back { Shown::Nothing } else { Shown::Subject },
                    set: SetKey::Local(Expression { namespaces: own(n), pods: Selector::everything() }),
                }
            }
        }
    }
}

fn has_local(n: u32) -> bool {
    (n * PODS..(n + 1) * PODS)
        .any(|number| number.is_multiple_of(LOCAL_STEP) && number < LOCAL_PODS * LOCAL_STEP)
}

fn address(first: u8, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(first) << 24 | (number + 1))
}

fn namespace_name(n: u32) -> Arc<str> {
    format!("team-{}-{n}", n % TEAMS).into()
}

fn own(n: u32) -> NamespaceScope {
    NamespaceScope::Named(namespace_name(n))
}

fn is(key: &str, value: String) -> Requirement {
    Requirement { key: key.into(), operator: Operator::In(BTreeSet::from([value.into()])) }
}

/// The pods of a tier in all namespaces of a team.
fn tier(team: u32, tier: u32) -> Expression {
    Expression {
        namespaces: NamespaceScope::Matching(Selector::new([is("team", team.to_string())])),
        pods: Selector::new([is("tier", format!("tier-{tier}"))]),
    }
}

/// The two policies of a namespace: one for all of its pods, one for half of the applications.
fn policies(n: u32) -> impl Iterator<Item = Policy> {
    let peer = |Expression { namespaces, pods }| Peer::Pods { namespaces, pods };
    let port = |protocol, first| Port::Range { protocol, first, last: first };
    let same = Peer::Pods { namespaces: own(n), pods: Selector::everything() };
    let http = Port::Named { protocol: Protocol::Tcp, name: "http".into() };
    let team = |distance: u32| (0..TIERS).map(move |of| peer(tier((n + distance) % TEAMS, of)));
    let base = Policy {
        key: PolicyKey::new(namespace_name(n), "base"),
        subjects: Selector::everything(),
        ingress: Some(vec![
            Rule { peers: Peers::Only(vec![same.clone()]), ports: Ports::Any },
            Rule { peers: Peers::Only(team(1).collect()), ports: Ports::Only(vec![http]) },
        ]),
        egress: None,
    };
    let outside = Block {
        cidr: "0.0.0.0/0".parse().expect("a prefix"),
        except: BTreeSet::from(["10.0.0.0/8".parse().expect("a prefix")]),
    };
    let apps = Requirement {
        key: "app".into(),
        operator: Operator::In((0..5).map(|app| format!("app-{app}").into()).collect()),
    };
    let some = Policy {
        key: PolicyKey::new(namespace_name(n), "applications"),
        subjects: Selector::new([apps]),
        ingress: None,
        egress: Some(vec![
            Rule {
                peers: Peers::Any,
                ports: Ports::Only(vec![port(Protocol::Udp, 53), port(Protocol::Tcp, 53)]),
            },
            Rule { peers: Peers::Only(vec![same]), ports: Ports::Any },
            Rule {
                peers: Peers::Only(team(2).collect()),
                ports: Ports::Only(vec![port(Protocol::Tcp, 8080)]),
            },
            Rule {
                peers: Peers::Only(vec![Peer::Block(outside)]),
                ports: Ports::Only(vec![port(Protocol::Tcp, 443)]),
            },
        ]),
    };
    [base, some].into_iter()
}

/// A pod as policy sees it.
fn model(n: u32, p: u32, name: &str, node: &str, address: Ipv4Addr) -> Pod {
    Pod {
        key: PodKey::new(namespace_name(n), name),
        node: Some(node.into()),
        labels: Labels::from([
            ("app".into(), format!("app-{}", p % 10).into()),
            ("app.kubernetes.io/managed-by".into(), "Helm".into()),
            ("pod-template-hash".into(), format!("{:010x}", n * 31 + p % 10).into()),
            // Pods of one template have the same labels.
            ("tier".into(), format!("tier-{}", p % 10 % TIERS).into()),
        ]),
        addresses: BTreeSet::from([IpAddr::V4(address)]),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
        created: 1,
    }
}

fn namespace(n: u32) -> Value {
    let labels = json!({"team": (n % TEAMS).to_string(), "pod-security.kubernetes.io/enforce": "baseline"});
    json!({"kind": "Namespace", "metadata": {"name": *namespace_name(n), "labels": labels}, "spec": {"finalizers": ["kubernetes"]}})
}

/// How far a pod's life has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Made,
    Bound,
    Running,
    Ending,
}

/// A pod with all that a cluster's pods have.
fn as_sent(pod: &Pod, stage: Stage) -> Value {
    let mut value = kubernetes::pod(pod);
    let metadata = &mut value["metadata"];
    metadata["generateName"] = json!("web-");
    metadata["annotations"] = json!({
        "kubectl.kubernetes.io/restartedAt": "2026-01-01T00:00:00Z", "prometheus.io/scrape": "true", "prometheus.io/port": "9090",
        "checksum/config": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9",
    });
    metadata["ownerReferences"] = json!([{
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d8f7b6c4d", "uid": "6e8f1c2a-0d0b-4f43-9f5e-5d8f7b6c4d00",
        "controller": true, "blockOwnerDeletion": true,
    }]);
    metadata["managedFields"] = managed_fields();
    if stage == Stage::Ending {
        metadata["deletionTimestamp"] = json!("2026-01-01T00:10:00Z");
        metadata["deletionGracePeriodSeconds"] = json!(30);
    }
    let main = value["spec"]["containers"][0].clone();
    let spec = &mut value["spec"];
    spec["containers"] = json!([
        container("main", &main["ports"]),
        container("proxy", &json!([{"containerPort": 9090, "protocol": "TCP"}]))
    ]);
    spec["volumes"] = volumes();
    spec["restartPolicy"] = json!("Always");
    spec["terminationGracePeriodSeconds"] = json!(30);
    spec["dnsPolicy"] = json!("ClusterFirst");
    spec["serviceAccountName"] = json!("web");
    spec["serviceAccount"] = json!("web");
    spec["securityContext"] = json!({"runAsNonRoot": true, "fsGroup": 2000});
    spec["schedulerName"] = json!("default-scheduler");
    spec["enableServiceLinks"] = json!(true);
    spec["preemptionPolicy"] = json!("PreemptLowerPriority");
    spec["priority"] = json!(0);
    let toleration = |key: &str| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300});
    spec["tolerations"] =
        json!([toleration("node.kubernetes.io/not-ready"), toleration("node.kubernetes.io/unreachable")]);
    match stage {
        Stage::Made | Stage::Bound => {
            if stage == Stage::Made {
                spec.as_object_mut().expect("a pod has a spec").remove("nodeName");
            }
            value["status"] = json!({"phase": "Pending", "qosClass": "Burstable", "conditions": [condition("PodScheduled")]});
        }
        Stage::Running | Stage::Ending => {
            let status = &mut value["status"];
            status["qosClass"] = json!("Burstable");
            status["hostIP"] = json!("10.240.0.17");
            status["hostIPs"] = json!([{"ip": "10.240.0.17"}]);
            status["startTime"] = json!("2026-01-01T00:00:00Z");
            status["conditions"] =
                ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"]
                    .map(condition)
                    .into();
            status["containerStatuses"] = json!([container_status("main"), container_status("proxy")]);
        }
    }
    value
}

fn condition(name: &str) -> Value {
    json!({"type": name, "status": "True", "observedGeneration": 1, "lastProbeTime": null, "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

fn container(name: &str, ports: &Value) -> Value {
    let probe = |path: &str| {
        json!({
            "httpGet": {"path": path, "port": 9090, "scheme": "HTTP"}, "initialDelaySeconds": 5, "timeoutSeconds": 1,
            "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3,
        })
    };
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}});
    let plain = |name: &str, value: &str| json!({"name": name, "value": value});
    json!({
        "name": name, "image": format!("registry.example/{name}@sha256:4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a"),
        "imagePullPolicy": "IfNotPresent", "ports": ports,
        "env": [
            field("POD_NAME", "metadata.name"), field("POD_NAMESPACE", "metadata.namespace"), field("POD_IP", "status.podIP"),
            plain("LOG_LEVEL", "info"), plain("DATABASE_URL", "postgres://web@database.data.svc.cluster.local:5432/web"),
            plain("JAVA_OPTS", "-XX:MaxRAMPercentage=75 -XX:+ExitOnOutOfMemoryError"),
        ],
        "resources": {"limits": {"cpu": "500m", "memory": "256Mi"}, "requests": {"cpu": "100m", "memory": "128Mi"}},
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/web", "readOnly": true},
            {"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true},
        ],
        "livenessProbe": probe("/healthz"), "readinessProbe": probe("/readyz"),
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": true},
        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
    })
}

fn container_status(name: &str) -> Value {
    json!({
        "name": name, "ready": true, "started": true, "restartCount": 0, "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        "lastState": {}, "image": format!("registry.example/{name}"),
        "imageID": format!("registry.example/{name}@sha256:4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a"),
        "containerID": "containerd://ef2d127de37b942baad06145e54b0c619a1f22327b2ebbcfbec78f5564afe39d",
    })
}

fn volumes() -> Value {
    json!([
        {"name": "config", "configMap": {"name": "web", "defaultMode": 420}},
        {"name": "kube-api-access", "projected": {"defaultMode": 420, "sources": [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
        ]}},
    ])
}

fn managed_fields() -> Value {
    let empty = || json!({});
    let names = |names: &[&str]| -> Value {
        names.iter().map(|name| (format!("f:{name}"), empty())).collect::<serde_json::Map<_, _>>().into()
    };
    let container = names(&[
        "env",
        "image",
        "imagePullPolicy",
        "livenessProbe",
        "name",
        "ports",
        "readinessProbe",
        "resources",
        "securityContext",
        "terminationMessagePath",
        "terminationMessagePolicy",
        "volumeMounts",
    ]);
    let manager = |name: &str, fields: Value| {
        json!({
            "manager": name, "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
            "fieldsV1": fields,
        })
    };
    json!([
        manager(
            "kube-controller-manager",
            json!({
                "f:metadata": {"f:annotations": empty(), "f:generateName": empty(), "f:labels": names(&["app", "pod-template-hash", "tier"]),
                    "f:ownerReferences": {".": {}, "k:{\"uid\":\"6e8f1c2a-0d0b-4f43-9f5e-5d8f7b6c4d00\"}": {}}},
                "f:spec": {"f:containers": {"k:{\"name\":\"main\"}": container, "k:{\"name\":\"proxy\"}": container},
                    "f:dnsPolicy": {}, "f:restartPolicy": {}, "f:schedulerName": {}, "f:securityContext": {}, "f:volumes": {}},
            })
        ),
        manager(
            "kubelet",
            json!({"f:status": {
                "f:conditions": {"k:{\"type\":\"ContainersReady\"}": names(&["lastProbeTime", "lastTransitionTime", "status", "type"]),
                    "k:{\"type\":\"Ready\"}": names(&["lastProbeTime", "lastTransitionTime", "status", "type"])},
                "f:containerStatuses": {}, "f:hostIP": {}, "f:phase": {}, "f:podIP": {}, "f:podIPs": {}, "f:startTime": {},
            }})
        ),
    ])
}
