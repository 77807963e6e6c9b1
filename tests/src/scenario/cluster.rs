//! The objects of a scenario as they are at a step, as documents and as a [`World`]; and the lab that they need.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context, Result, bail};
use npm_agent::source::manifests;
use npm_policy::model::PodNetwork;
use npm_policy::world::World;
use serde_json::{Value, json};

use super::{Addresses, Scenario};
use crate::lab::node::Layout;
use crate::lab::{Host, Spec};

/// The node of pods that name none.
pub const NODE: &str = "node-a";

/// Objects by kind and name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    objects: BTreeMap<String, Value>,
}

/// A cluster on some way.
#[derive(Clone, Debug)]
pub struct Stop {
    /// What there is.
    pub cluster: Cluster,
    /// What is done there.
    pub look: Look,
}

/// What is done when a cluster is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Everything is probed.
    Probes,
    /// The next comes.
    Passes,
}

impl Cluster {
    /// The cluster at the start and after each step.
    ///
    /// # Errors
    /// A manifest is no YAML; a step removes what is not there.
    pub fn stages(scenario: &Scenario) -> Result<Vec<Self>> {
        let mut cluster = Self::default();
        if let Some(name) = &scenario.cluster {
            let path =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios/clusters").join(format!("{name}.yaml"));
            let text = std::fs::read_to_string(&path);
            cluster.set(&text.with_context(|| format!("reading {}", path.display()))?)?;
        }
        cluster.set(&scenario.manifests)?;
        let mut stages = vec![cluster.clone()];
        for step in &scenario.steps {
            for id in &step.remove {
                cluster.objects.remove(id).with_context(|| format!("there is no {id} to remove"))?;
            }
            cluster.set(&step.set)?;
            stages.push(cluster.clone());
        }
        Ok(stages)
    }

    /// The ways from the first of some stages to the last other than from each to the next, with a name each: reversed
    /// (from the last to the first and back at once), squashed, split into single objects, and with nothing at all
    /// between.
    pub fn other_ways(stages: &[Self]) -> Vec<(&'static str, Vec<Stop>)> {
        let [first, .., last] = stages else { return Vec::new() };
        let stop = |cluster: &Self| Stop { cluster: cluster.clone(), look: Look::Probes };
        let pass = |cluster: Self| Stop { cluster, look: Look::Passes };
        let mut reversed: Vec<Stop> = stages.iter().rev().map(stop).collect();
        reversed.push(stop(last));
        let mut split = vec![pass(first.clone())];
        for pair in stages.windows(2) {
            split.extend(pair[0].one_by_one(&pair[1]).into_iter().map(pass));
            split.push(stop(&pair[1]));
        }
        let empties = stages.iter().flat_map(|stage| [pass(Self::default()), stop(stage)]);
        vec![
            ("reversed", reversed),
            ("squashed", vec![pass(first.clone()), stop(last)]),
            ("split", split),
            ("with empties between", empties.collect()),
        ]
    }

    /// What lies between two stages when each object changes by itself, without the two.
    fn one_by_one(&self, next: &Self) -> Vec<Self> {
        let ids: BTreeSet<&String> = self.objects.keys().chain(next.objects.keys()).collect();
        let mut cluster = self.clone();
        let mut between = Vec::new();
        for id in ids.into_iter().filter(|id| self.objects.get(*id) != next.objects.get(*id)) {
            match next.objects.get(id) {
                Some(object) => drop(cluster.objects.insert(id.clone(), object.clone())),
                None => drop(cluster.objects.remove(id)),
            }
            between.push(cluster.clone());
        }
        between.pop();
        between
    }

    fn set(&mut self, manifests: &str) -> Result<()> {
        // As kubectl reads YAML: a namespace may be called y.
        let options = serde_saphyr::options! { strict_booleans: true };
        let documents: Vec<Value> =
            serde_saphyr::from_multiple_with_options(manifests, options).context("reading manifests")?;
        let mut left: Vec<Value> = documents.into_iter().rev().collect();
        while let Some(mut value) = left.pop() {
            if value.is_null() {
                continue;
            }
            if value["kind"] == "List" {
                let Value::Array(items) = value["items"].take() else { bail!("a list without items") };
                left.extend(items.into_iter().rev());
                continue;
            }
            if value["kind"] == "Pod" {
                schedule(&mut value);
            }
            self.objects.insert(id(&value), value);
        }
        Ok(())
    }

    /// The objects as the agent reads them.
    ///
    /// # Errors
    /// They can't be written to be read.
    pub fn world(&self) -> Result<World> {
        let directory = tempfile::tempdir().context("making a directory for manifests")?;
        self.write(directory.path())?;
        let mut world = World::default();
        // Objects in which something is wrong are in there, as strictly as the agent takes them.
        for change in manifests::read(&[directory.path().to_owned()]).changes {
            world.apply(change);
        }
        Ok(world)
    }

    /// Writes all objects into the directory, as one file that is replaced at once.
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let items: Vec<&Value> = self.objects.values().collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        let path = directory.join("cluster.json");
        // Dot files are no manifests.
        let new = directory.join(".cluster.json.new");
        let written =
            std::fs::write(&new, serde_json::to_vec(&list)?).and_then(|()| std::fs::rename(&new, &path));
        written.with_context(|| format!("writing {}", path.display()))
    }
}

fn id(value: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&value["kind"]), text(&value["metadata"]["name"]));
    match value["metadata"]["namespace"].as_str() {
        Some(namespace) if !namespace.is_empty() => format!("{kind} {namespace}/{name}"),
        Some(_) | None if kind == "Namespace" => format!("{kind} {name}"),
        Some(_) | None => format!("{kind} default/{name}"),
    }
}

/// Gives a pod without a node one.
fn schedule(pod: &mut Value) {
    let address = pod["status"]["podIP"].as_str().unwrap_or_default().to_owned();
    let Some(object) = pod.as_object_mut() else { return };
    let spec = object.entry("spec").or_insert_with(|| json!({}));
    if !spec.is_object() {
        return;
    }
    let node = match spec["hostNetwork"] == true {
        // Several pods of one host's address stand on one node.
        true => format!("node-{}", address.replace([':', '.'], "-")),
        false => NODE.to_owned(),
    };
    if spec["nodeName"].is_null() {
        spec["nodeName"] = node.into();
    }
}

/// The lab in which all stages of a scenario can be played.
///
/// # Errors
/// A scenario has no pod with an address.
pub fn spec(scenario: &Scenario, worlds: &[World]) -> Result<Spec> {
    let mut nodes: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    for pod in worlds.iter().flat_map(World::pods) {
        let Some(node) = &pod.node else { continue };
        let addresses = nodes.entry(node.to_string()).or_default();
        if pod.network == PodNetwork::Host {
            addresses.extend(pod.addresses.iter().filter(|address| usable(**address)));
        }
    }
    let mut taken: BTreeSet<IpAddr> = nodes.values().flatten().copied().collect();
    // Pods that have an address in common, at different times or at once, are one host here.
    let mut hosts: Vec<(String, BTreeSet<IpAddr>)> = Vec::new();
    for pod in worlds.iter().flat_map(World::pods).filter(|pod| pod.network == PodNetwork::Own) {
        let Some(node) = &pod.node else { continue };
        let free = |address: &&IpAddr| usable(**address) && !taken.contains(*address);
        let mut own: BTreeSet<IpAddr> = pod.addresses.iter().filter(free).copied().collect();
        if own.is_empty() {
            continue;
        }
        let mut home = node.to_string();
        hosts.retain(|(node, addresses)| {
            let shared = !addresses.is_disjoint(&own);
            if shared {
                own.extend(addresses);
                home.clone_from(node);
            }
            !shared
        });
        hosts.push((home, own));
    }
    if hosts.is_empty() {
        bail!("no pod has an address");
    }
    taken.extend(hosts.iter().flat_map(|(_, addresses)| addresses));
    let index = |name: &str| nodes.keys().position(|node| node == name);
    let pods = hosts.iter().map(|(node, addresses)| {
        let first = addresses.first().context("a host has an address")?;
        let host = Host { name: format!("pod {first}"), addresses: addresses.iter().copied().collect() };
        Ok((index(node).context("a pod's node is known")?, host))
    });
    let pods = pods.collect::<Result<Vec<_>>>()?;
    let externals = scenario.external.iter().map(|(name, addresses): (_, &Addresses)| {
        let free = |address: &&IpAddr| usable(**address) && !taken.contains(*address);
        let addresses = addresses.all().iter().filter(free).copied().collect();
        Host { name: format!("ext/{name}"), addresses }
    });
    Ok(Spec {
        layout: match scenario.layout {
            super::Layout::Routed => Layout::Routed,
            super::Layout::Bridged => Layout::Bridged,
        },
        externals: externals.filter(|host| !host.addresses.is_empty()).collect(),
        pods,
        nodes: nodes.iter().enumerate().map(|(index, (name, own))| node(index, name, own)).collect(),
    })
}

/// A node with an address of each family: where a pod of the host's network does not say which, one of the blocks for
/// benchmarks (RFC 2544) and for local use.
fn node(index: usize, name: &str, own: &BTreeSet<IpAddr>) -> Host {
    let mut addresses: Vec<IpAddr> = own.iter().copied().collect();
    let number = index as u16 + 1;
    if !own.iter().any(IpAddr::is_ipv4) {
        addresses.push(Ipv4Addr::from([198, 18, (number >> 8) as u8, number as u8]).into());
    }
    if !own.iter().any(IpAddr::is_ipv6) {
        addresses.push(Ipv6Addr::new(0xfd00, 0x198, 0, 0, 0, 0, 0, number).into());
    }
    Host { name: format!("node {name}"), addresses }
}

/// Whether packets can come from the address.
fn usable(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(address) => {
            address.is_link_local() || address.is_broadcast() || address.octets()[0] >= 240
        }
        IpAddr::V6(address) => address.is_unicast_link_local() || address.to_ipv4_mapped().is_some(),
    };
    !(link_local || address.is_unspecified() || address.is_loopback() || address.is_multicast())
}
