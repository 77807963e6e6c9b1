//! Probes during updates: thousands of new flows a second each way through a running agent while policies are replaced,
//! split and merged, pods and namespaces relabelled and addresses reused, also with the agent killed at random points.
//!
//! Invariant 2 (docs/ARCHITECTURE.md): a flow that the states before and after an update both deny never gets through
//! meanwhile, and one that both allow is never lost. The observer's own test (`observer.rs`) shows that it catches a
//! planted millisecond.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::Family;
use npm_policy::model::{
    Block, Labels, Namespace, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork, PodPhase,
    Policy, PolicyKey, Port, Ports, Protocol, Requirement, Rule, Selector,
};
use npm_policy::verdict::oracle;
use npm_policy::world::{Change, World};
use npm_tests::kubernetes;
use npm_tests::lab::agent::{Agent, Settings};
use npm_tests::lab::node::Layout;
use npm_tests::lab::observer::{self, End, Observer, Stream};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Host, Lab, Spec, require_root};
use npm_tests::random::SplitMix;

const RATE: u32 = 6000;
const PORT: u16 = 80;
const NODE: &str = "node";
const NAMESPACES: [&str; 2] = ["x", "y"];
const VALUES: [&str; 3] = ["web", "db", ""];
/// The pods' addresses: streams go between the first two.
const ADDRESSES: [(&str, &str); 3] =
    [("10.241.0.2", "fd00:241::2"), ("10.241.0.3", "fd00:241::3"), ("10.241.0.4", "fd00:241::4")];

/// What happens to the agent during each update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    /// SIGKILL at a random point, and a restart.
    IsKilled,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    dialect: Dialect,
    family: Family,
    protocol: Protocol,
    fate: Fate,
    updates: usize,
}

/// A span of time, and what each stream must do in it; `None` where the states before and after differ.
struct Span {
    from: Instant,
    to: Instant,
    expected: [Option<Decision>; 2],
    what: String,
}

#[test]
fn updates_open_nothing_and_lose_nothing() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let updates = updates(100);
    for (dialect, family, protocol) in
        [(Dialect::Nft, Family::V4, Protocol::Udp), (Dialect::Legacy, Family::V6, Protocol::Tcp)]
    {
        run(Run { dialect, family, protocol, fate: Fate::Lives, updates })?;
    }
    Ok(())
}

#[test]
fn an_agent_killed_at_any_point_opens_nothing_and_loses_nothing() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let updates = updates(100);
    for (dialect, family, protocol) in
        [(Dialect::Nft, Family::V6, Protocol::Udp), (Dialect::Legacy, Family::V4, Protocol::Tcp)]
    {
        run(Run { dialect, family, protocol, fate: Fate::IsKilled, updates })?;
    }
    Ok(())
}

/// `NPM_UPDATES` changes how many updates each run makes.
fn updates(default: usize) -> usize {
    std::env::var("NPM_UPDATES").map_or(default, |text| text.parse().expect("NPM_UPDATES is a number"))
}

fn run(run: Run) -> Result<()> {
    let seed = match std::env::var("NPM_SEED") {
        Ok(text) => text.parse().context("NPM_SEED is a number")?,
        Err(_) => u64::from(std::process::id()),
    };
    eprintln!("{run:?}, NPM_SEED={seed}");
    let mut numbers = SplitMix(seed);
    let lab = lab()?;
    let directory = tempfile::tempdir()?;
    let manifests = directory.path().join("manifests");
    std::fs::create_dir(&manifests)?;
    let mut world = first_world();
    write(&world, &manifests)?;
    let settings = Settings {
        backend: "iptables".into(),
        node: NODE.into(),
        manifests: manifests.clone(),
        directory: directory.path().to_owned(),
        more: ["--iptables-variant", run.dialect.name(), "--log-level", "debug"].map(String::from).to_vec(),
    };
    let mut agent = Agent::start(lab.netns(NODE)?, settings)?;
    agent.wait()?;

    let flows = flows(run)?;
    let verdicts = |world: &World| flows.map(|flow| oracle(world, &flow).decision());
    let streams = [(0, 1), (1, 0)].map(|(from, to)| -> Result<Observer> {
        let stream = Stream {
            from: end(&lab, from, run)?,
            to: end(&lab, to, run)?,
            protocol: run.protocol,
            port: PORT,
            rate: RATE,
        };
        Observer::start(stream)
    });
    let mut spans = Vec::new();
    let mut kills = Kills::default();
    let mut now = verdicts(&world);
    let mut settled = Instant::now();
    for _ in 0..run.updates {
        let what = update(&mut world, &mut numbers);
        let next = verdicts(&world);
        let begun = Instant::now();
        spans.push(Span {
            from: settled,
            to: begun,
            expected: now.map(Some),
            what: "between updates".into(),
        });
        write(&world, &manifests)?;
        if run.fate == Fate::IsKilled {
            // The source waits for 100 ms of quiet: the first kill may come at any point of noticing. The next ones come
            // when the agent has its goal, at any point of reading back, planning and writing.
            std::thread::sleep(Duration::from_micros(numbers.next() % 150_000));
            kills.note(&agent.log());
            agent.kill_and_restart()?;
            for _ in 0..2 {
                kills.wait_for_goal(&agent);
                std::thread::sleep(Duration::from_micros(numbers.next() % 50_000));
                kills.note(&agent.log());
                agent.kill_and_restart()?;
            }
        }
        agent.wait().with_context(|| what.clone())?;
        settled = Instant::now();
        let expected = [0, 1].map(|stream| (now[stream] == next[stream]).then_some(next[stream]));
        spans.push(Span { from: begun, to: settled, expected, what });
        now = next;
        std::thread::sleep(Duration::from_millis(5));
    }
    spans.push(Span { from: settled, to: Instant::now(), expected: now.map(Some), what: "the end".into() });
    let traces = streams.map(|stream| stream?.stop());
    agent.terminate()?;
    if run.fate == Fate::IsKilled {
        eprintln!(
            "  {} kills, {} of them between a new goal and the end of its writes",
            kills.all, kills.at_work
        );
        ensure!(kills.at_work * 10 >= kills.all, "hardly any kill hit the agent at work");
    }
    for (index, trace) in traces.into_iter().enumerate() {
        let trace = trace?;
        ensure!(trace.rate() >= 5000.0, "only {:.0} flows a second", trace.rate());
        ensure!(
            blind_share(&trace) <= 0.1,
            "{:.1} % of the time nothing was sent",
            blind_share(&trace) * 100.0
        );
        judge(index, &trace, &spans)?;
    }
    Ok(())
}

/// The share of the time that lies in pauses of more than a millisecond, in which an opening would go unseen.
fn blind_share(trace: &observer::Trace) -> f64 {
    let pauses = trace.sent.windows(2).map(|pair| pair[1].before - pair[0].before);
    let blind: Duration = pauses.filter(|pause| *pause > Duration::from_millis(1)).sum();
    match (trace.sent.first(), trace.sent.last()) {
        (Some(first), Some(last)) => blind.as_secs_f64() / (last.after - first.before).as_secs_f64(),
        (None, _) | (_, None) => 1.0,
    }
}

/// Where the kills hit, by the agent's log.
#[derive(Default)]
struct Kills {
    all: usize,
    at_work: usize,
    read: usize,
}

impl Kills {
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
    ensure!(
        denied * 40 > total && allowed * 40 > total,
        "one of the verdicts is rare: {denied}, {allowed} of {total}"
    );
    ensure!(wrong.is_empty(), "{} packets met neither state's verdict, the first: {}", wrong.len(), wrong[0]);
    Ok(())
}

fn lab() -> Result<Lab> {
    let host = |name: String, (v4, v6): (&str, &str)| -> Result<Host> {
        Ok(Host { name, addresses: vec![v4.parse()?, v6.parse()?] })
    };
    let pods = ADDRESSES.iter().enumerate().map(|(index, pair)| Ok((0, host(format!("pod{index}"), *pair)?)));
    let lab = Lab::build(&Spec {
        layout: Layout::Routed,
        nodes: vec![host(NODE.into(), ("10.240.0.4", "fd00:240::4"))?],
        pods: pods.collect::<Result<_>>()?,
        externals: vec![],
    })?;
    observer::prepare(lab.netns(NODE)?)?;
    Ok(lab)
}

fn end(lab: &Lab, index: usize, run: Run) -> Result<End> {
    let endpoint = &lab.endpoints()[lab.find(&format!("pod{index}"))?];
    Ok(End { netns: endpoint.netns.clone(), address: endpoint.address(run.family).context("no address")? })
}

fn flows(run: Run) -> Result<[Flow; 2]> {
    let address = |index: usize| {
        let (v4, v6) = ADDRESSES[index];
        match run.family {
            Family::V4 => v4.parse(),
            Family::V6 => v6.parse(),
        }
    };
    let transport = Transport::Port(run.protocol, PORT);
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

fn first_world() -> World {
    let mut world = World::default();
    for name in NAMESPACES {
        let labels = Labels::from([("env".into(), "web".into())]);
        world.apply(Change::Namespace(name.into(), Some(Namespace::new(name, labels))));
    }
    for index in 0..ADDRESSES.len() {
        let pod = pod(index, "x", &format!("pod{index}"), "web");
        world.apply(Change::Pod(pod.key.clone(), Some(pod)));
    }
    world
}

fn pod(index: usize, namespace: &str, name: &str, app: &str) -> Pod {
    let (v4, v6) = ADDRESSES[index];
    Pod {
        key: PodKey::new(namespace, name),
        node: Some(NODE.into()),
        labels: Labels::from([("app".into(), app.into())]),
        addresses: BTreeSet::from([v4.parse().expect("an address"), v6.parse().expect("an address")]),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: BTreeSet::new(),
        created: 1,
    }
}

/// Changes the world in one of the ways that clusters change, or in several at once; says how.
fn update(world: &mut World, numbers: &mut SplitMix) -> String {
    let count = if numbers.next().is_multiple_of(4) { 3 } else { 1 };
    let said: Vec<String> = (0..count).map(|_| single_update(world, numbers)).collect();
    said.join(" and ")
}

fn single_update(world: &mut World, numbers: &mut SplitMix) -> String {
    let policies: Vec<Arc<Policy>> = world.policies().cloned().collect();
    match numbers.next() % 8 {
        0 | 1 => {
            let pods: Vec<Arc<Pod>> = world.pods().cloned().collect();
            let mut pod = (*pods[usize::try_from(numbers.next()).unwrap_or(0) % pods.len()]).clone();
            pod.labels.insert("app".into(), numbers.pick(&VALUES).into());
            let said = format!("pod {} is relabelled {:?}", pod.key, pod.labels);
            world.apply(Change::Pod(pod.key.clone(), Some(pod)));
            said
        }
        2 => {
            let name: Arc<str> = numbers.pick(&NAMESPACES).into();
            let labels = Labels::from([("env".into(), numbers.pick(&VALUES).into())]);
            let said = format!("namespace {name} is relabelled {labels:?}");
            world.apply(Change::Namespace(Arc::clone(&name), Some(Namespace::new(name, labels))));
            said
        }
        3 => reuse_address(world, numbers),
        4 if !policies.is_empty() => {
            // Half of the rules each: together they allow what the one allowed.
            let whole = &policies[usize::try_from(numbers.next()).unwrap_or(0) % policies.len()];
            let (mut one, mut other) = ((**whole).clone(), (**whole).clone());
            other.key = PolicyKey::new(Arc::clone(&whole.key.namespace), format!("{}-half", whole.key.name));
            for (left, right) in
                [(&mut one.ingress, &mut other.ingress), (&mut one.egress, &mut other.egress)]
            {
                if let (Some(left), Some(right)) = (left, right) {
                    right.drain(..right.len() / 2);
                    left.truncate(left.len() / 2);
                }
            }
            let said = format!("policy {} is split", whole.key);
            world.apply(Change::Policy(one.key.clone(), Some(one)));
            world.apply(Change::Policy(other.key.clone(), Some(other)));
            said
        }
        5 if policies.len() > 1 => {
            let (one, other) = (&policies[0], &policies[1]);
            let mut merged = (**one).clone();
            for (into, from) in [(&mut merged.ingress, &other.ingress), (&mut merged.egress, &other.egress)] {
                if let (Some(into), Some(from)) = (into, from) {
                    into.extend(from.iter().cloned());
                }
            }
            world.apply(Change::Policy(other.key.clone(), None));
            world.apply(Change::Policy(merged.key.clone(), Some(merged)));
            format!("policy {} goes into {}", other.key, one.key)
        }
        6 if policies.len() > 3 => {
            let key = policies[usize::try_from(numbers.next()).unwrap_or(0) % policies.len()].key.clone();
            world.apply(Change::Policy(key.clone(), None));
            format!("policy {key} is deleted")
        }
        _ => {
            let policy = random_policy(numbers);
            let said = format!("policy {} is replaced", policy.key);
            world.apply(Change::Policy(policy.key.clone(), Some(policy)));
            said
        }
    }
}

/// The pod behind an address goes, and another takes the address in the same update.
fn reuse_address(world: &mut World, numbers: &mut SplitMix) -> String {
    let index = usize::try_from(numbers.next()).unwrap_or(0) % ADDRESSES.len();
    let address = ADDRESSES[index].0.parse().expect("an address");
    let old = world.holder(address).expect("every address is held").key.clone();
    let new = pod(
        index,
        numbers.pick(&NAMESPACES),
        &format!("pod{index}-{}", numbers.next() % 1000),
        numbers.pick(&VALUES),
    );
    let said = format!("pod {old} goes and {} takes its address", new.key);
    world.apply(Change::Pod(old, None));
    world.apply(Change::Pod(new.key.clone(), Some(new)));
    said
}

fn random_policy(numbers: &mut SplitMix) -> Policy {
    let direction = |numbers: &mut SplitMix| match numbers.next() % 3 {
        0 => None,
        _ => Some((0..numbers.next() % 4).map(|_| random_rule(numbers)).collect()),
    };
    let (ingress, egress) = (direction(numbers), direction(numbers));
    Policy {
        key: PolicyKey::new(numbers.pick(&NAMESPACES), numbers.pick(&["p", "q", "r"])),
        subjects: random_selector("app", numbers),
        // A policy is of one type at least.
        ingress: if egress.is_none() { Some(ingress.unwrap_or_default()) } else { ingress },
        egress,
    }
}

fn random_selector(key: &str, numbers: &mut SplitMix) -> Selector {
    let values = BTreeSet::from([numbers.pick(&VALUES).into()]);
    match numbers.next() % 4 {
        0 | 1 => Selector::everything(),
        2 => Selector::new([Requirement { key: key.into(), operator: Operator::In(values) }]),
        _ => Selector::new([Requirement { key: key.into(), operator: Operator::NotIn(values) }]),
    }
}

fn random_rule(numbers: &mut SplitMix) -> Rule {
    let peers = match numbers.next() % 6 {
        0 => Peers::Any,
        1 => {
            let (v4, v6) = numbers.pick(&ADDRESSES);
            let block = |text: String| {
                Peer::Block(Block { cidr: text.parse().expect("a CIDR"), except: BTreeSet::new() })
            };
            Peers::Only(vec![block(format!("{v4}/32")), block(format!("{v6}/128"))])
        }
        _ => Peers::Only(vec![Peer::Pods {
            namespaces: NamespaceScope::Matching(random_selector("env", numbers)),
            pods: random_selector("app", numbers),
        }]),
    };
    let ports = match numbers.next() % 4 {
        0 => Ports::Any,
        1 => Ports::Only(vec![Port::Range { protocol: Protocol::Tcp, first: 443, last: 443 }]),
        _ => Ports::Only(vec![
            Port::Range { protocol: Protocol::Tcp, first: 1, last: PORT },
            Port::Range { protocol: Protocol::Udp, first: PORT, last: PORT },
        ]),
    };
    Rule { peers, ports }
}
