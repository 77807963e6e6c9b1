//! The agent with the eBPF backend, killed (SIGKILL) before its nth call of bpf(2), for each n: while it changes what is
//! enforced, and while it takes over what an earlier one left. What is enforced then is the old policies or the new ones,
//! whole; and the next start enforces the new ones.
//!
//! strace kills it, so the agent is the one that is shipped. `NPM_KILLS=<number>` spreads more kills over the calls
//! (`all`: one at each).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_policy::flow::Transport;
use npm_policy::model::Protocol;
use npm_tests::exec::{run, start};
use npm_tests::lab::agent::{Agent, Settings, binary};
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::{Lab, Spec, require_root};

const CLIENT: [&str; 2] = ["10.241.0.2", "fd00:241::2"];
const SERVER: [&str; 2] = ["10.241.0.3", "fd00:241::3"];
/// Open before and after; open before; open after; never open.
const PORTS: [u16; 4] = [80, 81, 82, 83];
const PATIENCE: Duration = Duration::from_secs(60);

/// How many kills each of the two tests makes without `NPM_KILLS`.
const KILLS: usize = 6;

/// Which policies a manifest holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Old,
    New,
}

impl State {
    const BOTH: [Self; 2] = [Self::Old, Self::New];

    /// Everything differs between the two, and from one `salt` to the next, so that every map is written each time: who is
    /// isolated, peers, blocks, ports.
    fn manifests(self, salt: u8) -> String {
        let (port, blocks) = match self {
            Self::Old => (81, [format!("198.51.100.{salt}/32"), format!("2001:db8:{salt:x}::1/128")]),
            Self::New => (82, [format!("203.0.113.{salt}/32"), format!("2001:db8:{salt:x}::/48")]),
        };
        let more = blocks.map(|block| format!("{{ipBlock: {{cidr: \"{block}\"}}}}")).join(", ");
        let other_port = 1000 + u16::from(salt);
        let pod = |name: &str, [v4, v6]: [&str; 2]| {
            format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: x, labels: {{app: {name}}}}}, \
                 spec: {{nodeName: node}}, status: {{phase: Running, podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]}}}}\n---\n"
            )
        };
        let policy = |name: &str, direction: &str, other: &str, from: &str| {
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: x}}\n\
                 spec:\n  podSelector: {{matchLabels: {{app: {name}}}}}\n  policyTypes: [{direction}]\n  {}:\n  \
                 - {from}: [{{podSelector: {{matchLabels: {{app: {other}}}}}}}, {more}]\n    \
                 ports: [{{port: 80}}, {{port: {port}}}, {{port: {other_port}}}]\n---\n",
                direction.to_lowercase(),
            )
        };
        let mut all = "{apiVersion: v1, kind: Namespace, metadata: {name: x}}\n---\n".to_owned();
        all += &pod("client", CLIENT);
        all += &pod("server", SERVER);
        all += &policy("server", "Ingress", "client", "from");
        if self == Self::New {
            all += &policy("client", "Egress", "server", "to");
        }
        all
    }

    /// What each port answers.
    fn outcomes(self) -> [Outcome; 4] {
        let (open, shut) = (Outcome::Answered, Outcome::Blocked);
        match self {
            Self::Old => [open, open, shut, shut],
            Self::New => [open, shut, open, shut],
        }
    }
}

struct Stage {
    // Dropped in this order: what runs in the namespace before the namespace.
    agent: Option<Agent>,
    lab: Lab,
    directory: tempfile::TempDir,
    /// Another one for each write of manifests.
    salt: u8,
}

impl Stage {
    fn build() -> Result<Self> {
        let mut lab = Lab::build(&Spec::one_node(&[("client", CLIENT), ("server", SERVER)])?)?;
        lab.listen(&PORTS.map(|port| Transport::Port(Protocol::Tcp, port)))?;
        let directory = tempfile::tempdir()?;
        std::fs::create_dir(directory.path().join("manifests"))?;
        Ok(Self { agent: None, lab, directory, salt: 0 })
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn write(&mut self, state: State) -> Result<()> {
        self.salt = self.salt.wrapping_add(1);
        let (new, place) = (self.path("new"), self.path("manifests/x.yaml"));
        std::fs::write(&new, state.manifests(self.salt))?;
        std::fs::rename(&new, &place).context("putting manifests into place")
    }

    fn start(&mut self, under: &[&str]) -> Result<()> {
        let node = self.lab.netns("node")?;
        let settings = Settings {
            backend: "ebpf".to_owned(),
            node: "node".to_owned(),
            manifests: self.path("manifests"),
            directory: self.directory.path().to_owned(),
            more: ["--instance", node.name()].map(str::to_owned).to_vec(),
        };
        let under = under.iter().map(|word| (*word).to_owned()).collect();
        self.agent = Some(Agent::start_under(node, settings, under)?);
        Ok(())
    }

    fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().context("the agent runs")
    }

    /// An agent that enforces these policies, without strace.
    fn settle(&mut self, state: State) -> Result<()> {
        self.agent = None;
        self.write(state)?;
        self.start(&[])?;
        self.agent()?.wait()?;
        self.sees(&[state]).context("settled").map(drop)
    }

    /// Which of these states traffic of both families sees, whole.
    fn sees(&mut self, states: &[State]) -> Result<State> {
        let from = self.lab.find("client")?;
        let mut probes = Vec::new();
        for (source, destination) in CLIENT.iter().zip(SERVER) {
            for port in PORTS {
                let transport = Transport::Port(Protocol::Tcp, port);
                let (source, destination) = (source.parse()?, destination.parse()?);
                probes.push(Probe { from, source, destination, transport, expected: None });
            }
        }
        let seen = self.lab.probe(&probes)?;
        let is = |state: &State| [state.outcomes(), state.outcomes()].concat() == seen;
        let found = states.iter().copied().find(is);
        found.with_context(|| format!("traffic sees {seen:?}, which is none of {states:?}"))
    }

    /// Waits until the agent is dead (true) or enforces everything (false).
    fn is_killed(&mut self) -> Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let agent = self.agent()?;
            if !agent.is_running()? {
                return Ok(true);
            }
            if agent.settles_within(Duration::from_millis(500))? {
                return Ok(false);
            }
            ensure!(Instant::now() < deadline, "neither dead nor ready: {}", agent.log());
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.agent = None;
        // Pins are not the namespace's, and would stay.
        let cleaned = self
            .lab
            .netns("node")
            .and_then(|node| node.exec(&binary()?.to_string_lossy(), &["cleanup"]).map(drop));
        if let Err(error) = cleaned {
            eprintln!("{error:#}");
        }
    }
}

/// What strace follows.
const TRACE: [&str; 3] = ["--follow-forks", "--quiet=all", "--trace=bpf"];

/// A program that strace starts is our child, not strace's: it can be killed, and strace ends with it.
const DAEMON: &str = "--daemonize";

/// strace's words that kill at the nth call.
fn words(nth: usize) -> Vec<String> {
    let inject = format!("inject=bpf:signal=SIGKILL:when={nth}");
    ["strace", "--output=/dev/null", "-e", &inject]
        .iter()
        .chain(&TRACE)
        .map(|word| (*word).to_owned())
        .collect()
}

/// Those of the calls at which to kill: all, or so many, from the first to the last, others in each run.
fn spread(calls: &[usize]) -> Result<Vec<usize>> {
    let kills = match std::env::var("NPM_KILLS").as_deref() {
        Ok("all") => calls.len(),
        Ok(number) => number.parse().context("NPM_KILLS is a number or `all`")?,
        Err(_) => KILLS,
    };
    let step = calls.len().div_ceil(kills.max(1)).max(1);
    let shift = usize::try_from(std::process::id())? % step;
    Ok(calls.iter().copied().skip(shift).step_by(step).collect())
}

/// Calls that only read: before them is after the one before.
const READING: [&str; 5] = ["MAP_LOOKUP", "MAP_GET_NEXT_KEY", "GET_INFO", "PROG_QUERY", "GET_FD_BY_ID"];

/// Which calls of bpf(2) in a trace change something, by their number in the thread that makes the most of them: strace
/// counts for each thread by itself.
fn calls_in(trace: &Path) -> Result<Vec<usize>> {
    let text = std::fs::read_to_string(trace).with_context(|| format!("reading {}", trace.display()))?;
    let mut threads: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (thread, call) in text.lines().filter_map(|line| line.split_once(" bpf(")) {
        threads.entry(thread.trim()).or_default().push(call);
    }
    let busiest = threads.into_values().max_by_key(Vec::len).context("no calls")?;
    let changes = |call: &str| {
        !READING.iter().any(|word| {
            call.starts_with(&format!("BPF_{word}")) || call.starts_with(&format!("BPF_OBJ_{word}"))
        })
    };
    let numbered = busiest.iter().enumerate().filter(|(_, call)| changes(call));
    Ok(numbered.map(|(index, _)| index + 1).collect())
}

/// What the kills found; enough of them must have hit: calls that belong to no update (counters that are read) and the
/// order of the kernel's lists move the numbers a little.
fn enough(calls: &[usize], found: [usize; 2], missed: usize) -> Result<()> {
    let ([old, new], calls) = (found, calls.len());
    eprintln!(
        "{calls} calls change something; killed: {old} times the old policies held, {new} the new; {missed} missed"
    );
    ensure!(old > 0 && old + new >= missed, "too few kills hit");
    Ok(())
}

/// strace on a running program; it ends with it.
struct Tracer(Child);

impl Tracer {
    fn attach(pid: u32, words: &[String], log: &Path) -> Result<Self> {
        let file = File::create(log).context("making strace's log")?;
        let mut args = words[1..].to_vec();
        args.extend(["--attach".to_owned(), pid.to_string()]);
        let tracer = Self(start(&words[0], &args, &file)?);
        let status = format!("/proc/{pid}/status");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = std::fs::read_to_string(&status).context("reading a process's status")?;
            if text.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0")) {
                // The other threads follow at once, but the kernel says that of the first only.
                std::thread::sleep(Duration::from_millis(100));
                return Ok(tracer);
            }
            ensure!(Instant::now() < deadline, "strace does not attach: {:?}", std::fs::read_to_string(log));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Lets go.
    fn detach(mut self) -> Result<()> {
        run("kill", &["-INT", &self.0.id().to_string()])?;
        self.0.wait().context("waiting for strace").map(drop)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None))
            && let Err(error) = self.0.kill().and_then(|()| self.0.wait().map(drop))
        {
            eprintln!("strace: {error}");
        }
    }
}

/// The words that only write down what is called.
fn recording(trace: &Path) -> Vec<String> {
    let output = format!("--output={}", trace.display());
    ["strace", &output].iter().chain(&TRACE).map(|word| (*word).to_owned()).collect()
}

#[test]
fn killed_at_any_call_of_an_update_it_leaves_one_state_whole() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build()?;
    let (trace, log) = (stage.path("trace"), stage.path("strace.log"));
    stage.settle(State::Old)?;
    let pid = stage.agent()?.id();
    let tracer = Tracer::attach(pid, &recording(&trace), &log)?;
    stage.write(State::New)?;
    stage.agent()?.wait()?;
    tracer.detach()?;
    stage.sees(&[State::New])?;
    let calls = calls_in(&trace)?;
    ensure!(calls.len() > 10, "only {} calls in an update", calls.len());

    let (mut found, mut missed) = ([0; 2], 0);
    for nth in spread(&calls)? {
        stage.settle(State::Old)?;
        let pid = stage.agent()?.id();
        let _tracer = Tracer::attach(pid, &words(nth), &log)?;
        stage.write(State::New)?;
        if !stage.is_killed()? {
            missed += 1;
            continue;
        }
        let state = stage.sees(&State::BOTH).with_context(|| format!("killed at call {nth}"))?;
        found[usize::from(state == State::New)] += 1;
        stage.settle(State::New).with_context(|| format!("after a kill at call {nth}"))?;
    }
    enough(&calls, found, missed)
}

#[test]
fn killed_at_any_call_of_a_start_it_leaves_one_state_whole() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build()?;
    let trace = stage.path("trace");
    stage.settle(State::Old)?;
    stage.agent()?.kill()?;
    stage.write(State::New)?;
    let recording = recording(&trace);
    stage.start(&recording.iter().map(String::as_str).chain([DAEMON]).collect::<Vec<_>>())?;
    stage.agent()?.wait()?;
    let calls = calls_in(&trace)?;
    ensure!(calls.len() > 10, "only {} calls in a start", calls.len());
    // The maps have room for a hundred thousand values, which are read back many at once.
    ensure!(calls.iter().all(|nth| *nth < 2000), "{} calls in a start", calls[calls.len() - 1]);

    let (mut found, mut missed) = ([0; 2], 0);
    for nth in spread(&calls)? {
        stage.settle(State::Old)?;
        stage.agent()?.kill()?;
        stage.write(State::New)?;
        let words = words(nth);
        stage.start(&words.iter().map(String::as_str).chain([DAEMON]).collect::<Vec<_>>())?;
        if !stage.is_killed()? {
            missed += 1;
            continue;
        }
        let state = stage.sees(&State::BOTH).with_context(|| format!("killed at call {nth}"))?;
        found[usize::from(state == State::New)] += 1;
        stage.settle(State::New).with_context(|| format!("after a kill at call {nth}"))?;
    }
    enough(&calls, found, missed)
}
