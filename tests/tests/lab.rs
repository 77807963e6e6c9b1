//! Tests of the lab itself: real packets, no agent.

use std::net::IpAddr;
use std::time::Instant;

use anyhow::Result;
use npm_policy::flow::{Decision, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::lab::node::Layout;
use npm_tests::lab::packet::{Ends, IpSender, Segment, fragments, tcp, udp, with_ipv4_options};
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::{self, Dialect, Service};
use npm_tests::lab::{Host, Lab, Spec, require_root};

const TRANSPORTS: [Transport; 4] = [
    Transport::Port(Protocol::Tcp, 80),
    Transport::Port(Protocol::Udp, 53),
    Transport::Port(Protocol::Sctp, 9),
    Transport::Portless(1),
];

fn host(name: &str, addresses: &[&str]) -> Host {
    Host {
        name: name.into(),
        addresses: addresses.iter().map(|address| address.parse().expect("the lab has it")).collect(),
    }
}

/// Two nodes, three pods on the first, one on the second, one host outside.
fn spec(layout: Layout) -> Spec {
    Spec {
        layout,
        nodes: vec![
            host("node-a", &["10.240.0.4", "fd00:240::4"]),
            host("node-b", &["10.240.0.5", "fd00:240::5"]),
        ],
        pods: vec![
            (0, host("a", &["10.241.0.2", "fd00:241::2"])),
            (0, host("b", &["10.241.0.3", "fd00:241::3"])),
            (0, host("c", &["10.241.0.4", "fd00:241::4"])),
            (1, host("d", &["10.241.1.2", "fd00:241:1::2"])),
        ],
        externals: vec![host("outside", &["203.0.113.7", "2001:db8::7"])],
    }
}

fn address(lab: &Lab, name: &str, family: Family) -> IpAddr {
    lab.endpoints()[lab.find(name).expect("the lab has it")].address(family).expect("the lab has it")
}

fn probe(lab: &Lab, from: &str, destination: IpAddr, transport: Transport) -> Probe {
    let source = address(lab, from, Family::of(destination));
    Probe { from: lab.find(from).expect("the lab has it"), source, destination, transport, expected: None }
}

/// Puts a rule into the filter table of both families.
fn filter(lab: &Lab, node: &str, rule: &str) {
    for family in Family::BOTH {
        let args: Vec<&str> = ["-w"].into_iter().chain(rule.split(' ')).collect();
        lab.netns(node)
            .expect("the lab has it")
            .exec(&Dialect::Nft.program(family, ""), &args)
            .expect("the lab has it");
    }
}

#[test]
fn everything_is_delivered_when_nothing_filters() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for layout in [Layout::Routed, Layout::Bridged] {
        let start = Instant::now();
        let mut lab = Lab::build(&spec(layout))?;
        eprintln!("{layout:?}: built in {:?}", start.elapsed());
        lab.listen(&TRANSPORTS)?;
        let start = Instant::now();
        let mut probes = Vec::new();
        for (from, source) in lab.endpoints().iter().enumerate() {
            for destination in lab.endpoints() {
                for family in Family::BOTH {
                    let destination = destination.address(family).unwrap();
                    for transport in TRANSPORTS {
                        let transport = match transport {
                            Transport::Port(..) => transport,
                            Transport::Portless(_) => Transport::echo(destination),
                        };
                        let source = source.address(family).unwrap();
                        probes.push(Probe { from, source, destination, transport, expected: None });
                    }
                }
            }
        }
        let outcomes = lab.probe(&probes)?;
        eprintln!("{layout:?}: {} probes in {:?}", probes.len(), start.elapsed());
        for (probe, outcome) in probes.iter().zip(outcomes) {
            assert_eq!(outcome, Outcome::Answered, "{layout:?} {probe:?}");
        }
    }
    Ok(())
}

#[test]
fn a_drop_rule_blocks_what_it_matches_and_nothing_else() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for layout in [Layout::Routed, Layout::Bridged] {
        let mut lab = Lab::build(&spec(layout))?;
        lab.listen(&TRANSPORTS)?;
        let b = [Family::V4, Family::V6].map(|family| address(&lab, "b", family).to_string());
        for (family, address) in Family::BOTH.into_iter().zip(&b) {
            let program = Dialect::Nft.program(family, "");
            let rule =
                ["-w", "-A", "FORWARD", "-d", address, "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP"];
            lab.netns("node-a")?.exec(&program, &rule)?;
        }
        let all: Vec<usize> = ["a", "b", "c", "d", "outside"].map(|name| lab.find(name).unwrap()).to_vec();
        let tables = lab.matrix(&all, &TRANSPORTS, &|_| None)?;
        assert_eq!(tables.len(), 2);
        for (family, table) in tables {
            assert_eq!(table.rows.len(), 4, "{family:?}");
            for (transport, rows) in &table.rows {
                assert_eq!(
                    *rows,
                    ["#X...", ".#...", ".X#..", ".X.#.", ".X..#"],
                    "{layout:?} {family:?} {transport}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn an_arrival_without_an_answer_is_told_from_a_block() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut lab = Lab::build(&spec(Layout::Routed))?;
    lab.listen(&TRANSPORTS)?;
    for family in Family::BOTH {
        let program = Dialect::Nft.program(family, "");
        let from = address(&lab, "b", family).to_string();
        lab.netns("node-a")?.exec(&program, &["-w", "-A", "FORWARD", "-s", &from, "-j", "DROP"])?;
        for transport in TRANSPORTS {
            let to = address(&lab, "b", family);
            let transport = if transport == Transport::Portless(1) { Transport::echo(to) } else { transport };
            let probes =
                [probe(&lab, "a", to, transport), probe(&lab, "b", address(&lab, "a", family), transport)];
            assert_eq!(lab.probe(&probes)?, [Outcome::Arrived, Outcome::Blocked], "{transport}");
        }
        // Where nobody listens, the arrival counts all the same.
        let closed = Transport::Port(Protocol::Tcp, 4444);
        let probes = [
            probe(&lab, "b", address(&lab, "b", family), closed),
            probe(&lab, "a", address(&lab, "c", family), closed),
        ];
        assert_eq!(lab.probe(&probes)?, [Outcome::Arrived, Outcome::Arrived]);
    }
    Ok(())
}

#[test]
fn cold_neighbour_discovery_crosses_the_filter_of_a_bridge() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (layout, blocked) in [(Layout::Routed, false), (Layout::Bridged, true)] {
        let mut lab = Lab::build(&spec(layout))?;
        lab.listen(&TRANSPORTS)?;
        let probes = [probe(&lab, "a", address(&lab, "b", Family::V6), TRANSPORTS[0])];
        assert_eq!(lab.probe(&probes)?, [Outcome::Answered]);
        // Neighbour solicitations, which only a bridge shows to FORWARD.
        filter_v6(&lab, "-A FORWARD -p icmpv6 --icmpv6-type 135 -j DROP");
        lab.forget_neighbours()?;
        let expected = if blocked { Outcome::Blocked } else { Outcome::Answered };
        assert_eq!(lab.probe(&probes)?, [expected], "{layout:?}");
    }
    Ok(())
}

fn filter_v6(lab: &Lab, rule: &str) {
    let args: Vec<&str> = ["-w"].into_iter().chain(rule.split(' ')).collect();
    lab.netns("node-a")
        .expect("the lab has it")
        .exec(&Dialect::Nft.program(Family::V6, ""), &args)
        .expect("the lab has it");
}

#[test]
fn services_reach_their_backends() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (layout, dialect) in [(Layout::Routed, Dialect::Nft), (Layout::Bridged, Dialect::Legacy)] {
        let mut lab = Lab::build(&spec(layout))?;
        lab.listen(&[Transport::Port(Protocol::Tcp, 8080), Transport::Port(Protocol::Udp, 8080)])?;
        let virtual_ips: [IpAddr; 2] = ["10.0.0.10".parse()?, "fd00:10::10".parse()?];
        let mut services = Vec::new();
        for address_of_service in virtual_ips {
            for protocol in Protocol::ALL {
                services.push(Service {
                    address: address_of_service,
                    protocol,
                    port: 80,
                    backend: address(&lab, "b", Family::of(address_of_service)),
                    target: 8080,
                    node_port: Some(30080),
                });
            }
        }
        // Twice: the second time in place of the first.
        for node in ["node-a", "node-b", "node-a"] {
            service::install(lab.netns(node)?, dialect, &services)?;
        }
        let mut probes = Vec::new();
        for destination in virtual_ips {
            for protocol in Protocol::ALL {
                // From beside the backend, from the backend to itself, from another node, from the node.
                for from in ["a", "b", "d", "node-a"] {
                    probes.push(probe(&lab, from, destination, Transport::Port(protocol, 80)));
                }
                let node = address(&lab, "node-a", Family::of(destination));
                probes.push(probe(&lab, "outside", node, Transport::Port(protocol, 30080)));
            }
        }
        for (probe, outcome) in probes.iter().zip(lab.probe(&probes)?) {
            assert_eq!(outcome, Outcome::Answered, "{layout:?} {dialect:?} {probe:?}");
        }
        // No Service, no answer: the address is nobody's.
        service::install(lab.netns("node-a")?, dialect, &[])?;
        let gone = probe(&lab, "a", virtual_ips[0], Transport::Port(Protocol::Tcp, 80));
        assert_eq!(lab.probe(&[gone])?, [Outcome::Blocked]);
    }
    Ok(())
}

#[test]
fn crafted_packets_arrive_as_they_are() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let lab = Lab::build(&spec(Layout::Routed))?;
    let node = lab.netns("node-a")?;
    let chain: &[(&str, &str)] = &[
        ("invalid", "-m conntrack --ctstate INVALID"),
        ("options", "-p udp -m u32 --u32 0>>24&0xF=6:15"),
        ("udp", "-p udp"),
    ];
    for family in Family::BOTH {
        for (name, condition) in chain {
            if family == Family::V6 && *name == "options" {
                continue;
            }
            // What comes back (RST, ICMP errors) is not counted.
            let source = address(&lab, "a", family).to_string();
            let mut args = vec!["-w", "-A", "FORWARD", "-s", &source, "-m", "comment", "--comment", name];
            args.extend(condition.split(' '));
            node.exec(&Dialect::Nft.program(family, ""), &args)?;
        }
    }
    let ends = |family| Ends {
        source: (address(&lab, "a", family), 3333).into(),
        destination: (address(&lab, "b", family), 4444).into(),
    };
    let [v4, v6] = Family::BOTH.map(ends);
    let mut packets = fragments(&udp(v4, &[7; 3000])?, 1400, 9)?;
    packets.extend(fragments(&udp(v6, &[7; 3000])?, 1400, 9)?);
    packets.push(with_ipv4_options(&udp(v4, b"options")?, 3)?);
    packets.push(tcp(v4, Segment::SynFin, 1)?);
    packets.push(tcp(v6, Segment::SynFin, 1)?);
    lab.netns("a")?.run(|| {
        let sender = IpSender::open()?;
        packets.iter().try_for_each(|packet| sender.send(packet))
    })?;
    let count = |family, name: &str| -> Result<u64> {
        let saved = node.exec(&Dialect::Nft.program(family, "-save"), &["-c", "-t", "filter"])?;
        let line = saved.lines().find(|line| line.contains(&format!("--comment {name}"))).unwrap().to_owned();
        Ok(line[1..].split(':').next().unwrap().parse()?)
    };
    assert_eq!(count(Family::V4, "invalid")?, 1);
    assert_eq!(count(Family::V6, "invalid")?, 1);
    assert_eq!(count(Family::V4, "options")?, 1);
    // Conntrack puts fragments together before FORWARD: one datagram in IPv4.
    assert_eq!(count(Family::V4, "udp")?, 2);
    assert!(count(Family::V6, "udp")? >= 1);
    Ok(())
}

#[test]
fn namespaces_are_gone_afterwards() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let lab = Lab::build(&spec(Layout::Routed))?;
    let path = format!("/run/netns/{}", lab.netns("a")?.name());
    assert!(std::fs::exists(&path)?);
    drop(lab);
    assert!(!std::fs::exists(&path)?);
    Ok(())
}

#[test]
fn an_expected_delivery_is_waited_for() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut lab = Lab::build(&spec(Layout::Routed))?;
    lab.listen(&TRANSPORTS)?;
    filter(&lab, "node-a", "-A FORWARD -m conntrack --ctstate NEW -j DROP");
    let opener = {
        let node = lab.netns("node-a")?.clone();
        std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(900));
            node.exec("iptables-nft", &["-w", "-F", "FORWARD"])
        })
    };
    let mut probes = [probe(&lab, "a", address(&lab, "b", Family::V4), TRANSPORTS[0])];
    probes[0].expected = Some(Decision::Allow);
    assert_eq!(lab.probe(&probes)?, [Outcome::Answered]);
    opener.join().unwrap()?;
    Ok(())
}
