//! Packets that connection tracking leaves to us, because it does not follow them (UNTRACKED) or does not understand them (INVALID), and
//! packets that can't be read: as packets through a node, by whichever program, beside iptables.
#![forbid(unsafe_code)]

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use npm_agent::backend::ebpf::choice::Choice;
use npm_common::event::Outcome;
use npm_policy::goal::Family;
use npm_tests::lab::packet::{Ends, IpSender, Segment, tcp, udp, with_ipv4_options};
use npm_tests::lab::require_root;
use npm_tests::pair::{CLOSED, Stage, world};
use npm_tests::scenario::enforcer::{Enforcer, Means};

/// b takes port 80 from a.
const POLICY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: b, namespace: x}
spec:
  podSelector: {matchLabels: {app: b}}
  ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: 80}, {protocol: UDP, port: 80}]}]
"#;
const IPV4_LEN_BYTES: usize = 20;
const IPV6_LEN_BYTES: usize = 40;
/// How often each packet is sent.
const TIMES: u16 = 10;

fn ends(family: Family, from: u16, to: u16) -> Result<Ends> {
    let (source, destination): (IpAddr, IpAddr) = match family {
        Family::V4 => ("10.241.0.2".parse()?, "10.241.0.3".parse()?),
        Family::V6 => ("fd00:241::2".parse()?, "fd00:241::3".parse()?),
    };
    Ok(Ends { source: SocketAddr::new(source, from), destination: SocketAddr::new(destination, to) })
}

/// Puts headers before what an IPv6 packet holds, each of 8 bytes with padding for options (RFC 8200 §4.2): the first of this
/// kind, more of destination options.
fn with_ipv6_headers(packet: &[u8], first: u8, number: usize) -> Result<Vec<u8>> {
    const DESTINATION_OPTIONS: u8 = 60;
    let (header, rest) = packet.split_at_checked(IPV6_LEN_BYTES).context("an IPv6 header")?;
    let mut changed = header.to_vec();
    let length = u16::try_from(rest.len() + 8 * number)?;
    changed[4..6].copy_from_slice(&length.to_be_bytes());
    changed[6] = first;
    for index in 1..=number {
        let next = if index == number { header[6] } else { DESTINATION_OPTIONS };
        changed.extend([next, 0, 1, 4, 0, 0, 0, 0]);
    }
    changed.extend(rest);
    Ok(changed)
}

/// UDP that is shorter than its ports, by what the IP header says.
fn short(family: Family, from: u16) -> Result<Vec<u8>> {
    let mut packet = udp(ends(family, from, 80)?, b"")?;
    match family {
        Family::V4 => {
            packet.truncate(IPV4_LEN_BYTES + 2);
            packet[2..4].copy_from_slice(&22_u16.to_be_bytes());
            packet[10..12].copy_from_slice(&[0, 0]);
            let checksum = npm_tests::lab::packet::internet_checksum(&packet[..IPV4_LEN_BYTES]);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        Family::V6 => {
            packet.truncate(IPV6_LEN_BYTES + 2);
            packet[4..6].copy_from_slice(&2_u16.to_be_bytes());
        }
    }
    Ok(packet)
}

/// An IPv6 header that announces UDP and no length (as of a jumbogram), and nothing behind it.
fn cut_off(from: u16) -> Result<Vec<u8>> {
    let mut packet = udp(ends(Family::V6, from, 80)?, b"")?;
    packet.truncate(IPV6_LEN_BYTES);
    packet[4..6].copy_from_slice(&[0, 0]);
    Ok(packet)
}

/// Sends packets from a; gives how many of them arrived at b.
fn arrive(stage: &Stage, make: impl Fn(u16) -> Result<Vec<u8>>) -> Result<u64> {
    stage.deafen()?;
    let packets: Vec<Vec<u8>> = (0..TIMES).map(|number| make(30_000 + number)).collect::<Result<_>>()?;
    let netns = stage.lab.endpoints()[stage.pod("10.241.0.2")?].netns.clone();
    // A veth hands a packet on within the call that sends it: when all are sent, all have arrived that will.
    netns.run(|| {
        let sender = IpSender::open()?;
        packets.iter().try_for_each(|packet| sender.send(packet))
    })?;
    stage.arrived()
}

/// Keeps what comes to the node from being tracked.
fn untrack(stage: &Stage, what: &[&str]) -> Result<()> {
    for program in ["iptables-nft", "ip6tables-nft"] {
        let rule = [&["-t", "raw", "-A", "PREROUTING"], what, &["-j", "NOTRACK"]].concat();
        stage.node().exec(program, &rule)?;
    }
    Ok(())
}

fn counted(stage: &Stage, outcome: Outcome) -> Result<u64> {
    let Enforcer::Ebpf { backend, .. } = &stage.enforcer else { anyhow::bail!("not the eBPF backend") };
    Ok(backend.outcomes()?.get(&outcome).copied().unwrap_or(0))
}

#[test]
fn what_connection_tracking_leaves_is_judged_by_its_headers() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let all = [Means::Backend].into_iter().chain(Choice::every().map(Means::Ebpf));
    for means in all {
        let mut stage = Stage::build(means)?;
        untrack(&stage, &["-p", "udp"])?;
        stage.enforcer.enforce(&world(POLICY)?)?;
        for (port, expected) in [(80, u64::from(TIMES)), (81, 0)] {
            for family in Family::BOTH {
                let invalid = arrive(&stage, |from| tcp(ends(family, from, port)?, Segment::SynFin, 1))?;
                ensure!(invalid == expected, "{means:?}, {family:?}, INVALID, {port}: {invalid} arrived");
                let plain = arrive(&stage, |from| udp(ends(family, from, port)?, b"untracked"))?;
                ensure!(plain == expected, "{means:?}, {family:?}, UNTRACKED, {port}: {plain} arrived");
                let options = arrive(&stage, |from| {
                    let packet = udp(ends(family, from, port)?, b"untracked")?;
                    match family {
                        Family::V4 => with_ipv4_options(&packet, 4),
                        // Hop-by-hop options, then destination options.
                        Family::V6 => with_ipv6_headers(&packet, 0, 2),
                    }
                })?;
                ensure!(options == expected, "{means:?}, {family:?}, options, {port}: {options} arrived");
            }
        }
        ensure!(stage.connections()? == 0, "{means:?}: something was tracked");
    }
    Ok(())
}

#[test]
fn what_can_not_be_read_is_dropped_and_counted_where_a_pod_is_isolated() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    type Make = fn(u16) -> Result<Vec<u8>>;
    let packets: [(&str, Make, Outcome); 4] = [
        ("no room for ports, IPv4", |from| short(Family::V4, from), Outcome::BadHeader),
        ("no room for ports, IPv6", |from| short(Family::V6, from), Outcome::BadHeader),
        ("nothing behind the header", cut_off, Outcome::Truncated),
        (
            "nine extension headers",
            |from| with_ipv6_headers(&udp(ends(Family::V6, from, 80)?, b"deep")?, 60, 9),
            Outcome::TooManyExtensions,
        ),
    ];
    for choice in Choice::every() {
        let mut stage = Stage::build(Means::Ebpf(choice))?;
        // What connection tracking could read is judged by its connection, whatever stands in between.
        untrack(&stage, &[])?;
        for (policies, expected) in [("", u64::from(TIMES)), (CLOSED, 0)] {
            stage.enforcer.enforce(&world(policies)?)?;
            for (name, make, reason) in &packets {
                let before = counted(&stage, *reason)?;
                let arrived = arrive(&stage, make)?;
                let counted = counted(&stage, *reason)? - before;
                ensure!(arrived == expected, "{choice}: {name}: {arrived} arrived, {expected} should");
                ensure!(counted == u64::from(TIMES) - expected, "{choice}: {name}: {counted} counted");
            }
        }
    }
    Ok(())
}
