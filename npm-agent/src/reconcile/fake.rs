//! A backend without a kernel, and a loop around it, for tests.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::Goal;
use npm_policy::model::{
    Labels, Namespace, Peers, Pod, PodKey, PodNetwork, PodPhase, Policy, PolicyKey, Ports, Rule, Selector,
};
use npm_policy::world::Change;
use tokio::sync::{mpsc, oneshot};

use super::backoff::Backoff;
use super::worker::{Timing, Worker};
use super::{Ask, Channels, Ended, Freshness, Identity, Reconcile};
use crate::backend::meter::Meter;
use crate::backend::{Applied, Backend, BackendError, Degraded, Removed, Write};
use crate::metrics::Metrics;
use crate::source::{Completeness, Event};
use crate::status::report::{BackendStatus, Status};

/// How long a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What the fake has been asked, and what it is to do.
#[derive(Default)]
struct Script {
    inherits: bool,
    attempts: Vec<Goal>,
    verifies: usize,
    failures_left: usize,
    held: bool,
    drift: Vec<String>,
    degraded: Vec<Degraded>,
}

/// The test's end of a fake backend.
#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<(Mutex<Script>, Condvar)>);

impl Fake {
    /// A backend whose kernel an earlier process has programmed.
    pub(crate) fn inheriting() -> Self {
        let fake = Self::default();
        fake.0.0.lock().unwrap().inherits = true;
        fake
    }

    /// The goals that were tried, failed ones too.
    pub(crate) fn attempts(&self) -> Vec<Goal> {
        self.0.0.lock().unwrap().attempts.clone()
    }

    pub(crate) fn verifies(&self) -> usize {
        self.0.0.lock().unwrap().verifies
    }

    /// Lets the next so many attempts fail.
    pub(crate) fn fail(&self, attempts: usize) {
        self.0.0.lock().unwrap().failures_left = attempts;
    }

    /// Keeps every attempt from ending until [`Fake::release`].
    pub(crate) fn hold(&self) {
        self.0.0.lock().unwrap().held = true;
    }

    pub(crate) fn release(&self) {
        self.0.0.lock().unwrap().held = false;
        self.0.1.notify_all();
    }

    /// What the next verify has to repair.
    pub(crate) fn drift(&self, lines: &[&str]) {
        self.0.0.lock().unwrap().drift = lines.iter().map(ToString::to_string).collect();
    }

    /// What every apply says from now on.
    pub(crate) fn degrade(&self, degraded: Vec<Degraded>) {
        self.0.0.lock().unwrap().degraded = degraded;
    }

    /// Waits until so many attempts have begun.
    pub(crate) fn wait_attempts(&self, count: usize) {
        let (script, timeout) = self
            .0
            .1
            .wait_timeout_while(self.0.0.lock().unwrap(), PATIENCE, |script| script.attempts.len() < count)
            .unwrap();
        assert!(!timeout.timed_out(), "{} of {count} attempts", script.attempts.len());
    }

    fn end(&self) -> Result<Applied, BackendError> {
        let script = self.0.0.lock().unwrap();
        self.0.1.notify_all();
        let mut script = self.0.1.wait_while(script, |script| script.held).unwrap();
        if script.failures_left > 0 {
            script.failures_left -= 1;
            return Err(BackendError::Refused {
                program: "fake".into(),
                status: "exit status: 4".into(),
                stderr: "planted".into(),
            });
        }
        Ok(Applied { set_writes: 1, rule_writes: 1, drift: Vec::new(), degraded: script.degraded.clone() })
    }
}

impl Backend for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn inherits(&self) -> bool {
        let script = self.0.0.lock().unwrap();
        script.inherits && script.attempts.is_empty()
    }

    fn apply(&mut self, goal: &Goal) -> Result<Applied, BackendError> {
        self.0.0.lock().unwrap().attempts.push(goal.clone());
        self.end()
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        self.0.0.lock().unwrap().verifies += 1;
        let applied = self.end()?;
        let drift = std::mem::take(&mut self.0.0.lock().unwrap().drift);
        Ok(Applied { set_writes: drift.len(), rule_writes: 0, drift, ..applied })
    }

    fn writes(&mut self) -> Vec<Write> {
        Vec::new()
    }

    fn meter(&self) -> Option<Meter> {
        None
    }

    fn decide(&mut self, _: &Flow) -> Result<Decision, BackendError> {
        Err(BackendError::Unsupported { what: "a kernel".into() })
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        Ok(Removed::default())
    }
}

/// A running loop over fake backends; the test is the source.
pub(crate) struct Agent {
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) refresh: mpsc::Receiver<u64>,
    pub(crate) asks: mpsc::Sender<Ask>,
    pub(crate) ended: oneshot::Receiver<Ended>,
    workers: Vec<Worker>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Retries soon, verifies never.
pub(crate) const QUICK: Timing = Timing {
    verify_interval: Duration::from_secs(3600),
    backoff: Backoff { first: Duration::from_millis(1), most: Duration::from_millis(20) },
};

impl Agent {
    pub(crate) fn start(backends: &[&Fake], timing: Timing) -> Self {
        let metrics = Arc::new(Metrics::new());
        let start = |fake: &&Fake| Worker::start(Box::new((*fake).clone()), timing, &metrics).unwrap();
        let workers: Vec<Worker> = backends.iter().map(start).collect();
        let (events, events_end) = mpsc::channel(4096);
        let (refresh_end, refresh) = mpsc::channel(1);
        let (asks, asks_end) = mpsc::channel(16);
        let identity = Identity {
            node: NODE.into(),
            instance: "test".into(),
            known_differences: vec!["a difference".into()],
        };
        let channels = Channels { events: events_end, refresh: refresh_end, asks: asks_end };
        let ended = Reconcile::new(identity, workers.clone(), Arc::clone(&metrics)).start(channels).unwrap();
        Self { events, refresh, asks, ended, workers, metrics }
    }

    pub(crate) fn send(&self, event: Event) {
        self.events.blocking_send(event).unwrap();
    }

    pub(crate) fn change(&self, changes: impl IntoIterator<Item = Change>) {
        self.send(Event::Changes(changes.into_iter().collect()));
    }

    /// The status after everything that was sent.
    pub(crate) fn seen(&mut self) -> Status {
        let (reply, answer) = oneshot::channel();
        self.asks.blocking_send(Ask::Status { freshness: Freshness::Refreshed, reply }).unwrap();
        let number = self.refresh.blocking_recv().unwrap();
        self.send(Event::Refreshed(number));
        answer.blocking_recv().unwrap()
    }

    /// Waits until a backend has programmed everything that was sent.
    pub(crate) fn settle(&mut self, backend: usize) -> BackendStatus {
        let generation = self.seen().generation;
        self.wait(backend, |status| status.generation == generation && status.last_error.is_none())
    }

    pub(crate) fn wait(&self, backend: usize, wanted: impl Fn(&BackendStatus) -> bool) -> BackendStatus {
        let worker = &self.workers[backend];
        worker.wait(PATIENCE, wanted).unwrap_or_else(|| panic!("it never came: {:?}", worker.progress()))
    }

    pub(crate) fn workers(&self) -> &[Worker] {
        &self.workers
    }
}

/// The source has read everything.
pub(crate) const IN_SYNC: Event = Event::InSync(Completeness::Complete);

/// The node that the loop is for.
pub(crate) const NODE: &str = "node-1";

/// A running pod of the node.
pub(crate) fn pod(name: &str, address: [u8; 4], labels: &[(&str, &str)]) -> Change {
    let labels: Labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let key = PodKey::new("x", name);
    let pod = Pod {
        key: key.clone(),
        node: Some(NODE.into()),
        labels,
        addresses: [address.into()].into(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [].into(),
        created: 0,
    };
    Change::Pod(key, Some(pod))
}

pub(crate) fn namespace(name: &str) -> Change {
    Change::Namespace(name.into(), Some(Namespace::new(name, Labels::new())))
}

/// A policy that lets everybody in, and nobody else's pods out.
pub(crate) fn policy(name: &str, subjects: Selector) -> Change {
    let key = PolicyKey::new("x", name);
    let anybody = Rule { peers: Peers::Any, ports: Ports::Any };
    let policy =
        Policy { key: key.clone(), subjects, ingress: Some(vec![anybody]), egress: Some(Vec::new()) };
    Change::Policy(key, Some(policy))
}
