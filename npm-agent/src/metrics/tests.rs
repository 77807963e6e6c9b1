//! The metrics as a scrape sees them, told by a running loop over fake backends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use npm_policy::compile::Compiler;
use npm_policy::model::{Operator, PolicyKey, Requirement, Selector};
use npm_policy::world::Change;

use super::catalogue::{ALL, Declared, Kind};
use super::*;
use crate::backend::meter::{Direction, Judged, Reading, Store, Timed, Timekeeping};
use crate::backend::{Applied, Degraded, Write, Written};
use crate::escape::{Board, Engine};
use crate::reconcile::backoff::Backoff;
use crate::reconcile::fake::{Agent, Fake, IN_SYNC, PATIENCE, QUICK, namespace, pod, policy};
use crate::reconcile::worker::Timing;
use crate::source::{Completeness, Event, Problem};
use crate::status::report::Size;

/// The samples of a scrape: series to value.
fn samples(metrics: &Metrics, scope: Scope) -> BTreeMap<String, f64> {
    let text = metrics.render(scope);
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series.to_owned(), value.parse().unwrap())
        })
        .collect()
}

fn value(metrics: &Metrics, series: &str) -> Option<f64> {
    let scope = if series.starts_with("npm_num") { Scope::Cluster } else { Scope::Node };
    samples(metrics, scope).get(series).copied()
}

fn labelled(value: &str) -> Selector {
    Selector::new([Requirement { key: "app".into(), operator: Operator::In([value.into()].into()) }])
}

fn gone(change: &Change) -> Change {
    match change {
        Change::Pod(key, _) => Change::Pod(key.clone(), None),
        Change::Namespace(name, _) => Change::Namespace(name.clone(), None),
        Change::Policy(key, _) => Change::Policy(key.clone(), None),
    }
}

fn problem(object: &str, message: &str) -> Event {
    let problem = Problem { object: object.into(), message: message.into() };
    Event::Problems { origin: "a.yaml".into(), problems: vec![problem] }
}

const POLICY_OK: &str = "npm_add_policy_exec_time_count{backend=\"fake\",had_error=\"false\"}";
const POLICY_BAD: &str = "npm_add_policy_exec_time_count{backend=\"fake\",had_error=\"true\"}";

fn pod_count(operation: &str) -> String {
    format!(
        "npm_controller_pod_exec_time_count{{backend=\"fake\",had_error=\"false\",operation=\"{operation}\"}}"
    )
}

fn changed_policy(operation: &str, had_error: &str) -> String {
    format!(
        "npm_controller_policy_exec_time_count{{backend=\"fake\",had_error=\"{had_error}\",operation=\"{operation}\"}}"
    )
}

#[test]
fn every_version_that_concerns_the_node_counts_once() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.change([namespace("x"), policy("all", Selector::everything()), pod("a", [10, 0, 0, 1], &[])]);
    agent.send(IN_SYNC);
    agent.settle(0);
    let metrics = Arc::clone(&agent.metrics);
    assert_eq!(value(&metrics, POLICY_OK), None, "what was there at the start is no event");
    assert_eq!(value(&metrics, "npm_node_in_sync"), Some(1.0));

    let (b, c) = (pod("b", [10, 0, 0, 2], &[("app", "b")]), pod("c", [10, 0, 0, 3], &[]));
    agent.change([b.clone(), c.clone(), policy("b", labelled("b")), policy("nobody", labelled("none"))]);
    agent.settle(0);
    assert_eq!(value(&metrics, &pod_count("create")), Some(2.0));
    assert_eq!(value(&metrics, POLICY_OK), Some(1.0), "one of the two selects no pod of this node");
    let created = "npm_node_changes_total{kind=\"policy\",operation=\"create\"}";
    assert_eq!(value(&metrics, created), Some(3.0));

    agent.change([b.clone(), pod("c", [10, 0, 0, 4], &[])]);
    agent.settle(0);
    assert_eq!(value(&metrics, &pod_count("update")), Some(1.0), "b is as it was");
    agent.change([gone(&b), gone(&c), gone(&policy("b", labelled("b")))]);
    agent.settle(0);
    assert_eq!(value(&metrics, &pod_count("delete")), Some(2.0));
    assert_eq!(value(&metrics, &changed_policy("delete", "false")), Some(1.0));
    assert_eq!(value(&metrics, POLICY_BAD), None, "no series before the first failure");
    let counted = value(&metrics, "npm_node_event_to_kernel_seconds_count{backend=\"fake\"}");
    assert_eq!(counted, Some(7.0), "2 created, 1 policy, 1 updated, 3 deleted");
}

#[test]
fn a_failed_apply_counts_its_versions_once_and_its_retries_apart() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.change([namespace("x"), pod("a", [10, 0, 0, 1], &[])]);
    agent.send(IN_SYNC);
    agent.settle(0);
    let metrics = Arc::clone(&agent.metrics);
    fake.fail(3);
    agent.change([policy("one", Selector::everything()), policy("two", Selector::everything())]);
    agent.settle(0);
    assert_eq!(value(&metrics, POLICY_BAD), Some(2.0));
    assert_eq!(value(&metrics, POLICY_OK), None, "neither succeeded at once");
    assert_eq!(value(&metrics, "npm_node_retries_total{backend=\"fake\"}"), Some(3.0));
    let failures = "npm_node_failures_total{backend=\"fake\",error=\"refused\",step=\"apply\"}";
    assert_eq!(value(&metrics, failures), Some(3.0));
    assert_eq!(value(&metrics, "npm_node_consecutive_failures{backend=\"fake\"}"), Some(0.0));
    assert_eq!(value(&metrics, "npm_node_event_to_kernel_seconds_count{backend=\"fake\"}"), Some(2.0));
    assert_eq!(value(&metrics, "npm_node_queue_age_seconds{backend=\"fake\"}"), Some(0.0));
}

#[test]
fn what_waits_has_an_age() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.change([namespace("x"), policy("all", Selector::everything())]);
    agent.send(IN_SYNC);
    agent.settle(0);
    let metrics = Arc::clone(&agent.metrics);
    let age = || value(&metrics, "npm_node_queue_age_seconds{backend=\"fake\"}").unwrap();
    assert_eq!(age(), 0.0);
    let attempts = fake.attempts().len();
    fake.hold();
    agent.change([pod("a", [10, 0, 0, 1], &[])]);
    fake.wait_attempts(attempts + 1);
    std::thread::sleep(Duration::from_millis(20));
    assert!(age() >= 0.02, "{}", age());
    fake.release();
    agent.settle(0);
    assert_eq!(age(), 0.0);
    let sum = value(&metrics, "npm_node_event_to_kernel_seconds_sum{backend=\"fake\"}").unwrap();
    assert!(sum >= 0.02, "{sum}");
}

#[test]
fn a_policy_that_cannot_be_taken_as_it_is_counts_as_failed_once() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.change([namespace("x"), pod("a", [10, 0, 0, 1], &[])]);
    agent.send(IN_SYNC);
    agent.settle(0);
    let metrics = Arc::clone(&agent.metrics);
    let bad = || value(&metrics, POLICY_BAD);
    // As sources tell it: the problem, then the strict reading.
    agent.send(problem("NetworkPolicy x/web", "port 70000 is no port"));
    agent.change([policy("web", Selector::everything())]);
    agent.settle(0);
    assert_eq!((bad(), value(&metrics, POLICY_OK)), (Some(1.0), None));
    assert_eq!(value(&metrics, "npm_node_object_problems"), Some(1.0));

    // Another version with the same problem is another failure.
    agent.change([policy("web", labelled("web"))]);
    agent.settle(0);
    assert_eq!(value(&metrics, &changed_policy("update", "true")), Some(1.0));
    // A good version is none.
    agent.send(Event::Problems { origin: "a.yaml".into(), problems: Vec::new() });
    agent.change([policy("web", Selector::everything())]);
    agent.settle(0);
    assert_eq!(value(&metrics, &changed_policy("update", "true")), Some(1.0));
    assert_eq!(value(&metrics, &changed_policy("update", "false")), Some(1.0));
    assert_eq!((bad(), value(&metrics, POLICY_OK)), (Some(1.0), None));
    assert_eq!(value(&metrics, "npm_node_object_problems"), Some(0.0));
}

#[test]
fn a_policy_that_is_bad_at_the_start_counts_as_failed() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.send(problem("NetworkPolicy x/web", "port 70000 is no port"));
    agent.change([namespace("x"), policy("web", Selector::everything()), pod("a", [10, 0, 0, 1], &[])]);
    agent.send(Event::InSync(Completeness::Complete));
    agent.settle(0);
    assert_eq!(value(&agent.metrics, POLICY_BAD), Some(1.0));
}

#[test]
fn of_a_batch_each_policy_has_its_own_outcome() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.change([namespace("x"), pod("a", [10, 0, 0, 1], &[])]);
    agent.send(IN_SYNC);
    agent.settle(0);
    fake.degrade(vec![Degraded { policy: PolicyKey::new("x", "two"), reason: "planted".into() }]);
    agent.change(["one", "two", "three"].map(|name| policy(name, Selector::everything())));
    agent.settle(0);
    assert_eq!(value(&agent.metrics, POLICY_OK), Some(2.0));
    assert_eq!(value(&agent.metrics, POLICY_BAD), Some(1.0));
    assert_eq!(value(&agent.metrics, "npm_node_degraded_policies{backend=\"fake\"}"), Some(1.0));
}

#[test]
fn the_clusters_counts_come_with_the_sync() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.change([namespace("x"), policy("all", Selector::everything()), pod("a", [10, 0, 0, 1], &[])]);
    agent.seen();
    assert_eq!(agent.metrics.render(Scope::Cluster), "", "half of a cluster is no cluster");
    agent.send(IN_SYNC);
    agent.settle(0);
    let expected = "# HELP npm_ipset_counts Entries of each set that has any; the IPv6 twin has a hash of its own.\n\
                    # TYPE npm_ipset_counts gauge\n\
                    npm_ipset_counts{set_name=\"local-ns-x\",set_hash=\"azure-npm-2tvw7d0h7zq0fpvcx9r7\"} 1\n";
    let text = agent.metrics.render(Scope::Cluster);
    let hash = npm_policy::names::kernel_set_name("local-ns-x", npm_policy::goal::Family::V4);
    assert!(text.contains(&expected.replace("azure-npm-2tvw7d0h7zq0fpvcx9r7", &hash)), "{text}");
    let counts: BTreeMap<String, f64> = samples(&agent.metrics, Scope::Cluster)
        .into_iter()
        .filter(|(series, _)| !series.starts_with("npm_ipset_counts"))
        .collect();
    let wanted = [
        ("npm_num_ipset_entries", 1.0),
        ("npm_num_ipsets", 1.0),
        // In: a jump, an allow rule, a mark. Out: a jump and a mark.
        ("npm_num_iptables_rules", 5.0),
        ("npm_num_policies", 1.0),
        ("npm_pods_watched", 1.0),
    ];
    assert_eq!(counts, wanted.map(|(name, count)| (name.to_owned(), count)).into());
}

/// Lets everything happen that some metric tells of.
fn eventful() -> Arc<Metrics> {
    let fake = Fake::default();
    let often = Timing {
        verify_interval: Duration::from_millis(10),
        backoff: Backoff { first: Duration::from_millis(1), most: Duration::from_millis(1) },
    };
    let mut agent = Agent::start(&[&fake], often);
    agent.change([namespace("x"), policy("all", Selector::everything())]);
    agent.send(IN_SYNC);
    agent.settle(0);
    fake.fail(1);
    agent.change([pod("a", [10, 0, 0, 1], &[]), policy("new", Selector::everything())]);
    agent.settle(0);
    let edited = policy("new", labelled("new"));
    agent.change([edited, Change::Namespace("x".into(), None)]);
    agent.send(problem("Namespace x", "planted"));
    agent.settle(0);
    agent.wait(0, |status| status.verifies > 0);
    let took = Duration::from_millis(5);
    let write = |what, failed| Write { what, took, failed };
    agent.metrics.backend("fake").wrote(&[
        write(Written::Sets, false),
        write(Written::Chains, true),
        write(Written::Removals, false),
    ]);
    agent.metrics.metered("fake", Box::new(reading));
    agent.metrics.board(Board::new(Engine::Ebpf, None).unwrap());
    Arc::clone(&agent.metrics)
}

/// One of everything that a backend may count.
fn reading() -> Reading {
    Reading {
        passes: vec![("established", 1)],
        drops: vec![("egress_denied", 2)],
        verdicts: vec![(Direction::Egress, Judged::Denied, 2)],
        unlogged: vec![("ring_full", 1)],
        timed: vec![Timed { program: "mark_cast".to_owned(), runs: 5, took: Duration::from_nanos(750) }],
        timekeeping: Some(Timekeeping::On),
        stores: vec![Store { name: "rows", used: 3, limit: 4 }],
    }
}

#[test]
fn what_a_backend_counts_is_told_with_its_labels() {
    let text = eventful().render(Scope::Node);
    for line in [
        "npm_node_passes_total{backend=\"fake\",reason=\"established\"} 1",
        "npm_node_drops_total{backend=\"fake\",reason=\"egress_denied\"} 2",
        "npm_node_verdicts_total{backend=\"fake\",direction=\"egress\",verdict=\"denied\"} 2",
        "npm_node_unlogged_denials_total{backend=\"fake\",reason=\"ring_full\"} 1",
        "npm_node_program_runs_total{backend=\"fake\",program=\"mark_cast\"} 5",
        "npm_node_program_run_seconds_total{backend=\"fake\",program=\"mark_cast\"} 0.00000075",
        "npm_node_program_statistics{backend=\"fake\"} 1",
        "npm_node_store_entries{backend=\"fake\",store=\"rows\"} 3",
        "npm_node_store_limit{backend=\"fake\",store=\"rows\"} 4",
        "npm_node_escapes{reason=\"ipsec\",effect=\"none\"} 0",
    ] {
        assert!(text.lines().any(|told| told == line), "no {line} in:\n{text}");
    }
}

#[test]
fn everything_declared_is_fed_and_everything_told_is_declared() {
    let metrics = eventful();
    let mut told: BTreeMap<String, (Scope, String, String)> = BTreeMap::new();
    for scope in Scope::ALL {
        let text = metrics.render(scope);
        let mut help = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                help = rest.split_once(' ').unwrap().1;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                told.insert(name.into(), (scope, kind.into(), help.into()));
            }
        }
    }
    let declared: BTreeMap<String, (Scope, String, String)> = ALL
        .iter()
        .filter(|declared| is_everywhere(declared))
        .map(|declared| {
            let kind = format!("{:?}", declared.kind).to_lowercase();
            (declared.name.to_owned(), (declared.scope, kind, declared.help.to_owned()))
        })
        .collect();
    told.retain(|name, _| ALL.iter().any(|declared| declared.name == name && is_everywhere(declared)));
    assert_eq!(told, declared);
    let names: BTreeSet<String> = told.into_keys().collect();
    assert!(names.len() >= 40, "{names:?}");
}

/// Whether a machine has it: connections are tracked only where the kernel has been asked to.
fn is_everywhere(declared: &Declared) -> bool {
    !declared.name.starts_with("npm_node_conntrack_")
}

#[test]
fn labels_are_as_declared() {
    let metrics = eventful();
    for scope in Scope::ALL {
        for family in metrics.registries.scope(scope).gather() {
            let declared = ALL.iter().find(|declared| declared.name == family.name()).unwrap();
            let wanted: BTreeSet<&str> = declared.labels.iter().copied().collect();
            for metric in family.get_metric() {
                let labels: BTreeSet<&str> = metric.get_label().iter().map(|pair| pair.name()).collect();
                assert_eq!(labels, wanted, "{}", declared.name);
            }
        }
    }
    assert!(ALL.iter().any(|declared| declared.kind == Kind::Summary));
}

#[test]
fn a_scrape_does_not_wait_for_an_apply() {
    let fake = Fake::default();
    let agent = Agent::start(&[&fake], QUICK);
    fake.hold();
    agent.change([namespace("x"), policy("all", Selector::everything()), pod("a", [10, 0, 0, 1], &[])]);
    agent.send(IN_SYNC);
    fake.wait_attempts(1);
    let metrics = Arc::clone(&agent.metrics);
    let (sender, scraped) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(metrics.render(Scope::Node)).unwrap());
    assert!(scraped.recv_timeout(PATIENCE).unwrap().contains("npm_node_goal_generation 1"));
    fake.release();
}

/// 20,000 pods, a set for each four of them.
fn large() -> (Metrics, Compiler) {
    let mut compiler = Compiler::new("elsewhere");
    let labelled = |index: u32| labelled(&(index % 5000).to_string());
    compiler.apply((0..5000).map(|index| policy(&index.to_string(), labelled(index))));
    compiler.apply((0..20_000_u32).map(|index| {
        let [_, high, middle, low] = index.to_be_bytes();
        pod(&index.to_string(), [10, high, middle, low], &[("app", &(index % 5000).to_string())])
    }));
    let metrics = Metrics::new();
    metrics.counted(compiler.census(), compiler.world().size());
    (metrics, compiler)
}

/// What an apply tells waits for no scrape: many applies are told of while one is answered.
#[test]
fn scrapes_hold_up_no_apply() {
    const SCRAPES: u32 = 20;
    let (metrics, compiler) = large();
    let backend = metrics.backend("fake");
    let applies = std::thread::scope(|scope| {
        let scraper = scope.spawn(|| {
            for _ in 0..SCRAPES {
                metrics.render(Scope::Cluster);
                metrics.render(Scope::Node);
            }
        });
        let mut applies = 0;
        while !scraper.is_finished() {
            applies += 1;
            metrics.counted(compiler.census(), compiler.world().size());
            backend.begins(Some(applies));
            backend.applied(applies, Duration::from_millis(1), &Applied::default(), Size::default());
        }
        applies
    });
    println!("{applies} applies during {SCRAPES} scrapes");
    assert!(applies > u64::from(20 * SCRAPES), "{applies} applies during {SCRAPES} scrapes");
}

#[test]
fn a_large_clusters_sets_are_told_one_by_one() {
    let (metrics, _) = large();
    const BAR: Duration = Duration::from_millis(50);
    let mut fastest = Duration::MAX;
    // On a busy machine one time says little.
    for _ in 0..20 {
        let start = Instant::now();
        let text = metrics.render(Scope::Cluster);
        fastest = fastest.min(start.elapsed());
        let sets: Vec<&str> = text.lines().filter(|line| line.starts_with("npm_ipset_counts{")).collect();
        assert_eq!(sets.len(), 5000);
        assert!(sets.iter().all(|line| line.ends_with(" 4")), "{}", sets[0]);
        assert!(text.contains("npm_num_ipset_entries 20000\n"));
    }
    assert!(fastest <= BAR, "20,000 pods, 5,000 sets: rendered in {fastest:?}");
    println!("20,000 pods, 5,000 sets: rendered in {fastest:?}");
}
