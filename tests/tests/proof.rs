//! The proof that a connection was judged and allowed, as the iptables backend leaves it in real connections: nft and
//! legacy, both families, with translated addresses.

#[path = "proof/cut.rs"]
mod cut;

use std::net::{IpAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use npm_agent::backend::Backend;
use npm_agent::backend::iptables::layout::Established;
use npm_agent::backend::iptables::render::Form;
use npm_agent::backend::iptables::variant::Variant;
use npm_agent::backend::iptables::{Iptables, Options};
use npm_agent::conntrack::{Conntrack, Detail, Entry};
use npm_agent::source::manifests;
use npm_common::mark::PROOF;
use npm_policy::compile::compile;
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::{Family, Goal};
use npm_policy::model::Protocol;
use npm_policy::world::World;
use npm_tests::lab::node::Layout;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::{self, Dialect, Service};
use npm_tests::lab::{EndpointKind, Host, Lab, Spec, require_root};

/// Bits of somebody else, in every TCP connection.
const FOREIGN: u32 = 0x8040_0002;

const PODS: &str = r#"
{apiVersion: v1, kind: Pod, metadata: {name: web, labels: {app: web}}, spec: {nodeName: node-a}, status: {phase: Running, podIPs: [{ip: 10.241.0.2}, {ip: "fd00:241::2"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client, labels: {app: client}}, spec: {nodeName: node-a}, status: {phase: Running, podIPs: [{ip: 10.241.0.3}, {ip: "fd00:241::3"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: stranger, labels: {app: stranger}}, spec: {nodeName: node-a}, status: {phase: Running, podIPs: [{ip: 10.241.0.4}, {ip: "fd00:241::4"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: far, labels: {app: far}}, spec: {nodeName: node-b}, status: {phase: Running, podIPs: [{ip: 10.241.1.2}, {ip: "fd00:241:1::2"}]}}
"#;
const POLICIES: &str = r#"
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
  - from: [{podSelector: {matchLabels: {app: far}}}, {ipBlock: {cidr: 203.0.113.0/24}}, {ipBlock: {cidr: "2001:db8::/64"}}]
    ports: [{port: 80}, {protocol: UDP, port: 80}, {protocol: SCTP, port: 80}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: stranger}
spec:
  podSelector: {matchLabels: {app: stranger}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: far}}}], ports: [{port: 80}, {protocol: UDP, port: 80}]}]
"#;
const CLOSED: &str = r#"
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec: {podSelector: {matchLabels: {app: web}}}
"#;

fn goal(manifests: &str) -> Result<Goal> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("all.yaml"), manifests)?;
    let reading = manifests::read(&[directory.path().to_owned()]);
    ensure!(reading.problems.is_empty(), "{:?}", reading.problems);
    let mut world = World::default();
    for change in reading.changes {
        world.apply(change);
    }
    Ok(compile(&world, "node-a").0)
}

fn lab() -> Result<Lab> {
    let host = |name: &str, v4: &str, v6: &str| -> Result<Host> {
        Ok(Host { name: name.into(), addresses: vec![v4.parse()?, v6.parse()?] })
    };
    Lab::build(&Spec {
        layout: Layout::Routed,
        nodes: vec![
            host("node-a", "10.240.0.4", "fd00:240::4")?,
            host("node-b", "10.240.0.5", "fd00:240::5")?,
        ],
        pods: vec![
            (0, host("web", "10.241.0.2", "fd00:241::2")?),
            (0, host("client", "10.241.0.3", "fd00:241::3")?),
            (0, host("stranger", "10.241.0.4", "fd00:241::4")?),
            (1, host("far", "10.241.1.2", "fd00:241:1::2")?),
        ],
        externals: vec![host("outside", "203.0.113.7", "2001:db8::7")?],
    })
}

fn address(lab: &Lab, name: &str, family: Family) -> Result<IpAddr> {
    lab.endpoints()[lab.find(name)?].address(family).context("the lab has it")
}

fn backend(lab: &Lab, dialect: Dialect, established: Established) -> Result<Iptables> {
    let variant = match dialect {
        Dialect::Nft => Variant::Nft,
        Dialect::Legacy => Variant::Legacy,
    };
    let form = Form { established, ..Form::default() };
    let options = Options { variant: Some(variant), form, ..Options::default() };
    lab.netns("node-a")?.run(|| Ok(Iptables::new(options)?))
}

/// The flow that an entry's first packet was to FORWARD.
fn flow(entry: &Entry) -> Flow {
    let transport = match (
        Protocol::ALL.into_iter().find(|protocol| protocol.number() == entry.original.protocol),
        entry.reply.detail,
    ) {
        (Some(protocol), Detail::Ports { source, .. }) => Transport::Port(protocol, source),
        _ => Transport::Portless(entry.original.protocol),
    };
    Flow { source: entry.original.source, destination: entry.reply.source, transport }
}

/// The entries of the node's table that forwarded packets made.
fn forwarded(lab: &Lab) -> Result<Vec<Entry>> {
    let entries = lab.netns("node-a")?.run(|| Ok(Conntrack::open()?.entries()?))?;
    let is_forwarded = |entry: &Entry| {
        let ends = [entry.original.source, entry.reply.source];
        ends.iter().all(|end| {
            lab.endpoints().iter().any(|host| host.kind != EndpointKind::Node && host.addresses.contains(end))
        })
    };
    Ok(entries.into_iter().filter(is_forwarded).collect())
}

/// Every pair, every kind, Services from beside, from the backend itself, and from outside through a node port.
fn probes(lab: &Lab, services: &mut Vec<Service>) -> Result<Vec<Probe>> {
    let mut probes = Vec::new();
    for (family, virtual_ip) in Family::BOTH.into_iter().zip(["10.0.0.10", "fd00:10::10"]) {
        let virtual_ip: IpAddr = virtual_ip.parse()?;
        let mut to = |from: &str, destination: IpAddr, transport: Transport| -> Result<()> {
            let source = address(lab, from, family)?;
            probes.push(Probe { from: lab.find(from)?, source, destination, transport, expected: None });
            Ok(())
        };
        let names = ["web", "client", "stranger", "far", "outside"];
        for protocol in Protocol::ALL {
            services.push(Service {
                address: virtual_ip,
                protocol,
                port: 8000,
                backend: address(lab, "web", family)?,
                target: 80,
                node_port: Some(30080),
            });
            for from in ["web", "client", "stranger"] {
                to(from, virtual_ip, Transport::Port(protocol, 8000))?;
            }
            to("outside", address(lab, "node-a", family)?, Transport::Port(protocol, 30080))?;
        }
        for from in names {
            for destination in names.into_iter().filter(|name| *name != from) {
                let destination = address(lab, destination, family)?;
                for protocol in Protocol::ALL {
                    to(from, destination, Transport::Port(protocol, 80))?;
                }
                to(from, destination, Transport::echo(destination))?;
            }
        }
    }
    Ok(probes)
}

#[test]
fn what_was_allowed_carries_the_proof_and_what_was_denied_is_not_there() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let goal = goal(&format!("{PODS}{POLICIES}"))?;
    for dialect in Dialect::BOTH {
        let mut lab = lab()?;
        lab.listen(&[Transport::Port(Protocol::Tcp, 80), Transport::Port(Protocol::Udp, 80)])?;
        let mut services = Vec::new();
        let probes = probes(&lab, &mut services)?;
        service::install(lab.netns("node-a")?, dialect, &services)?;
        for family in Family::BOTH {
            let rule = format!(
                "-w -t mangle -A PREROUTING -p tcp -j CONNMARK --set-xmark {FOREIGN:#x}/{FOREIGN:#x}"
            );
            let rule: Vec<&str> = rule.split(' ').collect();
            lab.netns("node-a")?.exec(&dialect.program(family, ""), &rule)?;
        }
        let mut backend = backend(&lab, dialect, Established::Keep)?;
        lab.netns("node-a")?.run(|| Ok(backend.apply(&goal)?))?;

        let outcomes = lab.probe(&probes)?;
        let entries = forwarded(&lab)?;
        for entry in &entries {
            let flow = flow(entry);
            assert_eq!(goal.verdict(&flow).decision(), Decision::Allow, "{dialect:?} {flow}: {entry:?}");
            let foreign = if entry.original.protocol == 6 { FOREIGN } else { 0 };
            assert_eq!(entry.mark, foreign | PROOF, "{dialect:?} {flow}: {entry:?}");
        }
        let mut seen = [0, 0];
        for (probe, outcome) in probes.iter().zip(&outcomes) {
            let number = match probe.transport {
                Transport::Port(protocol, _) => protocol.number(),
                Transport::Portless(number) => number,
            };
            let made = entries.iter().filter(|entry| {
                let tuple = &entry.original;
                (tuple.source, tuple.destination, tuple.protocol) == (probe.source, probe.destination, number)
            });
            match outcome {
                // What does not cross node-a has no entry there.
                Outcome::Answered | Outcome::Arrived => seen[0] += usize::from(made.count() > 0),
                Outcome::Blocked => {
                    seen[1] += 1;
                    assert_eq!(made.count(), 0, "{dialect:?} {probe:?}");
                }
            }
        }
        eprintln!(
            "{dialect:?}: {} entries, {} probes delivered, {} blocked",
            entries.len(),
            seen[0],
            seen[1]
        );
        assert!(seen[0] >= 60 && seen[1] >= 30, "{seen:?}: the probes show too little");
        assert!(entries.iter().any(|entry| entry.original.source == entry.reply.source), "no hairpin");
        let masqueraded = |entry: &Entry| entry.original.source != entry.reply.destination;
        assert!(entries.iter().any(masqueraded), "nothing masqueraded");
        // What is removed leaves the marks of others alone, and its own, which mean nothing then.
        lab.netns("node-a")?.run(|| Ok(backend.remove()?))?;
        let filter = lab.netns("node-a")?.exec(&dialect.program(Family::V4, "-save"), &["-t", "filter"])?;
        assert!(!filter.contains("CONNMARK"), "{filter}");
    }
    Ok(())
}

#[test]
fn what_is_denied_loses_the_proof() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let [open, closed] = [POLICIES, CLOSED].map(|policies| goal(&format!("{PODS}{policies}")));
    let (open, closed) = (open?, closed?);
    for dialect in Dialect::BOTH {
        let lab = lab()?;
        let mut backend = backend(&lab, dialect, Established::Keep)?;
        let mut apply = |goal| lab.netns("node-a")?.run(|| Ok(backend.apply(goal)?));
        for family in Family::BOTH {
            apply(&open)?;
            let web = address(&lab, "web", family)?;
            // Nobody listens: the connection stays without a reply, and each packet is judged.
            let socket =
                lab.netns("client")?.run(|| Ok(UdpSocket::bind((address(&lab, "client", family)?, 0))?))?;
            let proofs = || -> Result<Vec<u32>> {
                let entries = forwarded(&lab)?;
                let ours =
                    entries.iter().filter(|entry| entry.reply.source == web && entry.original.protocol == 17);
                Ok(ours.map(|entry| entry.mark).collect())
            };
            for (goal, expected) in [(&open, PROOF), (&closed, 0), (&open, PROOF)] {
                apply(goal)?;
                // An ICMP error to an earlier packet is reported instead of sending.
                while socket.send_to(b"?", (web, 4444)).is_err() {}
                assert_eq!(proofs()?, [expected], "{dialect:?} {family:?}");
            }
        }
    }
    Ok(())
}
