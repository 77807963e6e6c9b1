//! Denied flows as the eBPF backend tells them: pods, port, direction, policies, whichever program is loaded and however it is
//! attached; what is in no line is counted.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::choice::Choice;
use npm_agent::backend::ebpf::enforcer::{Ebpf, Options};
use npm_agent::backend::ebpf::width::Width;
use npm_agent::backend::meter::Reading;
use npm_agent::denied::{Line, Log};
use npm_agent::exec::Tools;
use npm_agent::interfaces::select::Selection;
use npm_common::layout::SCHEMA;
use npm_common::mark::ProofBit;
use npm_policy::compile::compile;
use npm_policy::flow::Transport;
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Lab, Spec, require_root};
use npm_tests::pair::world;
use npm_tests::scenario::enforcer::tracking;

const PATIENCE: Duration = Duration::from_secs(30);
const PODS: [(&str, [&str; 2]); 2] =
    [("a", ["10.241.0.2", "fd00:241::2"]), ("b", ["10.241.0.3", "fd00:241::3"])];

/// b takes TCP/80 from a only, and sends nothing.
const POLICIES: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: x}
spec: {podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: x}
spec:
  podSelector: {matchLabels: {app: b}}
  ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: 80}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: silent, namespace: x}
spec: {podSelector: {matchLabels: {app: b}}, policyTypes: [Egress]}
"#;

const WEB: Transport = Transport::Port(Protocol::Tcp, 80);
const SHUT: Transport = Transport::Port(Protocol::Tcp, 443);
const DNS: Transport = Transport::Port(Protocol::Udp, 53);
/// It is kept from being tracked.
const UNTRACKED: Transport = Transport::Port(Protocol::Udp, 54);

struct Stage {
    // Dropped in this order: what enforces before where.
    backend: Ebpf,
    lines: Receiver<Line>,
    lab: Lab,
}

impl Stage {
    fn build(choice: &str, width: Width) -> Result<Self> {
        let mut lab = Lab::build(&Spec::one_node(&PODS)?)?;
        lab.listen(&[WEB, SHUT, DNS, UNTRACKED])?;
        let node = lab.netns("node")?;
        if width == Width::Wide {
            // As if an earlier process had needed the wide rows.
            let pins = Path::new("/sys/fs/bpf/npm-agent").join(node.name()).join(format!("v{SCHEMA}/wide"));
            std::fs::create_dir_all(&pins).with_context(|| pins.display().to_string())?;
        }
        for program in ["iptables-nft", "ip6tables-nft"] {
            node.exec(
                program,
                &["-t", "raw", "-A", "PREROUTING", "-p", "udp", "--dport", "54", "-j", "NOTRACK"],
            )?;
        }
        let options = Options {
            instance: node.name().to_owned(),
            choice: format!("{choice},tell").parse()?,
            iptables: tracking(Dialect::Nft),
            tools: Tools::default(),
            selection: Selection::default(),
            proof: ProofBit::DEFAULT,
        };
        let (sender, lines) = channel();
        let sender = Mutex::new(sender);
        let log = Log::default();
        let world = world(POLICIES)?;
        for pod in world.pods() {
            for address in &pod.addresses {
                log.holder(*address, Some(pod.key.clone()));
            }
        }
        let sink = move |line: Line| {
            // The test may have ended.
            let _ = sender.lock().unwrap_or_else(PoisonError::into_inner).send(line);
        };
        let mut backend = node.run(|| Ok(Ebpf::new(options)?.with_log(log, Arc::new(sink))?))?;
        let goal = compile(&world, "node-a").0;
        node.run(|| Ok(backend.apply(&goal)?))?;
        Ok(Self { backend, lines, lab })
    }

    fn probe(
        &mut self,
        from: &str,
        to: &str,
        transport: impl Fn(IpAddr) -> Transport,
    ) -> Result<Vec<Outcome>> {
        let (from, to) = (self.lab.find(from)?, self.lab.find(to)?);
        let mut probes = Vec::new();
        for family in Family::BOTH {
            let address = |end: usize| self.lab.endpoints()[end].address(family).context("no address");
            let (source, destination) = (address(from)?, address(to)?);
            let transport = transport(destination);
            probes.push(Probe { from, source, destination, transport, expected: None });
        }
        self.lab.probe(&probes)
    }

    /// Collects lines until there are so many distinct ones.
    fn lines(&self, count: usize) -> Result<BTreeSet<[String; 6]>> {
        let deadline = Instant::now() + PATIENCE;
        let mut found = BTreeSet::new();
        while found.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).with_context(|| format!("lines so far: {found:#?}"))?;
            ensure!(line.interface > 0 && line.packets > 0, "{line:?}");
            ensure!(line.verdict.starts_with("denied: ") && line.verdict.contains(&line.port), "{line:?}");
            let Line { source, destination, addresses, port, direction, policies, .. } = line;
            let family = addresses.map_or("", |(source, _)| if source.is_ipv4() { "4" } else { "6" });
            found.insert([source, destination, family.to_owned(), port, direction, policies]);
        }
        Ok(found)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let removed =
            self.lab.netns("node").cloned().and_then(|node| node.run(|| Ok(self.backend.remove()?)));
        if let Err(error) = removed {
            eprintln!("pins are left behind: {error:#}");
        }
    }
}

#[test]
fn every_variant_names_pods_ports_and_policies() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut expected = BTreeSet::new();
    for family in ["4", "6"] {
        for (source, destination, port, direction, policies) in [
            ("x/a", "x/b", "TCP/443", "ingress", "x/deny,x/web"),
            ("x/a", "x/b", "ICMP", "ingress", "x/deny,x/web"),
            ("x/a", "x/b", "UDP/54", "ingress", "x/deny,x/web"),
            ("x/b", "x/a", "UDP/53", "egress", "x/silent"),
        ] {
            expected.insert([source, destination, family, port, direction, policies].map(str::to_owned));
        }
    }
    for (index, choice) in Choice::every().enumerate() {
        // Each way to read and to prove with either width.
        let width = Width::BOTH[(index + index / 2) % 2];
        let choice = choice.to_string();
        let mut stage = Stage::build(&choice, width)?;
        assert_eq!(stage.probe("a", "b", |_| WEB)?, [Outcome::Answered; 2], "{choice}");
        assert_eq!(stage.probe("a", "b", |_| SHUT)?, [Outcome::Blocked; 2], "{choice}");
        assert_eq!(stage.probe("a", "b", Transport::echo)?, [Outcome::Blocked; 2], "{choice}");
        assert_eq!(stage.probe("a", "b", |_| UNTRACKED)?, [Outcome::Blocked; 2], "{choice}");
        assert_eq!(stage.probe("b", "a", |_| DNS)?, [Outcome::Blocked; 2], "{choice}");
        let found = stage.lines(expected.len()).with_context(|| choice.clone())?;
        assert_eq!(found, expected, "{choice}");
    }
    Ok(())
}

/// Under a flood most packets have no line; all of them are in the counts.
#[test]
fn what_is_in_no_line_is_counted() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    const PACKETS: u16 = 20_000;
    let stage = Stage::build("", Width::Narrow)?;
    stage.lab.netns("a")?.run(|| {
        let socket = UdpSocket::bind("10.241.0.2:0").context("a socket")?;
        for port in 1000..1000 + PACKETS {
            socket.send_to(b"x", ("10.241.0.3", port)).context("sending")?;
        }
        Ok(())
    })?;
    let meter = stage.backend.meter().context("no meter")?;
    let deadline = Instant::now() + PATIENCE;
    let mut told = 0;
    loop {
        // The agent's thread reads now and then; lines of repeated packets come when their window ends.
        told += stage.lines.try_iter().map(|line| line.packets).sum::<u64>();
        let Reading { drops, unlogged, .. } = meter();
        let dropped: u64 = drops.iter().map(|(_, count)| count).sum();
        let untold: u64 = unlogged.iter().map(|(_, count)| count).sum();
        if dropped >= u64::from(PACKETS) && told + untold == dropped {
            ensure!(untold > 0 && told > 0, "told {told}, untold {unlogged:?}");
            eprintln!("dropped {dropped}, in lines {told}, {unlogged:?}");
            break;
        }
        ensure!(Instant::now() < deadline, "dropped {dropped}, told {told}, {unlogged:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
