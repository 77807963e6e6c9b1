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
use npm_tests::lab::agent::{Agent, Settings, binary};
use npm_tests::lab::netns::Netns;
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
    // The agent ends before its lab, and what it has pinned goes in between.
    agent: Agent,
    _pins: Pins,
    lab: Lab,
    client: Client,
    _directory: tempfile::TempDir,
}

/// What the eBPF backend pins outlives namespaces.
struct Pins(Netns);

impl Drop for Pins {
    fn drop(&mut self) {
        let cleaned = binary().and_then(|agent| self.0.exec(&agent.to_string_lossy(), &["cleanup"]));
        if let Err(error) = cleaned {
            eprintln!("pins are left behind: {error:#}");
        }
    }
}

impl Node {
    fn start(layout: Layout, verify_interval: &str) -> Result<Self> {
        Self::start_with("iptables", layout, verify_interval)
    }

    fn start_with(backend: &str, layout: Layout, verify_interval: &str) -> Result<Self> {
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
                backend: backend.to_owned(),
                node: "node".into(),
                manifests,
                directory: directory.path().to_owned(),
                more: ["--verify-interval", verify_interval, "--instance", lab.netns("node")?.name()]
                    .map(str::to_owned)
                    .to_vec(),
            },
        )?;
        agent.wait()?;
        let client = Client::new(Path::new(directory.path()).join("socket"));
        let pins = Pins(lab.netns("node")?.clone());
        Ok(Self { agent, _pins: pins, lab, client, _directory: directory })
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

/// A filter sends packets from the interface where they come in straight to a pod: no FORWARD, no conntrack.
#[test]
fn filters_before_netfilter() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut node = Node::start(Layout::Routed, "200ms")?;
    assert_eq!(node.outcomes("open", "closed")?, [Outcome::Blocked; 2]);
    // A frame for the pod has to carry the pod's address, so the gateway of `open` takes it.
    let shown = node.lab.netns("closed")?.exec("ip", &["-o", "link", "show", "eth0"])?;
    let address = shown.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
    let address = address.context("no link address")?;
    node.on_node("ip", &format!("link set veth1 address {address}"))?;
    node.lab.forget_neighbours()?;
    node.on_node("tc", "qdisc add dev veth1 clsact")?;
    assert_eq!(node.wait_for(&[])?.status.escapes, [], "a hook without filters does nothing");
    node.on_node(
        "tc",
        "filter add dev veth1 ingress protocol ip u32 match ip dst 10.241.0.2 action mirred egress redirect dev veth0",
    )?;
    let report = node.wait_for(&[("ingress-filter", Effect::Unknown)])?;
    assert!(report.ready, "{:?}", report.reasons);
    let what = &report.status.escapes[0].what;
    assert!(what.contains("veth1") && what.ends_with(": u32"), "{what}");
    let outcomes = node.outcomes("open", "closed")?;
    assert_ne!(outcomes[0], Outcome::Blocked, "the reason is real");
    assert_eq!(outcomes[1], Outcome::Blocked, "IPv6 was left alone");
    node.on_node("tc", "qdisc del dev veth1 clsact")?;
    node.wait_for(&[])?;
    assert_eq!(node.outcomes("open", "closed")?, [Outcome::Blocked; 2]);
    node.agent.terminate()
}

/// The rule that leads to us, and makes the kernel track connections, is gone: with iptables-nft it is put back at once,
/// though no read-back is due for an hour.
#[test]
fn the_jump_is_put_back_when_it_goes() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut node = Node::start(Layout::Routed, "1h")?;
    for (count, family) in (1..).zip(Family::BOTH) {
        let program = Dialect::Nft.program(family, "");
        // What comes just after a write is taken for the write itself.
        std::thread::sleep(Duration::from_millis(500));
        node.on_node(&program, "-w -F FORWARD")?;
        let start = Instant::now();
        while node.client.status(Freshness::Now, PATIENCE)?.status.backends[0].drift_repairs < count {
            anyhow::ensure!(start.elapsed() < PATIENCE, "it is not put back\n{}", node.agent.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        eprintln!("{family:?}: put back within {:?}", start.elapsed());
        assert_eq!(node.outcomes("open", "closed")?, [Outcome::Blocked; 2], "{family:?}");
    }
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
        assert!(escape.what.ends_with(", in nftables' table inet own: 1"), "{}", escape.what);
    }
    node.agent.terminate()
}

/// What IPsec encrypts leaves as packets that the eBPF program can't read. (This kernel has no ESP, so no packet shows it.)
#[test]
fn policies_of_ipsec() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (backend, effect) in [("iptables", Effect::None), ("ebpf", Effect::Unjudged)] {
        let node = Node::start_with(backend, Layout::Routed, "200ms")?;
        let policy = |what: &str, source: &str| {
            let template = match what {
                "add" => " tmpl src 10.240.0.4 dst 10.240.0.9 proto esp mode tunnel",
                _ => "",
            };
            node.on_node("ip", &format!("xfrm policy {what} src {source} dst 10.9.0.0/16 dir out{template}"))
        };
        // From a pod that no policy selects.
        policy("add", "10.241.0.3/32")?;
        let report = node.wait_for(&[("ipsec", Effect::None)])?;
        assert!(report.ready, "{backend}: {:?}", report.reasons);
        policy("add", "10.241.0.0/30")?;
        // The reason was there before; what it does is new.
        let deadline = Instant::now() + PATIENCE;
        let report = loop {
            let report = node.wait_for(&[("ipsec", effect)])?;
            if report.status.escapes[0].what.contains("encrypt what leaves the node: 2") {
                break report;
            }
            anyhow::ensure!(Instant::now() < deadline, "{:?}", report.status.escapes);
        };
        assert_eq!(report.ready, effect == Effect::None, "{backend}: {:?}", report.reasons);
        policy("delete", "10.241.0.3/32")?;
        policy("delete", "10.241.0.0/30")?;
        assert!(node.wait_for(&[])?.ready, "{backend}");
        node.agent.terminate()?;
    }
    Ok(())
}

/// Without the rule nothing makes the kernel track connections: it is put back at once, though no read-back is due for an
/// hour, and shown until the next one.
#[test]
fn the_rule_that_tracks_connections_is_put_back() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let node = Node::start_with("ebpf", Layout::Routed, "1h")?;
    node.wait_for(&[])?;
    // What comes just after a write is taken for the write itself.
    std::thread::sleep(Duration::from_millis(500));
    node.on_node("iptables-nft", "-w -F NPM-AGENT-CONNTRACK")?;
    let report = node.wait_for(&[("conntrack-rule-gone", Effect::Stricter)])?;
    assert!(report.ready, "{:?}", report.reasons);
    // The status has it when the read-back has ended.
    let start = Instant::now();
    while node.client.status(Freshness::Now, PATIENCE)?.status.backends[0].drift_repairs != 1 {
        anyhow::ensure!(start.elapsed() < PATIENCE, "it is not counted\n{}", node.agent.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    node.agent.terminate()
}
