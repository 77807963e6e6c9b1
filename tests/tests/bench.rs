//! The benchmark in small: its world is as described, and its lanes let through and drop what the policies say. Times
//! are `cargo xtask bench`'s; here they are not looked at.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::choice::{Choice, Hook};
use npm_agent::backend::ebpf::enforcer::Ebpf;
use npm_agent::backend::ebpf::held::Limits;
use npm_agent::backend::ebpf::lower::{Lowered, lower};
use npm_agent::backend::ebpf::plan::filled;
use npm_agent::backend::iptables::variant::Variant;
use npm_agent::backend::iptables::{Iptables, Options};
use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::bench::cluster::Cluster;
use npm_tests::bench::control::{self, Plan};
use npm_tests::bench::established::{established_times, options, pinned};
use npm_tests::bench::lane::{Course, Lane, measure};
use npm_tests::bench::world::{BenchWorld, Kind, Size, all_flows};
use npm_tests::lab::require_root;
use npm_tests::lab::service::Dialect;
use npm_tests::opinions::plain;

/// Making it checks that no two policies are alike and that the peers are many.
#[test]
fn the_world_is_as_described() -> Result<()> {
    for policies in [1, 10, 100, 1000] {
        let size = Size { policies, other_pods: 1000 };
        let world = BenchWorld::make(size)?;
        ensure!(world.most_on_a_pod == policies.min(90), "{} on one pod", world.most_on_a_pod);
        let flows = all_flows(&world, 20, 1)?;
        ensure!(flows == all_flows(&BenchWorld::make(size)?, 20, 1)?, "another world than the first time");
        let lowered: Lowered = lower(&world.goal)?;
        let maps = filled(&lowered, &Limits::OBJECT)?;
        for flow in flows.values().flatten() {
            ensure!(plain(&world.goal.verdict(flow)) == maps.decide(flow), "{flow}");
        }
    }
    Ok(())
}

/// That every packet was proven is checked by what measures.
#[test]
fn packets_of_established_connections_are_proven_in_every_way() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let world = BenchWorld::make(Size { policies: 20, other_pods: 500 })?;
    let choices: Vec<Choice> = Choice::every().filter(|choice| choice.hook == Some(Hook::Tcx)).collect();
    for family in Family::BOTH {
        let flows = world.flows(Kind::Hit, family, 64, 1)?;
        let udp = |flow: &&Flow| matches!(flow.transport, Transport::Port(Protocol::Udp, _));
        let flow = flows.iter().find(udp).context("a policy allows UDP")?;
        let times = established_times(&world.goal, flow, &choices, (1, 20))?;
        ensure!(times.len() == choices.len(), "{family:?}: {times:?}");
    }
    Ok(())
}

#[test]
fn lanes_pass_hits_and_drop_misses() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let world = BenchWorld::make(Size { policies: 20, other_pods: 500 })?;
    let mut filtered = Lane::open("iptables", Dialect::Nft)?;
    let variant = Options { variant: Some(Variant::Nft), ..Options::default() };
    filtered
        .enforce(|| -> Result<Box<dyn Backend>> { Ok(Box::new(Iptables::new(variant)?)) }, &world.goal)?;
    let mut judged = Lane::open("eBPF", Dialect::Nft)?;
    let options = options(Choice::default());
    let program = pinned(&options);
    judged.enforce(|| -> Result<Box<dyn Backend>> { Ok(Box::new(Ebpf::new(options)?)) }, &world.goal)?;
    judged.watch(&program)?;
    let mut empty = Lane::open("empty program", Dialect::Nft)?;
    empty.put_empty()?;
    let flows = all_flows(&world, 10, 1)?;
    let lanes = [Lane::open("no policy", Dialect::Nft)?, empty, filtered, judged];
    let mut courses = lanes.map(|lane| Course { lane, flows: &flows });
    // That what arrives is what should is checked batch by batch.
    let times = measure(&mut courses, 2, 20)?;
    for (times, has_program) in times.iter().zip([false, true, false, true]) {
        ensure!(times.way.len() == 4 && times.way.values().all(|times| times.len() == 2), "{times:?}");
        let measured: Vec<f64> = times.program.values().flatten().copied().collect();
        ensure!(measured.len() == if has_program { 8 } else { 0 }, "{times:?}");
        ensure!(measured.iter().all(|nanoseconds| *nanoseconds > 0.0), "{times:?}");
    }
    Ok(())
}

/// `cargo xtask bench control` in small: pods come, go and change, others are replaced meanwhile, everything is listed anew; the
/// kernel shows each event.
#[test]
fn events_reach_the_kernel() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let cluster = Cluster { namespaces: 40 };
    let least =
        cluster.objects().filter(|object| object["kind"] == "Pod").map(|pod| pod.to_string().len()).min();
    ensure!(least > Some(4096), "pods as a cluster sends them are larger: {least:?}");
    let (backend, verify_interval) = ("ebpf".to_owned(), "30s".to_owned());
    let plan = Plan { backend, cluster, streaming_lists: true, churn: 2, probes: 6, verify_interval };
    let figures = control::run(plan)?.events;
    ensure!(figures.latencies.len() == 6, "{figures:?}");
    let (events, bytes) = figures.sent;
    ensure!(events >= 6 && bytes > 4096 * (events - 3) && bytes < 9000 * events, "{figures:?}");
    ensure!(figures.applies > 0 && figures.applies <= events + 10, "{figures:?}");
    Ok(())
}
