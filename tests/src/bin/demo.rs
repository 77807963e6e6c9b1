//! The demo: a small cluster of network namespaces, real traffic, and who can talk to whom.
//!
//! ```text
//! deploy/demo/*.yaml ─► lab (a node, pods, hosts outside) ─► npm-agent run, inside the node ─► real connections
//!          └──────────► oracle ─────────────────────────────────────────────────► expected ──► side by side
//! ```
//!
//! The same connections are made under each backend: eBPF first, then iptables, which takes its place as it would on a node
//! that changes its backend.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use npm_agent::source::manifests::{self, Reading};
use npm_policy::compile::compile;
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_policy::names::name_sets;
use npm_policy::verdict::oracle;
use npm_policy::world::World;
use npm_tests::lab::agent::{Agent, Settings, binary};
use npm_tests::lab::netns::Netns;
use npm_tests::lab::node::Layout;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Host, Lab, Spec};
use npm_tests::random::world_of;

const NODE: &str = "demo";

/// Hosts outside the cluster: a customer, a network that the web server turns away, the bank, and its back office.
const OUTSIDE: [(&str, &str, &str); 4] = [
    ("visitor", "203.0.113.10", "2001:db8:cafe::10"),
    ("badnet", "192.0.2.200", "2001:db8:bad::1"),
    ("bank", "198.51.100.20", "2001:db8:ba::20"),
    ("backoffice", "198.51.100.70", "2001:db8:ba:40::70"),
];

/// In this order: the last is the one whose rules are shown, and that goes on with `--keep`.
const BACKENDS: [&str; 2] = ["ebpf", "iptables"];

/// Takes away what an agent left on the node, which is not all gone with the node's namespace: eBPF objects are pinned.
struct Swept {
    node: Netns,
}

impl Drop for Swept {
    fn drop(&mut self) {
        let swept =
            binary().and_then(|agent| self.node.exec(&agent.to_string_lossy(), &["cleanup", "--force"]));
        if let Err(error) = swept {
            eprintln!("what the agent programmed is left behind: {error:#}");
        }
    }
}

/// All connections, tried under one backend.
struct Round {
    backend: &'static str,
    /// From the agent's start until everything was programmed.
    took: Duration,
    observed: Vec<Outcome>,
}

/// What the command line asks for.
struct Args {
    keep: Keep,
    dialect: Dialect,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// Tear everything down at the end.
    No,
    /// Wait for Ctrl-C first.
    UntilInterrupted,
}

fn main() -> Result<()> {
    let args = parse(std::env::args().skip(1))?;
    // Blocked before any thread starts, so that Ctrl-C tears the lab down instead of leaving it.
    let mut interrupts = SigSet::empty();
    interrupts.add(Signal::SIGINT);
    interrupts.add(Signal::SIGTERM);
    interrupts.thread_block().context("blocking Ctrl-C")?;
    demo(&args, &interrupts)
}

fn parse(args: impl Iterator<Item = String>) -> Result<Args> {
    let mut parsed = Args { keep: Keep::No, dialect: Dialect::Nft };
    for arg in args {
        match arg.as_str() {
            "--keep" => parsed.keep = Keep::UntilInterrupted,
            "--nft" => parsed.dialect = Dialect::Nft,
            "--legacy" => parsed.dialect = Dialect::Legacy,
            other => bail!("unknown argument {other}: --keep, --nft (default), --legacy"),
        }
    }
    Ok(parsed)
}

fn demo(args: &Args, interrupts: &SigSet) -> Result<()> {
    let started = Instant::now();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/demo");
    let directory = tempfile::tempdir().context("making a directory for the demo")?;
    let manifests = copy(&source, &directory.path().join("manifests"))?;
    let Reading { changes, problems, unread } = manifests::read(std::slice::from_ref(&manifests));
    ensure!(problems.is_empty() && unread.is_empty(), "the demo's manifests have problems: {problems:?}");
    let world = world_of(changes);
    println!(
        "The application of deploy/demo: {} pods in {} namespaces under {} NetworkPolicies, on one node;\n\
         outside the cluster: {}. Every pod and host is a network namespace, every connection is real.\n",
        world.pods().count(),
        world.namespaces().count(),
        world.policies().count(),
        OUTSIDE.map(|(name, ..)| name).join(", ")
    );

    let mut lab = Lab::build(&spec(&world)?).context("building the lab")?;
    let columns = columns(&world);
    let transports: Vec<Transport> = columns.iter().map(|column| column.transport).collect();
    lab.listen(&transports)?;
    let plan = Plan::of(&lab, &world, &columns)?;
    let open = plan.observe(&mut lab, |_| Some(Decision::Allow))?;
    let delivered = open.iter().filter(|outcome| outcome.decision() == Decision::Allow).count();
    println!("Without the agent {delivered} of {} connections get through (IPv4 and IPv6).", open.len());
    ensure!(delivered == open.len(), "the lab itself loses connections");

    let node = lab.netns(NODE)?.clone();
    // Dropped after the agent.
    let swept = Swept { node: node.clone() };
    let mut rounds = Vec::new();
    let mut running = None;
    for backend in BACKENDS {
        if let Some(agent) = running.take() {
            Agent::terminate(agent).context("stopping the agent")?;
        }
        let more = ["--iptables-variant", args.dialect.name(), "--instance", node.name()];
        let settings = Settings {
            backend: backend.to_owned(),
            node: NODE.to_owned(),
            manifests: manifests.clone(),
            directory: directory.path().to_owned(),
            more: more.map(str::to_owned).to_vec(),
        };
        let start = Instant::now();
        let agent = Agent::start(&node, settings)?;
        let agent = running.insert(agent);
        agent.wait().with_context(|| format!("waiting for the agent with {backend}"))?;
        let took = start.elapsed();
        let observed = plan.observe(&mut lab, |flow| Some(oracle(&world, flow).decision()))?;
        rounds.push(Round { backend, took, observed });
    }
    let agent = running.context("an agent runs")?;
    let wrong = plan.print(&world, &columns, &rounds);
    show_rules(&world, &node, args.dialect)?;
    println!(
        "\nDone in {:.1} s. Look next at:\n  \
         target/debug/npm-agent matrix -f deploy/demo             the same table offline, without root\n  \
         target/debug/npm-agent render -f deploy/demo --node {NODE}  all rules and sets as text (--backend ebpf: all maps)\n  \
         docs/ARCHITECTURE.md, docs/configuration.md              how it works, how to run it",
        started.elapsed().as_secs_f64()
    );
    if args.keep == Keep::UntilInterrupted {
        keep(&lab, &manifests, directory.path(), interrupts)?;
    }
    agent.terminate().context("stopping the agent")?;
    drop(swept);
    ensure!(wrong == 0, "{wrong} connections did not do what the policies say");
    Ok(())
}

/// A copy that the user may edit while the agent watches it.
fn copy(from: &Path, to: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    for entry in std::fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let path = entry?.path();
        let name = path.file_name().context("a directory's entry has a name")?;
        std::fs::copy(&path, to.join(name)).with_context(|| format!("copying {}", path.display()))?;
    }
    Ok(to.to_owned())
}

fn spec(world: &World) -> Result<Spec> {
    let parse = |text: &str| text.parse::<IpAddr>().with_context(|| format!("{text} is no address"));
    let pods = world.pods().map(|pod| {
        let addresses = pod.addresses.iter().copied().collect();
        (0, Host { name: pod.key.name.to_string(), addresses })
    });
    let externals = OUTSIDE
        .iter()
        .map(|(name, v4, v6)| Ok(Host { name: (*name).to_owned(), addresses: vec![parse(v4)?, parse(v6)?] }));
    Ok(Spec {
        layout: Layout::Routed,
        nodes: vec![Host {
            name: NODE.to_owned(),
            addresses: vec![parse("10.240.0.4")?, parse("fd00:10:240::4")?],
        }],
        pods: pods.collect(),
        externals: externals.collect::<Result<_>>()?,
    })
}

/// Something to connect to.
struct Column {
    host: String,
    what: String,
    transport: Transport,
}

/// Every named port of every pod, HTTPS of the hosts outside, and an echo request to the web server.
fn columns(world: &World) -> Vec<Column> {
    let mut columns = Vec::new();
    for pod in world.pods() {
        for port in &pod.ports {
            columns.push(Column {
                host: pod.key.name.to_string(),
                what: port.name.to_string(),
                transport: Transport::Port(port.protocol, port.port),
            });
        }
    }
    for host in ["bank", "backoffice"] {
        let transport = Transport::Port(Protocol::Tcp, 443);
        columns.push(Column { host: host.to_owned(), what: "https".to_owned(), transport });
    }
    let echo = Transport::Portless(1);
    columns.push(Column { host: "frontend".to_owned(), what: "ping".to_owned(), transport: echo });
    columns
}

/// A connection's family, what was expected, and what was seen, in each round.
type Cell = (Family, Decision, Vec<Decision>);

/// All connections to try: every endpoint but the node, to every column, in both families.
struct Plan {
    sources: Vec<String>,
    /// (source, column, family) of each probe.
    cells: Vec<(usize, usize, Family)>,
    probes: Vec<(Flow, usize)>,
}

impl Plan {
    fn of(lab: &Lab, world: &World, columns: &[Column]) -> Result<Self> {
        let outside = OUTSIDE.iter().map(|(name, ..)| (*name).to_owned());
        let sources: Vec<String> = world.pods().map(|pod| pod.key.name.to_string()).chain(outside).collect();
        let mut plan = Self { sources, cells: Vec::new(), probes: Vec::new() };
        for (row, source) in plan.sources.iter().enumerate() {
            let from = lab.find(source)?;
            for (index, column) in columns.iter().enumerate().filter(|(_, column)| column.host != *source) {
                for family in Family::BOTH {
                    let address = |name: &str| -> Result<IpAddr> {
                        let endpoint = &lab.endpoints()[lab.find(name)?];
                        endpoint.address(family).with_context(|| format!("{name} has no such address"))
                    };
                    let destination = address(&column.host)?;
                    let transport = match column.transport {
                        Transport::Port(..) => column.transport,
                        Transport::Portless(_) => Transport::echo(destination),
                    };
                    plan.cells.push((row, index, family));
                    plan.probes.push((Flow { source: address(source)?, destination, transport }, from));
                }
            }
        }
        Ok(plan)
    }

    fn observe(&self, lab: &mut Lab, expected: impl Fn(&Flow) -> Option<Decision>) -> Result<Vec<Outcome>> {
        let probe = |(flow, from): &(Flow, usize)| Probe {
            from: *from,
            source: flow.source,
            destination: flow.destination,
            transport: flow.transport,
            expected: expected(flow),
        };
        lab.probe(&self.probes.iter().map(probe).collect::<Vec<_>>())
    }

    /// Prints the table; returns how many connections did not do what the oracle says, in all rounds.
    fn print(&self, world: &World, columns: &[Column], rounds: &[Round]) -> usize {
        let mut cells: BTreeMap<(usize, usize), Vec<Cell>> = BTreeMap::new();
        let mut wrong: Vec<usize> = vec![0; rounds.len()];
        let mut allowed: Vec<usize> = vec![0; rounds.len()];
        for (probe, (cell, (flow, _))) in self.cells.iter().zip(&self.probes).enumerate() {
            let expected = oracle(world, flow).decision();
            let seen: Vec<Decision> = rounds.iter().map(|round| round.observed[probe].decision()).collect();
            for (round, seen) in seen.iter().enumerate() {
                wrong[round] += usize::from(*seen != expected);
                allowed[round] += usize::from(*seen == Decision::Allow);
            }
            cells.entry((cell.0, cell.1)).or_default().push((cell.2, expected, seen));
        }
        let width = 11;
        let head = |text: fn(&Column) -> String| {
            columns.iter().map(|column| format!("{:>width$}", text(column))).collect::<String>()
        };
        println!(
            "Who can connect (rows) to what (columns), as observed over IPv4 and IPv6, under both backends:\n"
        );
        println!("{:12}{}", "", head(|column| column.host.clone()));
        println!("{:12}{}", "", head(|column| column.what.clone()));
        println!("{:12}{}", "", head(|column| column.transport.to_string()));
        for (row, source) in self.sources.iter().enumerate() {
            let mut line = format!("{source:12}");
            for column in 0..columns.len() {
                let text = match cells.get(&(row, column)) {
                    None => "#".to_owned(),
                    Some(families) => cell_text(families),
                };
                line.push_str(&format!("{text:>width$}"));
            }
            println!("{line}");
        }
        println!(
            "\n{:12}{:>12}{:>14}{:>14}{:>22}",
            "backend", "ready after", "connections", "got through", "as the policies say"
        );
        for (index, Round { backend, took, observed }) in rounds.iter().enumerate() {
            println!(
                "{backend:12}{:>12}{:>14}{:>14}{:>22}",
                format!("{} ms", took.as_millis()),
                observed.len(),
                allowed[index],
                observed.len() - wrong[index]
            );
        }
        let wrong: usize = wrong.iter().sum();
        if wrong > 0 {
            println!("Differences are marked with !");
        }
        let examples = [("report", "db"), ("notebook", "db"), ("cart", "bank")];
        println!("\nWhy, in three cases:");
        for (from, to) in examples {
            let column = columns.iter().position(|column| column.host == to);
            let row = self.sources.iter().position(|source| source == from);
            let found = self.cells.iter().zip(&self.probes).find(|((source, target, family), _)| {
                Some(*source) == row && Some(*target) == column && *family == Family::V4
            });
            if let Some((_, (flow, _))) = found {
                println!("  {from} -> {to}: {}", oracle(world, flow).explain_as(&from, &to, flow.transport));
            }
        }
        wrong
    }
}

/// `yes` or `-` when both families agree, else which family passes, the same under every backend; `!` where a backend did
/// not do what the oracle says, with what each did.
fn cell_text(families: &[Cell]) -> String {
    let rounds = families.first().map_or(0, |(_, _, seen)| seen.len());
    let mut texts: Vec<String> = (0..rounds)
        .map(|round| {
            let allowed = families.iter().filter(|(_, _, seen)| seen[round] == Decision::Allow);
            let allowed: Vec<&str> = allowed
                .map(|(family, ..)| match family {
                    Family::V4 => "v4",
                    Family::V6 => "v6",
                })
                .collect();
            match (allowed.len(), families.len()) {
                (0, _) => "-".to_owned(),
                (some, all) if some == all => "yes".to_owned(),
                (_, _) => allowed.join("+"),
            }
        })
        .collect();
    texts.dedup();
    let wrong = families.iter().any(|(_, expected, seen)| seen.iter().any(|seen| seen != expected));
    format!("{}{}", texts.join("|"), if wrong { "!" } else { "" })
}

/// What made it: the sets with their names for people, and one policy's chain, from the node's kernel.
fn show_rules(world: &World, node: &Netns, dialect: Dialect) -> Result<()> {
    let (goal, _) = compile(world, NODE);
    let names = name_sets(goal.sets.keys());
    println!("\nThe rules and sets that made it, for policy shop/db (IPv4), read from the node:");
    let key = npm_policy::model::PolicyKey::new("shop", "db");
    let program = goal.programs.get(&key).context("shop/db is programmed")?;
    let suffix = npm_policy::names::chain_suffix(&key.to_string());
    let save = node.exec(&dialect.program(Family::V4, "-save"), &["-t", "filter"])?;
    for line in save.lines().filter(|line| line.starts_with("-A") && line.contains(&suffix)) {
        println!("  {line}");
    }
    for set in program.sets() {
        let Some(set_names) = names.get(&set) else { continue };
        let kernel = set_names.kernel(Family::V4);
        let listing = node.exec("ipset", &["list", kernel])?;
        let members: Vec<&str> = listing.lines().skip_while(|line| *line != "Members:").skip(1).collect();
        println!("  set {kernel} ({}): {}", set_names.name, members.join(" "));
    }
    let chains = save.lines().filter(|line| line.starts_with(":AZURE-NPM")).count();
    let rules = save.lines().filter(|line| line.starts_with("-A AZURE-NPM")).count();
    let sets = node.exec("ipset", &["list", "-name"])?.lines().count();
    println!("  ... in all {rules} rules in {chains} chains for IPv4, and {sets} sets for both families.");
    Ok(())
}

/// Says how to look around, and waits.
fn keep(lab: &Lab, manifests: &Path, directory: &Path, interrupts: &SigSet) -> Result<()> {
    println!("\nIt keeps running. In another terminal:");
    for endpoint in lab.endpoints() {
        println!("  {:12} ip netns exec {} bash", endpoint.name, endpoint.netns.name());
    }
    let socket = directory.join("socket");
    println!("  target/debug/npm-agent status --socket {}", socket.display());
    println!(
        "Edit {}/*.yaml and see the agent follow (log: {}/log).",
        manifests.display(),
        directory.display()
    );
    println!("Ctrl-C ends it and removes everything.");
    interrupts.wait().context("waiting for Ctrl-C").map(drop)
}
