//! `npm-agent trace`.

use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use npm_common::mark::ProofBit;

use crate::backend::ebpf::pins::Pins;
use crate::backend::ebpf::trace::{Filter, Trace};
use crate::config::duration::parse_duration;
use crate::config::{self, value};
use crate::interfaces::Interface;
use crate::interfaces::follow::Follower;

/// How often it is looked for new interfaces, and whether the agent has replaced its program.
const LOOK: Duration = Duration::from_millis(500);
/// How long it may take to print what came in time.
const SETTLE: Duration = Duration::from_secs(1);
/// How long a line is waited for at a time.
const PATIENCE: Duration = Duration::from_millis(100);

/// Print the packets that leave through the node's interfaces, and what becomes of each
///
/// For nodes with the eBPF backend: asks the maps that the agent has filled, at the interfaces where its program is, by a
/// program of its own that lets everything go on and is gone when the command ends. A line is a packet: the interface, from and
/// to as they are there, what it is to its connection, and the outcome, in the words of npm_node_packets_total. What is judged is
/// the connection: behind the translation of Services. Packets that come faster than they can be printed are left out, and
/// counted at the end. Needs root, as the agent does, and Linux 6.6.
///
/// Exit codes: 0 it has ended; 1 there is nothing to ask, or the kernel refuses; 2 bad flags or configuration.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// An interface [default: all where the agent's program is, new ones too]
    #[arg(long = "interface", value_name = "NAME")]
    interfaces: Vec<String>,

    /// Only packets with this port at either end, or at that of their connection
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// Only packets with this address at either end, or at that of their connection
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,

    /// End after so many packets
    #[arg(long, value_name = "NUMBER")]
    count: Option<u64>,

    /// End after this time
    #[arg(long = "for", value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    duration: Duration,

    /// The agent's configuration file, for its name and its proof bit [default: as of `npm-agent run`]
    #[arg(long, env = "NPM_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    /// Name of the agent [default: that of the configuration, else npm-agent]
    #[arg(long, env = "NPM_INSTANCE", value_name = "NAME", value_parser = value::parse_instance)]
    instance: Option<String>,

    /// The agent's --proof-bit [default: that of the configuration]
    #[arg(long, env = "NPM_PROOF_BIT", value_name = "BIT", value_parser = value::parse_proof_bit)]
    proof_bit: Option<ProofBit>,
}

/// Traces, and prints.
///
/// # Errors
/// There is nothing to ask, or the kernel refuses.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + args.duration;
    let (file, _) = config::read_file(args.config.clone())?;
    let instance = args.instance.clone().or(file.instance);
    let pins = Pins::as_they_are(instance.as_deref().unwrap_or(config::DEFAULT_INSTANCE));
    let proof = args.proof_bit.or(file.proof).unwrap_or_default();
    let mut follower = Follower::open().context("listing the network interfaces")?;
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut untold = 0;
    let mut trace = begin(&args, &pins, proof, &follower, deadline)?;
    let mut looked = Instant::now();
    // What came in time is printed, unless there is too much of it.
    let end = deadline + SETTLE;
    loop {
        let is_late = Instant::now() >= deadline;
        if is_late {
            trace.detach();
        } else if looked.elapsed() > LOOK {
            looked = Instant::now();
            follower.wait(Duration::ZERO).context("listing the network interfaces")?;
            if trace.is_current(&pins)? {
                trace.follow(chosen(&follower, &args.interfaces))?;
            } else {
                untold += trace.untold()?;
                drop(trace);
                eprintln!("the agent has replaced its program");
                trace = begin(&args, &pins, proof, &follower, deadline)?;
            }
        }
        match trace.line(PATIENCE) {
            Some(line) if !print(&line)? => return Ok(ExitCode::SUCCESS),
            Some(_) => left -= 1,
            None if is_late => break,
            None => {}
        }
        if left == 0 || Instant::now() >= end {
            break;
        }
    }
    untold += trace.untold()?;
    if left > 0 && untold > 0 {
        eprintln!("{untold} packets more are in no line");
    }
    Ok(ExitCode::SUCCESS)
}

/// Begins, and says so.
fn begin(
    args: &Args,
    pins: &Pins,
    proof: ProofBit,
    follower: &Follower,
    deadline: Instant,
) -> anyhow::Result<Trace> {
    let mut trace = Trace::load(pins, proof, Filter { port: args.port, address: args.address })?;
    let count = trace.follow(chosen(follower, &args.interfaces))?;
    if count < args.interfaces.len() {
        bail!("the agent's program is not at all of {}", args.interfaces.join(", "));
    }
    let rest = deadline.saturating_duration_since(Instant::now());
    eprintln!("tracing {count} interfaces for {rest:.0?}; Ctrl-C ends it");
    Ok(trace)
}

/// The interfaces of these names; all if there are no names.
fn chosen<'a>(follower: &'a Follower, names: &'a [String]) -> impl Iterator<Item = &'a Interface> {
    follower.known().values().filter(|interface| names.is_empty() || names.contains(&interface.name))
}

/// Prints a line. `false`: nobody reads any more.
fn print(line: &str) -> anyhow::Result<bool> {
    match writeln!(std::io::stdout(), "{line}") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("writing to standard output"),
    }
}
