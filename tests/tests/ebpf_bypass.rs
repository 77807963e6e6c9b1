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
use npm_tests::lab::packet::{Ends, IpSender, udp};
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
    for (name, means) in all_means() {
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
