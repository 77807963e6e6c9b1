//! What the agent tells Prometheus: one [`Metrics`], made in `run.rs`, passed by handle.
//!
//! ```text
//! reconcile ── Journal ────────┐
//! worker ───── BackendMetrics ─┼─► Metrics ── render(Scope) ─► /node-metrics, /cluster-metrics
//! compiler ─── Census ─────────┘       ▲
//!                                      └── /proc, the board of escapes, what backends count: at each scrape
//! ```
//!
//! `docs/metrics.md` says what each metric means. Whoever scrapes never waits for an apply, nor the other way round:
//! locks are held for as long as it takes to copy a few numbers, or to merge the sketches of one summary.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use npm_policy::compile::Census;
use npm_policy::world::WorldSize;
use prometheus::{HistogramVec, IntCounterVec, IntGaugeVec, TextEncoder};

pub mod catalogue;
pub mod journal;
pub mod objects;

mod backend;
mod escapes;
mod metered;
mod pending;
mod pulled;
mod summary;
mod system;
mod window;

pub use self::backend::{BackendMetrics, Step};
pub use self::catalogue::Scope;

use self::backend::Families;
use self::catalogue::Registries;
use self::metered::Metered;
use self::objects::{Object, Operation};
use self::pulled::{Pulled, Sample};
use crate::backend::meter::Meter;
use crate::escape::Board;

/// The content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Everything the agent counts and measures.
pub struct Metrics {
    registries: Registries,
    families: Arc<Families>,
    metered: Metered,
    cluster: Arc<Mutex<Option<Cluster>>>,
    in_sync: IntGaugeVec,
    object_problems: IntGaugeVec,
    warnings: IntGaugeVec,
    changes: IntCounterVec,
    compile: HistogramVec,
    compile_tests: IntCounterVec,
    goal: IntGaugeVec,
}

/// What is the same on every node.
struct Cluster {
    census: Census,
    size: WorldSize,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics, with nothing told yet.
    pub fn new() -> Self {
        let registries = Registries::default();
        let families = Arc::new(Families::new(&registries));
        let metered = Metered::new();
        registries.add(Scope::Node, Box::new(metered.clone()));
        let cluster = register_cluster(&registries);
        system::register(&registries);
        let build = catalogue::BUILD_INFO.gauge(&registries);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            in_sync: catalogue::IN_SYNC.gauge(&registries),
            object_problems: catalogue::OBJECT_PROBLEMS.gauge(&registries),
            warnings: catalogue::WARNINGS.gauge(&registries),
            changes: catalogue::CHANGES.counter(&registries),
            compile: catalogue::COMPILE.histogram(&registries),
            compile_tests: catalogue::COMPILE_TESTS.counter(&registries),
            goal: catalogue::GOAL_GENERATION.gauge(&registries),
            registries,
            families,
            metered,
            cluster,
        };
        for gauge in [&metrics.in_sync, &metrics.object_problems, &metrics.warnings, &metrics.goal] {
            gauge.with_label_values::<&str>(&[]);
        }
        metrics.compile.with_label_values::<&str>(&[]);
        metrics
    }

    /// Everything of one scope, in Prometheus' text format ([`CONTENT_TYPE`]).
    pub fn render(&self, scope: Scope) -> String {
        let families = self.registries.scope(scope).gather();
        TextEncoder::new().encode_to_string(&families).expect("a registry gathers no family without samples")
    }

    /// A handle for the backend of this name.
    pub fn backend(&self, name: &'static str) -> BackendMetrics {
        self.families.backend(name)
    }

    /// What the backend of this name counts is read from its meter.
    pub fn metered(&self, backend: &'static str, meter: Meter) {
        self.metered.set(backend, meter);
    }

    /// What escapes judgement is read from this board. There is one.
    pub fn board(&self, board: Board) {
        self.registries.add(Scope::Node, Pulled::new(catalogue::ESCAPES, move || escapes::samples(&board)));
    }

    /// Everything that was there at the start has been read.
    pub fn synced(&self) {
        self.in_sync.with_label_values::<&str>(&[]).set(1);
    }

    /// How much is wrong with objects, and how much there is to look at.
    pub fn complaints(&self, problems: usize, warnings: usize) {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.object_problems.with_label_values::<&str>(&[]).set(count(problems));
        self.warnings.with_label_values::<&str>(&[]).set(count(warnings));
    }

    /// The cluster's counts. Before the first there are none: half of a cluster is no cluster.
    pub fn counted(&self, census: Census, size: WorldSize) {
        *lock(&self.cluster) = Some(Cluster { census, size });
    }

    fn changed(&self, object: &Object, operation: Operation) {
        self.changes.with_label_values(&[object.kind(), operation.label()]).inc();
    }

    fn compiled(&self, took: Duration, tests: u64) {
        self.compile.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
        self.compile_tests.with_label_values::<&str>(&[]).inc_by(tests);
    }

    fn goal(&self, generation: u64) {
        let generation = i64::try_from(generation).unwrap_or(i64::MAX);
        self.goal.with_label_values::<&str>(&[]).set(generation);
    }

    fn backends(&self) -> Vec<BackendMetrics> {
        self.families.backends()
    }
}

fn register_cluster(registries: &Registries) -> Arc<Mutex<Option<Cluster>>> {
    let cluster: Arc<Mutex<Option<Cluster>>> = Arc::default();
    let number = |declared: catalogue::Declared, read: fn(&Cluster) -> usize| {
        let cluster = Arc::clone(&cluster);
        let read = move || lock(&cluster).as_ref().map(|cluster| read(cluster) as f64);
        registries.add(Scope::Cluster, Pulled::single(declared, read));
    };
    number(catalogue::NUM_POLICIES, |cluster| cluster.size.policies);
    number(catalogue::NUM_IPTABLES_RULES, |cluster| cluster.census.rules);
    number(catalogue::NUM_IPSETS, |cluster| cluster.census.sets.len());
    number(catalogue::NUM_IPSET_ENTRIES, |cluster| cluster.census.entries);
    number(catalogue::PODS_WATCHED, |cluster| cluster.size.pods);
    let shared = Arc::clone(&cluster);
    let sets = move || -> Vec<Sample> {
        // A copy costs a few pointers; the loop is not kept waiting for the rest.
        let census = lock(&shared).as_ref().map(|cluster| cluster.census.clone());
        let counts = census.iter().flat_map(|census| census.sets.values());
        let samples = counts.flat_map(|count| {
            let names = &count.names;
            // As in Azure NPM, an empty set has no series.
            let families = [(&names.v4, count.v4), (&names.v6, count.v6)].into_iter();
            families
                .filter(|(_, entries)| *entries > 0)
                .map(|(hash, entries)| (vec![names.name.to_string(), hash.to_string()], entries as f64))
        });
        samples.collect()
    };
    registries.add(Scope::Cluster, Pulled::new(catalogue::IPSET_COUNTS, sets));
    cluster
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds the lock, and a panic elsewhere ends the process.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
