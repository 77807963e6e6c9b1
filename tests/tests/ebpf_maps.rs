//! The eBPF maps in this kernel: written to while programs run, pinned and adopted, repaired, counted, wide.
//!
//! Pins are made below the BPF filesystem in a directory named for this process, and removed.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use aya::EbpfLoader;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData};
use npm_agent::backend::ebpf::kernel::Kernel;
use npm_agent::backend::ebpf::maps::{Maps, NAMES, Writes};
use npm_agent::backend::ebpf::width::Width;
use npm_common::layout::{NARROW_WORDS, V4};
use npm_policy::compile::Compiler;
use npm_policy::flow::Flow;
use npm_policy::goal::Goal;
use npm_policy::model::{Operator, Policy, Port, Ports, Protocol, Requirement, Rule, Selector};
use npm_policy::world::Change;
use npm_tests::bench::world::{BenchWorld, Size};
use npm_tests::opinions::plain;
use npm_tests::property::check;
use npm_tests::random::{NODES, cluster, flows, sequence, world, world_of};
use npm_tests::regressions;
use proptest::prelude::*;

const REGRESSIONS: &str = regressions!("ebpf_maps.txt");

/// Whether this test can run; under CI it must.
fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: eBPF programs are loaded by root only");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "a skipped test is a failure in CI");
    }
    root
}

/// A directory for pins, removed in the end.
struct Pins(PathBuf);

impl Pins {
    fn new(name: &str) -> Result<Self> {
        let directory = PathBuf::from(format!("/sys/fs/bpf/npm-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        Ok(Self(directory))
    }

    /// The maps, made and pinned, or those that are pinned.
    fn load(&self) -> Result<Maps<NARROW_WORDS>> {
        let mut loader = EbpfLoader::new();
        for name in NAMES {
            loader.map_pin_path(name, self.0.join(name));
        }
        let mut ebpf = loader.load(Width::Narrow.object()).context("loading the object")?;
        Ok(Maps::take(&mut ebpf)?)
    }

    fn adopt(&self) -> Result<Maps<NARROW_WORDS>> {
        Ok(Maps::pinned(&self.0)?)
    }

    /// What the kernel says that all maps take.
    fn memory_bytes(&self) -> Result<u64> {
        let mut sum = 0;
        for name in NAMES {
            let bytes = memory_bytes(&self.0.join(name)).with_context(|| format!("asking for {name}"))?;
            println!("{name}: {} KiB", bytes / 1024);
            sum += bytes;
        }
        Ok(sum)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn memory_bytes(pin: &Path) -> Result<u64> {
    let map = MapData::from_pin(pin)?;
    let fd = map.fd().as_fd().as_raw_fd();
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:")).context("no memlock")?;
    Ok(line.trim().parse()?)
}

fn compiler(changes: Vec<Change>) -> Compiler {
    let mut compiler = Compiler::new(NODES[0]);
    compiler.apply(changes);
    compiler
}

/// What is written and deleted in large calls is there and gone, also where somebody has taken out a part meanwhile.
#[test]
fn many_elements_at_once_are_what_single_ones_are() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let pins = Pins::new("many")?;
    let mut maps = pins.load()?;
    let goal = |policies| -> Result<Goal> { Ok(BenchWorld::make(Size { policies, other_pods: 3000 })?.goal) };
    let (large, nobody) = (goal(1000)?, compiler(Vec::new()).goal());
    let wrote = maps.apply(&large)?;
    ensure!(wrote.entries > 10_000, "{wrote:?} is not many");
    let held = maps.held();
    let sizes = [
        held.v4.places.len(),
        held.v6.places.len(),
        held.rows.len(),
        held.v4.networks.len(),
        held.v6.pairs.len(),
    ];
    ensure!(sizes.iter().all(|size| *size >= 100), "{sizes:?} is not many");
    let differ = pins.adopt()?.held().differences(held);
    ensure!(differ.is_empty(), "something else was written than meant: {differ:?}");
    // Read one by one.
    let mut places = places_of(&pins)?;
    let single: BTreeMap<V4, u32> = places.iter().collect::<Result<_, _>>()?;
    ensure!(single == held.v4.places, "something else was written than meant");

    let some: Vec<V4> = single.keys().copied().step_by(7).collect();
    some.iter().try_for_each(|address| places.remove(address))?;
    let pinned = |name: &str| MapData::from_pin(pins.0.join(name));
    let mut networks = LpmTrie::<_, V4, [u32; 2]>::try_from(Map::LpmTrie(pinned("NETWORKS_V4")?))?;
    let some: Vec<Key<V4>> = networks.keys().step_by(7).collect::<Result<_, _>>()?;
    some.iter().try_for_each(|prefix| networks.remove(prefix))?;
    let mut pairs = HashMap::<_, [u8; 20], u32>::try_from(Map::HashMap(pinned("PAIRS_V6")?))?;
    let some: Vec<[u8; 20]> = pairs.keys().step_by(7).collect::<Result<_, _>>()?;
    some.iter().try_for_each(|pair| pairs.remove(pair))?;
    maps.apply(&nobody)?;
    ensure!(maps.is_empty() && places_of(&pins)?.keys().next().is_none(), "something is left");
    let differ = pins.adopt()?.held().differences(maps.held());
    ensure!(differ.is_empty(), "something is left: {differ:?}");
    Ok(())
}

fn places_of(pins: &Pins) -> Result<HashMap<MapData, V4, u32>> {
    Ok(HashMap::try_from(Map::HashMap(MapData::from_pin(pins.0.join("PLACES_V4"))?))?)
}

/// Packets are judged by one goal or the other while the maps go from one to the other and back.
#[test]
fn every_packet_sees_one_goal() {
    if !is_root() {
        return;
    }
    let (asked, split) = (Cell::new(0), Cell::new(0));
    let strategy = (world(), sequence(4..12), any::<u64>());
    let kernel = std::cell::RefCell::new(Kernel::load(Width::Narrow).expect("the program loads"));
    check(REGRESSIONS, "written while asked", 12, strategy, |(start, changes, seed)| {
        let mut compiler = compiler(start);
        let (old, before) = (compiler.goal(), compiler.world().clone());
        compiler.apply(changes);
        let (new, after) = (compiler.goal(), compiler.world().clone());
        let flows: BTreeSet<Flow> = [before, after].iter().flat_map(|world| flows(world, 60, seed)).collect();
        let allowed: Vec<_> = flows
            .iter()
            .map(|flow| (*flow, [plain(&old.verdict(flow)), plain(&new.verdict(flow))]))
            .collect();
        let mut kernel = kernel.borrow_mut();
        let (judge, maps) = kernel.apart();
        let fail = |error: String| TestCaseError::fail(error);
        // As an agent does it, and all that can be in one call.
        maps.write_at_once_from(if seed % 2 == 0 { 16 } else { 1 });
        maps.apply(&old).map_err(|error| fail(error.to_string()))?;
        let (is_over, count) = (AtomicBool::new(false), AtomicU64::new(0));
        let outcome = std::thread::scope(|scope| {
            let asker = scope.spawn(|| {
                let mut differing = 0_u64;
                while !is_over.load(Ordering::Relaxed) {
                    for (flow, allowed) in &allowed {
                        let verdict = judge.verdict(flow).map_err(|error| error.to_string())?;
                        if !allowed.contains(&verdict) {
                            return Err(format!("{flow}: {verdict:?}, neither of {allowed:?}"));
                        }
                        differing += u64::from(allowed[0] != allowed[1]);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(differing)
            });
            for _ in 0..6 {
                for goal in [&new, &old] {
                    maps.apply(goal).map_err(|error| error.to_string())?;
                    // Every flow is asked about once in between, or the asker has given up.
                    let from = count.load(Ordering::Relaxed);
                    while count.load(Ordering::Relaxed) < from + allowed.len() as u64 && !asker.is_finished()
                    {
                        std::thread::yield_now();
                    }
                }
            }
            is_over.store(true, Ordering::Relaxed);
            asker.join().expect("the asker does not panic")
        });
        split.set(split.get() + outcome.map_err(fail)?);
        asked.set(asked.get() + count.into_inner());
        Ok(())
    });
    println!(
        "{} verdicts while maps were written, {} of flows that the goals differ on",
        asked.get(),
        split.get()
    );
    assert!(asked.get() > 5_000 && split.get() > 500);
}

/// 10,000 pods of two families, 1,000 policies on this node, half as many peer sets.
fn large() -> Vec<Change> {
    let mut changes = cluster(50, 200, 20, NODES[0]);
    let mut number = 0_u16;
    for change in &mut changes {
        match change {
            Change::Pod(_, Some(pod)) => {
                number += 1;
                pod.addresses.insert(IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 1, number)));
                let index: u32 = pod.key.name.trim_start_matches("pod-").parse().expect("pod-<number>");
                if index < 10 {
                    pod.node = Some(NODES[0].into());
                }
            }
            Change::Policy(_, Some(policy)) => narrow(policy),
            Change::Namespace(..) | Change::Pod(_, None) | Change::Policy(_, None) => {}
        }
    }
    changes
}

/// The policy selects pods that are there, and names ports by their numbers, each policy others.
fn narrow(policy: &mut Policy) {
    let index: u16 = policy.key.name.trim_start_matches("policy-").parse().expect("policy-<number>");
    let values = [format!("app-{}", index % 10).into()].into();
    policy.subjects = Selector::new([Requirement { key: "app".into(), operator: Operator::In(values) }]);
    let range = |first| Port::Range { protocol: Protocol::Tcp, first, last: first + 5 };
    let ports = Ports::Only(vec![range(100 * index + 1), range(100 * index + 50)]);
    let renumbered = |rules: &mut Vec<Rule>| rules.iter_mut().for_each(|rule| rule.ports = ports.clone());
    policy.ingress.iter_mut().chain(&mut policy.egress).for_each(renumbered);
}

/// The bar of memory; the cost of one pod's change; adoption; repair.
#[test]
fn a_large_cluster_is_held_in_little_and_changed_by_little() -> Result<()> {
    const MOST_MEMORY_BYTES: u64 = 16 << 20;
    if !is_root() {
        return Ok(());
    }
    let pins = Pins::new("large")?;
    let mut maps = pins.load()?;
    ensure!(maps.is_empty());
    let mut compiler = compiler(large());
    let goal = compiler.goal();
    ensure!(goal.programs.len() == 1000, "{} policies", goal.programs.len());
    let began = Instant::now();
    let writes = maps.apply(&goal)?;
    let held = maps.held();
    println!(
        "{writes:?} in {:?}: {} rows, {} policies, {} segments",
        began.elapsed(),
        held.rows.len(),
        held.policies.len(),
        held.segments.len()
    );
    ensure!(held.v4.places.len() == 10_000 && held.v6.places.len() == 10_000);
    let memory = pins.memory_bytes()?;
    println!("memory of all maps: {} KiB", memory / 1024);
    ensure!(memory <= MOST_MEMORY_BYTES, "{memory} bytes");
    ensure!(maps.apply(&goal)? == Writes::default());

    // One pod's change costs what it changes: its two addresses' records and places, the switch; what was left to sweep.
    let pod =
        compiler.world().pods().find(|pod| &*pod.key.name == "pod-77").context("a pod elsewhere")?.clone();
    for change in [None, Some((*pod).clone()), None, Some((*pod).clone())] {
        compiler.apply([Change::Pod(pod.key.clone(), change)]);
        let began = Instant::now();
        let writes = maps.apply(&compiler.goal())?;
        println!("one pod: {writes:?} in {:?}", began.elapsed());
        ensure!(writes.entries <= 16 && writes.waits <= 1, "{writes:?}");
    }

    // A process that remembers nothing finds all as it was, and goes on with the same numbers.
    drop(maps);
    let mut adopted = pins.adopt()?;
    ensure!(!adopted.is_empty());
    let goal = compiler.goal();
    for flow in flows(compiler.world(), 300, 1) {
        ensure!(adopted.decide(&flow) == plain(&goal.verdict(&flow)), "{flow}");
    }
    let writes = adopted.apply(&goal)?;
    println!("adopted: {writes:?}");
    ensure!(writes.entries <= 8, "{writes:?}");
    ensure!(adopted.apply(&goal)? == Writes::default());

    // Somebody else writes: it is seen, named and repaired.
    let map = Map::from_map_data(MapData::from_pin(pins.0.join("POLICIES"))?)?;
    let mut policies: Array<_, [u32; 4]> = map.try_into()?;
    policies.set(1, [0, 0, 1, 0], 0)?;
    let (writes, drift) = adopted.verify(&goal)?;
    println!("{writes:?}: {drift:?}");
    ensure!(drift == ["policies: 1 changed"], "{drift:?}");
    for flow in flows(compiler.world(), 300, 2) {
        ensure!(adopted.decide(&flow) == plain(&goal.verdict(&flow)), "{flow}");
    }
    let (writes, drift) = adopted.verify(&goal)?;
    ensure!(drift.is_empty() && writes.entries <= 4, "{writes:?} {drift:?}");
    Ok(())
}

/// More peer sets than the narrow object tells apart: the wide one judges as the goal does.
#[test]
fn many_peer_sets_need_the_wide_object() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let mut changes = cluster(60, 20, 10, NODES[0]);
    for change in &mut changes {
        if let Change::Pod(_, Some(pod)) = change {
            pod.node = Some(NODES[0].into());
        }
    }
    let world = world_of(changes.clone());
    let goal: Goal = compiler(changes).goal();
    let mut kernel = Kernel::load(Width::Narrow)?;
    let few = compiler(cluster(2, 20, 2, NODES[0])).goal();
    ensure!(Width::needed(&few)? == Width::Narrow && Width::needed(&goal)? == Width::Wide);
    kernel.fill(&few)?;
    let writes = kernel.fill(&goal)?;
    println!("wide: {writes:?}");
    ensure!(kernel.apart().1.width() == Width::Wide);
    for flow in flows(&world, 1000, 3) {
        ensure!(kernel.verdict(&flow)? == plain(&goal.verdict(&flow)), "{flow}");
    }
    Ok(())
}
