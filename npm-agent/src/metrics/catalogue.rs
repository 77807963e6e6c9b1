//! Every metric there is: its name, type, labels and help. `docs/metrics.md` lists the same; a test compares.
//!
//! The documented metrics have Azure NPM's names, types and labels; they carry one label more, `backend`, where what they
//! measure depends on it. Names that end in `exec_time` are in milliseconds, as documented; everything else says its
//! unit in its name.

use prometheus::core::{Collector, Desc};
use prometheus::proto::{self, MetricType};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry};

/// Where a metric is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// What this node does: `/node-metrics`.
    Node,
    /// What is the same on every node: `/cluster-metrics`.
    Cluster,
}

impl Scope {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Node, Self::Cluster];

    /// The path at which the HTTP server tells it.
    pub fn path(self) -> &'static str {
        match self {
            Self::Node => "/node-metrics",
            Self::Cluster => "/cluster-metrics",
        }
    }
}

/// A metric's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up only.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by bucket.
    Histogram,
    /// Quantiles over ten minutes; sum and count since the start.
    Summary,
}

/// A metric, before there is a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Declared {
    /// The name.
    pub name: &'static str,
    /// The type.
    pub kind: Kind,
    /// Where it is told.
    pub scope: Scope,
    /// The labels' names; `quantile` and `le` aside.
    pub labels: &'static [&'static str],
    /// One sentence, or two.
    pub help: &'static str,
}

/// Buckets for whole applies and what contains them: from 50 microseconds (a map write) to 100 seconds.
const SPANS: (f64, usize) = (0.00005, 22);

/// Azure NPM's buckets for `iptables-restore`: 16 ms to 131 s.
const RESTORES: (f64, usize) = (0.016, 14);

impl Declared {
    pub(crate) fn desc(&self) -> Desc {
        let labels = self.labels.iter().map(ToString::to_string).collect();
        Desc::new(self.name.to_owned(), self.help.to_owned(), labels, Default::default())
            .expect("names and labels of the catalogue are valid: its test")
    }

    pub(crate) fn family(&self, metrics: Vec<proto::Metric>) -> proto::MetricFamily {
        let mut family = proto::MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(match self.kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
            Kind::Histogram => MetricType::HISTOGRAM,
            Kind::Summary => MetricType::SUMMARY,
        });
        family.set_metric(metrics);
        family
    }

    pub(crate) fn gauge(&self, registries: &Registries) -> IntGaugeVec {
        registries.register(self, IntGaugeVec::new(self.options(), self.labels))
    }

    pub(crate) fn counter(&self, registries: &Registries) -> IntCounterVec {
        registries.register(self, IntCounterVec::new(self.options(), self.labels))
    }

    pub(crate) fn histogram(&self, registries: &Registries) -> HistogramVec {
        let (first, count) = if *self == RESTORE_LATENCY { RESTORES } else { SPANS };
        let buckets = prometheus::exponential_buckets(first, 2.0, count).expect("a rising sequence");
        let options = HistogramOpts::new(self.name, self.help).buckets(buckets);
        registries.register(self, HistogramVec::new(options, self.labels))
    }

    fn options(&self) -> Opts {
        Opts::new(self.name, self.help)
    }
}

/// The two registries, as Azure NPM has them.
#[derive(Default)]
pub(crate) struct Registries {
    pub(crate) node: Registry,
    pub(crate) cluster: Registry,
}

impl Registries {
    pub(crate) fn scope(&self, scope: Scope) -> &Registry {
        match scope {
            Scope::Node => &self.node,
            Scope::Cluster => &self.cluster,
        }
    }

    pub(crate) fn add(&self, scope: Scope, collector: Box<dyn Collector>) {
        self.scope(scope).register(collector).expect("the catalogue's names are valid and unique: its test");
    }

    fn register<C>(&self, declared: &Declared, made: prometheus::Result<C>) -> C
    where
        C: Collector + Clone + 'static,
    {
        let collector = made.expect("names and labels of the catalogue are valid: its test");
        self.add(declared.scope, Box::new(collector.clone()));
        collector
    }
}

macro_rules! catalogue {
    ($($constant:ident: $kind:ident $scope:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(
            pub(crate) const $constant: Declared = Declared {
                name: $name,
                kind: Kind::$kind,
                scope: Scope::$scope,
                labels: &[$($label),*],
                help: $help,
            };
        )*

        /// All of them.
        pub const ALL: &[Declared] = &[$($constant),*];
    };
}

catalogue! {
    // Documented for Azure NPM: counts.
    NUM_POLICIES: Gauge Cluster "npm_num_policies" []
        "NetworkPolicies in the cluster.";
    NUM_IPTABLES_RULES: Gauge Cluster "npm_num_iptables_rules" []
        "Rules that the cluster's policies make: jumps, pairs of peer and port, final marks; base chains aside.";
    NUM_IPSETS: Gauge Cluster "npm_num_ipsets" []
        "Sets that the cluster's policies name, both families as one.";
    NUM_IPSET_ENTRIES: Gauge Cluster "npm_num_ipset_entries" []
        "Entries of all sets that the cluster's policies name, of both families.";
    IPSET_COUNTS: Gauge Cluster "npm_ipset_counts" ["set_name", "set_hash"]
        "Entries of each set that has any; the IPv6 twin has a hash of its own.";
    // Documented for Azure NPM: times.
    ADD_IPTABLES_RULE: Summary Node "npm_add_iptables_rule_exec_time" []
        "Milliseconds of one iptables-restore that writes chains, also of one that fails.";
    ADD_IPSET: Summary Node "npm_add_ipset_exec_time" []
        "Milliseconds of one batch of writes to IP sets, also of one that fails.";
    ADD_POLICY: Summary Node "npm_add_policy_exec_time" ["backend", "had_error"]
        "Milliseconds from taking up a new NetworkPolicy until this node's kernel holds it.";
    CONTROLLER_POLICY: Summary Node "npm_controller_policy_exec_time" ["backend", "had_error", "operation"]
        "Milliseconds from taking up a changed or deleted NetworkPolicy until this node's kernel agrees.";
    CONTROLLER_NAMESPACE: Summary Node "npm_controller_namespace_exec_time" ["backend", "had_error", "operation"]
        "Milliseconds from taking up a namespace's change until this node's kernel agrees.";
    CONTROLLER_POD: Summary Node "npm_controller_pod_exec_time" ["backend", "had_error", "operation"]
        "Milliseconds from taking up a pod's change until this node's kernel agrees.";
    // Azure NPM has these, and does not document them.
    PODS_WATCHED: Gauge Cluster "npm_pods_watched" []
        "Pods that the agent knows of, of all nodes.";
    RESTORE_LATENCY: Histogram Node "npm_linux_iptables_restore_latency_seconds" ["operation"]
        "Seconds of one iptables-restore: create where it writes chains, delete where it only removes.";
    RESTORE_FAILURES: Counter Node "npm_linux_iptables_restore_failure_total" ["operation"]
        "Refused iptables-restore runs.";
    // Ours: the agent.
    BUILD_INFO: Gauge Node "npm_build_info" ["version"]
        "Always 1.";
    IN_SYNC: Gauge Node "npm_node_in_sync" []
        "1 when everything that was there at the start has been read, 0 before.";
    OBJECT_PROBLEMS: Gauge Node "npm_node_object_problems" []
        "Things wrong with objects now: they are taken strictly or not at all.";
    WARNINGS: Gauge Node "npm_node_warnings" []
        "Things to look at in the cluster's state now, such as an address that two pods claim.";
    CHANGES: Counter Node "npm_node_changes_total" ["kind", "operation"]
        "Versions of objects taken up, those that concern other nodes only included.";
    COMPILE: Histogram Node "npm_node_compile_seconds" []
        "Seconds to take up a batch of changes: world, goal and counts.";
    COMPILE_TESTS: Counter Node "npm_node_compile_tests_total" []
        "How often a pod was tested against a set or the subjects of a policy: the compiler's work.";
    GOAL_GENERATION: Gauge Node "npm_node_goal_generation" []
        "Number of the newest goal; 0 before the first.";
    // Ours: what each backend does with it.
    APPLIED_GENERATION: Gauge Node "npm_node_applied_generation" ["backend"]
        "Number of the goal that the kernel holds; 0 before the first.";
    NODE_POLICIES: Gauge Node "npm_node_policies" ["backend"]
        "Policies programmed on this node: those that select a pod of it.";
    NODE_RULES: Gauge Node "npm_node_rules" ["backend"]
        "Ingress and egress rules of the policies programmed on this node.";
    NODE_SETS: Gauge Node "npm_node_sets" ["backend"]
        "Sets programmed on this node.";
    NODE_SET_ENTRIES: Gauge Node "npm_node_set_entries" ["backend"]
        "Entries of the sets programmed on this node, of both families.";
    EVENT_TO_KERNEL: Histogram Node "npm_node_event_to_kernel_seconds" ["backend"]
        "Seconds from taking up an object's change until this node's kernel agrees, retries included.";
    QUEUE_AGE: Gauge Node "npm_node_queue_age_seconds" ["backend"]
        "Age of the oldest change that this node's kernel does not agree with yet; 0 when there is none.";
    UNVERIFIED: Gauge Node "npm_node_unverified_seconds" ["backend"]
        "Seconds since the kernel was last known to be as it should: an apply or a read-back that succeeded.";
    APPLY: Histogram Node "npm_node_apply_seconds" ["backend"]
        "Seconds of one apply of a goal, also of one that fails.";
    VERIFY: Histogram Node "npm_node_verify_seconds" ["backend"]
        "Seconds of one read-back, repairs included, also of one that fails.";
    KERNEL_WRITES: Counter Node "npm_node_kernel_writes_total" ["backend", "what"]
        "What was written: set members and sets; chains or their likes.";
    FAILURES: Counter Node "npm_node_failures_total" ["backend", "step", "error"]
        "Applies and read-backs that failed.";
    CONSECUTIVE_FAILURES: Gauge Node "npm_node_consecutive_failures" ["backend"]
        "Attempts that failed in a row until now; 0 when the last one succeeded.";
    RETRIES: Counter Node "npm_node_retries_total" ["backend"]
        "Attempts after one that failed.";
    DRIFT_REPAIRS: Counter Node "npm_node_drift_repairs_total" ["backend"]
        "Things that someone else had changed in the kernel and that were repaired.";
    DEGRADED_POLICIES: Gauge Node "npm_node_degraded_policies" ["backend"]
        "Policies that the kernel does not take whole: they isolate, and allow less than they say.";
    // Ours: what the backends' programs and rules do.
    VERDICTS: Counter Node "npm_node_verdicts_total" ["backend", "direction", "verdict"]
        "Packets judged: denied and dropped by policies of this direction, or allowed by them and passed.";
    PASSES: Counter Node "npm_node_passes_total" ["backend", "reason"]
        "Packets that passed the eBPF program.";
    DROPS: Counter Node "npm_node_drops_total" ["backend", "reason"]
        "Packets that were dropped.";
    UNLOGGED: Counter Node "npm_node_unlogged_denials_total" ["backend", "reason"]
        "Packets that were denied and are in no line of the log of denied flows.";
    PROGRAM_RUNS: Counter Node "npm_node_program_runs_total" ["backend", "program"]
        "Runs of the eBPF program that the kernel has timed, one for each packet that leaves by an interface.";
    PROGRAM_SECONDS: Counter Node "npm_node_program_run_seconds_total" ["backend", "program"]
        "Seconds that those runs took, on all CPUs together.";
    PROGRAM_STATISTICS: Gauge Node "npm_node_program_statistics" ["backend"]
        "1 while the node has the kernel time eBPF programs (kernel.bpf_stats_enabled), 0 while it does not.";
    STORE_ENTRIES: Gauge Node "npm_node_store_entries" ["backend", "store"]
        "Entries in use of what holds so much and no more: eBPF maps, IP sets.";
    STORE_LIMIT: Gauge Node "npm_node_store_limit" ["backend", "store"]
        "Most entries that there can be.";
    ESCAPES: Gauge Node "npm_node_escapes" ["reason", "effect"]
        "Reasons why traffic of this node escapes judgement, or may; 0 for those that are not so.";
    // Ours: the machine and the process. Names without npm_ are the convention of Prometheus' own clients.
    CONNTRACK_ENTRIES: Gauge Node "npm_node_conntrack_entries" []
        "Connections that the kernel tracks in the agent's network namespace.";
    CONNTRACK_LIMIT: Gauge Node "npm_node_conntrack_limit" []
        "Connections that the kernel can track; what comes beyond is dropped.";
    CPU_SECONDS: Counter Node "process_cpu_seconds_total" []
        "User and system CPU time in seconds.";
    RESIDENT_BYTES: Gauge Node "process_resident_memory_bytes" []
        "Resident memory in bytes.";
    VIRTUAL_BYTES: Gauge Node "process_virtual_memory_bytes" []
        "Virtual memory in bytes.";
    OPEN_FILES: Gauge Node "process_open_fds" []
        "Open file descriptors.";
    MAX_FILES: Gauge Node "process_max_fds" []
        "Most file descriptors that may be open.";
    THREADS: Gauge Node "process_threads" []
        "Threads.";
    START_TIME: Gauge Node "process_start_time_seconds" []
        "When the process started, in seconds since 1970.";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_is_valid_and_unique() {
        let names: BTreeSet<&str> = ALL.iter().map(|declared| declared.name).collect();
        assert_eq!(names.len(), ALL.len());
        for declared in ALL {
            declared.desc();
            assert!(declared.help.ends_with('.'), "{}", declared.name);
            let total = declared.name.ends_with("_total");
            assert_eq!(total, declared.kind == Kind::Counter, "{}", declared.name);
            assert!(declared.name.starts_with("npm_") || declared.name.starts_with("process_"));
        }
    }

    /// The rows of the tables of `docs/metrics.md`: path, name, type, labels, help.
    fn documented() -> BTreeSet<[String; 5]> {
        let mut rows = BTreeSet::new();
        let mut path = "";
        for line in include_str!("../../../docs/metrics.md").lines() {
            if let Some(heading) = line.strip_prefix("## ") {
                path = heading;
            }
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            if let ["", name, kind, labels, help, ""] = cells[..]
                && name.starts_with('`')
            {
                rows.insert([path, name, kind, labels, help].map(|cell| cell.replace('`', "")));
            }
        }
        rows
    }

    #[test]
    fn the_documentation_lists_what_there_is() {
        let declared: BTreeSet<[String; 5]> = ALL
            .iter()
            .map(|Declared { name, kind, scope, labels, help }| {
                let kind = format!("{kind:?}").to_lowercase();
                let labels = if labels.is_empty() { "-".to_owned() } else { labels.join(" ") };
                [scope.path().to_owned(), (*name).to_owned(), kind, labels, (*help).to_owned()]
            })
            .collect();
        let documented = documented();
        let missing: Vec<_> = declared.difference(&documented).collect();
        let surplus: Vec<_> = documented.difference(&declared).collect();
        assert!(
            missing.is_empty() && surplus.is_empty(),
            "not in the list: {missing:?}, not in the code: {surplus:?}"
        );
    }

    #[test]
    fn the_documented_metrics_are_there() {
        for (name, kind, labels) in [
            ("npm_num_policies", Kind::Gauge, ""),
            ("npm_num_iptables_rules", Kind::Gauge, ""),
            ("npm_num_ipsets", Kind::Gauge, ""),
            ("npm_num_ipset_entries", Kind::Gauge, ""),
            ("npm_add_iptables_rule_exec_time", Kind::Summary, ""),
            ("npm_add_ipset_exec_time", Kind::Summary, ""),
            ("npm_ipset_counts", Kind::Gauge, "set_hash set_name"),
            ("npm_add_policy_exec_time", Kind::Summary, "had_error"),
            ("npm_controller_policy_exec_time", Kind::Summary, "had_error operation"),
            ("npm_controller_namespace_exec_time", Kind::Summary, "had_error operation"),
            ("npm_controller_pod_exec_time", Kind::Summary, "had_error operation"),
        ] {
            let declared = ALL.iter().find(|declared| declared.name == name).unwrap();
            let mut own: Vec<&str> =
                declared.labels.iter().copied().filter(|label| *label != "backend").collect();
            own.sort_unstable();
            assert_eq!((declared.kind, own.join(" ").as_str()), (kind, labels), "{name}");
        }
    }
}
