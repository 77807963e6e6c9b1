//! Two pods that may not talk to each other send to each other on the same tuple, at once and from both ends: conntrack
//! makes an established connection of that if anybody lets it. Nothing may arrive, and nothing may be left of it.
//!
//! `NPM_FLOOD_SECONDS=60` makes each flood last that long.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use npm_agent::backend::ebpf::choice::Choice;
use npm_agent::conntrack::{Conntrack, MarkFilter};
use npm_policy::flow::{Decision, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_policy::world::World;
use npm_tests::lab::packet::{Ends, IpSender, Segment, tcp, udp};
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::require_root;
use npm_tests::pair::{CLOSED, Kind, Ports, Stage, world};
use npm_tests::scenario::enforcer::Means;

/// Only b may open connections to a.
const ONE_WAY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a, namespace: x}
spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}
"#;

fn lasts() -> Result<Duration> {
    let seconds = std::env::var("NPM_FLOOD_SECONDS").unwrap_or_else(|_| "0.15".into());
    Ok(Duration::from_secs_f64(seconds.parse().context("NPM_FLOOD_SECONDS")?))
}

fn all_means() -> Vec<(String, Means)> {
    let mut all = vec![("iptables".to_owned(), Means::Backend)];
    all.extend(Choice::every().map(|choice| (choice.to_string(), Means::Ebpf(choice))));
    all
}

#[test]
fn denied_pods_never_reach_each_other() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (name, means) in all_means() {
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
        // What was open has ended, and the kernel gives its memory to what comes next on the same tuple.
        stage.proven(0, Duration::from_secs(10)).with_context(|| name.clone())?;
        stage.deafen()?;
        for (kind, family, ports) in every_flood() {
            let sent = stage.flood(kind, family, ports, lasts()?)?;
            let arrived = stage.arrived()?;
            eprintln!("{name}: {kind:?} {family:?} {ports:?}: {sent} sent, {arrived} arrived");
            assert!(sent > 100, "{name}: {kind:?}: {sent} packets are no flood");
            assert_eq!(arrived, 0, "{name}: {kind:?} {family:?} {ports:?}: {sent} sent");
        }
        stage.forgotten().with_context(|| name.clone())?;
    }
    Ok(())
}

fn every_flood() -> Vec<(Kind, Family, Ports)> {
    let mut all = Vec::new();
    for kind in [Kind::Udp, Kind::Tcp, Kind::Icmp, Kind::Sctp] {
        for family in Family::BOTH {
            all.extend([(kind, family, Ports::Same), (kind, family, Ports::Fresh)]);
        }
    }
    all
}

/// One end after the other: first packets, and a while later what would answer them.
#[test]
fn nor_one_after_the_other() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (name, means) in all_means() {
        let mut stage = Stage::build(means)?;
        stage.enforcer.enforce(&world(CLOSED)?)?;
        stage.deafen()?;
        for kind in [Kind::Udp, Kind::Tcp, Kind::Icmp, Kind::Sctp] {
            for family in Family::BOTH {
                let ports = 20_000..20_050;
                stage.open(kind, family, ports.clone())?;
                stage.answer(kind, family, ports.clone())?;
                // Where user space ends denied entries it has done so by then.
                std::thread::sleep(Duration::from_millis(150));
                stage.answer(kind, family, ports.clone())?;
                stage.open(kind, family, ports)?;
                assert_eq!(stage.arrived()?, 0, "{name}: {kind:?} {family:?}");
            }
        }
        stage.forgotten().with_context(|| name.clone())?;
    }
    Ok(())
}

/// Everything at once, so that a minute of it (`NPM_FLOOD_SECONDS=60`) takes ten minutes for all variants.
#[test]
fn nor_by_everything_in_turn() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (name, means) in all_means() {
        let mut stage = Stage::build(means)?;
        stage.enforcer.enforce(&world(CLOSED)?)?;
        stage.deafen()?;
        let sent = stage.flood_with(&every_flood(), lasts()?)?;
        let arrived = stage.arrived()?;
        eprintln!("{name}: {sent} sent, {arrived} arrived");
        assert!(sent > 1000, "{name}: {sent} packets are no flood");
        assert_eq!(arrived, 0, "{name}: {sent} sent");
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
    for (name, means) in all_means() {
        let mut stage = Stage::build(means)?;
        stage.enforcer.enforce(&world(CLOSED)?)?;
        stage.deafen()?;
        let pairs: [[IpAddr; 2]; 2] = [
            ["10.241.0.2".parse()?, "10.241.0.3".parse()?],
            ["fd00:241::2".parse()?, "fd00:241::3".parse()?],
        ];
        stage.lab.endpoints()[stage.pod("10.241.0.2")?].netns.run(|| {
            let sender = IpSender::open()?;
            for port in 0..FLOWS {
                let [from, to] = pairs[usize::from(port % 2)];
                let source = SocketAddr::new(from, 20_000 + port);
                let ends = Ends { source, destination: SocketAddr::new(to, 80) };
                let is_tcp = port % 4 >= 2;
                let packet = if is_tcp { tcp(ends, Segment::Syn, 1)? } else { udp(ends, b"not you")? };
                sender.send(&packet)?;
            }
            Ok(())
        })?;
        stage.forgotten().with_context(|| name.clone())?;
        assert_eq!(stage.arrived()?, 0, "{name}");
    }
    Ok(())
}

/// What one end is allowed works while the other, which is not, floods the same tuple: UDP always; TCP as under iptables where
/// proofs are in marks. Where they are in maps a part of the connections fails (docs/configuration.md, known limits).
#[test]
fn the_allowed_side_works_while_the_denied_one_floods() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (name, means) in all_means() {
        for family in Family::BOTH {
            let [answered, of] = beside_a_flood(means, Protocol::Udp, family, Some(Decision::Allow))?;
            assert_eq!(answered, of, "{name}, UDP, {family:?}");
        }
        let is_whole = !name.contains("maps");
        let expected = is_whole.then_some(Decision::Allow);
        let [answered, of] = beside_a_flood(means, Protocol::Tcp, Family::V4, expected)?;
        eprintln!("{name}, TCP: {answered} of {of} connections");
        assert!(answered == of || !is_whole, "{name}, TCP: {answered} of {of} connections");
    }
    Ok(())
}

/// How many of how many flows are answered, of b's, while a sends packets that would open them the other way round. An answer
/// that is expected is waited for longer.
fn beside_a_flood(
    means: Means,
    protocol: Protocol,
    family: Family,
    expected: Option<Decision>,
) -> Result<[usize; 2]> {
    let mut stage = Stage::build(means)?;
    stage.enforcer.enforce(&world(ONE_WAY)?)?;
    let transport = Transport::Port(protocol, 80);
    stage.lab.listen(&[transport])?;
    let (a, b) = (stage.pod("10.241.0.2")?, stage.pod("10.241.0.3")?);
    let address = |pod: usize| stage.lab.endpoints()[pod].address(family).context("both families");
    let (to, from) = (address(a)?, address(b)?);
    // The lab's probes come from ports from 20,000 up.
    let netns = stage.lab.endpoints()[a].netns.clone();
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let outcomes = std::thread::scope(|scope| {
        let flood = scope.spawn(|| -> Result<()> {
            netns.enter()?;
            let sender = IpSender::open()?;
            while !stop.load(Ordering::Relaxed) {
                for port in 20_000..20_040 {
                    let ends =
                        Ends { source: SocketAddr::new(to, 80), destination: SocketAddr::new(from, port) };
                    let packet = match protocol {
                        Protocol::Tcp => tcp(ends, Segment::Syn, 1)?,
                        Protocol::Udp | Protocol::Sctp => udp(ends, b"not you")?,
                    };
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
            let probe = Probe { from: b, source: from, destination: to, transport, expected };
            outcomes.extend(stage.lab.probe(&[probe; 8])?);
        }
        stop.store(true, Ordering::Relaxed);
        flood.join().expect("the flood does not panic")?;
        anyhow::Ok(outcomes)
    })?;
    let answered = outcomes.iter().filter(|outcome| **outcome == Outcome::Answered).count();
    Ok([answered, outcomes.len()])
}
