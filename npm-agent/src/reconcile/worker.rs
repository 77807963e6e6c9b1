//! A backend with a thread of its own, which holds only the newest goal.
//!
//! Applying blocks (it runs programs, it waits for the xtables lock), so each backend does it on its own thread:
//! a slow or failing one delays neither the others nor the loop. A goal that comes before the one ahead of it was
//! taken replaces it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use npm_policy::goal::Goal;
use tracing::{debug, error, info, warn};

use super::backoff::Backoff;
use crate::backend::{Applied, Backend, BackendError};
use crate::metrics::{BackendMetrics, Metrics, Step as Attempt};
use crate::status::report::{BackendStatus, DegradedStatus, LastApply, Size};

/// At most this many lines about one drift are logged; the rest is counted.
const MAX_DRIFT_LINES: usize = 20;

/// After so many intervals without a read-back that succeeded, nobody knows what the kernel holds.
const STALE_INTERVALS: u32 = 3;

/// But not before this: one attempt may take as long.
const MIN_STALE: Duration = Duration::from_secs(1);

/// What is heard of so soon after an attempt's end is mostly the attempt itself; the rest waits for the next read-back.
const ECHO: Duration = Duration::from_millis(100);

/// The least time between two read-backs that were asked for: others may change things all the time.
const DISTURBED_PAUSE: Duration = Duration::from_secs(1);

/// A goal and its number; a higher number is newer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The number, from 1.
    pub generation: u64,
    /// The goal.
    pub goal: Goal,
}

/// When a worker acts of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// From one read-back to the next.
    pub verify_interval: Duration,
    /// After failures.
    pub backoff: Backoff,
}

/// A handle on a backend's thread. The thread ends on [`Worker::stop`], not when the handles are gone.
#[derive(Clone)]
pub struct Worker {
    shared: Arc<Shared>,
}

/// What stopping came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The backend was still at work; what it writes is as good as if the process had been killed there.
    Busy,
    /// The backend does nothing any more.
    Idle,
}

struct Shared {
    state: Mutex<State>,
    /// Notified on every change of the state.
    changed: Condvar,
}

struct State {
    newest: Option<Target>,
    /// Whether somebody has asked for a read-back.
    disturbed: bool,
    /// When the last attempt ended.
    ended: Instant,
    life: Life,
    status: BackendStatus,
    /// When the attempt under way began.
    busy_since: Option<Instant>,
    /// When the kernel was last known to be as it should: the end of an apply or a read-back that succeeded. At first
    /// the start.
    good_at: Instant,
    stale_after: Duration,
}

impl State {
    /// The status as of now.
    fn progress(&self) -> BackendStatus {
        BackendStatus {
            unverified_ms: millis(self.good_at.elapsed()),
            attempt_ms: self.busy_since.map(|since| millis(since.elapsed())),
            stale_after_ms: millis(self.stale_after),
            ..self.status.clone()
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Running,
    Stopping,
    Ended,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock, and a panic elsewhere ends the process.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Worker {
    /// Starts a thread for the backend.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(backend: Box<dyn Backend>, timing: Timing, metrics: &Metrics) -> std::io::Result<Self> {
        let name = backend.name();
        let inherited = backend.inherits();
        if let Some(meter) = backend.meter() {
            metrics.metered(name, meter);
        }
        let status = BackendStatus { name: name.to_owned(), inherited, ..BackendStatus::default() };
        let state = State {
            newest: None,
            disturbed: false,
            ended: Instant::now(),
            life: Life::Running,
            status,
            busy_since: None,
            good_at: Instant::now(),
            stale_after: timing.verify_interval.saturating_mul(STALE_INTERVALS).max(MIN_STALE),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let thread = Thread {
            shared: Arc::clone(&shared),
            backend,
            name,
            timing,
            metrics: metrics.backend(name),
            attempted: 0,
            applied: 0,
            failures: 0,
            ended: Instant::now(),
            retry_at: Instant::now(),
            verify_at: Instant::now() + timing.verify_interval,
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(move || thread.run())?;
        Ok(Self { shared })
    }

    /// Leaves a goal for the backend. It replaces one that was not taken yet.
    pub fn publish(&self, target: Target) {
        self.shared.lock().newest = Some(target);
        self.shared.changed.notify_all();
    }

    /// Asks for a read-back ahead of its time: somebody has changed something. While the backend is at work that is taken
    /// to be its own doing.
    pub fn verify_soon(&self) {
        let mut state = self.shared.lock();
        if state.busy_since.is_none() && state.ended.elapsed() > ECHO {
            state.disturbed = true;
            self.shared.changed.notify_all();
        }
    }

    /// Whether what the kernel holds is what an earlier process enforced: nothing was applied since.
    pub fn inherits(&self) -> bool {
        self.shared.lock().status.inherited
    }

    /// What the backend has come to.
    pub fn progress(&self) -> BackendStatus {
        self.shared.lock().progress()
    }

    /// Waits until the backend's status is as wanted; `None` after `patience`.
    pub fn wait(&self, patience: Duration, wanted: impl Fn(&BackendStatus) -> bool) -> Option<BackendStatus> {
        let (state, timeout) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), patience, |state| !wanted(&state.status))
            .unwrap_or_else(PoisonError::into_inner);
        (!timeout.timed_out()).then(|| state.progress())
    }

    /// Lets the backend finish what it is doing, for `patience`, and do nothing more.
    pub fn stop(&self, patience: Duration) -> Stopped {
        let mut state = self.shared.lock();
        if state.life == Life::Running {
            state.life = Life::Stopping;
        }
        self.shared.changed.notify_all();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, patience, |state| state.life != Life::Ended)
            .unwrap_or_else(PoisonError::into_inner);
        if state.life == Life::Ended { Stopped::Idle } else { Stopped::Busy }
    }
}

/// What the thread does next.
enum Step {
    Apply(Target),
    Verify,
    Stop,
}

/// What the thread has to itself.
struct Thread {
    shared: Arc<Shared>,
    backend: Box<dyn Backend>,
    name: &'static str,
    timing: Timing,
    metrics: BackendMetrics,
    /// The generation last tried; 0: none.
    attempted: u64,
    /// The generation that the kernel has; 0: none of this process.
    applied: u64,
    /// Failed attempts in a row.
    failures: u32,
    /// When the last attempt ended.
    ended: Instant,
    /// When to try again after a failure.
    retry_at: Instant,
    /// When to read back.
    verify_at: Instant,
}

impl Thread {
    fn run(mut self) {
        let _guard = AbortOnPanic { name: self.name };
        loop {
            match self.next() {
                Step::Apply(target) => self.apply(&target),
                Step::Verify => self.verify(),
                Step::Stop => break,
            }
        }
        self.shared.lock().life = Life::Ended;
        self.shared.changed.notify_all();
    }

    /// Waits for something to do.
    fn next(&self) -> Step {
        let mut state = self.shared.lock();
        loop {
            if state.life != Life::Running {
                return Step::Stop;
            }
            let (mut at, step) = self.due(state.newest.as_ref());
            let is_verify = matches!(step, Step::Verify);
            if is_verify && state.disturbed && self.failures == 0 {
                at = at.min(self.ended + DISTURBED_PAUSE);
            }
            let now = Instant::now();
            if at <= now {
                state.disturbed &= !is_verify;
                return step;
            }
            let (woken, _) =
                self.shared.changed.wait_timeout(state, at - now).unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
    }

    /// What is to be done when, as long as nothing newer comes. Also before the first goal there is something to read
    /// back: what an earlier process has left.
    fn due(&self, newest: Option<&Target>) -> (Instant, Step) {
        let outdated = newest.filter(|newest| newest.generation != self.applied);
        if self.failures > 0 {
            // A newer goal may be without what made the last one fail: it need not wait out a long backoff, but a
            // stream of them must not hammer a backend that fails.
            let soonest = self.ended + self.timing.backoff.first;
            let news = newest.is_some_and(|newest| newest.generation != self.attempted);
            let at = if news { soonest.min(self.retry_at) } else { self.retry_at };
            return (at, outdated.map_or(Step::Verify, |newest| Step::Apply(newest.clone())));
        }
        let Some(newest) = outdated else { return (self.verify_at, Step::Verify) };
        // Goals come first, but a stream of them does not put off the read-back for ever.
        let put_off = self.applied > 0 && self.verify_at + self.timing.verify_interval <= Instant::now();
        (self.ended, if put_off { Step::Verify } else { Step::Apply(newest.clone()) })
    }

    fn apply(&mut self, target: &Target) {
        let Target { generation, goal } = target;
        self.attempted = *generation;
        let (at, start) = (SystemTime::now(), self.begin_attempt());
        self.metrics.begins(Some(*generation));
        let outcome = self.backend.apply(goal);
        let duration = self.end_attempt(start);
        let applied = match outcome {
            Ok(applied) => applied,
            Err(error) => return self.failed(Attempt::Apply, duration, &error),
        };
        let size = Size::of(goal);
        self.metrics.applied(*generation, duration, &applied, size);
        let Applied { set_writes, rule_writes, .. } = applied;
        let duration_ms = millis(duration);
        if set_writes + rule_writes > 0 || self.applied == 0 {
            info!(backend = self.name, generation, set_writes, rule_writes, duration_ms, "programmed");
        } else {
            debug!(backend = self.name, generation, duration_ms, "already as it should be");
        }
        self.applied = *generation;
        self.succeeded(applied, |status| {
            status.generation = *generation;
            status.inherited = false;
            status.applies += 1;
            status.last_apply = Some(LastApply { at, duration_ms, set_writes, rule_writes });
            status.size = size;
        });
    }

    fn verify(&mut self) {
        let start = self.begin_attempt();
        self.metrics.begins(None);
        let outcome = self.backend.verify();
        let duration = self.end_attempt(start);
        match outcome {
            Ok(applied) => {
                debug!(backend = self.name, duration_ms = millis(duration), "verified");
                self.metrics.verified(duration, &applied);
                // An apply does not put it off: it looks only where the goal differs.
                self.verify_at = self.ended + self.timing.verify_interval;
                self.succeeded(applied, |status| {
                    status.verifies += 1;
                    status.last_verify = Some(SystemTime::now());
                });
            }
            Err(error) => self.failed(Attempt::Verify, duration, &error),
        }
    }

    /// Notes that an attempt begins; gives when.
    fn begin_attempt(&self) -> Instant {
        let start = Instant::now();
        self.shared.lock().busy_since = Some(start);
        start
    }

    /// Notes that an attempt has ended; gives how long it took.
    fn end_attempt(&mut self, start: Instant) -> Duration {
        self.ended = Instant::now();
        self.metrics.wrote(&self.backend.writes());
        let mut state = self.shared.lock();
        state.busy_since = None;
        state.ended = self.ended;
        drop(state);
        self.ended - start
    }

    fn succeeded(&mut self, applied: Applied, update: impl FnOnce(&mut BackendStatus)) {
        if self.failures > 0 {
            info!(backend = self.name, failures = self.failures, "works again");
        }
        self.failures = 0;
        let Applied { set_writes: _, rule_writes: _, drift, degraded } = applied;
        for line in drift.iter().take(MAX_DRIFT_LINES) {
            warn!(backend = self.name, drift = line, "repaired what someone else had changed");
        }
        if drift.len() > MAX_DRIFT_LINES {
            let more = drift.len() - MAX_DRIFT_LINES;
            warn!(backend = self.name, more, "repaired more that someone else had changed");
        }
        let degraded: Vec<DegradedStatus> = degraded.into_iter().map(DegradedStatus::from).collect();
        let mut state = self.shared.lock();
        state.good_at = self.ended;
        let status = &mut state.status;
        update(status);
        for new in degraded.iter().filter(|new| !status.degraded.contains(new)) {
            warn!(
                backend = self.name,
                policy = new.policy,
                reason = new.reason,
                "policy allows less than it says"
            );
        }
        for old in status.degraded.iter().filter(|old| !degraded.contains(old)) {
            info!(
                backend = self.name,
                policy = old.policy,
                "policy is not degraded for that reason any more"
            );
        }
        status.degraded = degraded;
        status.consecutive_failures = 0;
        status.last_error = None;
        status.drift_repairs += drift.len() as u64;
        drop(state);
        self.shared.changed.notify_all();
    }

    fn failed(&mut self, attempt: Attempt, duration: Duration, error: &BackendError) {
        self.metrics.failed(attempt, duration, error);
        let what = match attempt {
            Attempt::Apply => "apply",
            Attempt::Verify => "verify",
        };
        self.failures = self.failures.saturating_add(1);
        let delay = self.timing.backoff.delay(self.failures);
        self.retry_at = self.ended + delay;
        let text = chain(error);
        error!(
            backend = self.name,
            step = what,
            generation = self.attempted,
            failures = self.failures,
            retry_ms = millis(delay),
            error = text,
            "the newest goal is not known to be enforced"
        );
        let mut state = self.shared.lock();
        state.status.consecutive_failures = self.failures;
        state.status.failures += 1;
        state.status.last_error = Some(format!("{what}: {text}"));
        drop(state);
        self.shared.changed.notify_all();
    }
}

/// Ends the process when the thread that holds it panics: nobody else would notice that nothing is enforced any
/// more. [`crate::logging::abort_on_panic`] comes first where it is installed, and says more.
struct AbortOnPanic {
    name: &'static str,
}

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!(backend = self.name, "backend panicked, a bug: the process aborts");
            std::process::abort();
        }
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
