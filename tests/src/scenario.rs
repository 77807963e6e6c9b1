//! Scenarios: a small cluster, what happens to it, and whether real packets between all its ends fare as the oracle
//! says, after every step.
//!
//! A scenario is data (`tests/scenarios/*.yaml`; the hand-written cases of `tests/cases` are scenarios too). The
//! lab is built
//! from the addresses that its pods have at any step, and kept for the next scenario that needs the same.

pub mod cluster;
pub mod enforcer;
pub mod runner;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use npm_policy::flow::Transport;
use npm_policy::model::Protocol;
use serde::Deserialize;

/// A scenario, as its file has it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Unique among all.
    pub name: String,
    /// The sentence that it stands for.
    pub says: String,
    /// The numbered rows of the semantics that it shows (docs: "The exact rules of NetworkPolicy").
    #[serde(default)]
    pub rows: Vec<u8>,
    /// How pods are joined to their nodes.
    #[serde(default)]
    pub layout: Layout,
    /// The name of a file in `tests/scenarios/clusters`, whose objects come before [`Scenario::manifests`].
    #[serde(default)]
    pub cluster: Option<String>,
    /// Plain Kubernetes YAML; an object replaces an earlier one of its kind and name. Pods without `spec.nodeName`
    /// are
    /// on the node `node-a`, those of the host's network each on a node of their own.
    #[serde(default)]
    pub manifests: String,
    /// Hosts outside the cluster.
    #[serde(default)]
    pub external: BTreeMap<String, Addresses>,
    /// What every pair tries: `TCP/80`, `ICMP`.
    pub probes: Vec<String>,
    /// What every end tries besides.
    #[serde(default)]
    pub services: Vec<Service>,
    /// What happens then, one after the other.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// Of hand-written cases: which family the tables are for. The lab probes both.
    #[serde(default)]
    pub family: Option<u8>,
    /// Of hand-written cases: the tables, which `tests/cases.rs` compares with the oracle.
    #[serde(default)]
    pub expect: Option<serde_json::Value>,
}

impl Scenario {
    /// One of these objects and nothing else.
    pub fn of(manifests: String) -> Self {
        Self {
            name: "of-its-objects".into(),
            says: String::new(),
            rows: Vec::new(),
            layout: Layout::Routed,
            cluster: None,
            manifests,
            external: BTreeMap::new(),
            probes: Vec::new(),
            services: Vec::new(),
            steps: Vec::new(),
            family: None,
            expect: None,
        }
    }
}

/// How pods are joined to their nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// By a veth each.
    #[default]
    Routed,
    /// By a bridge.
    Bridged,
}

/// One address, or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Addresses {
    /// One.
    One(IpAddr),
    /// Several.
    Many(Vec<IpAddr>),
}

impl Addresses {
    /// All of them.
    pub fn all(&self) -> &[IpAddr] {
        match self {
            Self::One(address) => std::slice::from_ref(address),
            Self::Many(addresses) => addresses,
        }
    }
}

/// A Service with one backend, on every node.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its ClusterIPs.
    pub addresses: Vec<IpAddr>,
    /// The probe that reaches it: `TCP/80`.
    pub port: String,
    /// The backend pod, as `namespace/name`.
    pub backend: String,
    /// The pod's port.
    pub target: u16,
    /// The port on the nodes' own addresses, which the externals try.
    #[serde(default)]
    pub node_port: Option<u16>,
}

/// What happens to a cluster, at once.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// What it is, for people.
    pub does: String,
    /// Objects that are so from now on.
    #[serde(default)]
    pub set: String,
    /// Objects that are gone: `Pod x/a`, `Namespace x`, `NetworkPolicy x/p`.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// Reads every scenario of a directory of `tests/`, in order.
///
/// # Errors
/// A file can't be read or is no list of scenarios.
pub fn load(directory: &str) -> Result<Vec<Scenario>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let entries =
        std::fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    let mut scenarios = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let documents: Vec<Scenario> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("reading {}", file.display()))?;
        scenarios.extend(documents);
    }
    Ok(scenarios)
}

/// Reads a probe: `TCP/80`, `ICMP`.
///
/// # Errors
/// It is none.
pub fn transport(probe: &str) -> Result<Transport> {
    if probe == "ICMP" {
        return Ok(Transport::Portless(1));
    }
    let (name, port) = probe.split_once('/').with_context(|| format!("{probe} is no probe"))?;
    let Some(protocol) = Protocol::ALL.into_iter().find(|protocol| protocol.to_string() == name) else {
        bail!("{probe} is no probe");
    };
    Ok(Transport::Port(protocol, port.parse().with_context(|| format!("{probe} is no probe"))?))
}
