//! What one backend does, told by its worker and by whoever publishes goals to it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use npm_policy::model::PolicyKey;
use prometheus::{HistogramVec, IntCounterVec, IntGaugeVec};

use super::catalogue::{self, Registries, Scope};
use super::objects::{Object, Operation, Tell, Version};
use super::pending::Pending;
use super::pulled::{Pulled, Sample};
use super::summary::Summary;
use crate::backend::{Applied, BackendError, Write, Written};
use crate::status::report::Size;

/// The metrics that differ by backend.
pub(super) struct Families {
    add_iptables_rule: Summary,
    add_ipset: Summary,
    add_policy: Summary,
    controller_policy: Summary,
    controller_namespace: Summary,
    controller_pod: Summary,
    restore_latency: HistogramVec,
    restore_failures: IntCounterVec,
    applied_generation: IntGaugeVec,
    policies: IntGaugeVec,
    rules: IntGaugeVec,
    sets: IntGaugeVec,
    set_entries: IntGaugeVec,
    event_to_kernel: HistogramVec,
    apply: HistogramVec,
    verify: HistogramVec,
    kernel_writes: IntCounterVec,
    failures: IntCounterVec,
    consecutive_failures: IntGaugeVec,
    retries: IntCounterVec,
    drift_repairs: IntCounterVec,
    degraded: IntGaugeVec,
    backends: Arc<Mutex<Vec<BackendMetrics>>>,
}

impl Families {
    pub(super) fn new(registries: &Registries) -> Self {
        let summary = |declared| {
            let summary = Summary::new(declared);
            registries.add(declared.scope, Box::new(summary.clone()));
            summary
        };
        let backends: Arc<Mutex<Vec<BackendMetrics>>> = Arc::default();
        let ages = |age: fn(&State, Instant) -> Duration| {
            let backends = Arc::clone(&backends);
            move || -> Vec<Sample> {
                let now = Instant::now();
                let seconds = |backend: &BackendMetrics| age(&backend.lock(), now).as_secs_f64();
                let backends = backends.lock().unwrap_or_else(PoisonError::into_inner);
                backends.iter().map(|backend| (vec![backend.name.to_owned()], seconds(backend))).collect()
            }
        };
        let waits = |state: &State, now: Instant| {
            let oldest = state.pending.oldest();
            oldest.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
        };
        registries.add(Scope::Node, Pulled::new(catalogue::QUEUE_AGE, ages(waits)));
        let unverified = |state: &State, now: Instant| now.saturating_duration_since(state.good_at);
        registries.add(Scope::Node, Pulled::new(catalogue::UNVERIFIED, ages(unverified)));
        Self {
            add_iptables_rule: summary(catalogue::ADD_IPTABLES_RULE),
            add_ipset: summary(catalogue::ADD_IPSET),
            add_policy: summary(catalogue::ADD_POLICY),
            controller_policy: summary(catalogue::CONTROLLER_POLICY),
            controller_namespace: summary(catalogue::CONTROLLER_NAMESPACE),
            controller_pod: summary(catalogue::CONTROLLER_POD),
            restore_latency: catalogue::RESTORE_LATENCY.histogram(registries),
            restore_failures: catalogue::RESTORE_FAILURES.counter(registries),
            applied_generation: catalogue::APPLIED_GENERATION.gauge(registries),
            policies: catalogue::NODE_POLICIES.gauge(registries),
            rules: catalogue::NODE_RULES.gauge(registries),
            sets: catalogue::NODE_SETS.gauge(registries),
            set_entries: catalogue::NODE_SET_ENTRIES.gauge(registries),
            event_to_kernel: catalogue::EVENT_TO_KERNEL.histogram(registries),
            apply: catalogue::APPLY.histogram(registries),
            verify: catalogue::VERIFY.histogram(registries),
            kernel_writes: catalogue::KERNEL_WRITES.counter(registries),
            failures: catalogue::FAILURES.counter(registries),
            consecutive_failures: catalogue::CONSECUTIVE_FAILURES.gauge(registries),
            retries: catalogue::RETRIES.counter(registries),
            drift_repairs: catalogue::DRIFT_REPAIRS.counter(registries),
            degraded: catalogue::DEGRADED_POLICIES.gauge(registries),
            backends,
        }
    }

    /// A handle for the backend of this name: the same one each time.
    pub(super) fn backend(self: &Arc<Self>, name: &'static str) -> BackendMetrics {
        let mut backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backend) = backends.iter().find(|backend| backend.name == name) {
            return backend.clone();
        }
        let state = State { pending: Pending::default(), good_at: Instant::now(), failures: 0 };
        let backend = BackendMetrics { name, families: Arc::clone(self), state: Arc::new(Mutex::new(state)) };
        backend.show_zeros();
        backends.push(backend.clone());
        backend
    }

    pub(super) fn backends(&self) -> Vec<BackendMetrics> {
        self.backends.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct State {
    pending: Pending,
    /// When the kernel was last known to be as it should; at first the start.
    good_at: Instant,
    /// Failures in a row.
    failures: u32,
}

/// A handle on one backend's metrics.
#[derive(Clone)]
pub struct BackendMetrics {
    name: &'static str,
    families: Arc<Families>,
    state: Arc<Mutex<State>>,
}

/// What a backend was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// [`crate::backend::Backend::apply`].
    Apply,
    /// [`crate::backend::Backend::verify`].
    Verify,
}

impl BackendMetrics {
    /// The goal of this number goes to the backend, and has these versions of objects.
    pub(super) fn published(&self, generation: u64, versions: &[Version]) {
        self.lock().pending.queue(generation, versions.iter().cloned());
    }

    /// An object can't be taken as it is: told as a failure of the version that is on its way, or of one that never is.
    pub(super) fn refused(&self, object: &Object, operation: Operation, now: Instant) {
        let untold = self.lock().pending.refuse(object);
        let version = Version { object: object.clone(), operation, since: now, tell: Tell::Failure };
        self.tell(&untold.unwrap_or(version), Outcome::Failed, now);
    }

    /// An attempt begins; the number of the goal, where it is to be programmed.
    pub fn begins(&self, goal: Option<u64>) {
        let mut state = self.lock();
        if let Some(generation) = goal {
            state.pending.begin(generation);
        }
        if state.failures > 0 {
            self.families.retries.with_label_values(&[self.name]).inc();
        }
    }

    /// What was written on the way, whatever came of it.
    pub fn wrote(&self, writes: &[Write]) {
        let now = Instant::now();
        for Write { what, took, failed } in writes {
            match what {
                Written::Sets => self.families.add_ipset.observe(now, &[], *took),
                Written::Chains | Written::Removals => {
                    let operation = match what {
                        Written::Removals => Operation::Delete,
                        Written::Sets | Written::Chains => {
                            self.families.add_iptables_rule.observe(now, &[], *took);
                            Operation::Create
                        }
                    };
                    let label = [operation.label()];
                    self.families.restore_latency.with_label_values(&label).observe(took.as_secs_f64());
                    self.families.restore_failures.with_label_values(&label).inc_by(u64::from(*failed));
                }
            }
        }
    }

    /// A goal was programmed.
    pub fn applied(&self, generation: u64, took: Duration, applied: &Applied, size: Size) {
        let Size { sets, members, policies, rules } = size;
        let families = &self.families;
        families.apply.with_label_values(&[self.name]).observe(took.as_secs_f64());
        for (gauge, value) in [
            (&families.sets, sets),
            (&families.set_entries, members),
            (&families.policies, policies),
            (&families.rules, rules),
        ] {
            gauge.with_label_values(&[self.name]).set(signed(value));
        }
        let generation = i64::try_from(generation).unwrap_or(i64::MAX);
        families.applied_generation.with_label_values(&[self.name]).set(generation);
        let finished: Vec<Version> = self.lock().pending.finish().collect();
        let now = Instant::now();
        for version in finished {
            let degraded = applied.degraded.iter().any(|degraded| is_about(&version, &degraded.policy));
            self.tell(&version, if degraded { Outcome::Failed } else { Outcome::Programmed }, now);
            if version.tell != Tell::Failure {
                let waited = now.saturating_duration_since(version.since).as_secs_f64();
                families.event_to_kernel.with_label_values(&[self.name]).observe(waited);
            }
        }
        self.succeeded(applied);
    }

    /// The kernel was read back.
    pub fn verified(&self, took: Duration, applied: &Applied) {
        self.families.verify.with_label_values(&[self.name]).observe(took.as_secs_f64());
        self.succeeded(applied);
    }

    /// An attempt failed.
    pub fn failed(&self, step: Step, took: Duration, error: &BackendError) {
        let (histogram, name) = match step {
            Step::Apply => (&self.families.apply, "apply"),
            Step::Verify => (&self.families.verify, "verify"),
        };
        histogram.with_label_values(&[self.name]).observe(took.as_secs_f64());
        self.families.failures.with_label_values(&[self.name, name, error.kind()]).inc();
        let mut state = self.lock();
        state.failures = state.failures.saturating_add(1);
        let failures = i64::from(state.failures);
        self.families.consecutive_failures.with_label_values(&[self.name]).set(failures);
        let untold = state.pending.fail();
        drop(state);
        let now = Instant::now();
        untold.iter().for_each(|version| self.tell(version, Outcome::Failed, now));
    }

    fn succeeded(&self, applied: &Applied) {
        let Applied { set_writes, rule_writes, drift, degraded } = applied;
        let families = &self.families;
        for (what, count) in [("sets", set_writes), ("chains", rule_writes)] {
            families.kernel_writes.with_label_values(&[self.name, what]).inc_by(*count as u64);
        }
        families.drift_repairs.with_label_values(&[self.name]).inc_by(drift.len() as u64);
        families.degraded.with_label_values(&[self.name]).set(signed(degraded.len()));
        families.consecutive_failures.with_label_values(&[self.name]).set(0);
        let mut state = self.lock();
        state.failures = 0;
        state.good_at = Instant::now();
    }

    fn tell(&self, version: &Version, outcome: Outcome, now: Instant) {
        let had_error = match (version.tell, outcome) {
            (Tell::Nothing, _) | (Tell::Failure, Outcome::Programmed) => return,
            (Tell::Outcome, Outcome::Programmed) => "false",
            (Tell::Failure | Tell::Outcome, Outcome::Failed) => "true",
        };
        let families = &self.families;
        let took = now.saturating_duration_since(version.since);
        let operation = version.operation.label();
        let summary = match (&version.object, version.operation) {
            (Object::Policy(_), Operation::Create) => {
                return families.add_policy.observe(now, &[self.name, had_error], took);
            }
            (Object::Policy(_), Operation::Update | Operation::Delete) => &families.controller_policy,
            (Object::Namespace(_), _) => &families.controller_namespace,
            (Object::Pod(_), _) => &families.controller_pod,
        };
        summary.observe(now, &[self.name, had_error, operation], took);
    }

    /// Counters of ours are there from the start, so that their first step is seen. Those of Azure NPM are not: see
    /// [`Summary`].
    fn show_zeros(&self) {
        let families = &self.families;
        let name = [self.name];
        for counter in [&families.retries, &families.drift_repairs] {
            counter.with_label_values(&name);
        }
        for gauge in [
            &families.applied_generation,
            &families.policies,
            &families.rules,
            &families.sets,
            &families.set_entries,
            &families.consecutive_failures,
            &families.degraded,
        ] {
            gauge.with_label_values(&name);
        }
        for histogram in [&families.event_to_kernel, &families.apply, &families.verify] {
            histogram.with_label_values(&name);
        }
        for what in ["sets", "chains"] {
            families.kernel_writes.with_label_values(&[self.name, what]);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock, and a panic elsewhere ends the process.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What became of a version.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Failed,
    Programmed,
}

fn is_about(version: &Version, policy: &PolicyKey) -> bool {
    match &version.object {
        Object::Policy(key) => key == policy,
        Object::Namespace(_) | Object::Pod(_) => false,
    }
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
