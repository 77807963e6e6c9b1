//! The seam between what must hold and how the kernel is made to hold it: one value in, one converged kernel out.

pub mod cut;
pub mod ebpf;
pub mod hold;
pub mod iptables;
pub mod meter;
pub mod succession;

use std::time::Duration;

use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::Goal;
use npm_policy::model::PolicyKey;

use self::meter::Meter;
use crate::conntrack::ConntrackError;

/// Converges one kind of kernel state to a [`Goal`].
///
/// A backend owns the kernel objects that it can recognise as its own, and touches no others. Every method may be
/// called at any time and in any order; each starts from what is in the kernel, not from what earlier calls meant
/// to do.
pub trait Backend: Send {
    /// The name that operators know it by: `iptables`, `ebpf`.
    fn name(&self) -> &'static str;

    /// Whether the kernel holds what an earlier process of ours enforces and this process has not replaced yet. Asked
    /// before the first [`Backend::apply`]; until then [`Backend::verify`] keeps that state as it was found.
    fn inherits(&self) -> bool;

    /// Makes the kernel enforce `goal`, writing only what differs.
    ///
    /// Between two goals no flow that both deny gets through and none that both allow is lost, also if the process
    /// dies at any point.
    ///
    /// # Errors
    /// The kernel is then in the old state, the new one, or one between that is no more open than either; the next
    /// call converges from there.
    fn apply(&mut self, goal: &Goal) -> Result<Applied, BackendError>;

    /// Reads back everything of ours from the kernel, compares it with the goal last applied, and repairs what
    /// someone else has changed. What it had to repair is in [`Applied::drift`].
    ///
    /// # Errors
    /// As [`Backend::apply`].
    fn verify(&mut self) -> Result<Applied, BackendError>;

    /// What was written to the kernel since the last call, also by attempts that failed: as much of it as is worth a
    /// measurement of its own.
    fn writes(&mut self) -> Vec<Write>;

    /// Reads what the backend counts, from now on; `None`: it counts nothing.
    fn meter(&self) -> Option<Meter>;

    /// What the kernel's present state, read back and interpreted, does with a new forwarded flow.
    ///
    /// # Errors
    /// The state could not be read or holds something of ours that can't be interpreted.
    fn decide(&mut self, flow: &Flow) -> Result<Decision, BackendError>;

    /// Removes everything of ours, of whatever version made it, and nothing else: the node is open afterwards.
    ///
    /// # Errors
    /// Something of ours is still there.
    fn remove(&mut self) -> Result<Removed, BackendError>;
}

/// What an [`Backend::apply`] or [`Backend::verify`] did.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Applied {
    /// Set members added or deleted, sets created or destroyed.
    pub set_writes: usize,
    /// Chains (or their likes) written or deleted.
    pub rule_writes: usize,
    /// What someone else had changed and is repaired: one line for people each.
    pub drift: Vec<String>,
    /// Policies that the kernel would not take whole: they isolate, and allow less than they say.
    pub degraded: Vec<Degraded>,
}

/// One write to the kernel that is worth a measurement: a program that ran, a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// What was written.
    pub what: Written,
    /// How long it took.
    pub took: Duration,
    /// Whether it was refused, or did not come to an end.
    pub failed: bool,
}

/// What a [`Write`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// IP sets and their members.
    Sets,
    /// Chains of iptables: at least one was made or filled.
    Chains,
    /// The same, where chains were only emptied or removed.
    Removals,
}

/// A policy that is enforced more strictly than it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Degraded {
    /// The policy.
    pub policy: PolicyKey,
    /// What the kernel refused, for people.
    pub reason: String,
}

/// What a [`Backend::remove`] took out.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Removed {
    /// Sets destroyed.
    pub sets: usize,
    /// Chains deleted.
    pub chains: usize,
    /// Rules deleted from chains that are not ours.
    pub rules: usize,
}

/// Why a backend could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A program could not be started.
    #[error("cannot run {program}")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A program refused what it was given.
    #[error("{program} failed with {status}: {stderr}")]
    Refused {
        /// The program, with its arguments.
        program: String,
        /// Its exit status, for people.
        status: String,
        /// What it said, trimmed.
        stderr: String,
    },
    /// A program did not end in time, and was killed.
    #[error("{program} did not end within {after:?}")]
    TimedOut {
        /// The program, with its arguments.
        program: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// What a program printed is not what we know how to read.
    #[error("cannot read the output of {program}: {detail}")]
    Unreadable {
        /// The program.
        program: String,
        /// Which line, and what is wrong with it.
        detail: String,
    },
    /// The kernel's table of connections could not be read or changed.
    #[error("cannot cut connections")]
    Connections(#[from] ConntrackError),
    /// The eBPF programs or maps can't be used.
    #[error("the eBPF backend")]
    Ebpf(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel lacks what the backend cannot do without.
    #[error("the kernel lacks {what}")]
    Unsupported {
        /// What is missing.
        what: String,
    },
}

impl BackendError {
    /// The variant's name, to count by.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Spawn { .. } => "spawn",
            Self::Refused { .. } => "refused",
            Self::TimedOut { .. } => "timed_out",
            Self::Unreadable { .. } => "unreadable",
            Self::Connections(_) => "connections",
            Self::Ebpf(_) => "ebpf",
            Self::Unsupported { .. } => "unsupported",
        }
    }
}
