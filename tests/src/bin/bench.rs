//! `cargo xtask bench datapath`: what a new flow costs, by backend and number of policies. `cargo xtask bench control`: what the
//! agent takes to follow a large cluster. docs/benchmarks.md says how to read both.
//!
//! ```text
//! cargo xtask bench datapath                          N = 1, 10, 100, 1,000, 10,000 (minutes)
//! cargo xtask bench datapath --policies 1 100         some
//! cargo xtask bench datapath --rounds 3 --skip-packets  the program alone
//! cargo xtask bench datapath --policies 10000 --skip-iptables
//! cargo xtask bench control                           both backends, and a server without streaming lists
//! cargo xtask bench control --backend ebpf --probes 1000
//! ```
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use npm_agent::backend::ebpf::choice::{Choice, Hook, Proofs};
use npm_agent::backend::ebpf::enforcer::Ebpf;
use npm_agent::backend::ebpf::kernel::Kernel;
use npm_agent::backend::ebpf::width::Width;
use npm_agent::backend::iptables::variant::Variant;
use npm_agent::backend::iptables::{Iptables, Options};
use npm_agent::exec::Tools;
use npm_common::conntrack::Tuple;
use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::{Family, Goal};
use npm_policy::model::Protocol;
use npm_tests::bench::cluster::{Cluster, LOCAL_PODS as CLUSTER_LOCAL_PODS, NAMESPACES, PODS};
use npm_tests::bench::control::{self, Events, Figures, Memory, Plan};
use npm_tests::bench::established::{established_times, options, pinned};
use npm_tests::bench::lane::{Course, Lane, Series, Times, interval, measure, median};
use npm_tests::bench::runs::{MapMemory, maps, verdict_times};
use npm_tests::bench::world::{BenchWorld, Kind, LOCAL_PODS, NODE, Size, all_flows};
use npm_tests::lab::service::Dialect;
use npm_tests::programs;

#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// What a new flow costs, by backend and number of policies
    Datapath(Arguments),
    /// Memory of the agent, time to the first programming, from an event to the kernel
    Control(ControlArguments),
}

#[derive(clap::Args)]
struct ControlArguments {
    /// The backends
    #[arg(long, num_args = 1.., default_values = ["ebpf", "iptables"])]
    backend: Vec<String>,
    /// Namespaces, of 20 pods and 2 policies each
    #[arg(long, default_value_t = NAMESPACES)]
    namespaces: u32,
    /// Pods replaced a second while events are measured
    #[arg(long, default_value_t = 20)]
    churn: u32,
    /// Events that are measured with eBPF; a tenth of it with iptables
    #[arg(long, default_value_t = 500)]
    probes: u32,
    /// Measure with a server without streaming lists only
    #[arg(long)]
    pages: bool,
    /// The agent's --verify-interval: events wait while it reads back what the kernel has
    #[arg(long, default_value = "30s")]
    verify_interval: String,
}

#[derive(clap::Args)]
struct Arguments {
    /// Numbers of policies
    #[arg(long, num_args = 1.., default_values_t = [1, 10, 100, 1000, 10_000])]
    policies: Vec<u32>,
    /// Pods of other nodes
    #[arg(long, default_value_t = 2000)]
    other_pods: u32,
    /// Rounds of which the median (packets) or the best (runs) counts
    #[arg(long, default_value_t = 21)]
    rounds: u32,
    /// Packets a batch; the first 64 are not timed
    #[arg(long, default_value_t = 300)]
    packets: usize,
    /// Which flows are taken
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Do not measure iptables, which takes long to take many policies
    #[arg(long)]
    skip_iptables: bool,
    /// Do not send packets
    #[arg(long)]
    skip_packets: bool,
    /// Do not measure new flows
    #[arg(long)]
    skip_new_flows: bool,
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Datapath(arguments) => datapath(arguments),
        Command::Control(arguments) => follow(&arguments),
    }
}

/// What the agent takes to follow a cluster.
fn follow(arguments: &ControlArguments) -> Result<()> {
    let ControlArguments { backend, namespaces, churn, probes, pages, verify_interval } = arguments;
    let (cluster, churn) = (Cluster { namespaces: *namespaces }, *churn);
    let sizes: Vec<usize> =
        cluster.objects().filter(|it| it["kind"] == "Pod").map(|it| it.to_string().len()).collect();
    let mean = sizes.iter().sum::<usize>() / sizes.len().max(1);
    println!(
        "{} pods of {mean} bytes of JSON (the least {}), {namespaces} namespaces, {} policies; {} pods on the node",
        namespaces * PODS,
        sizes.iter().min().copied().unwrap_or_default(),
        2 * namespaces,
        CLUSTER_LOCAL_PODS
    );
    let mut runs: Vec<(&str, bool)> = backend.iter().map(|backend| (backend.as_str(), !pages)).collect();
    if !pages && let Some(first) = backend.first() {
        runs.push((first, false));
    }
    for (backend, streaming_lists) in runs {
        let probes = if backend == "iptables" { probes.div_ceil(10) } else { *probes };
        let (verify_interval, backend) = (verify_interval.clone(), backend.to_owned());
        let plan =
            Plan { backend: backend.clone(), cluster, streaming_lists, churn, probes, verify_interval };
        let figures = control::run(plan).with_context(|| backend.clone())?;
        let lists = if streaming_lists { "streaming lists" } else { "lists by pages" };
        println!("\n## {backend}, {lists}\n");
        print_figures(&figures);
    }
    Ok(())
}

fn print_figures(figures: &Figures) {
    let Figures { objects, first_sync, relist, memory, events } = figures;
    let Events { spent, sent: (count, bytes), applies, latencies } = events;
    println!("{objects}");
    println!("start to programmed:  {first_sync}   (bar: 3 s)");
    println!("410 to listed again:  {relist}");
    for (when, Memory { peak, now, anonymous }) in ["first sync", "relist", "the events"].iter().zip(memory) {
        let [peak, now, anonymous] = [peak, now, anonymous].map(|kib| *kib as f64 / 1024.0);
        println!(
            "memory after {when:<11} peak {peak:.1} MiB, resident {now:.1} MiB, of no file {anonymous:.1} MiB   (bar: 64 MiB)"
        );
    }
    println!("pods being replaced:  {spent}; {applies} applies");
    println!("sent by the server:   {count} events, {} bytes each", bytes / (*count).max(1));
    if !latencies.is_empty() {
        let [p50, p90, p99, most] =
            [0.5, 0.9, 0.99, 1.0].map(|part| events.quantile(part).as_secs_f64() * 1000.0);
        println!(
            "event to kernel:      p50 {p50:.2} ms, p90 {p90:.2} ms, p99 {p99:.2} ms, most {most:.2} ms of {}   (bar for ebpf: p50 2 ms, p99 10 ms)",
            latencies.len()
        );
    }
}

/// What a new flow costs.
fn datapath(arguments: Arguments) -> Result<()> {
    println!(
        "seed {}: node {NODE} with {LOCAL_PODS} pods, {} pods elsewhere; {} rounds",
        arguments.seed, arguments.other_pods, arguments.rounds
    );
    counts(arguments.rounds)?;
    memory()?;
    let mut is_measured = false;
    let mut stages = Vec::new();
    for policies in &arguments.policies {
        let began = Instant::now();
        let size = Size { policies: *policies, other_pods: arguments.other_pods };
        let world = BenchWorld::make(size)?;
        println!(
            "\n## {policies} policies: {} peers, {} on one pod (made in {:.1} s)",
            world.peers,
            world.most_on_a_pod,
            began.elapsed().as_secs_f64()
        );
        let flows = all_flows(&world, 64, arguments.seed)?;
        runs(&world, &flows, arguments.rounds)?;
        if !arguments.skip_packets && !is_measured {
            is_measured = established(&world, &arguments)?;
        }
        stages.push(Stage { policies: *policies, world, flows });
    }
    if arguments.skip_packets || arguments.skip_new_flows { Ok(()) } else { new_flows(&stages, &arguments) }
}

/// A number of policies.
struct Stage {
    policies: u32,
    world: BenchWorld,
    flows: Series<Flow>,
}

/// What the programs cost before a packet comes.
fn counts(rounds: u32) -> Result<()> {
    println!("\n## Programs: CPU time to load, best of {rounds} (the bar is 50 ms); counts\n");
    println!(
        "{:<18}{:>10}{:>12}{:>14}{:>12}{:>9}",
        "program", "load", "verified", "instructions", "bytes", "helpers"
    );
    let times = programs::load_times(rounds)?;
    for (name, cost) in programs::costs()? {
        println!(
            "{name:<18}{:>7.1} ms{:>12}{:>14}{:>12}{:>9}",
            times[&name].as_secs_f64() * 1000.0,
            cost.verified,
            cost.instructions,
            cost.machine_code_bytes,
            cost.helper_calls
        );
    }
    Ok(())
}

/// What the maps take for a large cluster.
fn memory() -> Result<()> {
    let size = Size { policies: 1000, other_pods: 10_000 - LOCAL_PODS };
    let world = BenchWorld::make(size)?;
    let mut kernel = Kernel::load(Width::Narrow)?;
    kernel.fill(&world.goal)?;
    let mut total = 0;
    println!("\n## Memory of the maps with 10,000 pods and 1,000 policies (the bar is 16 MiB)\n");
    println!("{:>5}{:>6}{:>7}{:>10}{:>12}", "type", "key", "value", "entries", "KiB");
    for map in maps()? {
        let (key, value) = map.sizes_bytes;
        total += map.memory_bytes;
        println!(
            "{:>5}{key:>6}{value:>7}{:>10}{:>12}",
            map.map_type,
            map.max_entries,
            map.memory_bytes.div_ceil(1024)
        );
    }
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("total with proofs in marks: {:.1} MiB", mebibytes(total));
    // The same with the maps of proofs as large as the object has them.
    let tuple_len_bytes = size_of::<Tuple>() as u64;
    let is_proofs = |map: &MapMemory| {
        let kind = (map.map_type.as_str(), map.sizes_bytes);
        kind == (LRU_HASH, (tuple_len_bytes, 8)) || kind == (ARRAY, (4, tuple_len_bytes + 8))
    };
    let small: u64 = maps()?.iter().filter(|map| is_proofs(map)).map(|map| map.memory_bytes).sum();
    let object = programs::object()?;
    let both: u64 = maps()?.iter().filter(|map| is_proofs(map)).map(|map| map.memory_bytes).sum();
    drop(object);
    println!("total with proofs in maps: {:.1} MiB", mebibytes(total + both - 2 * small));
    Ok(())
}

/// `BPF_MAP_TYPE_LRU_HASH` (include/uapi/linux/bpf.h).
const LRU_HASH: &str = "9";
/// `BPF_MAP_TYPE_ARRAY`: no other map's values are as long as what is told of a connection and when.
const ARRAY: &str = "2";

/// The program by itself.
fn runs(world: &BenchWorld, flows: &BTreeMap<(Kind, Family), Vec<Flow>>, rounds: u32) -> Result<()> {
    println!(
        "\nverdict, both directions, ns above an empty program, hot caches (best of {rounds}; the bar is 200):"
    );
    let mut kernel = Kernel::load(Width::Narrow)?;
    kernel.fill(&world.goal).context("filling the maps")?;
    for ((kind, family), flows) in flows {
        let mut times = verdict_times(&kernel, &flows[..flows.len().min(16)], rounds)?;
        times.sort_unstable();
        let mean = times.iter().sum::<u64>() / times.len() as u64;
        println!(
            "  {kind:?} {family:?}: mean {mean}, from {} to {} ({} flows)",
            times[0],
            times[times.len() - 1],
            times.len()
        );
    }
    Ok(())
}

/// A program's time for a packet of an established connection; whether the world has any.
fn established(world: &BenchWorld, arguments: &Arguments) -> Result<bool> {
    let mut found = Vec::new();
    for family in Family::BOTH {
        let flows = world.flows(Kind::Hit, family, 64, arguments.seed)?;
        let is_udp = |flow: &Flow| matches!(flow.transport, Transport::Port(Protocol::Udp, _));
        let Some(flow) = flows.into_iter().find(is_udp) else { return Ok(false) };
        found.push((family, flow));
    }
    println!(
        "\nestablished packet, UDP, ns above an empty program, interleaved (best of {}; the bars are 15 with casts, 80 \
         without):",
        arguments.rounds
    );
    let choices: Vec<Choice> = Choice::every().filter(|choice| choice.hook == Some(Hook::Tcx)).collect();
    for (family, flow) in found {
        for (choice, time) in
            established_times(&world.goal, &flow, &choices, (arguments.rounds, PACKETS_ESTABLISHED))?
        {
            println!("  {family:?} {choice}: {time:.1}");
        }
    }
    Ok(true)
}

/// Packets a batch of an established connection.
const PACKETS_ESTABLISHED: u32 = 2000;

/// Who filters in a lane.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Filter {
    Nobody,
    /// A program that does nothing, where the eBPF backend's is.
    Empty,
    Iptables(Variant),
    Ebpf(Proofs),
}

impl Filter {
    /// Those that are there to be compared with stand first.
    const ALL: [Self; 6] = [
        Self::Nobody,
        Self::Empty,
        Self::Ebpf(Proofs::Kfuncs),
        Self::Ebpf(Proofs::Maps),
        Self::Iptables(Variant::Nft),
        Self::Iptables(Variant::Legacy),
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Nobody => "no policy",
            Self::Empty => "empty program",
            Self::Ebpf(Proofs::Kfuncs) => "eBPF (marks)",
            Self::Ebpf(Proofs::Maps) => "eBPF (maps)",
            Self::Iptables(Variant::Nft) => "iptables (nft)",
            Self::Iptables(Variant::Legacy) => "iptables (legacy)",
        }
    }

    fn dialect(self) -> Dialect {
        match self {
            Self::Nobody | Self::Empty | Self::Ebpf(_) | Self::Iptables(Variant::Nft) => Dialect::Nft,
            Self::Iptables(Variant::Legacy) => Dialect::Legacy,
        }
    }

    fn lane(self, goal: &Goal) -> Result<Lane> {
        let mut lane = Lane::open(self.name(), self.dialect())?;
        match self {
            Self::Nobody => {}
            Self::Empty => lane.put_empty()?,
            Self::Ebpf(proofs) => {
                let options = options(Choice { proofs: Some(proofs), ..Choice::default() });
                let program = pinned(&options);
                lane.enforce(|| Ok(Box::new(Ebpf::new(options)?)), goal)?;
                lane.watch(&program)?;
            }
            Self::Iptables(variant) => {
                // Ten thousand policies are restored in one piece.
                let tools = Tools { deadline: Duration::from_secs(1800), ..Tools::default() };
                let options = Options { variant: Some(variant), tools, ..Options::default() };
                lane.enforce(|| Ok(Box::new(Iptables::new(options)?)), goal)?;
            }
        }
        Ok(lane)
    }
}

/// What was measured of a lane.
struct Row {
    policies: u32,
    filter: Filter,
    times: Times,
}

/// New flows as packets: everything is set up, then all is measured in turn.
fn new_flows(stages: &[Stage], arguments: &Arguments) -> Result<()> {
    println!("\n## New flows through a node\n");
    let (mut names, mut courses) = (Vec::new(), Vec::new());
    let is_wanted = |filter: &Filter| !(arguments.skip_iptables && matches!(filter, Filter::Iptables(_)));
    for Stage { policies, world, flows } in stages {
        for filter in Filter::ALL.into_iter().filter(is_wanted) {
            let began = Instant::now();
            match filter.lane(&world.goal) {
                Ok(lane) => {
                    let seconds = began.elapsed().as_secs_f64();
                    println!("{policies} policies, {} set up in {seconds:.1} s", filter.name());
                    names.push((*policies, filter));
                    courses.push(Course { lane, flows });
                }
                Err(error) => println!("{policies} policies, {} not measured: {error:#}", filter.name()),
            }
        }
    }
    let times = measure(&mut courses, arguments.rounds, arguments.packets)?;
    let rows: Vec<Row> = names
        .into_iter()
        .zip(times)
        .map(|((policies, filter), times)| Row { policies, filter, times })
        .collect();
    println!(
        "\nCPU time of a new flow through a node, us: median of {} batches of {} (least to most); times no policy in the \
         same round: median (between what it is with 95 of 100)",
        arguments.rounds, arguments.packets
    );
    for stage in stages {
        println!("\n{} policies", stage.policies);
        let of_stage = || rows.iter().filter(|row| row.policies == stage.policies);
        let bare = of_stage().find(|row| row.filter == Filter::Nobody).context("no lane without policies")?;
        for row in of_stage() {
            println!("  {}", row.filter.name());
            for (class, way) in &row.times.way {
                println!("    {:?} {:?}: {}", class.0, class.1, line(way, &bare.times.way[class])?);
            }
        }
    }
    growth(&rows);
    programs_time(&rows);
    Ok(())
}

fn line(way: &[f64], bare: &[f64]) -> Result<String> {
    let is = median(way).context("no batch")?;
    let [least, most] = [way.iter().copied().reduce(f64::min), way.iter().copied().reduce(f64::max)]
        .map(|time| time.unwrap_or(is) * 1e6);
    let ratio = interval(&ratios(way, bare)).context("no batch")?;
    Ok(format!("{:.2} ({least:.2} to {most:.2}), {}", is * 1e6, told(ratio)))
}

/// Round by round.
fn ratios(way: &[f64], other: &[f64]) -> Vec<f64> {
    way.iter().zip(other).map(|(one, other)| one / other).collect()
}

fn told([low, median, high]: [f64; 3]) -> String {
    format!("{median:.2} ({low:.2}-{high:.2})")
}

/// What a new flow costs more with many policies than with the fewest.
fn growth(rows: &[Row]) {
    let Some(fewest) = rows.iter().map(|row| row.policies).min() else { return };
    println!(
        "\nCPU time of a new flow, times that of the same row with {fewest} in the same round: median (between what it is with 95 of 100)\n"
    );
    by_policies(rows, |row, first, class| {
        let (way, first) = (row.times.way.get(&class)?, first.times.way.get(&class)?);
        Some(told(interval(&ratios(way, first))?))
    });
}

/// The program's part of it.
fn programs_time(rows: &[Row]) {
    println!(
        "\nOf that the program itself, by the kernel's count (kernel.bpf_stats), ns (median); counting is in it: see the \
         empty program\n"
    );
    by_policies(rows, |row, _, class| Some(format!("{:.0}", median(row.times.program.get(&class)?)?)));
}

/// A line for each filter and class, a column for each number of policies.
fn by_policies(rows: &[Row], cell: impl Fn(&Row, &Row, (Kind, Family)) -> Option<String>) {
    let numbers: BTreeSet<u32> = rows.iter().map(|row| row.policies).collect();
    print!("{:<28}", "policies");
    numbers.iter().for_each(|number| print!("{number:>18}"));
    println!();
    for filter in Filter::ALL {
        let mut of_filter: Vec<&Row> = rows.iter().filter(|row| row.filter == filter).collect();
        of_filter.sort_by_key(|row| row.policies);
        let Some(first) = of_filter.first() else { continue };
        for class in first.times.way.keys() {
            let cells: Vec<Option<String>> = numbers
                .iter()
                .map(|number| cell(of_filter.iter().find(|row| row.policies == *number)?, first, *class))
                .collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            print!("{:<18}{:<10}", filter.name(), format!("{:?} {:?}", class.0, class.1));
            cells.iter().for_each(|cell| print!("{:>18}", cell.as_deref().unwrap_or("-")));
            println!();
        }
    }
}
