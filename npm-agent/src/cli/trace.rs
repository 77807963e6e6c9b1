//! `npm-agent trace`.

use std::net::IpAddr;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use npm_common::mark::ProofBit;

use crate::backend::ebpf::pins::Pins;
use crate::backend::ebpf::trace::{Filter, Trace};
use crate::config::duration::parse_duration;
use crate::config::{self, value};
use crate::interfaces::Interface;
use crate::interfaces::follow::Follower;
use crate::interfaces::select::{Need, Selection};

/// Between two looks at what was told: the buffer holds some 500 packets.
const PAUSE: Duration = Duration::from_millis(20);

/// Print the packets that leave through the node's interfaces, and what becomes of each
///
/// For nodes with the eBPF backend: asks the maps that the agent has filled, by a program of its own that lets everything
/// go on, and is gone when the command ends. A line is a packet: the interface, from and to (behind the translation of
/// Services), what it is to its connection, and the outcome, in the words of npm_node_packets_total. Packets that come
/// faster than they can be printed are left out. Needs root, as the agent does, and Linux 6.6.
///
/// Exit codes: 0 it has ended; 1 there is nothing to ask, or the kernel refuses; 2 bad flags.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// An interface [default: all that the agent's program may be at]
    #[arg(long = "interface", value_name = "NAME")]
    interfaces: Vec<String>,

    /// Only packets with this port at either end
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// Only packets with this address at either end
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,

    /// End after so many packets
    #[arg(long, value_name = "NUMBER")]
    count: Option<usize>,

    /// End after this time
    #[arg(long = "for", value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    duration: Duration,

    /// Name of the agent
    #[arg(long, env = "NPM_INSTANCE", value_name = "NAME", default_value = config::DEFAULT_INSTANCE,
        value_parser = value::parse_instance)]
    instance: String,

    /// The agent's --proof-bit, if it has another than by default
    #[arg(long, env = "NPM_PROOF_BIT", value_name = "BIT", value_parser = value::parse_proof_bit)]
    proof_bit: Option<ProofBit>,
}

/// Traces, and prints.
///
/// # Errors
/// There is nothing to ask, or the kernel refuses.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let follower = Follower::open().context("listing the network interfaces")?;
    let interfaces = chosen(&follower, &args.interfaces)?;
    let filter = Filter { port: args.port, address: args.address };
    let pins = Pins::of(&args.instance)?;
    let mut trace = Trace::begin(&pins, args.proof_bit.unwrap_or_default(), filter, &interfaces)?;
    eprintln!("tracing {} interfaces for {:.0?}; Ctrl-C ends it", interfaces.len(), args.duration);
    let deadline = Instant::now() + args.duration;
    let mut left = args.count.unwrap_or(usize::MAX);
    loop {
        let is_over = Instant::now() >= deadline;
        let lines: Vec<String> = trace.lines().into_iter().take(left).map(|line| line + "\n").collect();
        left -= lines.len();
        super::print(&lines.concat())?;
        if is_over || left == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        sleep(PAUSE);
    }
}

/// The interfaces of these names, or all that need the program.
fn chosen<'a>(follower: &'a Follower, names: &[String]) -> anyhow::Result<Vec<&'a Interface>> {
    let known = || follower.known().values();
    if names.is_empty() {
        let needs = |it: &&Interface| matches!(Selection::default().need(it), Need::Program(_));
        return Ok(known().filter(needs).collect());
    }
    let mut found = Vec::new();
    for name in names {
        match known().find(|interface| interface.name == *name) {
            Some(interface) => found.push(interface),
            None => bail!("there is no interface {name}"),
        }
    }
    Ok(found)
}
