//! What a packet of an established connection costs in a program at the hook, by the kernel's own count of programs' time
//! (`kernel.bpf_stats_enabled`), above an empty program's that takes the same packets in turn.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use aya::sys::{Stats, enable_stats};
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::choice::Choice;
use npm_agent::backend::ebpf::enforcer::{Ebpf, Options};
use npm_agent::exec::Tools;
use npm_agent::interfaces::select::Selection;
use npm_common::event::Outcome;
use npm_common::layout::SCHEMA;
use npm_common::mark::ProofBit;
use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::Goal;
use npm_policy::model::Protocol;

use super::lane::{Clock, Lane};
use crate::lab::packet::{Ends, IpSender, udp};
use crate::lab::service::Dialect;
use crate::scenario::enforcer::tracking;
use crate::statistics::Statistics;

/// The port that connections come from.
const PORT: u16 = 20_000;

/// A lane with one program in the packets' way.
struct Path {
    backend: Option<Box<Ebpf>>,
    lane: Lane,
}

impl Path {
    /// Past a program that does nothing.
    fn empty() -> Result<Self> {
        let mut lane = Lane::open("nothing", Dialect::Nft)?;
        lane.put_empty()?;
        Ok(Self { backend: None, lane })
    }

    /// Past the one that enforces a goal.
    fn enforced(choice: Choice, goal: &Goal) -> Result<Self> {
        let mut lane = Lane::open("eBPF", Dialect::Nft)?;
        let options = options(choice);
        let pinned = pinned(&options);
        let backend = lane.node()?.run(|| {
            let mut backend = Box::new(Ebpf::new(options)?);
            backend.apply(goal)?;
            Ok(backend)
        })?;
        lane.watch(&pinned)?;
        Ok(Self { backend: Some(backend), lane })
    }

    /// Packets that the program has found proven.
    fn proven(&self) -> Result<Option<u64>> {
        let Some(backend) = &self.backend else { return Ok(None) };
        Ok(backend.outcomes()?.get(&Outcome::Proven).copied())
    }

    /// The program's nanoseconds for each of so many packets of an established connection of this flow.
    fn time(&mut self, flow: &Flow, count: u32) -> Result<f64> {
        let Transport::Port(Protocol::Udp, port) = flow.transport else { bail!("{flow} is not UDP") };
        let there = Ends {
            source: SocketAddr::new(flow.source, PORT),
            destination: SocketAddr::new(flow.destination, port),
        };
        let back = Ends { source: there.destination, destination: there.source };
        let (there, back) = (udp(there, b"again")?, udp(back, b"again")?);
        let answer = self.lane.netns("sink")?.run(IpSender::open)?;
        self.lane.sender().send(&there)?;
        answer.send(&back)?;
        self.lane.sender().send(&there)?;
        let (began, proven) = (self.lane.spent()?.context("no program")?, self.proven()?);
        for _ in 0..count {
            self.lane.sender().send(&there)?;
        }
        let spent = self.lane.spent()?.context("no program")?.since(began);
        spent.expect(count.into())?;
        if let (Some(before), Some(now)) = (proven, self.proven()?) {
            ensure!(now - before == u64::from(count), "{} of {count} packets were proven", now - before);
        }
        Ok(spent.per_run())
    }
}

/// The eBPF backend for a lane, under a name that no other has.
pub fn options(choice: Choice) -> Options {
    static MADE: AtomicU32 = AtomicU32::new(0);
    Options {
        instance: format!("bench-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed)),
        choice,
        iptables: tracking(Dialect::Nft),
        tools: Tools::default(),
        selection: Selection::default(),
        proof: ProofBit::DEFAULT,
    }
}

/// Where its program is pinned.
pub fn pinned(options: &Options) -> PathBuf {
    PathBuf::from(format!("/sys/fs/bpf/npm-agent/{}/v{SCHEMA}/program", options.instance))
}

impl Drop for Path {
    fn drop(&mut self) {
        // What is pinned outlives the namespace.
        let Some(mut backend) = self.backend.take() else { return };
        if let Err(error) = self.lane.node().and_then(|node| node.run(|| Ok(backend.remove()?))) {
            eprintln!("a program's pins are left: {error:#}");
        }
    }
}

/// Nanoseconds above an empty program by choice, for an allowed flow of UDP: the best of so many rounds each.
///
/// # Errors
/// A program can't be loaded, or packets do not take the way that is measured.
pub fn established_times(
    goal: &Goal,
    flow: &Flow,
    choices: &[Choice],
    (rounds, packets): (u32, u32),
) -> Result<BTreeMap<String, f64>> {
    // Whoever wants programs not to be timed waits, and whoever has them timed for itself.
    let _alone = Statistics::hold()?;
    let _counting = enable_stats(Stats::RunTime).context("having programs' time counted")?;
    let mut empty = Path::empty()?;
    let mut paths = choices.iter().map(|choice| Path::enforced(*choice, goal)).collect::<Result<Vec<_>>>()?;
    crate::lab::netns::on_fresh_thread(|| {
        let _clock = Clock::start()?;
        let mut best_empty = f64::INFINITY;
        let mut best = vec![f64::INFINITY; paths.len()];
        for _ in 0..rounds {
            best_empty = best_empty.min(empty.time(flow, packets)?);
            for (path, best) in paths.iter_mut().zip(&mut best) {
                *best = best.min(path.time(flow, packets)?);
            }
        }
        Ok(choices.iter().map(ToString::to_string).zip(best.iter().map(|best| best - best_empty)).collect())
    })
}
