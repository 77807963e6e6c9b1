//! Two pods on one node, and packets that both send to each other at once.

use std::net::{IpAddr, SocketAddr};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use npm_agent::conntrack::Conntrack;
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

    /// Both pods send to each other on the same tuples at once, each on a CPU of its own; gives how many packets were
    /// sent.
    ///
    /// # Errors
    /// A packet can't be made.
    pub fn flood(&self, kind: Kind, family: Family, ports: Ports, lasts: Duration) -> Result<u64> {
        let (a, b) = (self.pod("10.241.0.2")?, self.pod("10.241.0.3")?);
        let address = |pod: usize| self.lab.endpoints()[pod].address(family).context("no address");
        let (own, other) = (address(a)?, address(b)?);
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
        let forward = packets(kind, ports, own, other, Way::Forward)?;
        let backward = packets(kind, ports, own, other, Way::Backward)?;
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
        match kind {
            Kind::Udp => packets.push(udp(ends, b"not you")?),
            Kind::Tcp => {
                for segment in [Segment::Syn, Segment::SynAck, Segment::Ack] {
                    packets.push(tcp(ends, segment, 1)?);
                }
            }
            Kind::Icmp => {
                let first = if way == Way::Forward { Echo::Request } else { Echo::Reply };
                packets.push(echo(ends, first, port)?);
                packets.push(echo(
                    ends,
                    if first == Echo::Request { Echo::Reply } else { Echo::Request },
                    port,
                )?);
            }
            Kind::Sctp => {
                for (chunk, verification) in [(SctpChunk::Init, 0), (SctpChunk::InitAck, 7)] {
                    let (source, destination) = (ends.source.port(), ends.destination.port());
                    packets.push(sctp(ends, Sctp { source, destination, verification, tag: 7, chunk })?);
                }
            }
        }
    }
    Ok(packets)
}
