//! The program `verdict` in this kernel: loaded, filled, asked. Nothing is attached or pinned.

use std::error::Error;
use std::io;
use std::time::Duration;

use aya::programs::{ProgramError, SchedClassifier, TestRun, TestRunOptions, TestRunResult};
use aya::{Ebpf, EbpfError, EbpfLoader};
use npm_common::decide::Verdict;
use npm_policy::flow::Flow;
use npm_policy::goal::Goal;

use super::any_maps::AnyMaps;
use super::attach::AttachError;
use super::btf::BtfError;
use super::datapath::{LEAST_PROOFS, RECENT, TEXT};
use super::denials::EVENTS;
use super::maps::{ApplyError, MapsError, Writes};
use super::packet::opening;
use super::pins::PinsError;
use super::width::Width;
use crate::backend::BackendError;
use crate::conntrack::ConntrackError;
use crate::interfaces::follow::FollowError;

/// The program that is asked.
pub(super) const VERDICT: &str = "verdict";

/// Why the kernel gives no verdict.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The process may not load programs.
    #[error(
        "loading eBPF programs is not permitted: it needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
    )]
    NotPermitted {
        /// What was refused.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The kernel did not take the object.
    #[error("cannot load the eBPF object")]
    Object(#[source] EbpfError),
    /// The verifier refused the program: the kernel lacks something, or the process lacks CAP_PERFMON.
    #[error("cannot load the eBPF program (unless root, it needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN)")]
    Program(#[source] ProgramError),
    /// The object lacks a part.
    #[error("the eBPF object has no {name}")]
    Missing {
        /// The program or map.
        name: &'static str,
    },
    /// The maps can't be used.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// The maps do not hold the goal.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The program could not be run.
    #[error("cannot run the eBPF program")]
    Run(#[source] ProgramError),
    /// The kernel does not say where it keeps what the programs read.
    #[error("this kernel is not one that the eBPF backend can enforce on")]
    Types(#[from] BtfError),
    /// The programs that cast were asked for.
    #[error("this kernel has no functions to cast to its connections")]
    NoCasts,
    /// The programs that write to connections were asked for.
    #[error("this kernel has no functions to write to its connections")]
    NoWrites,
    /// Nothing can be pinned.
    #[error("cannot keep eBPF maps beyond the process")]
    Pins(#[from] PinsError),
    /// An interface is without the program.
    #[error("an interface is not enforced")]
    Attach(#[from] AttachError),
    /// The interfaces are not known.
    #[error("cannot list the network interfaces")]
    Interfaces(#[from] FollowError),
    /// The kernel's connections are not known.
    #[error("cannot use the kernel's table of connections")]
    Connections(#[source] ConntrackError),
    /// There can be no more threads.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// No packet can be of two families.
    #[error("no packet is {flow}")]
    NoPacket {
        /// The flow.
        flow: Flow,
    },
    /// The program returned something that is no verdict.
    #[error("the eBPF program could not judge {flow}: code {code:#x}")]
    Unread {
        /// The flow.
        flow: Flow,
        /// What it returned.
        code: u32,
    },
}

/// The program and its maps. They are gone when it is dropped.
pub struct Kernel {
    judge: Judge,
    maps: AnyMaps,
}

/// The program.
pub struct Judge {
    ebpf: Ebpf,
}

impl Kernel {
    /// Loads the program; the maps are empty: nobody is isolated.
    ///
    /// # Errors
    /// The process may not, or the kernel lacks what the program needs. Nothing is left behind.
    pub fn load(width: Width) -> Result<Self, KernelError> {
        let mut loader = EbpfLoader::new();
        // No connection is proven here: the map need not have the room of one that enforces.
        loader.map_max_entries("PROOFS", LEAST_PROOFS);
        loader.map_max_entries(RECENT, 1);
        loader.map_max_entries(EVENTS, LEAST_PROOFS);
        loader.map_max_entries(TEXT, LEAST_PROOFS);
        let mut ebpf = loader.load(width.object()).map_err(|error| permitted(error, KernelError::Object))?;
        let program = ebpf.program_mut(VERDICT).ok_or(KernelError::Missing { name: VERDICT })?;
        let program: &mut SchedClassifier = program.try_into().map_err(KernelError::Program)?;
        program.load().map_err(|error| permitted(error, KernelError::Program))?;
        let maps = AnyMaps::take(width, &mut ebpf)?;
        Ok(Self { judge: Judge { ebpf }, maps })
    }

    /// Makes the program judge by this goal and nothing else; a wider program is loaded if the goal needs it.
    ///
    /// # Errors
    /// The program then judges as it did before.
    pub fn fill(&mut self, goal: &Goal) -> Result<Writes, KernelError> {
        let needed = Width::needed(goal).map_err(ApplyError::Lower)?;
        if needed > self.maps.width() {
            let mut wider = Self::load(needed)?;
            let writes = wider.maps.apply(goal)?;
            *self = wider;
            return Ok(writes);
        }
        Ok(self.maps.apply(goal)?)
    }

    /// The program, and the maps to write to while it is asked.
    pub fn apart(&mut self) -> (&Judge, &mut AnyMaps) {
        (&self.judge, &mut self.maps)
    }

    /// [`Judge::verdict`].
    ///
    /// # Errors
    /// As there.
    pub fn verdict(&self, flow: &Flow) -> Result<Verdict, KernelError> {
        self.judge.verdict(flow)
    }

    /// [`Judge::time`].
    ///
    /// # Errors
    /// As there.
    pub fn time(&self, flow: &Flow, runs: u32) -> Result<Duration, KernelError> {
        self.judge.time(flow, runs)
    }
}

impl Judge {
    /// What the program says of the flow's first packet, by BPF_PROG_TEST_RUN.
    ///
    /// # Errors
    /// The program was not run, or could not read the packet.
    pub fn verdict(&self, flow: &Flow) -> Result<Verdict, KernelError> {
        verdict(&self.ebpf, flow)
    }

    /// How long the program takes for the flow's first packet: the mean of so many runs.
    ///
    /// # Errors
    /// The program was not run.
    pub fn time(&self, flow: &Flow, runs: u32) -> Result<Duration, KernelError> {
        Ok(run(&self.ebpf, flow, runs)?.duration)
    }
}

/// What the loaded program says of the flow's first packet, by BPF_PROG_TEST_RUN.
///
/// # Errors
/// The program was not run, or could not read the packet.
pub(super) fn verdict(ebpf: &Ebpf, flow: &Flow) -> Result<Verdict, KernelError> {
    let code = run(ebpf, flow, 1)?.return_value;
    Verdict::of(code).ok_or(KernelError::Unread { flow: *flow, code })
}

fn run(ebpf: &Ebpf, flow: &Flow, runs: u32) -> Result<TestRunResult, KernelError> {
    let frame = opening(flow).ok_or(KernelError::NoPacket { flow: *flow })?;
    let program = ebpf.program(VERDICT).ok_or(KernelError::Missing { name: VERDICT })?;
    let program: &SchedClassifier = program.try_into().map_err(KernelError::Program)?;
    let mut options = TestRunOptions::new();
    options.data_in = Some(&frame);
    options.repeat = runs;
    program.test_run(options).map_err(KernelError::Run)
}

/// "Operation not permitted" (include/uapi/asm-generic/errno-base.h). The other lack of permission, EACCES, is also what
/// the verifier says of a program that it does not like.
const EPERM: i32 = 1;

/// Tells a lack of privilege from everything else.
pub(super) fn permitted<E: Error + Send + Sync + 'static>(
    error: E,
    other: impl Fn(E) -> KernelError,
) -> KernelError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    let mut refused = false;
    while let Some(this) = cause {
        refused |= this.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error() == Some(EPERM));
        cause = this.source();
    }
    if refused { KernelError::NotPermitted { source: Box::new(error) } } else { other(error) }
}

impl From<KernelError> for BackendError {
    fn from(error: KernelError) -> Self {
        Self::Ebpf(Box::new(error))
    }
}
