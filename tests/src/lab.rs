//! The lab: nodes, pods and hosts outside the cluster as network namespaces, and real packets between them.
//!
//! A node is a namespace that forwards; what filters does so there. [`node`] has the picture. Everything lives in
//! namespaces that the lab makes and deletes; the root namespace is never touched. Needs root, `ip`, and for what
//! filters `iptables` and `ipset`.

pub mod agent;
pub mod netns;
pub mod node;
pub mod observer;
pub mod other;
pub mod packet;
pub mod probe;
mod responder;
pub mod service;

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::Family;

use crate::exec;
use crate::table::Table;
use netns::{Namespaces, Netns, on_fresh_thread};
use node::{Layout, Leaf, Role};
use probe::{Outcome, Ports, Probe};
use responder::Responder;

/// What a lab is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// How pods are joined to their nodes.
    pub layout: Layout,
    /// The nodes: one at least. Addresses: at most one of each family.
    pub nodes: Vec<Host>,
    /// The pods, each with the index of its node.
    pub pods: Vec<(usize, Host)>,
    /// Hosts outside the cluster.
    pub externals: Vec<Host>,
}

/// A name, unique in the lab, and addresses, unique too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The name, for people.
    pub name: String,
    /// The addresses, of any family.
    pub addresses: Vec<IpAddr>,
}

impl Spec {
    /// A node called `node` with these pods behind veths, each with a name and an address of either family.
    ///
    /// # Errors
    /// An address is none.
    pub fn one_node(pods: &[(&str, [&str; 2])]) -> Result<Self> {
        let host = |name: &str, addresses: [&str; 2]| -> Result<Host> {
            let addresses = addresses.iter().map(|address| address.parse()).collect::<Result<_, _>>();
            Ok(Host { name: name.into(), addresses: addresses.context("an address")? })
        };
        Ok(Self {
            layout: Layout::Routed,
            nodes: vec![host("node", ["10.240.0.4", "fd00:240::4"])?],
            pods: pods.iter().map(|(name, pair)| Ok((0, host(name, *pair)?))).collect::<Result<_>>()?,
            externals: vec![],
        })
    }
}

/// Something that packets come from and go to: a node, a pod, an external host.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name in the [`Spec`].
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Where it lives.
    pub netns: Netns,
    /// What it is.
    pub kind: EndpointKind,
}

/// What an endpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointKind {
    /// A node.
    Node,
    /// A pod of the node with this index.
    Pod(usize),
    /// A host outside the cluster.
    External,
}

impl Endpoint {
    /// Its first address of a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| Family::of(*address) == family)
    }
}

/// A lab that is up. Gone when dropped.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: who uses namespaces before the namespaces.
    responder: Responder,
    endpoints: Vec<Endpoint>,
    ports: Ports,
    fabric: Netns,
    layout: Layout,
    _namespaces: Namespaces,
}

impl Lab {
    /// Makes everything in `spec`: the endpoints are its nodes, then its pods, then its externals.
    ///
    /// # Errors
    /// The caller is not root, `ip` is missing, or addresses clash.
    pub fn build(spec: &Spec) -> Result<Self> {
        let hosts: Vec<(&Host, EndpointKind)> = spec
            .nodes
            .iter()
            .map(|host| (host, EndpointKind::Node))
            .chain(spec.pods.iter().map(|(node, host)| (host, EndpointKind::Pod(*node))))
            .chain(spec.externals.iter().map(|host| (host, EndpointKind::External)))
            .collect();
        // The kernel's names are numbers: a name in the spec may hold anything.
        let labels: Vec<String> =
            hosts.iter().enumerate().map(|(index, (_, kind))| label(index, *kind)).collect();
        let all = labels.iter().map(String::as_str).chain(["fabric"]);
        let namespaces = Namespaces::create(all).context("making the lab's namespaces")?;
        let endpoints: Vec<Endpoint> = hosts
            .iter()
            .zip(namespaces.members())
            .map(|((host, kind), netns)| Endpoint {
                name: host.name.clone(),
                addresses: host.addresses.clone(),
                netns: netns.clone(),
                kind: *kind,
            })
            .collect();
        let fabric = namespaces.members().last().context("the fabric was made")?.clone();
        for endpoint in &endpoints {
            node::prepare(&endpoint.netns, role(endpoint.kind))?;
        }
        node::prepare(&fabric, Role::Router)?;
        join(&endpoints, &fabric, spec.layout)?;
        let responder =
            Responder::start(endpoints.iter().map(|endpoint| (&endpoint.netns, role(endpoint.kind))))?;
        let ports = Ports::default();
        Ok(Self { responder, endpoints, ports, fabric, layout: spec.layout, _namespaces: namespaces })
    }

    /// All endpoints: nodes, pods, externals.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The index of the endpoint with this name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, name: &str) -> Result<usize> {
        let found = self.endpoints.iter().position(|endpoint| endpoint.name == name);
        found.with_context(|| format!("the lab has no {name}"))
    }

    /// The namespace of an endpoint.
    ///
    /// # Errors
    /// There is no endpoint of this name.
    pub fn netns(&self, name: &str) -> Result<&Netns> {
        Ok(&self.endpoints[self.find(name)?].netns)
    }

    /// The router between nodes and externals. It filters nothing.
    pub fn fabric(&self) -> &Netns {
        &self.fabric
    }

    /// How pods are joined to their nodes.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Makes every endpoint answer these transports from now on. SCTP and echo requests are always answered.
    ///
    /// # Errors
    /// A port can't be opened.
    pub fn listen(&mut self, transports: &[Transport]) -> Result<()> {
        let ports: Vec<_> = transports
            .iter()
            .filter_map(|transport| match transport {
                Transport::Port(protocol, port) => Some((*protocol, *port)),
                Transport::Portless(_) => None,
            })
            .collect();
        let wanted = self.endpoints.iter().enumerate().flat_map(|(index, endpoint)| {
            let of = move |(protocol, port): &(_, u16)| {
                (index, &endpoint.netns, endpoint.addresses.as_slice(), *protocol, *port)
            };
            ports.iter().map(of)
        });
        self.responder.listen(wanted)
    }

    /// Endpoints hear and answer nothing from here on: where packets are timed, being heard would be most of the time.
    pub fn stop_listening(&mut self) {
        self.responder.stop();
    }

    /// Tries all these connections at once and tells what became of each, in order.
    ///
    /// # Errors
    /// A probe makes no sense (its families differ, no such endpoint), or the system refuses a socket.
    pub fn probe(&mut self, probes: &[Probe]) -> Result<Vec<Outcome>> {
        probe::send_all(&self.endpoints, probes, &self.responder, &mut self.ports)
    }

    /// Probes every ordered pair of `endpoints` over every transport, in both families at once, between first
    /// addresses. [`Transport::Portless`] of either family stands for that family's echo request. `expected` may say
    /// what to wait for. Pairs that share no family stay unasked.
    ///
    /// # Errors
    /// As [`Lab::probe`].
    pub fn matrix(
        &mut self,
        endpoints: &[usize],
        transports: &[Transport],
        expected: &dyn Fn(&Flow) -> Option<Decision>,
    ) -> Result<BTreeMap<Family, Table>> {
        let names: Vec<String> = endpoints.iter().map(|index| self.endpoints[*index].name.clone()).collect();
        let mut cells = Vec::new();
        let mut probes = Vec::new();
        for family in Family::BOTH {
            for (from, source) in endpoints.iter().enumerate() {
                for (to, destination) in endpoints.iter().enumerate().filter(|(to, _)| *to != from) {
                    let source_address = self.endpoints[*source].address(family);
                    let Some(local) = source_address else { continue };
                    let Some(peer) = self.endpoints[*destination].address(family) else { continue };
                    for transport in transports {
                        let transport = match transport {
                            Transport::Port(..) => *transport,
                            Transport::Portless(_) => Transport::echo(peer),
                        };
                        let flow = Flow { source: local, destination: peer, transport };
                        cells.push((family, transport, from, to));
                        probes.push(Probe {
                            from: *source,
                            source: local,
                            destination: peer,
                            transport,
                            expected: expected(&flow),
                        });
                    }
                }
            }
        }
        let mut tables: BTreeMap<Family, Table> = BTreeMap::new();
        for ((family, transport, from, to), outcome) in cells.into_iter().zip(self.probe(&probes)?) {
            let table = tables.entry(family).or_insert_with(|| Table::new(names.clone()));
            table.observe(transport, from, to, outcome);
        }
        Ok(tables)
    }

    /// Empties every neighbour cache, so that neighbour discovery happens again.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn forget_neighbours(&self) -> Result<()> {
        on_fresh_thread(|| {
            for netns in self.endpoints.iter().map(|endpoint| &endpoint.netns).chain([&self.fabric]) {
                netns.enter()?;
                exec::run("ip", &["neigh", "flush", "all"])?;
            }
            Ok(())
        })
    }
}

/// Joins everything to everything.
fn join(endpoints: &[Endpoint], fabric: &Netns, layout: Layout) -> Result<()> {
    let pods_of = |node: usize| {
        endpoints.iter().filter(move |endpoint| match endpoint.kind {
            EndpointKind::Pod(of) => of == node,
            EndpointKind::Node | EndpointKind::External => false,
        })
    };
    let mut leaves = Vec::new();
    for (index, endpoint) in endpoints.iter().enumerate() {
        let behind = match endpoint.kind {
            EndpointKind::Pod(_) => continue,
            EndpointKind::External => Vec::new(),
            EndpointKind::Node => {
                let leaf = |pod| -> Leaf<'_> { leaf(pod, Vec::new()) };
                let pods: Vec<Leaf<'_>> = pods_of(index).map(leaf).collect();
                node::join_pods(&endpoint.netns, &pods, layout)
                    .with_context(|| format!("joining the pods of {}", endpoint.name))?;
                pods_of(index).flat_map(|pod| pod.addresses.iter().copied()).collect()
            }
        };
        leaves.push(leaf(endpoint, behind));
    }
    node::join_fabric(fabric, &leaves)
}

fn leaf(endpoint: &Endpoint, behind: Vec<IpAddr>) -> Leaf<'_> {
    Leaf { netns: &endpoint.netns, addresses: endpoint.addresses.clone(), behind }
}

fn label(index: usize, kind: EndpointKind) -> String {
    let what = match kind {
        EndpointKind::Node => "node",
        EndpointKind::Pod(_) => "pod",
        EndpointKind::External => "ext",
    };
    format!("{what}{index}")
}

fn role(kind: EndpointKind) -> Role {
    match kind {
        EndpointKind::Node => Role::Router,
        EndpointKind::Pod(_) | EndpointKind::External => Role::Host,
    }
}

/// Whether a test that needs root can run. Says loudly when it can't.
///
/// # Panics
/// Without root where `CI` is `true`: there a skipped test is a failed one.
pub fn require_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must run these tests as root");
    eprintln!("SKIPPED, NOT TESTED: this test needs root (network namespaces, eBPF)");
    false
}
