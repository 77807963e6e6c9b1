//! What a backend counts, for whoever asks at any moment and on any thread: each scrape does.

use std::time::Duration;

/// Reads what a backend counts. It outlives whatever the backend is at, and waits for none of it.
pub type Meter = Box<dyn Fn() -> Reading + Send + Sync>;

/// What is counted at one moment. What can't be read, or is not counted by this backend, is absent.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Reading {
    /// Packets that passed, by why.
    pub passes: Vec<(&'static str, u64)>,
    /// Packets that were dropped, by why.
    pub drops: Vec<(&'static str, u64)>,
    /// Packets by what one direction's policies say of them.
    pub verdicts: Vec<(Direction, Judged, u64)>,
    /// Packets that were denied and are in no line of the log, by why; also where nothing is logged.
    pub unlogged: Vec<(&'static str, u64)>,
    /// What the kernel has timed of the backend's programs.
    pub timed: Vec<Timed>,
    /// Whether the kernel times programs.
    pub timekeeping: Option<Timekeeping>,
    /// How full everything is that has a limit.
    pub stores: Vec<Store>,
}

/// What the kernel has timed of one program since it was loaded, while it was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timed {
    /// The program's name.
    pub program: String,
    /// How often it ran.
    pub runs: u64,
    /// How long these runs took in sum, on all CPUs.
    pub took: Duration,
}

/// Whether the kernel times programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timekeeping {
    /// It does not, so what is timed stands still.
    Off,
    /// It does.
    On,
}

/// Whose policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// The destination's.
    Ingress,
    /// The source's.
    Egress,
}

impl Direction {
    /// Its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// What they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Judged {
    /// None allows the packet: it was dropped.
    Denied,
    /// One allows the packet, and it passed.
    Allowed,
}

impl Judged {
    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Allowed => "allowed",
        }
    }
}

/// Something in the kernel that holds so much and no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Its name in metrics.
    pub name: &'static str,
    /// How much it holds.
    pub used: u64,
    /// How much it can hold.
    pub limit: u64,
}
