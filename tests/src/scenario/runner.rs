//! Plays scenarios: builds the lab, enforces, probes everything, compares with the oracle.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};
use npm_agent::backend::iptables::state::State;
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::Family;
use npm_policy::verdict::oracle;
use npm_policy::world::World;
use tempfile::TempDir;

use super::cluster::{Cluster, Look, Stop, spec};
use super::enforcer::{Enforcer, Means, Site};
use super::{Scenario, transport};
use crate::lab::probe::{Outcome, Probe};
use crate::lab::service::{self, Dialect};
use crate::lab::{Endpoint, EndpointKind, Lab, Spec};
use crate::table::Table;

/// Plays scenarios one after the other, in one lab as long as it fits.
#[derive(Debug)]
pub struct Runner {
    means: Means,
    dialect: Dialect,
    stage: Option<Stage>,
}

/// How a scenario's steps are gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// From each to the next.
    Straight,
    /// So, and then in every other way to the same end, where the kernel must hold the same.
    Every,
}

/// What became of a scenario.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many flows were probed that the oracle allows.
    pub allowed: usize,
    /// How many that it denies.
    pub denied: usize,
    /// Where packets and oracle differ: one line for people each.
    pub differences: Vec<String>,
}

/// A lab with its enforcers.
#[derive(Debug)]
struct Stage {
    // Dropped in this order: agents before the namespaces they run in, their directory last.
    enforcers: Vec<Enforcer>,
    lab: Lab,
    spec: Spec,
    directory: TempDir,
}

impl Runner {
    /// Plays with these means and this iptables.
    pub fn new(means: Means, dialect: Dialect) -> Self {
        Self { means, dialect, stage: None }
    }

    /// Plays one scenario.
    ///
    /// # Errors
    /// It could not be played to its end. What it showed otherwise is in the report.
    pub fn play(&mut self, scenario: &Scenario, route: Route) -> Result<Report> {
        let clusters = Cluster::stages(scenario)?;
        let worlds: Vec<World> = clusters.iter().map(Cluster::world).collect::<Result<_>>()?;
        let spec = spec(scenario, &worlds)?;
        let mut stage = match self.stage.take() {
            Some(stage) if stage.spec == spec => stage,
            Some(_) | None => Stage::build(spec, self.means, self.dialect, &clusters[0])?,
        };
        let mut report = Report::default();
        let transports = scenario.probes.iter().map(|probe| transport(probe)).collect::<Result<Vec<_>>>()?;
        stage.lab.listen(&transports)?;
        for (index, (cluster, world)) in clusters.iter().zip(&worlds).enumerate() {
            let step = match index {
                0 => "at the start",
                _ => scenario.steps[index - 1].does.as_str(),
            };
            stage.enforce(cluster, world).with_context(|| format!("enforcing {step}"))?;
            let differences = stage.observe(world, &transports, &mut report)?;
            report.differences.extend(differences.into_iter().map(|line| format!("{step}: {line}")));
            let differences = stage.observe_services(scenario, world, self.dialect, &mut report)?;
            report.differences.extend(differences.into_iter().map(|line| format!("{step}: {line}")));
        }
        if route == Route::Every {
            let straight = stage.kernel()?;
            for (way, stops) in Cluster::other_ways(&clusters) {
                for Stop { cluster, look } in stops {
                    let world = cluster.world()?;
                    stage.enforce(&cluster, &world).with_context(|| format!("enforcing {way}"))?;
                    if look == Look::Probes {
                        let differences = stage.observe(&world, &transports, &mut report)?;
                        report
                            .differences
                            .extend(differences.into_iter().map(|line| format!("{way}: {line}")));
                    }
                }
                if stage.kernel()? != straight {
                    report.differences.push(format!("{way}: the kernel holds another state in the end"));
                }
            }
        }
        if !report.differences.is_empty() {
            report
                .differences
                .extend(stage.enforcers.iter().map(Enforcer::log).filter(|log| !log.is_empty()));
        }
        self.stage = Some(stage);
        Ok(report)
    }
}

impl Stage {
    fn build(spec: Spec, means: Means, dialect: Dialect, first: &Cluster) -> Result<Self> {
        let lab = Lab::build(&spec)?;
        let directory = TempDir::new().context("making a directory")?;
        let manifests = directory.path().join("manifests");
        std::fs::create_dir(&manifests).context("making a directory for manifests")?;
        first.write(&manifests)?;
        let mut enforcers = Vec::new();
        for (index, node) in spec.nodes.iter().enumerate() {
            if !spec.pods.iter().any(|(of, _)| *of == index) {
                continue;
            }
            let site = Site {
                netns: &lab.endpoints()[index].netns,
                node: node.name.strip_prefix("node ").context("a node's name")?,
                dialect,
                directory: directory.path(),
            };
            enforcers.push(Enforcer::start(means, &site)?);
        }
        Ok(Self { enforcers, lab, spec, directory })
    }

    fn enforce(&mut self, cluster: &Cluster, world: &World) -> Result<()> {
        cluster.write(&self.directory.path().join("manifests"))?;
        self.enforcers.iter_mut().try_for_each(|enforcer| enforcer.enforce(world))
    }

    /// What the nodes' kernels hold of ours.
    fn kernel(&self) -> Result<Vec<BTreeMap<Family, State>>> {
        self.enforcers.iter().map(Enforcer::kernel).collect()
    }

    /// Probes every pair and gives the differences.
    fn observe(
        &mut self,
        world: &World,
        transports: &[Transport],
        report: &mut Report,
    ) -> Result<Vec<String>> {
        let owners = Owners::of(&self.lab);
        if self.lab.layout() == crate::lab::node::Layout::Bridged {
            self.lab.forget_neighbours()?;
        }
        let everybody: Vec<usize> = (0..self.lab.endpoints().len()).collect();
        let expected = |flow: &Flow| Some(owners.expected(world, flow));
        let observed = self.lab.matrix(&everybody, transports, &expected)?;
        let names: Vec<String> =
            self.lab.endpoints().iter().map(|endpoint| name_now(endpoint, world)).collect();
        let mut differences = Vec::new();
        for (family, mut table) in observed {
            let mut wanted = Table::new(names.clone());
            for (from, source) in self.lab.endpoints().iter().enumerate() {
                for (to, destination) in self.lab.endpoints().iter().enumerate() {
                    let (Some(source), Some(destination)) =
                        (source.address(family), destination.address(family))
                    else {
                        continue;
                    };
                    if from == to {
                        continue;
                    }
                    for transport in transports {
                        let transport = match transport {
                            Transport::Port(..) => *transport,
                            Transport::Portless(_) => Transport::echo(destination),
                        };
                        let flow = Flow { source, destination, transport };
                        wanted.set(transport, from, to, owners.expected(world, &flow));
                    }
                }
            }
            table.endpoints.clone_from(&names);
            report.allowed += wanted.count(Decision::Allow);
            report.denied += wanted.count(Decision::Deny);
            differences.extend(table.differences(&wanted));
        }
        Ok(differences)
    }

    /// Tries every Service from every end that is no node, and every node port from the externals.
    fn observe_services(
        &mut self,
        scenario: &Scenario,
        world: &World,
        dialect: Dialect,
        report: &mut Report,
    ) -> Result<Vec<String>> {
        if scenario.services.is_empty() {
            return Ok(Vec::new());
        }
        let owners = Owners::of(&self.lab);
        let services = services(scenario, world)?;
        let targets: Vec<Transport> =
            services.iter().map(|service| Transport::Port(service.protocol, service.target)).collect();
        self.lab.listen(&targets)?;
        for endpoint in self.lab.endpoints().iter().filter(|endpoint| endpoint.kind == EndpointKind::Node) {
            service::install(&endpoint.netns, dialect, &services)?;
        }
        let (mut probes, mut lines) = (Vec::new(), Vec::new());
        for service in &services {
            let family = Family::of(service.address);
            for (from, endpoint) in self.lab.endpoints().iter().enumerate() {
                let Some(source) = endpoint.address(family) else { continue };
                // Where to, and who the backend's node takes it to come from: the source is not yet rewritten there.
                let ways = match (endpoint.kind, service.node_port) {
                    (EndpointKind::Pod(_), _) => vec![(service.address, service.port, source)],
                    (EndpointKind::External, Some(port)) => {
                        let own = owners.node_of(service.backend).context("a backend has a node")?;
                        let through = |(index, node): (usize, &Endpoint)| {
                            let address = node.address(family)?;
                            // Another node has masqueraded what it sends on.
                            Some((address, port, if index == own { source } else { address }))
                        };
                        let nodes = self.lab.endpoints().iter().enumerate();
                        nodes.filter(|(_, it)| it.kind == EndpointKind::Node).filter_map(through).collect()
                    }
                    (EndpointKind::External, None) | (EndpointKind::Node, _) => continue,
                };
                for (destination, port, seen) in ways {
                    // As FORWARD sees it: the destination already translated.
                    let transport = Transport::Port(service.protocol, service.target);
                    let flow = Flow { source: seen, destination: service.backend, transport };
                    let transport = Transport::Port(service.protocol, port);
                    let expected = Some(owners.expected(world, &flow));
                    probes.push(Probe { from, source, destination, transport, expected });
                    lines
                        .push(format!("{} -> {destination} {transport} ({flow})", name_now(endpoint, world)));
                }
            }
        }
        let mut differences = Vec::new();
        for ((probe, line), outcome) in probes.iter().zip(lines).zip(self.lab.probe(&probes)?) {
            match probe.expected {
                Some(Decision::Allow) => report.allowed += 1,
                Some(Decision::Deny) | None => report.denied += 1,
            }
            let good = match probe.expected {
                Some(Decision::Allow) => Outcome::Answered,
                Some(Decision::Deny) | None => Outcome::Blocked,
            };
            if outcome != good {
                differences.push(format!("{line}: observed {outcome:?}, expected {:?}", probe.expected));
            }
        }
        Ok(differences)
    }
}

/// Which node and pod an address belongs to, by indexes into the lab's endpoints.
struct Owners(BTreeMap<IpAddr, (usize, EndpointKind)>);

impl Owners {
    fn of(lab: &Lab) -> Self {
        let all = lab.endpoints().iter().enumerate();
        let pairs = all.flat_map(|(index, endpoint)| {
            endpoint.addresses.iter().map(move |address| (*address, (index, endpoint.kind)))
        });
        Self(pairs.collect())
    }

    /// The index of the node that a pod's address is on.
    fn node_of(&self, address: IpAddr) -> Option<usize> {
        match self.0.get(&address)? {
            (_, EndpointKind::Pod(node)) => Some(*node),
            (_, EndpointKind::Node | EndpointKind::External) => None,
        }
    }

    /// What must become of a flow: traffic between a pod and its own node is never filtered, all else is as the oracle
    /// says.
    fn expected(&self, world: &World, flow: &Flow) -> Decision {
        let kind = |address| self.0.get(&address).map(|(index, kind)| (*index, *kind));
        match (kind(flow.source), kind(flow.destination)) {
            (Some((node, EndpointKind::Node)), Some((_, EndpointKind::Pod(of))))
            | (Some((_, EndpointKind::Pod(of))), Some((node, EndpointKind::Node)))
                if node == of =>
            {
                Decision::Allow
            }
            _ => oracle(world, flow).decision(),
        }
    }
}

/// The Services' addresses, each with the backend's address of its family.
fn services(scenario: &Scenario, world: &World) -> Result<Vec<service::Service>> {
    let mut found = Vec::new();
    for service in &scenario.services {
        let pod = world.pods().find(|pod| pod.key.to_string() == service.backend);
        let pod = pod.with_context(|| format!("there is no pod {}", service.backend))?;
        let Transport::Port(protocol, port) = transport(&service.port)? else {
            anyhow::bail!("a Service has a port, not {}", service.port);
        };
        for address in &service.addresses {
            let backend = pod.addresses.iter().find(|it| it.is_ipv4() == address.is_ipv4());
            found.push(service::Service {
                address: *address,
                protocol,
                port,
                backend: *backend.with_context(|| format!("{} has no address for {address}", pod.key))?,
                target: service.target,
                node_port: service.node_port,
            });
        }
    }
    Ok(found)
}

/// Who an endpoint is at this step.
fn name_now(endpoint: &Endpoint, world: &World) -> String {
    let holder = endpoint.addresses.iter().find_map(|address| world.holder(*address));
    match (endpoint.kind, holder) {
        (EndpointKind::Pod(_), Some(pod)) => pod.key.to_string(),
        (EndpointKind::Pod(_) | EndpointKind::Node | EndpointKind::External, _) => endpoint.name.clone(),
    }
}
