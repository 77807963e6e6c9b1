//! What watches have sent of changes, and when: for measurements.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::store::Logged;

/// Of how many events it is kept when they were sent.
const KEPT: usize = 4096;

/// What watches have sent of changes.
#[derive(Debug, Default)]
pub struct Sent(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    totals: Totals,
    times: VecDeque<(u64, Duration)>,
}

/// Changes that were sent, without what a watch begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Lines of watches.
    pub events: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Sent {
    pub(super) fn note(&self, news: &[Logged], bytes: usize) {
        if news.is_empty() {
            return;
        }
        let now = monotonic();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.totals.events += news.len() as u64;
        state.totals.bytes += bytes as u64;
        state.times.extend(news.iter().map(|logged| (logged.version, now)));
        let surplus = state.times.len().saturating_sub(KEPT);
        state.times.drain(..surplus);
    }

    /// What was sent so far.
    pub fn totals(&self) -> Totals {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).totals
    }

    /// When the change to this version was handed to the first watch that takes it, by [`monotonic`].
    pub fn when(&self, version: u64) -> Option<Duration> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.times.iter().find(|(sent, _)| *sent == version).map(|(_, when)| *when)
    }
}

/// The machine's own clock (CLOCK_MONOTONIC), the same for all processes.
///
/// # Panics
/// The kernel has no such clock.
pub fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock").into()
}
