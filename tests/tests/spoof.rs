//! Somebody else's packets with a pod's own address as their source: a pod reaches itself, and nobody else may pass for
//! it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use npm_policy::goal::Family;
use npm_tests::lab::agent::{Agent, Settings};
use npm_tests::lab::node::Layout;
use npm_tests::lab::packet::{Ends, IpSender, udp};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Host, Lab, Spec, require_root};

const PODS: &str = r#"
{apiVersion: v1, kind: Pod, metadata: {name: victim, labels: {app: victim}}, spec: {nodeName: node}, status: {phase: Running, podIPs: [{ip: 10.241.0.2}, {ip: "fd00:241::2"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: other}, spec: {nodeName: node}, status: {phase: Running, podIPs: [{ip: 10.241.0.3}, {ip: "fd00:241::3"}]}}
"#;
const CLOSED: &str = r#"
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec: {podSelector: {matchLabels: {app: victim}}}
"#;
const COUNT: u64 = 5;

#[test]
fn nobody_passes_for_the_pod_itself() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for dialect in Dialect::BOTH {
        let host = |name: &str, v4: &str, v6: &str| -> Result<Host> {
            Ok(Host { name: name.into(), addresses: vec![v4.parse()?, v6.parse()?] })
        };
        let lab = Lab::build(&Spec {
            layout: Layout::Routed,
            nodes: vec![host("node", "10.240.0.4", "fd00:240::4")?],
            pods: vec![
                (0, host("victim", "10.241.0.2", "fd00:241::2")?),
                (0, host("other", "10.241.0.3", "fd00:241::3")?),
            ],
            externals: vec![],
        })?;
        let directory = tempfile::tempdir()?;
        let manifests = directory.path().join("manifests");
        std::fs::create_dir(&manifests)?;
        std::fs::write(manifests.join("pods.yaml"), PODS)?;
        let mut agent = Agent::start(
            lab.netns("node")?,
            Settings {
                backend: "iptables".into(),
                node: "node".into(),
                manifests: manifests.clone(),
                directory: directory.path().to_owned(),
                more: vec!["--iptables-variant".into(), dialect.name().into()],
            },
        )?;
        agent.wait()?;
        for family in Family::BOTH {
            let open = arrivals(&lab, family, COUNT)?;
            assert_eq!(open, COUNT, "{dialect:?} {family:?}: without a policy they arrive");
        }
        std::fs::write(manifests.join(".new"), format!("{PODS}{CLOSED}"))?;
        std::fs::rename(manifests.join(".new"), manifests.join("pods.yaml"))?;
        agent.wait()?;
        for family in Family::BOTH {
            assert_eq!(arrivals(&lab, family, 0)?, 0, "{dialect:?} {family:?}");
        }
        agent.terminate()?;
    }
    Ok(())
}

/// Sends packets from `other` that say they are from `victim` to itself, and counts those that reach `victim`'s link.
fn arrivals(lab: &Lab, family: Family, expected: u64) -> Result<u64> {
    let victim = &lab.endpoints()[lab.find("victim")?];
    let own = victim.address(family).context("no address")?;
    let iptables = Dialect::Nft.program(family, "");
    let rule = ["-t", "raw", "-A", "PREROUTING", "-p", "udp", "-s", &own.to_string(), "-j", "DROP"]
        .map(String::from);
    let rule: Vec<&str> = rule.iter().map(String::as_str).collect();
    victim.netns.exec(&iptables, &["-t", "raw", "-F", "PREROUTING"])?;
    victim.netns.exec(&iptables, &rule)?;
    let sender = lab.netns("other")?.run(IpSender::open)?;
    for port in 0..COUNT {
        let source = SocketAddr::new(own, 30_000 + u16::try_from(port)?);
        let packet = udp(Ends { source, destination: SocketAddr::new(own, 9) }, b"not me")?;
        sender.send(&packet)?;
    }
    // What is expected is waited for; that nothing comes shows after some time only.
    let deadline = Instant::now() + Duration::from_millis(if expected == 0 { 300 } else { 20_000 });
    loop {
        let saved = victim.netns.exec(&Dialect::Nft.program(family, "-save"), &["-c", "-t", "raw"])?;
        let line = saved.lines().find(|line| line.contains("-j DROP")).context("no such rule")?;
        let count = line.trim_start_matches('[').split(':').next().context("no counter")?.parse()?;
        if Instant::now() > deadline || (expected > 0 && count >= expected) {
            return Ok(count);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
