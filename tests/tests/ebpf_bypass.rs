//! Two pods that may not talk to each other send to each other on the same tuple, at once and from both ends: conntrack
//! makes an established connection of that if anybody lets it. Nothing may arrive, and nothing may be left of it.
//!
//! `NPM_FLOOD_SECONDS=60` makes each flood last that long.

use std::net::{IpAddr, SocketAddr};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use npm_agent::conntrack::{Conntrack, MarkFilter};
use npm_policy::flow::{Decision, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_policy::world::World;
use npm_tests::lab::netns::Netns;
use npm_tests::lab::packet::{Echo, Ends, IpSender, Sctp, SctpChunk, Segment, echo, sctp, tcp, udp};
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Lab, require_root};
use npm_tests::scenario::cluster::{Cluster, spec};
use npm_tests::scenario::enforcer::{Enforcer, Means, Site};
use npm_tests::scenario::{Layout, Scenario};

const PODS: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: x}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x, labels: {app: a}}, spec: {}, status: {phase: Running, podIPs: [{ip: 10.241.0.2}, {ip: "fd00:241::2"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: x, labels: {app: b}}, spec: {}, status: {phase: Running, podIPs: [{ip: 10.241.0.3}, {ip: "fd00:241::3"}]}}
---
"#;
const CLOSED: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: x}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
"#;
/// Only b may open connections to a.
const ONE_WAY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a, namespace: x}
spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}
"#;

/// All that is tried on this kernel.
const VARIANTS: [&str; 4] =
    ["cast,maps,tcx", "cast,maps,clsact", "probe,maps,tcx", "probe,maps,clsact"];

/// How many ports a flood of fresh ones uses in turn.
const FRESH: u16 = 4000;

/// What floods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Udp,
    Tcp,
    Icmp,
    Sctp,
}

/// Which ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ports {
    Same,
    Fresh,
}

/// Two pods on one node, and what enforces there.
struct Stage {
    // Dropped in this order: what enforces before where.
    enforcer: Enforcer,
    lab: Lab,
    _directory: tempfile::TempDir,
}

fn scenario(policies: &str) -> Scenario {
    Scenario {
        name: "two-pods".into(),
        says: String::new(),
        rows: Vec::new(),
        layout: Layout::Routed,
        cluster: None,
        manifests: format!("{PODS}{policies}"),
        external: Default::default(),
        probes: Vec::new(),
        services: Vec::new(),
        steps: Vec::new(),
        family: None,
        expect: None,
    }
}

fn world(policies: &str) -> Result<World> {
    Cluster::stages(&scenario(policies))?[0].world()
}

impl Stage {
    fn build(means: Means) -> Result<Self> {
        let lab = Lab::build(&spec(&scenario(""), &[world("")?])?)?;
        let directory = tempfile::tempdir()?;
        let netns = &lab.endpoints()[0].netns;
        let site = Site { netns, node: "node-a", dialect: Dialect::Nft, directory: directory.path() };
        let enforcer = Enforcer::start(means, &site)?;
        Ok(Self { enforcer, lab, _directory: directory })
    }

    fn node(&self) -> &Netns {
        &self.lab.endpoints()[0].netns
    }

    /// The index of the pod with this IPv4 address.
    fn pod(&self, address: &str) -> Result<usize> {
        let address: IpAddr = address.parse()?;
        let found = self.lab.endpoints().iter().position(|it| it.addresses.contains(&address));
        found.with_context(|| format!("no pod has {address}"))
    }

    /// Makes both pods drop and count what comes from the other, before their own stacks see it.
    fn deafen(&self) -> Result<()> {
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
    fn arrived(&self) -> Result<u64> {
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
    fn connections(&self) -> Result<usize> {
        self.node().run(|| {
            let pods: [IpAddr; 4] =
                ["10.241.0.2".parse()?, "10.241.0.3".parse()?, "fd00:241::2".parse()?, "fd00:241::3".parse()?];
            let entries = Conntrack::open()?.entries()?;
            let between = entries.iter().filter(|entry| {
                pods.contains(&entry.original.source) && pods.contains(&entry.original.destination)
            });
            Ok(between.count())
        })
    }

    /// Waits until the node knows no connection between the pods.
    fn forgotten(&self) -> Result<()> {
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
    fn flood(&self, kind: Kind, family: Family, ports: Ports, lasts: Duration) -> Result<u64> {
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
                packets.push(echo(ends, if first == Echo::Request { Echo::Reply } else { Echo::Request }, port)?);
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

fn lasts() -> Result<Duration> {
    let seconds = std::env::var("NPM_FLOOD_SECONDS").unwrap_or_else(|_| "0.5".into());
    Ok(Duration::from_secs_f64(seconds.parse().context("NPM_FLOOD_SECONDS")?))
}

fn all_means() -> Result<Vec<(String, Means)>> {
    let mut all = vec![("iptables".to_owned(), Means::Backend)];
    for variant in VARIANTS {
        all.push((variant.to_owned(), Means::Ebpf(variant.parse()?)));
    }
    Ok(all)
}

#[test]
fn denied_pods_never_reach_each_other() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (name, means) in all_means()? {
        let mut stage = Stage::build(means)?;
        stage.enforcer.enforce(&World::default())?;
        stage.deafen()?;
        let sent = stage.flood(Kind::Udp, Family::V4, Ports::Same, Duration::from_millis(50))?;
        let arrived = stage.arrived()?;
        assert!(arrived > sent / 2, "{name}: without a policy {arrived} of {sent} arrive");
        let everything = || Ok(Conntrack::open()?.delete_where(MarkFilter::ANY, |_| true)?);
        let open = stage.node().run(everything)?;
        assert!(open > 0, "{name}: the node tracks connections");

        stage.enforcer.enforce(&world(CLOSED)?)?;
        stage.deafen()?;
        for (kind, family) in [
            (Kind::Udp, Family::V4),
            (Kind::Udp, Family::V6),
            (Kind::Tcp, Family::V4),
            (Kind::Tcp, Family::V6),
            (Kind::Icmp, Family::V4),
            (Kind::Icmp, Family::V6),
            (Kind::Sctp, Family::V4),
            (Kind::Sctp, Family::V6),
        ] {
            for ports in [Ports::Same, Ports::Fresh] {
                let sent = stage.flood(kind, family, ports, lasts()?)?;
                let arrived = stage.arrived()?;
                eprintln!("{name}: {kind:?} {family:?} {ports:?}: {sent} sent, {arrived} arrived");
                assert!(sent > 100, "{name}: {kind:?}: {sent} packets are no flood");
                assert_eq!(arrived, 0, "{name}: {kind:?} {family:?} {ports:?}: {sent} sent");
            }
        }
        stage.forgotten().with_context(|| name.clone())?;
    }
    Ok(())
}

/// One packet each: nothing comes later that could remind anybody of them.
#[test]
fn denied_flows_leave_no_entries() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    const FLOWS: u16 = 20_000;
    for (name, means) in all_means()? {
        let mut stage = Stage::build(means)?;
        stage.enforcer.enforce(&world(CLOSED)?)?;
        stage.deafen()?;
        let (from, to): (IpAddr, IpAddr) = ("10.241.0.2".parse()?, "10.241.0.3".parse()?);
        stage.lab.endpoints()[stage.pod("10.241.0.2")?].netns.run(|| {
            let sender = IpSender::open()?;
            for port in 0..FLOWS {
                let source = SocketAddr::new(from, 20_000 + port);
                sender.send(&udp(Ends { source, destination: SocketAddr::new(to, 80) }, b"not you")?)?;
            }
            Ok(())
        })?;
        stage.forgotten().with_context(|| name.clone())?;
        assert_eq!(stage.arrived()?, 0, "{name}");
    }
    Ok(())
}

/// What one end is allowed works while the other, which is not, floods the same tuple.
#[test]
fn the_allowed_side_works_while_the_denied_one_floods() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (name, means) in all_means()? {
        let mut stage = Stage::build(means)?;
        stage.enforcer.enforce(&world(ONE_WAY)?)?;
        let port = Transport::Port(Protocol::Udp, 80);
        stage.lab.listen(&[port])?;
        let (a, b) = (stage.pod("10.241.0.2")?, stage.pod("10.241.0.3")?);
        let (to, from): (IpAddr, IpAddr) = ("10.241.0.2".parse()?, "10.241.0.3".parse()?);
        // The lab's probes come from ports from 20,000 up.
        let netns = stage.lab.endpoints()[a].netns.clone();
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let outcomes = std::thread::scope(|scope| {
            let flood = scope.spawn(|| -> Result<()> {
                netns.enter()?;
                let sender = IpSender::open()?;
                while !stop.load(Ordering::Relaxed) {
                    for port in 20_000..20_040 {
                        let (source, destination) = (SocketAddr::new(to, 80), SocketAddr::new(from, port));
                        let packet = udp(Ends { source, destination }, b"not you")?;
                        sent.fetch_add(u64::from(sender.send(&packet).is_ok()), Ordering::Relaxed);
                    }
                }
                Ok(())
            });
            let mut outcomes = Vec::new();
            for _ in 0..3 {
                // Every tuple is flooded before the allowed end uses it.
                let least = sent.load(Ordering::Relaxed) + 400;
                while sent.load(Ordering::Relaxed) < least && !flood.is_finished() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let probe = Probe {
                    from: b,
                    source: from,
                    destination: to,
                    transport: port,
                    expected: Some(Decision::Allow),
                };
                outcomes.extend(stage.lab.probe(&[probe; 8])?);
            }
            stop.store(true, Ordering::Relaxed);
            flood.join().expect("the sender does not panic")?;
            Ok::<_, anyhow::Error>(outcomes)
        })?;
        let answered = outcomes.iter().filter(|outcome| **outcome == Outcome::Answered).count();
        assert_eq!(answered, outcomes.len(), "{name}: {outcomes:?}");
    }
    Ok(())
}
