//! The observer of updates: it sees gaps and openings of a millisecond, and nothing where there is none.

use std::io::{Read, Write};
use std::process::Child;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::exec;
use npm_tests::lab::node::Layout;
use npm_tests::lab::observer::{self, End, Observer, Stream, Trace, Which};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Host, Lab, Spec, require_root};

const RATE: u32 = 6000;
const PLANTED: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(60);

fn lab() -> Result<Lab> {
    let host = |name: &str, v4: &str, v6: &str| -> Result<Host> {
        Ok(Host { name: name.into(), addresses: vec![v4.parse()?, v6.parse()?] })
    };
    let lab = Lab::build(&Spec {
        layout: Layout::Routed,
        nodes: vec![host("node", "10.240.0.4", "fd00:240::4")?],
        pods: vec![
            (0, host("a", "10.241.0.2", "fd00:241::2")?),
            (0, host("b", "10.241.0.3", "fd00:241::3")?),
        ],
        externals: vec![],
    })?;
    observer::prepare(lab.netns("node")?)?;
    Ok(lab)
}

fn end(lab: &Lab, name: &str, family: Family) -> Result<End> {
    let endpoint = &lab.endpoints()[lab.find(name)?];
    let address = endpoint.address(family).context("no address")?;
    Ok(End { netns: endpoint.netns.clone(), address })
}

/// Six senders at once are more than two cores can do.
static ONE_PAIR: Mutex<()> = Mutex::new(());

/// Both ways between the pods while `meanwhile` runs.
fn observe(
    lab: &Lab,
    family: Family,
    protocol: Protocol,
    meanwhile: impl FnOnce(&[Observer; 2]) -> Result<()>,
) -> Result<[Trace; 2]> {
    let _alone = ONE_PAIR.lock().unwrap_or_else(PoisonError::into_inner);
    let (a, b) = (end(lab, "a", family)?, end(lab, "b", family)?);
    let stream =
        |from: &End, to: &End| Stream { from: from.clone(), to: to.clone(), protocol, port: 80, rate: RATE };
    let streams = [Observer::start(stream(&a, &b))?, Observer::start(stream(&b, &a))?];
    meanwhile(&streams)?;
    let [there, back] = streams.map(Observer::stop);
    Ok([there?, back?])
}

#[test]
fn nothing_is_lost_where_nothing_filters() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let lab = lab()?;
    // A rule that tracks connections, as every node has: each packet must be one of a new flow.
    for family in Family::BOTH {
        let rule = ["-w", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW"];
        lab.netns("node")?.exec(&Dialect::Nft.program(family, ""), &rule)?;
    }
    // The first run is long enough for all source ports to come round.
    for (family, protocol, least) in
        [(Family::V4, Protocol::Udp, 70_000), (Family::V6, Protocol::Tcp, 18_000)]
    {
        let traces = observe(&lab, family, protocol, |streams| {
            let start = Instant::now();
            while streams.iter().any(|stream| stream.view().sent() < least) {
                anyhow::ensure!(start.elapsed() < PATIENCE, "too slow: {:?}", streams[0].view());
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        })?;
        let mut sent = 0;
        for trace in &traces {
            sent += trace.sent.len() as u64;
            eprintln!(
                "{protocol}: {} sent, {:.0} a second, longest pause {:?}",
                trace.sent.len(),
                trace.rate(),
                trace.longest_pause()
            );
            assert_eq!(trace.count(Which::Lost), 0);
        }
        assert_eq!(counted(&lab, family, "--ctstate NEW")?, sent, "every packet begins a new flow");
    }
    Ok(())
}

/// The packets that the rule whose text contains `rule` has counted.
fn counted(lab: &Lab, family: Family, rule: &str) -> Result<u64> {
    let saved = lab.netns("node")?.exec(&Dialect::Nft.program(family, "-save"), &["-c", "-t", "filter"])?;
    let line = saved.lines().find(|line| line.contains(rule)).context("no such rule")?;
    let count = line.trim_start_matches('[').split(':').next().context("no counter")?;
    Ok(count.parse()?)
}

/// A set that takes and loses its only member at once, by an `ipset` that is already running.
struct Toggle {
    ipset: Child,
    name: &'static str,
    member: &'static str,
}

/// A change that lasted at least as long as `held` and at most as long as `whole`.
#[derive(Debug)]
struct Planted {
    whole: [Instant; 2],
    held: [Instant; 2],
}

impl Toggle {
    fn new(lab: &Lab, name: &'static str, family: Family) -> Result<Self> {
        let (kind, member) = match family {
            Family::V4 => ("inet", "10.241.0.2"),
            Family::V6 => ("inet6", "fd00:241::2"),
        };
        let node = lab.netns("node")?;
        node.exec("ipset", &["create", name, "hash:ip", "family", kind])?;
        let mut ipset = node.run(|| {
            // As the senders: on a busy machine it would not be on time.
            exec::run_first()?;
            // Unbuffered, its prompt tells that the command before it is done.
            exec::start_interactive("stdbuf", &["--output=0", "ipset", "-"])
        })?;
        prompt(&mut ipset)?;
        Ok(Self { ipset, name, member })
    }

    /// Puts the member in for a millisecond.
    fn blink(&mut self) -> Result<Planted> {
        let begin = Instant::now();
        self.order("add")?;
        let there = Instant::now();
        while there.elapsed() < PLANTED {
            std::hint::spin_loop();
        }
        let go = Instant::now();
        self.order("del")?;
        Ok(Planted { whole: [begin, Instant::now()], held: [there, go] })
    }

    fn order(&mut self, command: &str) -> Result<()> {
        let commands = self.ipset.stdin.as_mut().context("its input is piped")?;
        writeln!(commands, "{command} {} {}", self.name, self.member)?;
        prompt(&mut self.ipset)
    }
}

/// Waits until it asks for the next command.
fn prompt(ipset: &mut Child) -> Result<()> {
    let mut prompt = [0; "ipset> ".len()];
    ipset.stdout.as_mut().context("its output is piped")?.read_exact(&mut prompt)?;
    anyhow::ensure!(&prompt == b"ipset> ", "{:?}", String::from_utf8_lossy(&prompt));
    Ok(())
}

impl Drop for Toggle {
    fn drop(&mut self) {
        let ended = self.ipset.kill().and_then(|()| self.ipset.wait());
        ended.expect("ipset waits for commands until it is killed");
    }
}

#[test]
fn a_planted_gap_of_a_millisecond_is_seen() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let lab = lab()?;
    for (family, name) in [(Family::V4, "gap4"), (Family::V6, "gap6")] {
        let mut toggle = Toggle::new(&lab, name, family)?;
        let rule = ["-w", "-A", "FORWARD", "-m", "set", "--match-set", name, "src", "-j", "DROP"];
        lab.netns("node")?.exec(&Dialect::Nft.program(family, ""), &rule)?;
        blinks_are_seen(&lab, family, &mut toggle, Which::Lost, &format!("--match-set {name}"))?;
    }
    Ok(())
}

#[test]
fn a_planted_opening_of_a_millisecond_is_seen() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let lab = lab()?;
    for (family, name) in [(Family::V4, "open4"), (Family::V6, "open6")] {
        let mut toggle = Toggle::new(&lab, name, family)?;
        let program = Dialect::Nft.program(family, "");
        let node = lab.netns("node")?;
        let accept = ["-w", "-A", "FORWARD", "-m", "set", "--match-set", name, "src", "-j", "ACCEPT"];
        node.exec(&program, &accept)?;
        let port = ["-w", "-A", "FORWARD", "-p", "udp", "--dport", "80", "-j", "DROP"];
        node.exec(&program, &port)?;
        blinks_are_seen(&lab, family, &mut toggle, Which::Arrived, &format!("--match-set {name}"))?;
    }
    Ok(())
}

/// The set blinks until ten times the stream from `a` has sent packets meanwhile. It shows each of these, and exactly the
/// packets that the rule counted.
fn blinks_are_seen(lab: &Lab, family: Family, toggle: &mut Toggle, which: Which, rule: &str) -> Result<()> {
    const BLINKS: usize = 10;
    const MOST: usize = 200;
    let mut planted: Vec<Planted> = Vec::new();
    let [there, back] = observe(lab, family, Protocol::Udp, |streams| {
        exec::run_first()?;
        let mut watched = 0;
        while watched < BLINKS && planted.len() < MOST {
            std::thread::sleep(Duration::from_millis(50));
            let before = streams[0].view();
            planted.push(toggle.blink()?);
            std::thread::sleep(Duration::from_millis(2));
            watched += usize::from(streams[0].view().seen_since(&before) == 1.0);
        }
        Ok(())
    })?;
    // A machine that gives its cores to others makes pauses, and a blink in a pause has no packet to show it.
    let mut shown = 0;
    for Planted { held: [from, to], .. } in &planted {
        assert_eq!(there.count_within(opposite(which), *from, *to), 0, "a packet missed the change");
        shown += usize::from(there.count_within(which, *from, *to) > 0);
    }
    let runs = there.runs(which);
    let lasted: Vec<_> = runs.iter().map(|run| (run.count, run.at_most)).collect();
    eprintln!(
        "{family:?} {which:?}: planted {}, {shown} of them with packets, seen {lasted:?}",
        planted.len()
    );
    assert!(shown >= BLINKS, "the machine is too slow to plant and watch: {shown} of {}", planted.len());
    // Every change that was shown is a run of its own, and every run lies in a planted change.
    let is_planted = |first: usize, last: usize| {
        let (first, last) = (there.sent[first], there.sent[last]);
        planted.iter().any(|planted| first.after >= planted.whole[0] && last.before <= planted.whole[1])
    };
    for run in &runs {
        assert!(is_planted(run.first, run.first + run.count - 1), "{run:?} was not planted");
    }
    assert!((shown..=planted.len()).contains(&runs.len()), "{} runs", runs.len());
    assert_eq!(there.count(which) as u64, counted(lab, family, rule)?, "seen and counted packets");
    // The way back is not concerned.
    let other = if which == Which::Lost { 0 } else { back.sent.len() };
    assert_eq!(back.count(Which::Lost), other);
    Ok(())
}

fn opposite(which: Which) -> Which {
    match which {
        Which::Arrived => Which::Lost,
        Which::Lost => Which::Arrived,
    }
}
