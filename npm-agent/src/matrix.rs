//! Who can talk to whom, evaluated offline: a [`World`] and probes in, a table of verdicts out.
//!
//! ```text
//! World ─► endpoints x endpoints x probes ─► oracle            the objects, read literally
//!                                        ├─► goal              the compiled rules, interpreted
//!                                        ├─► iptables          the compiled rules, rendered and interpreted
//!                                        └─► ebpf              the compiled rules, as maps of this kernel's program
//! ```
//!
//! Every pod is judged on a node of its own, so that both directions count and no traffic stays on a node. Of the
//! kernel nothing is asked but to run a program on packets that nobody sent ([`Engine::Ebpf`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::Family;
use npm_policy::model::{PodKey, PodPhase, Port, Ports, Protocol};
use npm_policy::world::World;
use serde::Serialize;

use crate::backend::ebpf::kernel::KernelError;
use crate::backend::ebpf::lower::LowerError;
use crate::backend::iptables::render::RenderedError;

mod evaluate;
mod expect;
mod pair;
mod table;

pub use evaluate::{Evaluator, evaluate};
pub use expect::{Difference, Expectation, ExpectationError};
pub use pair::{Pair, PairError, port_of, verdict};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Request {
    /// The cluster.
    pub world: World,
    /// The probes; none: those of [`picked_probes`].
    pub probes: Vec<Probe>,
    /// Names and addresses outside the cluster; those of the other family are no endpoints.
    pub externals: Vec<(String, IpAddr)>,
    /// Which of the pods' addresses are meant.
    pub family: Family,
    /// Whom to ask.
    pub engines: BTreeSet<Engine>,
}

/// Who is asked for verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Engine {
    /// [`npm_policy::verdict::oracle`], by [`verdict`].
    Oracle,
    /// [`npm_policy::goal::Goal::verdict`] on the nodes of both ends.
    Goal,
    /// [`crate::backend::iptables::render::Rendered::decide`] on the nodes of both ends.
    Iptables,
    /// [`crate::backend::ebpf::kernel::Kernel::verdict`] on the nodes of both ends: needs the right to load programs.
    Ebpf,
}

impl Engine {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [Self::Oracle, Self::Goal, Self::Iptables, Self::Ebpf];

    /// Those that need no privilege.
    pub const UNPRIVILEGED: [Self; 3] = [Self::Oracle, Self::Goal, Self::Iptables];

    /// The name that users know it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Oracle => "oracle",
            Self::Goal => "goal",
            Self::Iptables => "iptables",
            Self::Ebpf => "ebpf",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Engine {
    type Err = UnknownEngine;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|engine| engine.name() == text).ok_or(UnknownEngine)
    }
}

/// A text is no engine's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not one of the engines {}", Engine::ALL.map(Engine::name).join(", "))]
pub struct UnknownEngine;

/// A kind of new connection to try between all endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Probe {
    /// A protocol and a destination port, 1 to 65535. Prints as `TCP/80`.
    Port(Protocol, u16),
    /// An echo request of the addresses' family. Prints as `ICMP`.
    Icmp,
}

impl Probe {
    /// What a flow of this probe to `destination` carries.
    pub fn transport(self, destination: IpAddr) -> Transport {
        match self {
            Self::Port(protocol, port) => Transport::Port(protocol, port),
            Self::Icmp => Transport::echo(destination),
        }
    }

    /// The flow of this probe.
    pub fn flow(self, source: IpAddr, destination: IpAddr) -> Flow {
        Flow { source, destination, transport: self.transport(destination) }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(protocol, port) => write!(f, "{protocol}/{port}"),
            Self::Icmp => f.write_str("ICMP"),
        }
    }
}

impl FromStr for Probe {
    type Err = UnknownProbe;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.eq_ignore_ascii_case("icmp") {
            return Ok(Self::Icmp);
        }
        let (protocol, port) = text.split_once('/').ok_or(UnknownProbe)?;
        let protocol = Protocol::ALL
            .into_iter()
            .find(|known| known.to_string().eq_ignore_ascii_case(protocol))
            .ok_or(UnknownProbe)?;
        let port: u16 = port.parse().ok().filter(|port| *port != 0).ok_or(UnknownProbe)?;
        Ok(Self::Port(protocol, port))
    }
}

/// A text is no probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a probe as TCP/80, UDP/53, SCTP/9 or ICMP")]
pub struct UnknownProbe;

/// The probes that the policies and pods name: the ends of port ranges, the ports of pods that have names, the usual
/// port of a protocol that is named without a port. TCP/80 if there is nothing.
pub fn named_probes(world: &World) -> Vec<Probe> {
    let mut probes = BTreeSet::new();
    for pod in world.pods() {
        probes.extend(pod.ports.iter().map(|port| Probe::Port(port.protocol, port.port)));
    }
    for policy in world.policies() {
        for rule in policy.ingress.iter().chain(&policy.egress).flatten() {
            let ports = match &rule.ports {
                Ports::Any => continue,
                Ports::Only(ports) => ports,
            };
            for port in ports {
                match port {
                    Port::Range { protocol, first: 0, last: _ } => {
                        probes.insert(Probe::Port(*protocol, usual_port(*protocol)));
                    }
                    Port::Range { protocol, first, last } => {
                        probes.extend([first, last].map(|port| Probe::Port(*protocol, *port)));
                    }
                    Port::Named { .. } => {}
                }
            }
        }
    }
    if probes.is_empty() {
        probes.insert(Probe::Port(Protocol::Tcp, usual_port(Protocol::Tcp)));
    }
    probes.into_iter().collect()
}

/// How many probes are tried when none is asked for. A probe more is a verdict more for each pair of endpoints: 300
/// pods and 200 policies with a port each would be 18 million.
pub const MOST_PICKED: usize = 32;

/// The probes that are tried when none is asked for: the first [`MOST_PICKED`] of [`named_probes`].
pub fn picked_probes(world: &World) -> Vec<Probe> {
    let mut probes = named_probes(world);
    probes.truncate(MOST_PICKED);
    probes
}

fn usual_port(protocol: Protocol) -> u16 {
    match protocol {
        Protocol::Tcp => 80,
        Protocol::Udp => 53,
        Protocol::Sctp => 9,
    }
}

/// Who is asked about, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `namespace/name` of a pod, `ext/NAME` of an external.
    pub name: String,
    /// Its address: the lowest of the family, where a pod has several.
    pub address: IpAddr,
}

/// The endpoints: running pods with an address of the family, in order of their keys, then the externals as given. A
/// pod whose phase is not known runs; one that is Pending does not yet.
pub fn endpoints(world: &World, externals: &[(String, IpAddr)], family: Family) -> Vec<Endpoint> {
    let of_family = |address: &&IpAddr| Family::of(**address) == family;
    let pods = world.pods().filter(|pod| match pod.phase {
        PodPhase::Active => true,
        PodPhase::Ended | PodPhase::Pending => false,
    });
    let pods = pods.filter_map(|pod| {
        let address = *pod.addresses.iter().find(of_family)?;
        Some(Endpoint { name: pod.key.to_string(), address })
    });
    let externals = externals.iter().filter(|(_, address)| of_family(&address));
    let externals =
        externals.map(|(name, address)| Endpoint { name: format!("ext/{name}"), address: *address });
    pods.chain(externals).collect()
}

/// One verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Cell {
    /// A new connection is denied. Prints as `X`.
    #[default]
    Denied,
    /// A new connection is allowed. Prints as `.`.
    Allowed,
    /// Source and destination are one endpoint. Prints as `#`.
    Itself,
}

impl Cell {
    /// The character that stands for it.
    pub fn symbol(self) -> char {
        match self {
            Self::Denied => 'X',
            Self::Allowed => '.',
            Self::Itself => '#',
        }
    }

    fn of(symbol: char) -> Option<Self> {
        [Self::Denied, Self::Allowed, Self::Itself].into_iter().find(|cell| cell.symbol() == symbol)
    }
}

/// The verdicts of one engine on one probe: a row a source, a cell a destination, both in the order of the endpoints.
pub type Rows = Vec<Vec<Cell>>;

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// The probes, in order, each once.
    pub probes: Vec<Probe>,
    /// The endpoints, in order.
    pub endpoints: Vec<Endpoint>,
    /// Each engine's verdicts on each probe.
    pub engines: BTreeMap<Engine, BTreeMap<Probe, Rows>>,
}

/// A [`Matrix`] as JSON.
#[derive(Serialize)]
struct Written<'a> {
    probes: Vec<String>,
    endpoints: Vec<&'a str>,
    engines: BTreeMap<&'static str, BTreeMap<String, Vec<String>>>,
}

impl Matrix {
    /// The JSON form: `{"probes": ["TCP/80"], "endpoints": ["x/a", "ext/b"], "engines": {"oracle": {"TCP/80": ["#.",
    /// "X#"]}}}`, one string a source, one character a destination.
    pub fn to_json(&self) -> String {
        let row = |row: &Vec<Cell>| row.iter().map(|cell| cell.symbol()).collect();
        let table = |(probe, rows): (&Probe, &Rows)| (probe.to_string(), rows.iter().map(row).collect());
        let written = Written {
            probes: self.probes.iter().map(Probe::to_string).collect(),
            endpoints: self.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect(),
            engines: self
                .engines
                .iter()
                .map(|(engine, tables)| (engine.name(), tables.iter().map(table).collect()))
                .collect(),
        };
        serde_json::to_string_pretty(&written).expect("strings and maps with string keys always serialise")
    }

    /// The form for people: a table for each set of probes on which the verdicts are the same.
    pub fn to_table(&self) -> String {
        table::render(self)
    }

    /// The cells on which the engines differ: (source, destination, probe), as places in the lists. Empty when they
    /// agree.
    pub fn disagreements(&self) -> Vec<(usize, usize, Probe)> {
        let Some(first) = self.engines.values().next() else { return Vec::new() };
        let mut differing = Vec::new();
        for probe in &self.probes {
            for source in 0..self.endpoints.len() {
                for destination in 0..self.endpoints.len() {
                    let cell = |tables: &BTreeMap<Probe, Rows>| tables[probe][source][destination];
                    if self.engines.values().any(|tables| cell(tables) != cell(first)) {
                        differing.push((source, destination, *probe));
                    }
                }
            }
        }
        differing
    }
}

/// Why a request can't be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum MatrixError {
    /// Two endpoints have one name.
    #[error("two endpoints are called {name}")]
    Ambiguous {
        /// The name.
        name: String,
    },
    /// A defect of ours: rules that we rendered can't be interpreted.
    #[error("the rules of {pod}'s node can't be interpreted")]
    Rendered {
        /// The pod.
        pod: PodKey,
        /// Why.
        #[source]
        source: RenderedError,
    },
    /// The rules of a pod's node do not fit into the eBPF maps.
    #[error("the rules of {pod}'s node do not fit into the eBPF maps")]
    Lowered {
        /// The pod.
        pod: PodKey,
        /// What is too much.
        #[source]
        source: LowerError,
    },
    /// The kernel gives no verdicts.
    #[error("the engine ebpf can't be asked")]
    Kernel(#[from] KernelError),
}
