//! Azure NPM's debug document, in the form that its own tools read (`npm/pkg/controlplane/controllers/common/cache.go` and
//! `pod.go` of azure-container-networking, `npm/pkg/dataplane/testdata/npmcachev2.json`): `NodeName`, `NsMap`, `PodMap`,
//! `SetMap`.
//!
//! As there, pods on their node's network and pods that have ended are left out, and a pod has one address; of several it
//! is the lowest IPv4 one. Container ports without a name decide nothing and are not known here. `SetMap` holds the
//! sets of this node's policies, under their names in `ipset`, of each family that they can hold.

use std::collections::BTreeMap;
use std::net::IpAddr;

use npm_policy::model::{Pod, PodNetwork, PodPhase};
use serde::Serialize;

use super::{View, labels};

/// The document.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::http) struct Manager<'a> {
    node_name: &'a str,
    ns_map: BTreeMap<&'a str, Namespace<'a>>,
    pod_map: BTreeMap<String, NpmPod<'a>>,
    set_map: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Namespace<'a> {
    name: &'a str,
    labels_map: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct NpmPod<'a> {
    name: &'a str,
    namespace: &'a str,
    #[serde(rename = "PodIP")]
    pod_ip: String,
    labels: BTreeMap<&'a str, &'a str>,
    container_ports: Vec<ContainerPort<'a>>,
    phase: &'static str,
}

/// As the Kubernetes API has it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort<'a> {
    name: &'a str,
    container_port: u16,
    protocol: String,
}

impl<'a> Manager<'a> {
    pub(in crate::http) fn of(view: &'a View) -> Self {
        let namespaces = view.world.namespaces().map(|namespace| {
            let name = &*namespace.name;
            (name, Namespace { name, labels_map: labels(&namespace.labels) })
        });
        let pods = view.world.pods().filter_map(|pod| Some((pod.key.to_string(), NpmPod::of(pod)?)));
        let sets = view
            .names
            .iter()
            .flat_map(|(key, names)| view.kernel_names(key, names).map(|(_, kernel)| (kernel, &*names.name)));
        Self {
            node_name: &view.node,
            ns_map: namespaces.collect(),
            pod_map: pods.collect(),
            set_map: sets.collect(),
        }
    }
}

impl<'a> NpmPod<'a> {
    fn of(pod: &'a Pod) -> Option<Self> {
        let phase = match (pod.network, pod.phase) {
            (PodNetwork::Host, _) | (PodNetwork::Own, PodPhase::Ended) => return None,
            (PodNetwork::Own, PodPhase::Pending) => "Pending",
            (PodNetwork::Own, PodPhase::Active) => "Running",
        };
        let ports = pod.ports.iter().map(|port| ContainerPort {
            name: &port.name,
            container_port: port.port,
            protocol: port.protocol.to_string(),
        });
        Some(Self {
            name: &pod.key.name,
            namespace: &pod.key.namespace,
            // IPv4 comes first in the order of addresses.
            pod_ip: pod.addresses.first().map(IpAddr::to_string).unwrap_or_default(),
            labels: labels(&pod.labels),
            container_ports: ports.collect(),
            phase,
        })
    }
}
