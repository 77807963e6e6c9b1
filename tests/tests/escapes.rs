//! What escapes judgement: packets show that each reason is real where this kernel can have it, and status says so.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use npm_agent::escape::Effect;
use npm_agent::reconcile::Freshness;
use npm_agent::status::Client;
use npm_agent::status::report::Report;
use npm_policy::flow::Transport;
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::lab::agent::{Agent, Settings};
use npm_tests::lab::node::{Layout, write_setting};
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Host, Lab, Spec, require_root};

/// How long a change of the node may take to be seen.
const PATIENCE: Duration = Duration::from_secs(20);
const UDP: Transport = Transport::Port(Protocol::Udp, 53);

/// `open` may be reached by everybody, `closed` by nobody.
const WORLD: &str = r#"
{apiVersion: v1, kind: Pod, metadata: {name: closed, labels: {app: closed}}, spec: {nodeName: node}, status: {phase: Running, podIPs: [{ip: 10.241.0.2}, {ip: "fd00:241::2"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: open}, spec: {nodeName: node}, status: {phase: Running, podIPs: [{ip: 10.241.0.3}, {ip: "fd00:241::3"}]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec: {podSelector: {matchLabels: {app: closed}}}
"#;

struct Node {
    // The agent ends before its lab.
    agent: Agent,
    lab: Lab,
    client: Client,
    _directory: tempfile::TempDir,
}

impl Node {
    fn start(layout: Layout, verify_interval: &str) -> Result<Self> {
        let host = |name: &str, v4: &str, v6: &str| -> Result<Host> {
            Ok(Host { name: name.into(), addresses: vec![v4.parse()?, v6.parse()?] })
        };
        let mut lab = Lab::build(&Spec {
            layout,
            nodes: vec![host("node", "10.240.0.4", "fd00:240::4")?],
            // The first pod's interface on the node is veth0.
            pods: vec![
                (0, host("closed", "10.241.0.2", "fd00:241::2")?),
                (0, host("open", "10.241.0.3", "fd00:241::3")?),
            ],
            externals: vec![],
        })?;
        lab.listen(&[UDP])?;
        let directory = tempfile::tempdir()?;
        let manifests = directory.path().join("manifests");
        std::fs::create_dir(&manifests)?;
        std::fs::write(manifests.join("world.yaml"), WORLD)?;
        let mut agent = Agent::start(
            lab.netns("node")?,
            Settings {
                backend: "iptables".into(),
                node: "node".into(),
                manifests,
                directory: directory.path().to_owned(),
                more: vec!["--verify-interval".into(), verify_interval.into()],
            },
        )?;
        agent.wait()?;
        let client = Client::new(Path::new(directory.path()).join("socket"));
        Ok(Self { agent, lab, client, _directory: directory })
    }

    /// What becomes of a packet, in each family.
    fn outcomes(&mut self, from: &str, to: &str) -> Result<Vec<Outcome>> {
        let (from, to) = (self.lab.find(from)?, self.lab.find(to)?);
        let mut probes = Vec::new();
        for family in Family::BOTH {
            let address =
                |endpoint: usize| self.lab.endpoints()[endpoint].address(family).context("no address");
            let (source, destination) = (address(from)?, address(to)?);
            probes.push(Probe { from, source, destination, transport: UDP, expected: None });
        }
        self.lab.probe(&probes)
    }

    /// Waits until the status says exactly these reasons: names and effects.
    fn wait_for(&self, expected: &[(&str, Effect)]) -> Result<Report> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.client.status(Freshness::Now, PATIENCE)?;
            let reasons = report.status.escapes.iter().map(|escape| (escape.name.as_str(), escape.effect));
            if reasons.eq(expected.iter().copied()) {
                return Ok(report);
            }
            if Instant::now() > deadline {
                bail!("wanted {expected:?}, is {:#?}\n{}", report.status.escapes, self.agent.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn on_node(&self, program: &str, line: &str) -> Result<String> {
        self.lab.netns("node")?.exec(program, &line.split(' ').collect::<Vec<_>>())
    }
}

#[test]
fn a_bridge_that_netfilter_does_not_see() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut node = Node::start(Layout::Bridged, "200ms")?;
    let report = node.wait_for(&[])?;
    assert!(report.ready, "{:?}", report.reasons);
    assert_eq!(node.outcomes("open", "closed")?, [Outcome::Blocked; 2]);

    let settings = ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"];
    let set = |node: &Node, value: &str| {
        node.lab.netns("node")?.run(|| settings.iter().try_for_each(|key| write_setting(key, value)))
    };
    set(&node, "0")?;
    assert_eq!(node.outcomes("open", "closed")?, [Outcome::Answered; 2], "the reason is real");
    let report = node.wait_for(&[("bridged", Effect::Unjudged); 2])?;
    assert!(!report.ready);
    let whats: Vec<&str> = report.status.escapes.iter().map(|escape| escape.what.as_str()).collect();
    for (what, family) in whats.iter().zip(["IPv4", "IPv6"]) {
        assert!(what.contains("cbr0") && what.contains(family) && what.ends_with("behind it: 1"), "{what}");
        assert!(report.reasons.contains(&format!("not judged: {what}")), "{:?}", report.reasons);
    }
    assert!(node.agent.log().contains("traffic escapes judgement"));

    // A bridge's own setting does as well.
    node.on_node("ip", "link set cbr0 type bridge nf_call_iptables 1 nf_call_ip6tables 1")?;
    assert!(node.wait_for(&[])?.ready);
    assert_eq!(node.outcomes("open", "closed")?, [Outcome::Blocked; 2]);
    node.on_node("ip", "link set cbr0 type bridge nf_call_iptables 0 nf_call_ip6tables 0")?;
    node.wait_for(&[("bridged", Effect::Unjudged); 2])?;
    set(&node, "1")?;
    assert!(node.wait_for(&[])?.ready);
    assert_eq!(node.outcomes("open", "closed")?, [Outcome::Blocked; 2]);
    node.agent.terminate()
}

/// Also when nothing is due for an hour.
#[test]
fn a_bridge_of_others_is_seen_when_it_comes_and_concerns_no_pod() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let node = Node::start(Layout::Routed, "1h")?;
    // The kernel's settings are the root namespace's in the beginning, whatever they are there.
    node.lab.netns("node")?.run(|| {
        write_setting("net/bridge/bridge-nf-call-iptables", "0")?;
        write_setting("net/bridge/bridge-nf-call-ip6tables", "1")
    })?;
    node.on_node("ip", "link add other0 type bridge")?;
    node.on_node("ip", "link set other0 up")?;
    for port in ["x0", "x1"] {
        node.on_node("ip", &format!("link add {port} type veth peer name {port}p"))?;
        node.on_node("ip", &format!("link set {port} master other0 up"))?;
    }
    let report = node.wait_for(&[("bridged", Effect::None)])?;
    assert!(report.ready, "{:?}", report.reasons);
    node.on_node("ip", "link del x1")?;
    node.wait_for(&[])?;
    node.agent.terminate()
}

#[test]
fn rules_that_bend_conntrack() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut node = Node::start(Layout::Routed, "200ms")?;
    node.wait_for(&[])?;
    // What `closed` starts is answered: its replies belong to a connection.
    assert_eq!(node.outcomes("closed", "open")?, [Outcome::Answered; 2]);
    for dialect in Dialect::BOTH {
        for (name, target) in [("notrack", "CT --notrack"), ("notrack", "NOTRACK"), ("zones", "CT --zone 7")]
        {
            for family in Family::BOTH {
                let program = dialect.program(family, "");
                node.on_node(&program, &format!("-w -t raw -A PREROUTING -i veth0 -j {target}"))?;
            }
            let report = node.wait_for(&[(name, Effect::Stricter); 2])?;
            assert!(report.ready, "{dialect:?} {target}: {:?}", report.reasons);
            assert_eq!(node.outcomes("closed", "open")?, [Outcome::Arrived; 2], "{dialect:?} {target}: real");
            // Nothing gets through that should not.
            assert_eq!(node.outcomes("open", "closed")?, [Outcome::Blocked; 2], "{dialect:?} {target}");
            for family in Family::BOTH {
                node.on_node(&dialect.program(family, ""), "-w -t raw -F PREROUTING")?;
            }
            node.wait_for(&[])?;
            assert_eq!(node.outcomes("closed", "open")?, [Outcome::Answered; 2], "{dialect:?} {target}");
        }
    }
    // What concerns the node's own packets only is no reason; nor is a target of another kind.
    for target in ["OUTPUT -j CT --notrack", "PREROUTING -j ACCEPT"] {
        node.on_node("iptables-nft", &format!("-w -t raw -A {target}"))?;
    }
    // nftables' own rules, one in a chain that is jumped to, and one too late to matter.
    node.lab.netns("node")?.exec_with_input(
        "nft",
        &["-f", "-"],
        "table inet own {\n\
           chain deeper { notrack; }\n\
           chain early { type filter hook prerouting priority raw; ct mark 7 jump deeper; iifname \"none\" ct zone set 7; }\n\
           chain late { type filter hook prerouting priority mangle; notrack; }\n\
         }\n",
    )?;
    let report = node.wait_for(&[("zones", Effect::Stricter), ("notrack", Effect::Stricter)])?;
    for escape in &report.status.escapes {
        assert!(escape.what.starts_with("1 rules in nftables' table inet own "), "{}", escape.what);
    }
    node.agent.terminate()
}
