//! Two pods on one node, and packets that both send to each other at once.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use npm_agent::conntrack::Conntrack;
use npm_common::layout::SCHEMA;
use npm_policy::goal::Family;
use npm_policy::world::World;

use crate::lab::Lab;
use crate::lab::netns::Netns;
use crate::lab::packet::{Echo, Ends, IpSender, Sctp, SctpChunk, Segment, echo, sctp, tcp, udp};
use crate::lab::service::Dialect;
use crate::scenario::Scenario;
use crate::scenario::cluster::{Cluster, spec};
use crate::scenario::enforcer::{Enforcer, Means, Site};

const PODS: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: x}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x, labels: {app: a}}, spec: {}, status: {phase: Running, podIPs: [{ip: 10.241.0.2}, {ip: "fd00:241::2"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: x, labels: {app: b}}, spec: {}, status: {phase: Running, podIPs: [{ip: 10.241.0.3}, {ip: "fd00:241::3"}]}}
---
"#;
/// A policy that lets neither pod send or take anything.
pub const CLOSED: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: x}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
"#;
/// How many ports a flood of fresh ones uses in turn.
const FRESH: u16 = 4000;

/// What floods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// UDP.
    Udp,
    /// TCP: SYN, SYN ACK, ACK.
    Tcp,
    /// Echo requests and replies of one id.
    Icmp,
    /// SCTP: INIT, INIT ACK.
    Sctp,
}

/// Which ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// One pair of ports.
    Same,
    /// Thousands in turn.
    Fresh,
}

/// Two pods on one node, and what enforces there.
pub struct Stage {
    // Dropped in this order: what enforces before where.
    /// What enforces on the node.
    pub enforcer: Enforcer,
    /// The node and the pods.
    pub lab: Lab,
    _directory: tempfile::TempDir,
}

fn scenario(policies: &str) -> Scenario {
    Scenario::of(format!("{PODS}{policies}"))
}

/// The pods under these policies.
///
/// # Errors
/// A policy is none.
pub fn world(policies: &str) -> Result<World> {
    Cluster::stages(&scenario(policies))?[0].world()
}

impl Stage {
    /// Both pods, and who enforces nothing yet.
    ///
    /// # Errors
    /// There can be no lab, or nobody can enforce.
    pub fn build(means: Means) -> Result<Self> {
        let lab = Lab::build(&spec(&scenario(""), &[world("")?])?)?;
        let directory = tempfile::tempdir()?;
        let netns = &lab.endpoints()[0].netns;
        let site = Site { netns, node: "node-a", dialect: Dialect::Nft, directory: directory.path() };
        let enforcer = Enforcer::start(means, &site)?;
        Ok(Self { enforcer, lab, _directory: directory })
    }

    /// The node.
    pub fn node(&self) -> &Netns {
        &self.lab.endpoints()[0].netns
    }

    /// The index of the pod with this IPv4 address.
    ///
    /// # Errors
    /// There is none.
    pub fn pod(&self, address: &str) -> Result<usize> {
        let address: IpAddr = address.parse()?;
        let found = self.lab.endpoints().iter().position(|it| it.addresses.contains(&address));
        found.with_context(|| format!("no pod has {address}"))
    }

    /// Makes both pods drop and count what comes from the other, before their own stacks see it.
    ///
    /// # Errors
    /// A rule can't be added.
    pub fn deafen(&self) -> Result<()> {
        for (of, other) in [("10.241.0.2", "10.241.0.3"), ("10.241.0.3", "10.241.0.2")] {
            let netns = &self.lab.endpoints()[self.pod(of)?].netns;
            for family in Family::BOTH {
                let other = match family {
                    Family::V4 => other.to_owned(),
                    Family::V6 => other.replace("10.241.0.", "fd00:241::"),
                };
                let iptables = Dialect::Nft.program(family, "");
                netns.exec(&iptables, &["-t", "raw", "-F", "PREROUTING"])?;
                netns.exec(&iptables, &["-t", "raw", "-A", "PREROUTING", "-s", &other, "-j", "DROP"])?;
            }
        }
        Ok(())
    }

    /// Packets that arrived at either pod from the other since [`Stage::deafen`].
    ///
    /// # Errors
    /// There is no such rule.
    pub fn arrived(&self) -> Result<u64> {
        let mut sum = 0;
        for of in ["10.241.0.2", "10.241.0.3"] {
            let netns = &self.lab.endpoints()[self.pod(of)?].netns;
            for family in Family::BOTH {
                let saved = netns.exec(&Dialect::Nft.program(family, "-save"), &["-c", "-t", "raw"])?;
                let line = saved.lines().find(|line| line.ends_with("-j DROP")).context("no such rule")?;
                let count = line.trim_start_matches('[').split(':').next().context("no counter")?;
                sum += count.parse::<u64>()?;
            }
        }
        Ok(sum)
    }

    /// Connections between the pods that the node knows.
    ///
    /// # Errors
    /// The kernel does not list them.
    pub fn connections(&self) -> Result<usize> {
        self.node().run(|| {
            let pods: [IpAddr; 4] = [
                "10.241.0.2".parse()?,
                "10.241.0.3".parse()?,
                "fd00:241::2".parse()?,
                "fd00:241::3".parse()?,
            ];
            let entries = Conntrack::open()?.entries()?;
            let between = entries.iter().filter(|entry| {
                pods.contains(&entry.original.source) && pods.contains(&entry.original.destination)
            });
            Ok(between.count())
        })
    }

    /// Waits until the node knows no connection between the pods.
    ///
    /// # Errors
    /// Some are left.
    pub fn forgotten(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let left = self.connections()?;
            if left == 0 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{left} connections of denied flows are left");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Connections that the eBPF backend's map says are judged and allowed; with another backend none.
    ///
    /// # Errors
    /// The map can't be read.
    pub fn proofs(&self) -> Result<usize> {
        if !matches!(self.enforcer, Enforcer::Ebpf { .. }) {
            return Ok(0);
        }
        let pins = Path::new("/sys/fs/bpf/npm-agent").join(self.node().name());
        let map = MapData::from_pin(pins.join(format!("v{SCHEMA}/maps/PROOFS")))?;
        let map: HashMap<_, [u64; 5], u64> = HashMap::try_from(Map::from_map_data(map)?)?;
        Ok(map.keys().collect::<Result<Vec<_>, _>>()?.len())
    }

    /// Waits until so many connections are proven, and whatever programs may remember of others is forgotten.
    ///
    /// # Errors
    /// Others are left.
    pub fn proven(&self, count: usize, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            // A key that goes meanwhile breaks the reading off.
            let left = self.proofs();
            if matches!(left, Ok(left) if left == count) {
                break;
            }
            ensure!(Instant::now() < deadline, "{left:?} proofs are left, not {count}");
            std::thread::sleep(Duration::from_millis(20));
        }
        if matches!(self.enforcer, Enforcer::Ebpf { .. }) {
            // 25 jiffies at 100 a second.
            std::thread::sleep(Duration::from_millis(250));
        }
        Ok(())
    }

    /// The first pod opens a connection to the second from each of these ports, or of these ids, by one packet.
    ///
    /// # Errors
    /// A packet can't be made or sent.
    pub fn open(&self, kind: Kind, family: Family, ports: Range<u16>) -> Result<()> {
        self.one_each(kind, family, ports, Way::Forward)
    }

    /// The second pod answers each, by one packet.
    ///
    /// # Errors
    /// A packet can't be made or sent.
    pub fn answer(&self, kind: Kind, family: Family, ports: Range<u16>) -> Result<()> {
        self.one_each(kind, family, ports, Way::Backward)
    }

    fn one_each(&self, kind: Kind, family: Family, ports: Range<u16>, way: Way) -> Result<()> {
        let pods = [self.pod("10.241.0.2")?, self.pod("10.241.0.3")?].map(|pod| &self.lab.endpoints()[pod]);
        let [near, far] = pods.map(|pod| pod.address(family).context("no address"));
        let (near, far) = (near?, far?);
        let sends = pods[usize::from(way == Way::Backward)];
        sends.netns.run(|| {
            let sender = IpSender::open()?;
            for (index, port) in ports.enumerate() {
                let (near, far) = (SocketAddr::new(near, port), SocketAddr::new(far, 80));
                let ends = match way {
                    Way::Forward => Ends { source: near, destination: far },
                    Way::Backward => Ends { source: far, destination: near },
                };
                let first = usize::from(kind == Kind::Tcp && way == Way::Backward);
                let packets = exchange(kind, ends, way)?;
                sender.send(packets.get(first).context("nothing is sent")?)?;
                if index % 200 == 199 {
                    // No queue is to overflow.
                    std::thread::sleep(Duration::from_millis(4));
                }
            }
            Ok(())
        })
    }

    /// Both pods send to each other on the same tuples at once, each on a CPU of its own; gives how many packets were
    /// sent.
    ///
    /// # Errors
    /// A packet can't be made.
    pub fn flood(&self, kind: Kind, family: Family, ports: Ports, lasts: Duration) -> Result<u64> {
        self.flood_with(&[(kind, family, ports)], lasts)
    }

    /// The same with packets of all these in turn.
    ///
    /// # Errors
    /// A packet can't be made.
    pub fn flood_with(&self, floods: &[(Kind, Family, Ports)], lasts: Duration) -> Result<u64> {
        let (a, b) = (self.pod("10.241.0.2")?, self.pod("10.241.0.3")?);
        let start = Barrier::new(2);
        let flood = |pod: usize, packets: Vec<Vec<u8>>, cpu: usize| {
            let start = &start;
            let netns = self.lab.endpoints()[pod].netns.clone();
            move || -> Result<u64> {
                netns.enter()?;
                let mut set = CpuSet::new();
                set.set(cpu)?;
                // A machine with one CPU takes turns.
                let _ = sched_setaffinity(Pid::from_raw(0), &set);
                let sender = IpSender::open()?;
                start.wait();
                let (until, mut sent) = (Instant::now() + lasts, 0);
                for packet in packets.iter().cycle() {
                    // A full queue is no failure: the next packet goes.
                    sent += u64::from(sender.send(packet).is_ok());
                    if sent % 64 == 0 && Instant::now() > until {
                        break;
                    }
                }
                Ok(sent)
            }
        };
        let packets = |way: Way| -> Result<Vec<Vec<u8>>> {
            let mut all = Vec::new();
            for &(kind, family, ports) in floods {
                let address = |pod: usize| self.lab.endpoints()[pod].address(family).context("no address");
                all.push(packets(kind, ports, address(a)?, address(b)?, way)?);
            }
            let longest = all.iter().map(Vec::len).max().unwrap_or(0);
            let turns = (0..longest).flat_map(|turn| all.iter().map(move |of| of[turn % of.len()].clone()));
            Ok(turns.collect())
        };
        let (forward, backward) = (packets(Way::Forward)?, packets(Way::Backward)?);
        std::thread::scope(|scope| {
            let threads = [scope.spawn(flood(a, forward, 0)), scope.spawn(flood(b, backward, 1))];
            let mut sum = 0;
            for thread in threads {
                sum += thread.join().expect("a sender does not panic")?;
            }
            Ok(sum)
        })
    }
}

/// Which end sends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Forward,
    Backward,
}

/// The packets of one end, to be sent over and over.
fn packets(kind: Kind, ports: Ports, own: IpAddr, other: IpAddr, way: Way) -> Result<Vec<Vec<u8>>> {
    let mut packets = Vec::new();
    let count = if ports == Ports::Same { 1 } else { FRESH };
    for port in 20_000..20_000 + count {
        let (near, far) = (SocketAddr::new(own, port), SocketAddr::new(other, 80));
        let ends = match way {
            Way::Forward => Ends { source: near, destination: far },
            Way::Backward => Ends { source: far, destination: near },
        };
        packets.extend(exchange(kind, ends, way)?);
    }
    Ok(packets)
}

/// The packets of one connection that one end sends: the first of [`Way::Forward`] opens it.
fn exchange(kind: Kind, ends: Ends, way: Way) -> Result<Vec<Vec<u8>>> {
    let port = match way {
        Way::Forward => ends.source.port(),
        Way::Backward => ends.destination.port(),
    };
    match kind {
        Kind::Udp => Ok(vec![udp(ends, b"not you")?]),
        Kind::Tcp => [Segment::Syn, Segment::SynAck, Segment::Ack]
            .map(|segment| tcp(ends, segment, 1))
            .into_iter()
            .collect(),
        Kind::Icmp => {
            let both = match way {
                Way::Forward => [Echo::Request, Echo::Reply],
                Way::Backward => [Echo::Reply, Echo::Request],
            };
            both.map(|echoed| echo(ends, echoed, port)).into_iter().collect()
        }
        Kind::Sctp => {
            let (source, destination) = (ends.source.port(), ends.destination.port());
            let chunk =
                |(chunk, verification)| sctp(ends, Sctp { source, destination, verification, tag: 7, chunk });
            [(SctpChunk::Init, 0), (SctpChunk::InitAck, 7)].map(chunk).into_iter().collect()
        }
    }
}
