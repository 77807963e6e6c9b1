//! `npm-agent trace`: packets of a lab as the command tells of them, whichever program enforces, and nothing of it left
//! behind.
#![forbid(unsafe_code)]

use std::fs::File;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::choice::Choice;
use npm_policy::compile::compile;
use npm_policy::flow::{Decision, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::exec::{run, start};
use npm_tests::lab::agent::binary;
use npm_tests::lab::netns::Netns;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::require_root;
use npm_tests::lab::service::Dialect;
use npm_tests::pair::{CLOSED, Kind, Ports, Stage, world};
use npm_tests::scenario::enforcer::{Means, ebpf};

/// b takes port 80, from a.
const POLICY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: b, namespace: x}
spec: {podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: 80}]}]}
"#;
const PATIENCE: Duration = Duration::from_secs(30);

/// The command, as somebody runs it on the node.
struct Running {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Running {
    /// Begun, so that every packet from here on is told.
    fn start(node: &Netns, more: &[&str]) -> Result<Self> {
        let log = tempfile::NamedTempFile::new()?;
        let output: &File = log.as_file();
        let program = binary()?;
        let child = node.run(|| {
            let long: &[&str] = if more.contains(&"--for") { &[] } else { &["--for", "5m"] };
            let args = [&["trace", "--instance", node.name()], long, more].concat();
            start(program.to_str().context("a path in UTF-8")?, &args, output)
        })?;
        let running = Self { child, log };
        running.tells("tracing").map(|_| running)
    }

    fn text(&self) -> Result<String> {
        std::fs::read_to_string(self.log.path()).context("reading what was told")
    }

    /// The first line that holds this.
    fn tells(&self, what: &str) -> Result<String> {
        self.nth(what, 1)
    }

    /// How it has ended.
    fn ends(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "it does not end: {}", self.text()?);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The line that holds this, as many times as that.
    fn nth(&self, what: &str, number: usize) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.text()?;
            if let Some(line) = text.lines().filter(|line| line.contains(what)).nth(number - 1) {
                return Ok(line.to_owned());
            }
            if Instant::now() > deadline {
                bail!("nothing tells of {what:?}:\n{text}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SIGKILL: it can clean up nothing by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is tried on each port, in both families.
fn probe(stage: &mut Stage, port: u16, decision: Decision) -> Result<()> {
    let (from, to) = (stage.pod("10.241.0.2")?, stage.pod("10.241.0.3")?);
    for family in Family::BOTH {
        let address = |index: usize| stage.lab.endpoints()[index].address(family).context("both families");
        let (source, destination) = (address(from)?, address(to)?);
        let transport = Transport::Port(Protocol::Tcp, port);
        let probe = Probe { from, source, destination, transport, expected: Some(decision) };
        let outcome = stage.lab.probe(&[probe])?[0];
        let expected = if decision == Decision::Allow { Outcome::Answered } else { Outcome::Blocked };
        ensure!(outcome == expected, "{port} {family:?}: {outcome:?} beside a trace");
    }
    Ok(())
}

/// The programs at the egress of the node's interface towards b.
fn attached(stage: &Stage) -> Result<Vec<String>> {
    stage.node().run(|| {
        let links = run("ip", &["-o", "link", "show", "type", "veth"])?;
        let mut names = Vec::new();
        for link in links.lines() {
            let name = link.split([' ', '@']).nth(1).context("a name")?;
            let (_, programs) = SchedClassifier::query_tcx(name, TcAttachType::Egress)?;
            names.extend(programs.iter().filter_map(|it| it.name_as_str()).map(str::to_owned));
        }
        Ok(names)
    })
}

#[test]
fn packets_are_told_of_as_they_are_judged() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for choice in Choice::every() {
        let mut stage = Stage::build(Means::Ebpf(choice)).with_context(|| choice.to_string())?;
        stage.lab.listen(&[80, 81].map(|port| Transport::Port(Protocol::Tcp, port)))?;
        stage.enforcer.enforce(&world(POLICY)?)?;
        let before = attached(&stage)?;
        let running = Running::start(stage.node(), &[])?;
        probe(&mut stage, 80, Decision::Allow).with_context(|| choice.to_string())?;
        probe(&mut stage, 81, Decision::Deny).with_context(|| choice.to_string())?;
        for (source, destination) in [("10.241.0.2:", "10.241.0.3:"), ("[fd00:241::2]:", "[fd00:241::3]:")] {
            let told = |told: &[&str]| -> Result<()> {
                let text = running.text()?;
                let is_told = |line: &str| told.iter().all(|word| line.contains(word));
                ensure!(text.lines().any(is_told), "{choice}: nothing tells {told:?}:\n{text}");
                Ok(())
            };
            running.tells(&format!("> {destination}81 tcp, conntrack new, ingress_denied"))?;
            let there = format!("> {destination}80 tcp");
            told(&["veth", &format!(": {source}"), &there, ", conntrack new, ingress_allowed"])?;
            told(&[&there, ", conntrack original, established"])?;
            told(&[&format!(": {destination}80 > {source}"), ", conntrack reply, established"])?;
        }
        let text = running.text()?;
        let is_wrong = |line: &&str| line.contains(":81 tcp") && !line.contains("denied");
        ensure!(!text.lines().any(|line| is_wrong(&line)), "{choice}: {text}");
        drop(running);
        ensure!(attached(&stage)? == before, "{choice}: {:?} are left", attached(&stage)?);
    }
    Ok(())
}

#[test]
fn only_what_is_looked_for_is_told_of() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build(Means::Ebpf(Choice::default()))?;
    stage.lab.listen(&[80, 81].map(|port| Transport::Port(Protocol::Tcp, port)))?;
    stage.enforcer.enforce(&world(POLICY)?)?;
    let filters: [(&[&str], [bool; 4]); 4] = [
        (&["--port", "81"], [false, true, false, true]),
        (&["--address", "10.241.0.3"], [true, true, false, false]),
        (&["--address", "fd00:241::2", "--port", "80"], [false, false, true, false]),
        (&["--address", "192.0.2.1"], [false; 4]),
    ];
    for (filter, wanted) in filters {
        let mut running = Running::start(stage.node(), &[filter, &["--for", "4s"]].concat())?;
        probe(&mut stage, 80, Decision::Allow)?;
        probe(&mut stage, 81, Decision::Deny)?;
        ensure!(running.ends()?.success(), "{}", running.text()?);
        let text = running.text()?;
        let kinds = ["> 10.241.0.3:80 ", "> 10.241.0.3:81 ", "> [fd00:241::3]:80 ", "> [fd00:241::3]:81 "];
        for (kind, is_wanted) in kinds.iter().zip(wanted) {
            ensure!(text.contains(kind) == is_wanted, "{filter:?}, {kind:?}, wanted {is_wanted}: {text}");
        }
    }
    Ok(())
}

/// It ends in time, in bounded memory, and says that it could not keep up.
#[test]
fn a_flood_is_no_trap() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build(Means::Ebpf(Choice::default()))?;
    stage.enforcer.enforce(&world(CLOSED)?)?;
    stage.deafen()?;
    let began = Instant::now();
    let mut running = Running::start(stage.node(), &["--for", "2s"])?;
    let status = format!("/proc/{}/status", running.child.id());
    let watch = || -> Result<()> {
        std::thread::sleep(Duration::from_secs(1));
        let status = std::fs::read_to_string(status).context("a trace that runs")?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("its memory")?;
        let kib: u64 = resident.trim().trim_end_matches(" kB").parse()?;
        ensure!(kib < 100 << 10, "{kib} KiB");
        ensure!(running.ends()?.success(), "{}", running.text()?);
        ensure!(began.elapsed() < Duration::from_secs(6), "{:?} instead of two seconds", began.elapsed());
        Ok(())
    };
    let sent = std::thread::scope(|scope| -> Result<u64> {
        let watch = scope.spawn(watch);
        let sent = stage.flood(Kind::Udp, Family::V4, Ports::Fresh, Duration::from_secs(7))?;
        watch.join().expect("the watch does not panic")?;
        Ok(sent)
    })?;
    ensure!(sent > 10_000, "{sent} packets are no flood");
    let text = running.text()?;
    let told = text.lines().filter(|line| line.contains("udp, conntrack")).count();
    ensure!(told > 100, "{told} lines");
    ensure!(text.lines().last().is_some_and(|line| line.ends_with("packets more are in no line")), "{text}");
    ensure!(stage.arrived()? == 0, "a denied packet arrived beside a trace");
    Ok(())
}

/// An agent that starts anew has another program, in the same places.
#[test]
fn it_goes_on_with_the_next_program() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build(Means::Ebpf(Choice::default()))?;
    stage.lab.listen(&[80, 81].map(|port| Transport::Port(Protocol::Tcp, port)))?;
    stage.enforcer.enforce(&world(POLICY)?)?;
    let running = Running::start(stage.node(), &["--port", "81"])?;
    probe(&mut stage, 81, Decision::Deny)?;
    let before = running.tells("10.241.0.3:81 tcp, conntrack new, ingress_denied")?;
    let node = stage.node().clone();
    let mut next = ebpf(&node, "maps".parse()?, Dialect::Nft)?;
    let goal = compile(&world("")?, "node-a").0;
    node.run(|| Ok(next.apply(&goal)?))?;
    running.tells("the agent has replaced its program")?;
    running.nth("tracing", 2)?;
    probe(&mut stage, 81, Decision::Allow)?;
    running.tells("10.241.0.3:81 tcp, conntrack new, not_isolated").context(before)?;
    Ok(())
}

#[test]
fn it_ends_by_itself_or_says_why_it_can_not_begin() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build(Means::Ebpf(Choice::default()))?;
    stage.lab.listen(&[Transport::Port(Protocol::Tcp, 80)])?;
    stage.enforcer.enforce(&world(POLICY)?)?;
    let mut running = Running::start(stage.node(), &["--count", "2"])?;
    probe(&mut stage, 80, Decision::Allow)?;
    let status = running.ends()?;
    let text = running.text()?;
    ensure!(status.success() && text.lines().count() == 3, "{status}: {text}");

    let program = binary()?;
    let program = program.to_str().context("a path in UTF-8")?;
    let refused = |args: &[&str]| -> Result<String> {
        match stage.node().exec(program, &[&["trace", "--for", "1s"], args].concat()) {
            Ok(output) => bail!("{args:?}: it traces: {output}"),
            Err(error) => Ok(format!("{error:#}")),
        }
    };
    let nobody = refused(&["--instance", "nobody-of-this-name"])?;
    ensure!(nobody.contains("no agent enforces by eBPF here"), "{nobody}");
    ensure!(!std::path::Path::new("/sys/fs/bpf/npm-agent/nobody-of-this-name").exists(), "it left pins");
    let missing = refused(&["--instance", stage.node().name(), "--interface", "eth7"])?;
    ensure!(missing.contains("the agent's program is not at all of eth7"), "{missing}");
    // Nobody drops what it would tell of as dropped.
    let elsewhere = refused(&["--instance", stage.node().name(), "--interface", "lo"])?;
    ensure!(elsewhere.contains("the agent's program is not at all of lo"), "{elsewhere}");
    // The agent's name, as its configuration has it.
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), r#"{"Instance": "nobody-of-the-file"}"#)?;
    let file = file.path().to_str().context("a path in UTF-8")?;
    let nobody = refused(&["--config", file])?;
    ensure!(nobody.contains("nobody-of-the-file"), "{nobody}");
    Ok(())
}
