//! The agent's loop and worker within the test, over a backend without a kernel: for what happens to metrics when
//! something fails, which a real kernel does too seldom.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use npm_agent::backend::meter::{Direction, Judged, Meter, Reading, Store, Timed, Timekeeping};
use npm_agent::backend::{Applied, Backend, BackendError, Degraded, Removed, Write, Written};
use npm_agent::escape::{Board, Engine};
use npm_agent::metrics::Metrics;
use npm_agent::reconcile::backoff::Backoff;
use npm_agent::reconcile::worker::{Timing, Worker};
use npm_agent::reconcile::{Channels, Identity, Reconcile};
use npm_agent::source::{Completeness, Event, Problem, manifests};
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::Goal;
use npm_policy::world::Change;
use tokio::sync::mpsc;

use super::export;

/// What the backend is to do.
#[derive(Clone, Debug, Default)]
pub struct Script {
    /// How many more attempts fail.
    pub failures: usize,
    /// How long an apply takes.
    pub takes: Duration,
    /// What the next read-back repairs.
    pub drift: Vec<String>,
    /// What every apply says.
    pub degraded: Vec<Degraded>,
    /// How much the one map holds, of 100.
    pub entries: u64,
}

/// A backend that writes nothing.
struct Scripted {
    name: &'static str,
    script: Arc<Mutex<Script>>,
}

impl Scripted {
    fn attempt(&self) -> Result<Applied, BackendError> {
        let takes = {
            let mut script = self.script.lock().unwrap_or_else(PoisonError::into_inner);
            if script.failures > 0 {
                script.failures -= 1;
                let (program, status) = ("scripted".to_owned(), "exit status: 1".to_owned());
                return Err(BackendError::Refused { program, status, stderr: "planted".to_owned() });
            }
            script.takes
        };
        std::thread::sleep(takes);
        let script = self.script.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Applied { set_writes: 3, rule_writes: 2, degraded: script.degraded.clone(), ..Applied::default() })
    }
}

impl Backend for Scripted {
    fn name(&self) -> &'static str {
        self.name
    }

    fn inherits(&self) -> bool {
        false
    }

    fn apply(&mut self, _: &Goal) -> Result<Applied, BackendError> {
        self.attempt()
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        let mut script = self.script.lock().unwrap_or_else(PoisonError::into_inner);
        let (drift, degraded) = (std::mem::take(&mut script.drift), script.degraded.clone());
        Ok(Applied { drift, degraded, ..Applied::default() })
    }

    fn writes(&mut self) -> Vec<Write> {
        let write = |what| Write { what, took: Duration::from_millis(2), failed: false };
        match self.name {
            "iptables" => vec![write(Written::Sets), write(Written::Chains)],
            _ => Vec::new(),
        }
    }

    fn meter(&self) -> Option<Meter> {
        let (name, script, asked) = (self.name, Arc::clone(&self.script), AtomicU64::new(0));
        Some(Box::new(move || {
            let Script { entries, .. } = *script.lock().unwrap_or_else(PoisonError::into_inner);
            // A hundred packets between two scrapes, of 200 ns each. Only programs are timed.
            let runs = asked.fetch_add(100, Ordering::Relaxed);
            let took = Duration::from_nanos(200 * runs);
            let timed = (name == "ebpf").then(|| Timed { program: "mark_cast".to_owned(), runs, took });
            // iptables can't tell what it allows.
            let allowed = (name == "ebpf").then_some((Direction::Ingress, Judged::Allowed, runs));
            let denied = (Direction::Ingress, Judged::Denied, 0);
            let verdicts = std::iter::once(denied).chain(allowed).collect();
            Reading {
                passes: vec![("established", 1)],
                drops: vec![("ingress_denied", 0)],
                verdicts,
                unlogged: vec![("rate_limit", 0)],
                timed: timed.into_iter().collect(),
                timekeeping: (name == "ebpf").then_some(Timekeeping::On),
                stores: vec![Store { name: "rows", used: entries, limit: 100 }],
            }
        }))
    }

    fn decide(&mut self, _: &Flow) -> Result<Decision, BackendError> {
        Err(BackendError::Unsupported { what: "a kernel".to_owned() })
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        Ok(Removed::default())
    }
}

/// An agent that can be scraped.
#[derive(Clone)]
pub struct Scrapable {
    /// Its metrics.
    pub metrics: Arc<Metrics>,
    /// What escapes judgement.
    pub board: Board,
    /// Where they are served.
    pub address: SocketAddr,
    events: mpsc::Sender<Event>,
    script: Arc<Mutex<Script>>,
}

impl Scrapable {
    /// Starts an agent for a node, with a backend of this name. The test is the source.
    ///
    /// # Errors
    /// A thread or a port can't be had.
    pub fn start(node: &str, backend: &'static str) -> Result<Self> {
        Ok(Self::with_refresh(node, backend)?.0)
    }

    /// The same, with the manifests of a directory as the source.
    ///
    /// # Errors
    /// As [`Scrapable::start`].
    pub fn over_manifests(node: &str, backend: &'static str, directory: &Path) -> Result<Self> {
        let (agent, refresh) = Self::with_refresh(node, backend)?;
        let (directory, events) = (directory.to_owned(), agent.events.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("starting a runtime")?;
        std::thread::spawn(move || {
            if let Err(error) = runtime.block_on(manifests::run(directory, events, refresh)) {
                eprintln!("the source has ended: {error}");
            }
        });
        Ok(agent)
    }

    fn with_refresh(node: &str, backend: &'static str) -> Result<(Self, mpsc::Receiver<u64>)> {
        let metrics = Arc::new(Metrics::new());
        let script: Arc<Mutex<Script>> = Arc::default();
        let timing = Timing {
            verify_interval: Duration::from_millis(500),
            backoff: Backoff { first: Duration::from_millis(50), most: Duration::from_millis(200) },
        };
        let scripted = Scripted { name: backend, script: Arc::clone(&script) };
        let worker = Worker::start(Box::new(scripted), timing, &metrics).context("starting the worker")?;
        let engine = if backend == "ebpf" { Engine::Ebpf } else { Engine::Iptables };
        let board = Board::new(engine, None).context("making a board")?;
        metrics.board(board.clone());
        let (events, events_end) = mpsc::channel(64);
        let (refresh, refresh_end) = mpsc::channel(1);
        let (_, asks) = mpsc::channel(1);
        let identity = Identity { node: node.to_owned(), instance: "test".to_owned(), ..Identity::default() };
        let channels = Channels { events: events_end, refresh, asks };
        Reconcile::new(identity, vec![worker], Arc::clone(&metrics))
            .start(channels)
            .context("starting the loop")?;
        let address = export(Arc::clone(&metrics))?;
        Ok((Self { metrics, board, address, events, script }, refresh_end))
    }

    /// Objects change.
    ///
    /// # Panics
    /// The loop has ended.
    pub fn change(&self, changes: Vec<Change>) {
        self.send(Event::Changes(changes));
    }

    /// Everything that was there at the start has been told.
    ///
    /// # Panics
    /// The loop has ended.
    pub fn in_sync(&self) {
        self.send(Event::InSync(Completeness::Complete));
    }

    /// An object can't be taken as it is; with an empty message it can.
    ///
    /// # Panics
    /// The loop has ended.
    pub fn problem(&self, object: &str, message: &str) {
        let problem = Problem { object: object.to_owned(), message: message.to_owned() };
        let problems = if message.is_empty() { Vec::new() } else { vec![problem] };
        self.send(Event::Problems { origin: object.to_owned(), problems });
    }

    /// What the backend does from now on.
    pub fn script(&self, edit: impl FnOnce(&mut Script)) {
        edit(&mut self.script.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn send(&self, event: Event) {
        self.events.blocking_send(event).expect("the loop runs as long as the test");
    }
}
