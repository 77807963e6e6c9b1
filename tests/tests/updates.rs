//! Probes during updates: thousands of new flows a second each way through a running agent while policies are replaced,
//! split and merged, pods and namespaces relabelled, addresses reused, all of this undone, one by one and many at once, and
//! everything taken away and put back; also with the agent killed at random points.
//!
//! Invariant 2 (docs/ARCHITECTURE.md): a flow that the states before and after an update both deny never gets through
//! meanwhile, and one that both allow is never lost. The observer's own test (`observer.rs`) shows that it catches a
//! planted millisecond.
//!
//! A machine that gives its cores to others makes the streams pause. What an update does in a pause nobody sees, so an
//! update counts by the share of its time that was watched, and the run goes on until enough of them were. Left alone,
//! the walk may stay for long where everything is allowed, or nothing; it is led to the verdict that was rare so far.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_policy::verdict::oracle;
use npm_policy::world::World;
use npm_tests::kubernetes;
use npm_tests::lab::agent::{Agent, Settings, binary};
use npm_tests::lab::observer::{self, End, Observer, Stream, View};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Lab, Spec, require_root};
use npm_tests::random::SplitMix;

#[path = "updates/world.rs"]
mod world;

use world::{ADDRESSES, Walk};

/// New flows a second that each stream sends, and the fewest at which an update counts as watched.
const RATE: u32 = 6000;
const FEWEST: f64 = 5000.0;
const PORT: u16 = 80;
const NODE: &str = "node";
/// A run ends without having watched all it wanted after so many times its updates, or so long.
const MOST_TIMES: usize = 4;
const PATIENCE: Duration = Duration::from_secs(150);
/// At least this share of the wanted updates has to be watched.
const LEAST_WATCHED: f64 = 0.25;

/// Four senders at once are more than two cores can do beside the agent.
static ONE_RUN: Mutex<()> = Mutex::new(());

/// What happens to the agent during each update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    /// SIGKILL at a random point, and a restart.
    IsKilled,
}

/// What enforces.
#[derive(Clone, Copy, Debug)]
enum Engine {
    Iptables(Dialect),
    Ebpf,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    engine: Engine,
    family: Family,
    protocol: Protocol,
    fate: Fate,
    /// How many updates have to be watched.
    updates: usize,
}

/// A span of time, and what each stream must do in it; `None` where the states before and after differ.
struct Span {
    from: Instant,
    to: Instant,
    expected: [Option<Decision>; 2],
    what: String,
}

/// For how long each verdict was certain, over both streams: whether a run has anything to tell.
#[derive(Clone, Copy, Debug, Default)]
struct Balance([Duration; 2]);

impl Balance {
    /// What the walk is led to keep each verdict at, and what a run needs at least, in hundredths.
    const AIM: u32 = 25;
    const LEAST: u32 = 5;

    fn note(&mut self, span: &Span) {
        for decision in span.expected.into_iter().flatten() {
            self.0[usize::from(decision == Decision::Allow)] += span.to - span.from;
        }
    }

    fn rare(self, hundredths: u32) -> Option<Decision> {
        let [denied, allowed] = self.0;
        let least = (denied + allowed) * hundredths / 100;
        if denied <= least {
            Some(Decision::Deny)
        } else if allowed <= least {
            Some(Decision::Allow)
        } else {
            None
        }
    }

    /// The next step: one that some stream keeps the rare verdict through, or comes to it.
    fn step(
        self,
        walk: &mut Walk,
        verdicts: impl Fn(&World) -> [Decision; 2],
        numbers: &mut SplitMix,
    ) -> String {
        let Some(rare) = self.rare(Self::AIM) else { return walk.step(numbers) };
        let now = verdicts(walk.world());
        let any = !now.contains(&rare);
        let leads = |world: &World| {
            let next = verdicts(world);
            // A world of nothing lasts for one step, and leads back.
            let lasts = world.pods().next().is_some();
            lasts && (0..2).any(|stream| next[stream] == rare && (any || now[stream] == rare))
        };
        walk.step_to(leads, numbers)
    }
}

fn certain(now: [Decision; 2], next: [Decision; 2]) -> [Option<Decision>; 2] {
    [0, 1].map(|stream| (now[stream] == next[stream]).then_some(next[stream]))
}

/// However the numbers fall, a run tells something of both verdicts.
#[test]
fn every_walk_shows_both_verdicts() -> Result<()> {
    let mut fewest = 100;
    for seed in 0..2000 {
        let mut numbers = SplitMix(seed);
        let transport = Transport::Port(Protocol::Tcp, PORT);
        let flows = flows(Family::V4, transport)?;
        let verdicts = |world: &World| flows.map(|flow| oracle(world, &flow).decision());
        let (mut walk, mut balance, mut time) = (Walk::start(), Balance::default(), Instant::now());
        for _ in 0..10 {
            let now = verdicts(walk.world());
            let what = balance.step(&mut walk, verdicts, &mut numbers);
            let expected = certain(now, verdicts(walk.world()));
            let span = Span { from: time, to: time + Duration::from_millis(100), expected, what };
            balance.note(&span);
            time = span.to;
        }
        let least = (0..50).find(|hundredths| balance.rare(*hundredths).is_some()).unwrap_or(50);
        fewest = fewest.min(least);
        ensure!(balance.rare(Balance::LEAST).is_none(), "seed {seed}: {balance:?}");
    }
    eprintln!("the rarer verdict was certain for {fewest} % of the time or more");
    Ok(())
}

#[test]
fn updates_open_nothing_and_lose_nothing() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let updates = updates(40);
    for (engine, family, protocol) in [
        (Engine::Iptables(Dialect::Nft), Family::V4, Protocol::Udp),
        (Engine::Iptables(Dialect::Legacy), Family::V6, Protocol::Tcp),
        (Engine::Ebpf, Family::V4, Protocol::Tcp),
        (Engine::Ebpf, Family::V6, Protocol::Udp),
    ] {
        run(Run { engine, family, protocol, fate: Fate::Lives, updates })?;
    }
    Ok(())
}

#[test]
fn an_agent_killed_at_any_point_opens_nothing_and_loses_nothing() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let updates = updates(40);
    for (engine, family, protocol) in [
        (Engine::Iptables(Dialect::Nft), Family::V6, Protocol::Udp),
        (Engine::Iptables(Dialect::Legacy), Family::V4, Protocol::Tcp),
        (Engine::Ebpf, Family::V4, Protocol::Udp),
    ] {
        // A start of the eBPF backend takes longer than one of the other, and each update has three.
        let updates = if matches!(engine, Engine::Ebpf) { updates / 4 } else { updates };
        run(Run { engine, family, protocol, fate: Fate::IsKilled, updates })?;
    }
    Ok(())
}

/// `NPM_UPDATES` changes how many updates each run watches.
fn updates(default: usize) -> usize {
    std::env::var("NPM_UPDATES").map_or(default, |text| text.parse().expect("NPM_UPDATES is a number"))
}

fn run(run: Run) -> Result<()> {
    let seed = match std::env::var("NPM_SEED") {
        Ok(text) => text.parse().context("NPM_SEED is a number")?,
        Err(_) => u64::from(std::process::id()),
    };
    let _alone = ONE_RUN.lock().unwrap_or_else(PoisonError::into_inner);
    eprintln!("{run:?}, NPM_SEED={seed}");
    let mut numbers = SplitMix(seed);
    let lab = lab()?;
    let directory = tempfile::tempdir()?;
    let manifests = directory.path().join("manifests");
    std::fs::create_dir(&manifests)?;
    let mut walk = Walk::start();
    write(walk.world(), &manifests)?;
    let (backend, variant) = match run.engine {
        Engine::Iptables(dialect) => ("iptables", dialect),
        Engine::Ebpf => ("ebpf", Dialect::Nft),
    };
    let instance = lab.netns(NODE)?.name();
    let more = ["--iptables-variant", variant.name(), "--instance", instance, "--log-level", "debug"];
    let settings = Settings {
        backend: backend.into(),
        node: NODE.into(),
        manifests: manifests.clone(),
        directory: directory.path().to_owned(),
        more: more.map(String::from).to_vec(),
    };
    let mut agent = Agent::start(lab.netns(NODE)?, settings)?;
    agent.wait()?;

    let flows = flows(run.family, Transport::Port(run.protocol, PORT))?;
    let verdicts = |world: &World| flows.map(|flow| oracle(world, &flow).decision());
    let stream = |from, to| -> Result<Observer> {
        Observer::start(Stream {
            from: end(&lab, from, run)?,
            to: end(&lab, to, run)?,
            protocol: run.protocol,
            port: PORT,
            rate: RATE,
        })
    };
    let streams = [stream(0, 1)?, stream(1, 0)?];
    let views = || [0, 1].map(|index: usize| streams[index].view());
    let mut spans = Vec::new();
    let mut kills = Kills::default();
    let mut balance = Balance::default();
    let mut now = verdicts(walk.world());
    let started = Instant::now();
    let mut settled = started;
    let (mut made, mut watched) = (0, 0.0);
    let wanted = run.updates as f64;
    loop {
        let told = watched + 0.5 >= wanted && balance.rare(Balance::LEAST).is_none() && kills.hit(run);
        let tired = made >= run.updates * MOST_TIMES || started.elapsed() >= PATIENCE;
        if told || tired {
            break;
        }
        let what = balance.step(&mut walk, verdicts, &mut numbers);
        let next = verdicts(walk.world());
        let (begun, before) = (Instant::now(), views());
        spans.push(Span {
            from: settled,
            to: begun,
            expected: now.map(Some),
            what: "between updates".into(),
        });
        write(walk.world(), &manifests)?;
        if run.fate == Fate::IsKilled {
            // The source waits for 100 ms of quiet: the first kill may come at any point of noticing. The next ones come
            // when the agent has its goal, at any point of reading back, planning and writing.
            std::thread::sleep(Duration::from_micros(numbers.next() % 150_000));
            kills.note(&agent.log());
            agent.kill_and_restart()?;
            for _ in 0..2 {
                kills.wait_for_goal(&agent);
                std::thread::sleep(kills.delay(&mut numbers));
                kills.aimed(&agent.log());
                agent.kill_and_restart()?;
            }
        }
        agent.wait().with_context(|| what.clone())?;
        settled = Instant::now();
        (made, watched) = (made + 1, watched + watched_share(before, views()));
        let span = Span { from: begun, to: settled, expected: certain(now, next), what };
        balance.note(&span);
        spans.push(span);
        now = next;
        std::thread::sleep(Duration::from_millis(5));
    }
    spans.push(Span { from: settled, to: Instant::now(), expected: now.map(Some), what: "the end".into() });
    let traces = streams.map(Observer::stop);
    agent.terminate()?;
    // Pins are not the namespace's, and would stay.
    lab.netns(NODE)?.exec(&binary()?.to_string_lossy(), &["cleanup"])?;
    eprintln!("  {made} updates in {:?}, worth {watched:.1} watched ones", started.elapsed());
    for (index, trace) in traces.into_iter().enumerate() {
        judge(index, &trace?, &spans)?;
    }
    ensure!(balance.rare(Balance::LEAST).is_none(), "one of the verdicts is rare: {balance:?}");
    if run.fate == Fate::IsKilled {
        eprintln!(
            "  {} kills, {} of them between a new goal and the end of its writes",
            kills.all, kills.at_work
        );
    }
    ensure!(kills.hit(run), "hardly any kill hit the agent at work");
    ensure!(
        watched >= wanted * LEAST_WATCHED,
        "the streams were too slow to watch: {made} updates are worth {watched:.1}"
    );
    Ok(())
}

/// The share of an update that both streams have watched: none of it where one of them sent too few flows.
fn watched_share(before: [View; 2], after: [View; 2]) -> f64 {
    let seen = before.iter().zip(&after).map(|(before, after)| {
        if after.rate_since(before) < FEWEST { 0.0 } else { after.seen_since(before) }
    });
    seen.fold(1.0, f64::min)
}

/// The share of the time that lies in pauses of more than a millisecond, in which an opening would go unseen.
fn blind_share(trace: &observer::Trace) -> f64 {
    let pauses = trace.sent.windows(2).map(|pair| pair[1].before - pair[0].before);
    let blind: Duration = pauses.filter(|pause| *pause > observer::BLIND).sum();
    match (trace.sent.first(), trace.sent.last()) {
        (Some(first), Some(last)) => blind.as_secs_f64() / (last.after - first.before).as_secs_f64(),
        (None, _) | (_, None) => 1.0,
    }
}

/// Where the kills hit, by the agent's log.
struct Kills {
    all: usize,
    at_work: usize,
    read: usize,
    /// How long after a new goal the agent may be killed: about as long as it works, however fast the machine is.
    reach: Duration,
}

impl Default for Kills {
    fn default() -> Self {
        Self { all: 0, at_work: 0, read: 0, reach: Self::FARTHEST }
    }
}

impl Kills {
    const NEAREST: Duration = Duration::from_millis(1);
    const FARTHEST: Duration = Duration::from_millis(50);

    /// Whether enough of them hit.
    fn hit(&self, run: Run) -> bool {
        match (run.fate, run.engine) {
            (Fate::Lives, _) => true,
            (Fate::IsKilled, Engine::Iptables(_)) => self.at_work * 10 >= self.all,
            // It works for a few milliseconds only: `ebpf_killed.rs` aims at each write.
            (Fate::IsKilled, Engine::Ebpf) => self.at_work > 0,
        }
    }

    /// Waits until the agent knows what to program, or for a second.
    fn wait_for_goal(&self, agent: &Agent) {
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            if agent.log().get(self.read..).is_some_and(|said| said.contains("\"new goal\"")) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A random time within reach.
    fn delay(&self, numbers: &mut SplitMix) -> Duration {
        let micros = u64::try_from(self.reach.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(numbers.next() % micros)
    }

    /// As [`Kills::note`], and aims the next kill by what became of this one.
    fn aimed(&mut self, log: &str) {
        let before = self.at_work;
        self.note(log);
        let reach = if self.at_work > before { self.reach * 3 / 2 } else { self.reach / 2 };
        self.reach = reach.clamp(Self::NEAREST, Self::FARTHEST);
    }

    /// Looks at what the agent has said since the last kill.
    fn note(&mut self, log: &str) {
        let said = log.get(self.read..).unwrap_or_default();
        self.read = log.len();
        self.all += 1;
        let last = |text: &str| said.rfind(text);
        let done = last("\"programmed\"").max(last("already as it should be"));
        self.at_work +=
            usize::from(last("new goal").is_some_and(|begun| done.is_none_or(|done| done < begun)));
    }
}

/// Every packet that was sent while its verdict was certain must have met it.
fn judge(stream: usize, trace: &observer::Trace, spans: &[Span]) -> Result<()> {
    let mut wrong = Vec::new();
    let mut certain = [0usize; 2];
    let mut first = 0;
    for (sent, arrived) in trace.sent.iter().zip(&trace.arrived) {
        while spans.get(first).is_some_and(|span| span.to < sent.before) {
            first += 1;
        }
        let touched: Vec<&Span> = spans[first..].iter().take_while(|span| span.from <= sent.after).collect();
        let verdicts: BTreeSet<Option<Decision>> = touched.iter().map(|span| span.expected[stream]).collect();
        let [Some(expected)] = verdicts.into_iter().collect::<Vec<_>>()[..] else { continue };
        certain[usize::from(expected == Decision::Allow)] += 1;
        if *arrived != (expected == Decision::Allow) {
            wrong.push(format!("{expected:?} in `{}`", touched[0].what));
        }
    }
    let [denied, allowed] = certain;
    let total = trace.sent.len();
    eprintln!(
        "  stream {stream}: {total} new flows, {:.0} a second, blind for {:.2} % of the time; {denied} to be denied, {allowed} to be allowed, {} wrong",
        trace.rate(),
        blind_share(trace) * 100.0,
        wrong.len()
    );
    ensure!(wrong.is_empty(), "{} packets met neither state's verdict, the first: {}", wrong.len(), wrong[0]);
    Ok(())
}

fn lab() -> Result<Lab> {
    let names = ["pod0", "pod1", "pod2"];
    let pods: Vec<_> = names.into_iter().zip(ADDRESSES.map(|(v4, v6)| [v4, v6])).collect();
    let lab = Lab::build(&Spec::one_node(&pods)?)?;
    observer::prepare(lab.netns(NODE)?)?;
    Ok(lab)
}

fn end(lab: &Lab, index: usize, run: Run) -> Result<End> {
    let endpoint = &lab.endpoints()[lab.find(&format!("pod{index}"))?];
    Ok(End { netns: endpoint.netns.clone(), address: endpoint.address(run.family).context("no address")? })
}

fn flows(family: Family, transport: Transport) -> Result<[Flow; 2]> {
    let address = |index: usize| {
        let (v4, v6) = ADDRESSES[index];
        match family {
            Family::V4 => v4.parse(),
            Family::V6 => v6.parse(),
        }
    };
    let (one, other) = (address(0)?, address(1)?);
    Ok([
        Flow { source: one, destination: other, transport },
        Flow { source: other, destination: one, transport },
    ])
}

/// Puts the world into place at once, as an update of a ConfigMap or a `mv` does.
fn write(world: &World, directory: &Path) -> Result<()> {
    let (new, path): (PathBuf, PathBuf) = (directory.join(".new"), directory.join("world.json"));
    std::fs::write(&new, kubernetes::list(world).to_string())?;
    std::fs::rename(&new, &path).context("renaming the new world into place")
}
