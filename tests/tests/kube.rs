//! The agent on a node of the lab, watching the test API server: what the kernel holds is what the server's objects
//! mean, whatever the server does on the way; packets are judged as the oracle says; nothing changes before everything
//! is known.
//!
//! `NPM_SEED=<number>` repeats the random run, `NPM_CHANGES=<number>` makes it longer (`cargo xtask chaos`).

use std::collections::BTreeMap;
use std::io::{Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use npm_agent::backend::ebpf::held::{Limits, Write};
use npm_agent::backend::ebpf::lower::lower_with;
use npm_agent::backend::ebpf::maps::Maps;
use npm_agent::backend::ebpf::plan::{Step, plan};
use npm_agent::backend::iptables::layout::is_our_jump;
use npm_agent::backend::iptables::render::Rendered;
use npm_agent::backend::iptables::state::State;
use npm_agent::backend::iptables::{Iptables, Options};
use npm_common::event::Mode;
use npm_common::layout::{NARROW_WORDS, SCHEMA, WIDE_WORDS};
use npm_policy::compile::compile;
use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::{Family, Goal};
use npm_policy::model::Protocol;
use npm_policy::verdict::oracle;
use npm_tests::apiserver::faults::{Disturbance, Fault, On};
use npm_tests::apiserver::{self, Server};
use npm_tests::chaos::{Chaos, seed};
use npm_tests::lab::agent::{Agent, Settings, binary};
use npm_tests::lab::netns::Netns;
use npm_tests::lab::node::Layout;
use npm_tests::lab::observer::{self, End, Observer, Stream, Which};
use npm_tests::lab::{Host, Lab, Spec, require_root};
use npm_tests::table::Table;
use serde_json::{Value, json};
use tempfile::TempDir;

/// As the random pods' first node is called.
const NODE: &str = "n1";
const PORT: u16 = 80;
const PODS: [(&str, &str); 3] =
    [("10.241.0.2", "fd00:241::2"), ("10.241.0.3", "fd00:241::3"), ("10.241.0.4", "fd00:241::4")];

/// How long the kernel may take to hold what the server means: faults have hung, asked for pauses and doubled the agent's
/// own.
const SETTLED: Duration = Duration::from_secs(90);

/// What enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Iptables,
    Ebpf,
}

/// A node with three pods, a server that only it can reach, and an agent.
struct Stage {
    engine: Engine,
    // Dropped in this order: what runs in namespaces before the namespaces.
    agent: Option<Agent>,
    server: Server,
    lab: Lab,
    directory: TempDir,
}

impl Stage {
    fn build(engine: Engine) -> Result<Self> {
        let host = |name: &str, (v4, v6): (&str, &str)| -> Result<Host> {
            Ok(Host { name: name.to_owned(), addresses: vec![v4.parse()?, v6.parse()?] })
        };
        let names = ["a", "b", "c"];
        let pods = names.iter().zip(PODS).map(|(name, addresses)| Ok((0, host(name, addresses)?)));
        let lab = Lab::build(&Spec {
            layout: Layout::Routed,
            nodes: vec![host(NODE, ("10.240.0.4", "fd00:240::4"))?],
            pods: pods.collect::<Result<_>>()?,
            externals: vec![],
        })?;
        observer::prepare(lab.netns(NODE)?)?;
        let listener = lab.netns(NODE)?.run(|| TcpListener::bind("127.0.0.1:0").context("listening"))?;
        let options = apiserver::Options {
            bookmark_interval: Duration::from_millis(500),
            ..apiserver::Options::default()
        };
        let server = Server::start(listener, &options)?;
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("kubeconfig"), server.kubeconfig(None))?;
        let store = server.store();
        store.put(json!({"kind": "Namespace", "metadata": {"name": "lab"}}));
        for (name, (v4, v6)) in names.iter().zip(PODS) {
            store.put(pod(name, v4, v6));
        }
        store.put(only_from("a"));
        Ok(Self { engine, agent: None, server, lab, directory })
    }

    fn node(&self) -> Result<&Netns> {
        self.lab.netns(NODE)
    }

    fn start_agent(&mut self) -> Result<()> {
        let kubeconfig = self.directory.path().join("kubeconfig");
        let settings = Settings {
            backend: match self.engine {
                Engine::Iptables => "iptables".into(),
                Engine::Ebpf => "ebpf".into(),
            },
            node: NODE.into(),
            manifests: "".into(),
            directory: self.directory.path().to_owned(),
            more: [
                ["--source", "kube"],
                ["--kubeconfig", &kubeconfig.to_string_lossy()],
                ["--watch-timeout", "3s"],
                ["--listening-address", "127.0.0.1"],
                ["--log-level", "debug"],
                ["--instance", self.lab.netns(NODE)?.name()],
            ]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect(),
        };
        self.agent = Some(Agent::start(self.lab.netns(NODE)?, settings)?);
        Ok(())
    }

    fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().context("the agent runs")
    }

    /// The agent's status, as soon as it is as wanted.
    fn status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let agent = self.agent.as_ref().context("the agent runs")?;
        let mut last = Value::Null;
        let seen = eventually(|| {
            // The socket appears shortly after the start.
            last = agent.status().unwrap_or_default();
            Ok(wanted(&last))
        })?;
        ensure!(seen, "{what}: it never came; the status is {last:#}\n{}", agent.log());
        Ok(last)
    }

    /// What our chains and sets are in the kernel.
    fn kernel(&self) -> Result<BTreeMap<Family, State>> {
        self.node()?.run(|| {
            let mut read = Iptables::new(Options::default())?.read()?;
            for state in read.values_mut() {
                state.forward.retain(is_our_jump);
            }
            Ok(read)
        })
    }

    /// Where our maps are.
    fn maps(&self) -> Result<PathBuf> {
        Ok(Path::new("/sys/fs/bpf/npm-agent").join(self.node()?.name()).join(format!("v{SCHEMA}")))
    }

    /// What they have to be.
    fn wanted(&self) -> BTreeMap<Family, State> {
        let rendered = Rendered::of(&compile(&self.server.store().world(), NODE).0);
        [(Family::V4, rendered.v4), (Family::V6, rendered.v6)].into()
    }

    /// Waits until the kernel holds what the server's objects mean.
    fn settle(&self, what: &str) -> Result<()> {
        let holds = match self.engine {
            Engine::Iptables => {
                let wanted = self.wanted();
                // While it is being written it may not be readable.
                eventually(|| Ok(self.kernel().is_ok_and(|kernel| kernel == wanted)))?
            }
            Engine::Ebpf => {
                let goal = compile(&self.server.store().world(), NODE).0;
                let maps = self.maps()?;
                // At a start the maps are filled first.
                eventually(|| {
                    Ok(enforces(&maps).unwrap_or(false) && maps_hold(&maps, &goal).unwrap_or(false))
                })?
            }
        };
        if holds {
            return Ok(());
        }
        let agent = self.agent.as_ref().context("the agent runs")?;
        let status = agent.status()?;
        bail!("{what}: the kernel is not what the server means: {status:#}\n{}", agent.log())
    }

    /// Probes every pair of pods as the oracle says.
    fn probe(&mut self) -> Result<()> {
        let world = self.server.store().world();
        let transport = Transport::Port(Protocol::Tcp, PORT);
        self.lab.listen(&[transport])?;
        let pods: Vec<usize> =
            ["a", "b", "c"].iter().map(|name| self.lab.find(name)).collect::<Result<_>>()?;
        let expected = |flow: &Flow| Some(oracle(&world, flow).decision());
        let tables = self.lab.matrix(&pods, &[transport], &expected)?;
        for (family, observed) in tables {
            let mut wanted = Table::new(observed.endpoints.clone());
            for (from, source) in pods.iter().enumerate() {
                for (to, destination) in pods.iter().enumerate().filter(|(to, _)| *to != from) {
                    let address =
                        |pod: &usize| self.lab.endpoints()[*pod].address(family).context("an address");
                    let flow =
                        Flow { source: address(source)?, destination: address(destination)?, transport };
                    wanted.set(transport, from, to, oracle(&world, &flow).decision());
                }
            }
            let differences = observed.differences(&wanted);
            ensure!(differences.is_empty(), "{family:?}: {differences:?}");
        }
        Ok(())
    }

    /// An answer of the agent's HTTP server: code and body.
    fn http(&self, path: &str) -> Result<(u16, String)> {
        self.node()?.run(|| {
            let mut stream = TcpStream::connect("127.0.0.1:10091").context("connecting to the agent")?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(
                format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes(),
            )?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (head, body) = answer.split_once("\r\n\r\n").context("a head and a body")?;
            Ok((head.split(' ').nth(1).context("a code")?.parse()?, body.to_owned()))
        })
    }
}

/// Whether packets are judged by this goal, by what the pinned maps hold.
fn maps_hold(pins: &Path, goal: &Goal) -> Result<bool> {
    let (narrow, wide) = (pins.join("narrow"), pins.join("wide"));
    if wide.is_dir() {
        same(&Maps::<WIDE_WORDS>::pinned(&wide)?, goal)
    } else {
        same(&Maps::<NARROW_WORDS>::pinned(&narrow)?, goal)
    }
}

/// Whether programs drop what the maps deny.
fn enforces(pins: &Path) -> Result<bool> {
    let mode: Array<_, u32> =
        Array::try_from(Map::from_map_data(MapData::from_pin(pins.join("maps/MODE"))?)?)?;
    Ok(Mode::of(mode.get(&0, 0)?) == Mode::Enforce)
}

fn same<const W: usize>(maps: &Maps<W>, goal: &Goal) -> Result<bool> {
    let lowered = lower_with::<W>(goal, &maps.held().numbers())?;
    let steps = plan(maps.held(), &lowered, &Limits::OBJECT)?;
    // What the next half is swept of no packet sees.
    Ok(!steps.iter().any(|step| matches!(step, Step::Write(Write::Generation(_)))))
}

/// Whether something comes true before patience ends.
fn eventually(mut holds: impl FnMut() -> Result<bool>) -> Result<bool> {
    let deadline = Instant::now() + SETTLED;
    loop {
        if holds()? {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn pod(name: &str, v4: &str, v6: &str) -> Value {
    json!({
        "kind": "Pod", "metadata": {"namespace": "lab", "name": name, "labels": {"app": name}},
        "spec": {"nodeName": NODE, "containers": []},
        "status": {"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]},
    })
}

/// A policy that lets only this pod to b.
fn only_from(app: &str) -> Value {
    json!({
        "kind": "NetworkPolicy", "metadata": {"namespace": "lab", "name": "only"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "b"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": app}}}]}],
        },
    })
}

/// How many watches follow.
fn following(status: &Value) -> usize {
    let watches = status["source"]["watches"].as_array();
    watches.into_iter().flatten().filter(|watch| watch["following"] == true).count()
}

#[test]
fn nothing_changes_before_everything_is_known() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build(Engine::Iptables)?;
    let refuse = Fault::Refuse { code: 403, retry_after: None };
    stage.server.faults().plant(On::Any, Some("networkpolicies"), u32::MAX, refuse.clone());
    let untouched = stage.kernel()?;
    stage.start_agent()?;
    stage.status("two of three watches", |status| following(status) == 2)?;
    let error = |status: &Value| status["source"]["watches"].to_string().contains("403");
    let status = stage.status("the third fails", error)?;
    ensure!(status["ready"] == false && status["generation"] == 0, "{status:#}");
    ensure!(stage.kernel()? == untouched, "something was programmed");
    let (code, reasons) = stage.http("/readyz")?;
    ensure!(code == 503 && reasons.contains("networkpolicies can't be read: "), "{code}: {reasons}");
    ensure!(stage.http("/healthz")?.0 == 200);

    stage.server.faults().clear();
    stage.settle("the start")?;
    stage.probe()?;
    stage.status("ready", |status| status["ready"] == true)?;
    ensure!(stage.http("/readyz")? == (200, "ok\n".to_owned()));

    // An agent that finds what another has programmed leaves it alone until it knows better.
    stage.agent()?.kill()?;
    stage.server.store().put(only_from("c"));
    stage.server.store().put(pod("a", "10.241.0.9", "fd00:241::9"));
    stage.server.faults().plant(On::Any, Some("pods"), u32::MAX, refuse);
    let inherited = stage.kernel()?;
    stage.start_agent()?;
    stage.status("two of three watches", |status| following(status) == 2)?;
    ensure!(stage.kernel()? == inherited, "something was changed");
    stage.server.faults().clear();
    stage.settle("the second start")
}

#[test]
fn an_agent_whose_server_is_away_goes_on_enforcing_and_ends_when_told() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build(Engine::Iptables)?;
    stage.start_agent()?;
    stage.settle("the start")?;
    stage.status("following", |status| following(status) == 3)?;
    stage.server.faults().plant(On::Any, None, u32::MAX, Fault::Hang);
    stage.server.faults().disturb(None, Disturbance::Cut);
    stage.server.store().put(only_from("c"));
    let before = stage.kernel()?;
    let failing =
        |status: &Value| status["source"]["watches"].to_string().matches("no answer for").count() == 3;
    stage.status("the server hangs", failing)?;
    ensure!(stage.kernel()? == before, "enforcement has changed");

    let begun = Instant::now();
    stage.agent.take().context("the agent runs")?.terminate()?;
    ensure!(begun.elapsed() < Duration::from_secs(2), "it took {:?} to end", begun.elapsed());
    ensure!(stage.kernel()? == before, "the end has changed what is enforced");

    stage.server.faults().clear();
    stage.start_agent()?;
    stage.settle("a new agent")?;
    stage.probe()
}

#[test]
fn one_event_is_programmed_at_once_and_a_burst_in_few_applies() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    const BURST: u64 = 400;
    let mut stage = Stage::build(Engine::Iptables)?;
    stage.start_agent()?;
    stage.settle("the start")?;
    stage.status("following", |status| following(status) == 3)?;
    let applies = |stage: &Stage| -> Result<u64> {
        stage.status("ready", |status| status["ready"] == true)?["backends"][0]["applies"]
            .as_u64()
            .context("a count")
    };
    let before = applies(&stage)?;
    // Each of these is a change of the goal, and the next comes when it is programmed.
    for app in ["c", "a", "c", "a", "c"] {
        stage.server.store().put(only_from(app));
        stage.settle("one event")?;
    }
    let singles = applies(&stage)? - before;
    ensure!(singles == 5, "{singles} applies for 5 events");
    for index in 0..BURST {
        // Another member of a's set each time.
        let (v4, v6) =
            (format!("10.242.{}.{}", index / 250, index % 250 + 1), format!("fd00:242::{index:x}"));
        let mut one = pod(&format!("c{index}"), &v4, &v6);
        one["metadata"]["labels"]["app"] = json!("c");
        stage.server.store().put(one);
    }
    stage.settle("a burst")?;
    let burst = applies(&stage)? - before - singles;
    eprintln!("{burst} applies for {BURST} events that came at once");
    ensure!(burst >= 1 && burst * 5 <= BURST, "{burst} applies for {BURST} events");
    Ok(())
}

#[test]
fn random_changes_and_faults_leave_the_kernel_as_the_server_means_it() -> Result<()> {
    chaos(Engine::Iptables)
}

#[test]
fn random_changes_and_faults_leave_the_maps_as_the_server_means_it() -> Result<()> {
    chaos(Engine::Ebpf)
}

fn chaos(engine: Engine) -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let changes = match std::env::var("NPM_CHANGES") {
        Ok(text) => text.parse().context("NPM_CHANGES is a number")?,
        Err(_) => 150,
    };
    let seed = seed();
    eprintln!("{engine:?}, NPM_SEED={seed}, {changes} changes");
    let mut stage = Stage::build(engine)?;
    stage.start_agent()?;
    stage.settle("the start")?;
    let end = |stage: &Stage, name: &str| -> Result<End> {
        let endpoint = &stage.lab.endpoints()[stage.lab.find(name)?];
        Ok(End {
            netns: endpoint.netns.clone(),
            address: endpoint.address(Family::V4).context("an address")?,
        })
    };
    let observe = |stage: &Stage, from: &str| -> Result<Observer> {
        let (from, to) = (end(stage, from)?, end(stage, "b")?);
        Observer::start(Stream { from, to, protocol: Protocol::Udp, port: PORT, rate: 500 })
    };
    // What no random object touches: always allowed, always denied.
    let (allowed, denied) = (observe(&stage, "a")?, observe(&stage, "c")?);
    let mut chaos = Chaos::new(seed);
    let mut rounds = 0;
    while chaos.done().changes < changes {
        chaos.round(&stage.server, 15);
        rounds += 1;
        stage.settle(&format!("NPM_SEED={seed}, round {rounds}"))?;
    }
    let (allowed, denied) = (allowed.stop()?, denied.stop()?);
    stage.probe()?;
    let status = stage.status("an answer", |status| status["generation"] != 0)?;
    let done = chaos.done();
    eprintln!(
        "{done:?} in {rounds} rounds, {} goals, {} requests; {} packets allowed, {} denied",
        status["generation"],
        stage.server.requests(),
        allowed.sent.len(),
        denied.sent.len()
    );
    ensure!(done.faults >= rounds / 2, "hardly any fault: {done:?}");
    ensure!(allowed.sent.len() > 100 && denied.sent.len() > 100, "hardly any packet was sent");
    for (trace, which, what) in [
        (&allowed, Which::Lost, "allowed packets were lost"),
        (&denied, Which::Arrived, "denied packets arrived"),
    ] {
        // The log has the time of day.
        let wrong = trace.runs(which).into_iter().map(|run| {
            let ago = trace.sent[run.first].before.elapsed();
            format!("{} from {:?} on, in {:?}", run.count, SystemTime::now() - ago, run.at_most)
        });
        let wrong: Vec<String> = wrong.collect();
        if !wrong.is_empty() {
            let log = stage.directory.path().join("log");
            let kept = std::env::temp_dir().join(format!("npm-chaos-{seed}.log"));
            std::fs::copy(log, &kept)?;
            bail!("{} {what}: {wrong:?}; the agent's log: {}", trace.count(which), kept.display());
        }
    }
    ensure!(Path::new(&stage.directory.path().join("log")).exists());
    if engine == Engine::Ebpf {
        // Nobody is isolated by it, and somebody always is.
        ensure!(!maps_hold(&stage.maps()?, &Goal::default())?, "any goal would have done");
    }
    stage.agent.take().context("the agent runs")?.terminate()?;
    // Pins are not the namespace's, and would stay.
    stage.node()?.exec(&binary()?.to_string_lossy(), &["cleanup"]).map(drop)
}
