//! The eBPF programs at the hook: they load, attach, stay when the agent ends, follow interfaces, and go.
//!
//! `NPM_RESTARTS=200` restarts as often under a flood.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use aya::programs::{SchedClassifier, TcAttachType};
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::choice::Choice;
use npm_agent::backend::ebpf::enforcer::Ebpf;
use npm_common::layout::{MAX_PROOFS, SCHEMA};
use npm_policy::compile::compile;
use npm_policy::flow::Transport;
use npm_policy::goal::Goal;
use npm_policy::model::Protocol;
use npm_tests::lab::netns::{Namespaces, Netns};
use npm_tests::lab::packet::{Ends, IpSender, udp};
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::require_root;
use npm_tests::lab::service::Dialect;
use npm_tests::pair::{CLOSED, Stage, world};
use npm_tests::scenario::enforcer::{Means, ebpf};

fn start(node: &Netns, choice: &str) -> Result<Ebpf> {
    ebpf(node, choice.parse()?, Dialect::Nft)
}

fn pins(node: &Netns) -> PathBuf {
    PathBuf::from("/sys/fs/bpf/npm-agent").join(node.name())
}

fn closed() -> Result<Goal> {
    Ok(compile(&world(CLOSED)?, "node-a").0)
}

#[test]
fn every_program_loads_and_goes() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let every = Choice::every().map(|choice| choice.to_string());
    for choice in every.chain([String::new()]) {
        let namespaces = Namespaces::create(["node"])?;
        let node = &namespaces.members()[0];
        let mut backend = start(node, &choice)?;
        assert!(!backend.inherits(), "{choice}: nothing was there");
        node.run(|| Ok(backend.apply(&Goal::default())?))?;
        assert!(pins(node).exists(), "{choice}");
        node.run(|| Ok(backend.remove()?))?;
        assert!(!pins(node).exists(), "{choice}");
        let rules = node.exec("iptables-nft-save", &[])?;
        assert!(!rules.contains("AZURE-NPM"), "{choice}: {rules}");
    }
    Ok(())
}

/// An interface that appears later is judged too.
#[test]
fn new_interfaces_get_the_program() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let namespaces = Namespaces::create(["node"])?;
    let node = &namespaces.members()[0];
    let mut backend = start(node, "tcx")?;
    node.run(|| Ok(backend.apply(&Goal::default())?))?;
    let links =
        || Ok::<_, anyhow::Error>(std::fs::read_dir(pins(node).join(format!("v{SCHEMA}/links")))?.count());
    let wait = |count: usize| -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while links()? != count {
            ensure!(Instant::now() < deadline, "{} links instead of {count}", links()?);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    assert_eq!(links()?, 0, "loopback gets none");
    node.exec("ip", &["link", "add", "late", "type", "veth", "peer", "name", "later"])?;
    wait(2)?;
    node.exec("ip", &["link", "del", "late"])?;
    wait(0)?;
    node.run(|| Ok(backend.remove()?)).map(drop)
}

/// Floods one pod from the other, both isolated, while `work` is done. Nothing may arrive.
fn leaks_nothing<T>(stage: &Stage, work: impl FnOnce() -> Result<T>) -> Result<T> {
    stage.deafen()?;
    let (from, to): (IpAddr, IpAddr) = ("10.241.0.2".parse()?, "10.241.0.3".parse()?);
    let sender = stage.lab.endpoints()[stage.pod("10.241.0.2")?].netns.clone();
    let stop = AtomicBool::new(false);
    let began = AtomicBool::new(false);
    let (outcome, sent) = std::thread::scope(|scope| {
        let flood = scope.spawn(|| -> Result<u64> {
            sender.enter()?;
            let (sender, mut sent) = (IpSender::open()?, 0);
            while !stop.load(Ordering::Relaxed) {
                let source = SocketAddr::new(from, 20_000 + u16::try_from(sent % 40_000)?);
                let ends = Ends { source, destination: SocketAddr::new(to, 80) };
                sender.send(&udp(ends, b"not you")?)?;
                sent += 1;
                began.store(sent > 1000, Ordering::Relaxed);
            }
            Ok(sent)
        });
        while !began.load(Ordering::Relaxed) && !flood.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let outcome = work();
        stop.store(true, Ordering::Relaxed);
        (outcome, flood.join().expect("the sender does not panic"))
    });
    let (outcome, sent) = (outcome?, sent?);
    let arrived = stage.arrived()?;
    ensure!(arrived == 0, "{arrived} of {sent} packets arrived");
    Ok(outcome)
}

/// What an earlier process left drops packets until the next one says otherwise, and no packet passes between the two.
#[test]
fn restarts_leak_nothing() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let restarts = std::env::var("NPM_RESTARTS").unwrap_or_else(|_| "10".into());
    let restarts: usize = restarts.parse().context("NPM_RESTARTS")?;
    for choice in ["kfuncs,tcx", "kfuncs,clsact", "maps,tcx", "maps,clsact"] {
        let stage = Stage::build(Means::Nothing)?;
        let node = stage.node();
        let mut backend = start(node, choice)?;
        node.run(|| Ok(backend.apply(&closed()?)?))?;
        leaks_nothing(&stage, || {
            (0..restarts).try_for_each(|_| {
                drop(std::mem::replace(&mut backend, start(node, choice)?));
                ensure!(backend.inherits(), "{choice}: what was enforced is not taken over");
                node.run(|| Ok(backend.apply(&closed()?)?)).map(drop)
            })
        })
        .with_context(|| format!("{choice}: {restarts} restarts"))?;
        node.run(|| Ok(backend.remove()?))?;
    }
    Ok(())
}

/// How many programs are at an interface's egress: linked, as filters.
fn attached(node: &Netns, interface: &str) -> Result<[usize; 2]> {
    let linked = node.run(|| Ok(SchedClassifier::query_tcx(interface, TcAttachType::Egress)?.1.len()))?;
    // An interface without the queueing discipline has none.
    let filters = node.exec("tc", &["filter", "show", "dev", interface, "egress"]).unwrap_or_default();
    Ok([linked, filters.lines().filter(|line| line.contains("handle 0x")).count()])
}

/// What an earlier process has attached in another way, or with maps of another schema, goes, once the successor's program
/// is there: it would judge by maps that nobody keeps up to date.
#[test]
fn what_was_before_gives_way() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (before, after, schema) in [
        ("kfuncs,tcx", "kfuncs,clsact", false),
        ("maps,clsact", "kfuncs,tcx", false),
        ("kfuncs,tcx", "maps,tcx", false),
        ("kfuncs,tcx", "maps,tcx", true),
        ("kfuncs,clsact", "kfuncs,clsact", true),
        ("maps,clsact", "maps,tcx", true),
    ] {
        let said = format!("{before} to {after}, another schema: {schema}");
        let stage = Stage::build(Means::Nothing)?;
        let node = stage.node();
        let mut first = start(node, before)?;
        node.run(|| Ok(first.apply(&closed()?)?))?;
        let succession = leaks_nothing(&stage, || {
            drop(first);
            let version = pins(node).join(format!("v{SCHEMA}"));
            let other = pins(node).join("v0");
            if schema {
                std::fs::rename(&version, &other).context("renaming the schema")?;
            }
            let mut second = start(node, after)?;
            ensure!(second.inherits() != schema, "{said}");
            node.run(|| Ok(second.apply(&closed()?)?))?;
            ensure!(!other.exists(), "{said}: the maps of another schema are still pinned");
            Ok(second)
        });
        let mut backend = succession.with_context(|| said.clone())?;
        if after.contains("maps") {
            let map = pins(node).join(format!("v{SCHEMA}/maps/PROOFS"));
            let room = MapData::from_pin(map)?.info()?.max_entries();
            assert_eq!(room, MAX_PROOFS, "{said}: programs that mark need less");
        }
        let expected = if after.contains("tcx") { [1, 0] } else { [0, 1] };
        for interface in ["veth0", "veth1"] {
            assert_eq!(attached(node, interface)?, expected, "{said}: {interface}");
        }
        node.run(|| Ok(backend.remove()?))?;
    }
    Ok(())
}

/// Semantics 25: a connection that was open before anything was enforced lives on, through restarts too.
#[test]
fn connections_from_before_live_on() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for choice in Choice::every().map(|choice| choice.to_string()) {
        let mut stage = Stage::build(Means::Nothing)?;
        let port = Transport::Port(Protocol::Tcp, 80);
        stage.lab.listen(&[port])?;
        let node = stage.node().clone();
        // Somebody else's rule makes the node track connections.
        node.exec("iptables-nft", &["-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID"])?;
        node.exec("ip6tables-nft", &["-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID"])?;
        let from = stage.pod("10.241.0.2")?;
        let mut open = Vec::new();
        for to in ["10.241.0.3", "fd00:241::3"] {
            let to: IpAddr = to.parse()?;
            let stream = stage.lab.endpoints()[from].netns.run(|| Ok(TcpStream::connect((to, 80))?))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            open.push(stream);
        }
        let mut echo = |when: &str| -> Result<()> {
            for stream in &mut open {
                let mut answer = [0; 4];
                stream.write_all(b"open")?;
                stream.read_exact(&mut answer).with_context(|| format!("{choice}: {when}"))?;
            }
            Ok(())
        };
        echo("before")?;
        let mut backend = start(&node, &choice)?;
        node.run(|| Ok(backend.apply(&closed()?)?))?;
        echo("enforced")?;
        let probe = Probe {
            from,
            source: "10.241.0.2".parse()?,
            destination: "10.241.0.3".parse()?,
            transport: port,
            expected: None,
        };
        assert_eq!(stage.lab.probe(&[probe])?, [Outcome::Blocked], "{choice}");
        drop(backend);
        let mut backend = start(&node, &choice)?;
        echo("taken over")?;
        assert_eq!(stage.lab.probe(&[probe])?, [Outcome::Blocked], "{choice}: before the first apply");
        node.run(|| Ok(backend.apply(&closed()?)?))?;
        echo("restarted")?;
        node.run(|| Ok(backend.remove()?))?;
        assert_eq!(
            stage.lab.probe(&[Probe { expected: Some(npm_policy::flow::Decision::Allow), ..probe }])?,
            [Outcome::Answered]
        );
    }
    Ok(())
}
