//! The observer of updates: it sees gaps and openings of a millisecond, and nothing where there is none.

use std::io::Write;
use std::process::ChildStdin;
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

/// Both ways between the pods while `meanwhile` runs.
fn observe(
    lab: &Lab,
    family: Family,
    protocol: Protocol,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<[Trace; 2]> {
    let (a, b) = (end(lab, "a", family)?, end(lab, "b", family)?);
    let stream =
        |from: &End, to: &End| Stream { from: from.clone(), to: to.clone(), protocol, port: 80, rate: RATE };
    let streams = [Observer::start(stream(&a, &b))?, Observer::start(stream(&b, &a))?];
    meanwhile()?;
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
    for (family, protocol, seconds) in [(Family::V4, Protocol::Udp, 12), (Family::V6, Protocol::Tcp, 3)] {
        let traces = observe(&lab, family, protocol, || {
            std::thread::sleep(Duration::from_secs(seconds));
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
            assert!(trace.rate() >= 5000.0, "{}", trace.rate());
            assert!(trace.sent.len() > if seconds == 12 { 64512 } else { 0 });
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
    ipset: std::process::Child,
    commands: ChildStdin,
    name: &'static str,
    member: &'static str,
}

impl Toggle {
    fn new(lab: &Lab, name: &'static str, family: Family) -> Result<Self> {
        let (kind, member) = match family {
            Family::V4 => ("inet", "10.241.0.2"),
            Family::V6 => ("inet6", "fd00:241::2"),
        };
        let node = lab.netns("node")?;
        node.exec("ipset", &["create", name, "hash:ip", "family", kind])?;
        let (ipset, commands) = node.run(|| {
            // As the senders: on a busy machine add and delete would meet in one time slice.
            exec::run_first()?;
            exec::start_interactive("ipset", &["-"])
        })?;
        Ok(Self { ipset, commands, name, member })
    }

    /// Puts the member in for about a millisecond, and tells how long it took all in all.
    fn blink(&mut self) -> Result<Duration> {
        let start = Instant::now();
        writeln!(self.commands, "add {} {}", self.name, self.member)?;
        self.commands.flush()?;
        let shut = Instant::now() + PLANTED;
        while Instant::now() < shut {
            std::hint::spin_loop();
        }
        writeln!(self.commands, "del {} {}", self.name, self.member)?;
        self.commands.flush()?;
        Ok(start.elapsed())
    }
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

/// Ten blinks of the set; the stream from `a` shows each of them, and exactly the packets that the rule counted.
fn blinks_are_seen(lab: &Lab, family: Family, toggle: &mut Toggle, which: Which, rule: &str) -> Result<()> {
    const BLINKS: usize = 10;
    let mut took = Vec::new();
    let [there, back] = observe(lab, family, Protocol::Udp, || {
        exec::run_first()?;
        for _ in 0..BLINKS {
            std::thread::sleep(Duration::from_millis(100));
            took.push(toggle.blink()?);
        }
        std::thread::sleep(Duration::from_millis(100));
        Ok(())
    })?;
    let runs = there.runs(which);
    let lasted: Vec<_> = runs.iter().map(|run| (run.count, run.at_most)).collect();
    eprintln!("{family:?} {which:?}: planted {took:?}, seen {lasted:?}");
    assert_eq!(runs.len(), BLINKS, "every planted change, and no other, is seen: {lasted:?}");
    assert_eq!(there.count(which) as u64, counted(lab, family, rule)?, "seen and counted packets");
    // The way back is not concerned.
    let other = if which == Which::Lost { 0 } else { back.sent.len() };
    assert_eq!(back.count(Which::Lost), other);
    Ok(())
}
