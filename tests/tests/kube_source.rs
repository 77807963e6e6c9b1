//! The Kubernetes source against the test API server: whatever the server does, the source ends up knowing what the
//! server has, tells of it no more than once, and forgets nothing meanwhile.
//!
//! `NPM_SEED=<number>` repeats the random run.

#![expect(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use npm_agent::source::kube::{Credentials, Options, run};
use npm_agent::source::{Completeness, Event, Problem, WatchState};
use npm_policy::model::{PodKey, PolicyKey};
use npm_policy::world::World;
use npm_tests::apiserver::faults::{Disturbance, Fault, On};
use npm_tests::apiserver::{self, Server};
use npm_tests::chaos::{Chaos, seed};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Short, so that a server that says nothing is given up soon; not so short that a busy machine looks like one.
const WATCH_TIMEOUT: Duration = Duration::from_secs(2);

/// A source that runs, and what it has told.
struct Source {
    events: mpsc::Receiver<Event>,
    refresh: mpsc::Sender<u64>,
    refreshed: u64,
    world: World,
    /// How many objects were told of, and deletions.
    told: usize,
    in_sync: bool,
    states: BTreeMap<&'static str, WatchState>,
    lists: BTreeMap<&'static str, u64>,
    failures: usize,
    errors: Vec<String>,
    problems: BTreeMap<String, Vec<Problem>>,
    task: tokio::task::JoinHandle<()>,
    _directory: TempDir,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn server(options: &apiserver::Options) -> Server {
    Server::start(TcpListener::bind("127.0.0.1:0").unwrap(), options).unwrap()
}

impl Source {
    fn start(server: &Server) -> Self {
        Self::start_with(server, None)
    }

    fn start_with(server: &Server, token_file: Option<PathBuf>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, server.kubeconfig(token_file.as_deref())).unwrap();
        let options = Options { credentials: Credentials::Kubeconfig(path), watch_timeout: WATCH_TIMEOUT };
        let (sender, events) = mpsc::channel(64);
        let (refresh, refresh_end) = mpsc::channel(1);
        let task = tokio::spawn(async move { run(options, sender, refresh_end).await.unwrap() });
        Self {
            events,
            refresh,
            refreshed: 0,
            world: World::default(),
            told: 0,
            in_sync: false,
            states: BTreeMap::new(),
            lists: BTreeMap::new(),
            failures: 0,
            errors: Vec::new(),
            problems: BTreeMap::new(),
            task,
            _directory: directory,
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Changes(changes) => {
                self.told += changes.len();
                changes.into_iter().for_each(|change| self.world.apply(change));
            }
            Event::Problems { origin, problems } if problems.is_empty() => {
                drop(self.problems.remove(&origin))
            }
            Event::Problems { origin, problems } => drop(self.problems.insert(origin, problems)),
            Event::InSync(completeness) => {
                assert_eq!(completeness, Completeness::Complete);
                assert!(!std::mem::replace(&mut self.in_sync, true), "it is said once");
            }
            Event::Watch { name, state } => {
                match &state {
                    WatchState::Listing => {}
                    WatchState::Following { lists } => drop(self.lists.insert(name, *lists)),
                    WatchState::Failing { error, failures: _ } => {
                        self.failures += 1;
                        self.errors.push(error.clone());
                    }
                }
                self.states.insert(name, state);
            }
            Event::Refreshed(number) => self.refreshed = number,
        }
    }

    /// Takes events until something holds.
    async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !holds(self) {
            match tokio::time::timeout_at(deadline, self.events.recv()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => panic!("the source has ended"),
                Err(_) => panic!("{what}: it never came; the watches: {:?}", self.states),
            }
        }
    }

    /// Takes events until the source knows what the server has.
    async fn settle(&mut self, server: &Server, what: &str) {
        let truth = server.store().world();
        self.until(what, |source| source.in_sync && source.world == truth).await;
    }

    /// Takes what comes within this time.
    async fn listen(&mut self, time: Duration) {
        let deadline = tokio::time::Instant::now() + time;
        while let Ok(Some(event)) = tokio::time::timeout_at(deadline, self.events.recv()).await {
            self.take(event);
        }
    }

    fn following(&self) -> usize {
        self.states.values().filter(|state| matches!(state, WatchState::Following { .. })).count()
    }

    fn follows_all(&self) -> bool {
        self.following() == 3
    }

    /// How often each was read.
    fn lists(&self) -> Vec<u64> {
        self.lists.values().copied().collect()
    }
}

fn namespace(name: &str, label: &str) -> Value {
    json!({"kind": "Namespace", "metadata": {"name": name, "labels": {"team": label}}})
}

fn pod(name: &str, address: &str) -> Value {
    json!({
        "kind": "Pod", "metadata": {"namespace": "x", "name": name, "labels": {"app": name}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 80}]}],
            "initContainers": [{"name": "s", "restartPolicy": "Always",
                "ports": [{"name": "side", "containerPort": 81}]}]},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    })
}

fn policy(name: &str) -> Value {
    json!({
        "kind": "NetworkPolicy", "metadata": {"namespace": "x", "name": name},
        "spec": {"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": name}}}]}]},
    })
}

fn fill(server: &Server) {
    for value in [namespace("x", "a"), pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), policy("p")] {
        server.store().put(value);
    }
}

#[tokio::test]
async fn what_is_there_and_what_changes_is_told_once() {
    let server = server(&apiserver::Options::default());
    fill(&server);
    let mut source = Source::start(&server);
    source.settle(&server, "the list").await;
    source.until("following", Source::follows_all).await;
    assert_eq!((source.told, source.lists()), (4, vec![1; 3]));
    let ports = &source.world.pod(&PodKey::new("x", "a")).unwrap().ports;
    let names: Vec<&str> = ports.iter().map(|port| &*port.name).collect();
    assert_eq!(names, ["http", "side"], "sidecars have ports too");

    let store = server.store();
    store.put(pod("a", "10.0.0.9"));
    store.put(namespace("x", "b"));
    store.remove("networkpolicies", "x", "p");
    store.put(policy("q"));
    source.settle(&server, "changes").await;
    assert_eq!(source.told, 8);

    // What decides nothing is no news.
    let mut noisy = pod("a", "10.0.0.9");
    noisy["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    noisy["metadata"]["annotations"] = json!({"x": "y"});
    store.put(noisy);
    store.put(pod("c", "10.0.0.3"));
    source.settle(&server, "after the noise").await;
    assert_eq!(source.told, 9);

    store.remove("namespaces", "", "x");
    source.settle(&server, "a namespace with all that is in it").await;
    assert_eq!(source.world.pods().count() + source.world.policies().count(), 0);
}

#[tokio::test]
async fn a_server_without_streaming_lists_is_read_page_by_page() {
    let server = server(&apiserver::Options { streaming_lists: false, ..apiserver::Options::default() });
    fill(&server);
    for index in 0..1203 {
        server.store().put(pod(&format!("p{index}"), &format!("10.1.{}.{}", index / 250, index % 250)));
    }
    let mut source = Source::start(&server);
    source.settle(&server, "pages").await;
    assert!(
        !source.errors.iter().any(|error| error.contains("422")),
        "it is no failure: {:?}",
        source.errors
    );
    server.store().put(pod("a", "10.0.0.9"));
    source.settle(&server, "a change behind the pages").await;
    assert_eq!(source.told, 1208);
}

#[tokio::test]
async fn nothing_is_in_sync_before_everything_is() {
    for plural in ["namespaces", "networkpolicies", "pods"] {
        let server = server(&apiserver::Options::default());
        fill(&server);
        server.faults().plant(
            On::Any,
            Some(plural),
            u32::MAX,
            Fault::Refuse { code: 403, retry_after: None },
        );
        let mut source = Source::start(&server);
        source.until("two of three", |source| source.following() == 2).await;
        source.until("a failure", |source| source.failures >= 2).await;
        assert!(!source.in_sync, "{plural} can't be read");
        let Some(WatchState::Failing { error, .. }) = source.states.get(plural) else { panic!("{plural}") };
        assert!(error.contains("403 Forbidden"), "{error}");
        server.faults().clear();
        source.settle(&server, plural).await;
    }
}

#[tokio::test]
async fn every_fault_of_a_request_is_survived() {
    survive_faults(apiserver::Options::default()).await;
}

#[tokio::test]
async fn every_fault_of_a_request_is_survived_without_streaming_lists() {
    survive_faults(apiserver::Options { streaming_lists: false, ..apiserver::Options::default() }).await;
}

async fn survive_faults(options: apiserver::Options) {
    let faults = [
        Fault::Refuse { code: 500, retry_after: None },
        Fault::Refuse { code: 429, retry_after: Some(1) },
        Fault::Refuse { code: 410, retry_after: None },
        Fault::Refuse { code: 400, retry_after: None },
        Fault::Refuse { code: 504, retry_after: None },
        Fault::Delay(Duration::from_millis(300)),
        Fault::Hang,
        Fault::Reset,
        Fault::Garbage,
        Fault::Truncate(0),
        Fault::Truncate(150),
        Fault::Truncate(900),
    ];
    let server = server(&options);
    fill(&server);
    let mut source = Source::start(&server);
    source.settle(&server, "the start").await;
    for (round, fault) in faults.iter().enumerate() {
        let what = format!("{fault:?}, {options:?}");
        for on in [On::List, On::StreamingList, On::Watch] {
            server.faults().plant(on, Some("pods"), 1, fault.clone());
        }
        // Whatever happens while nobody watches is found afterwards, deletions too.
        server.faults().disturb(None, Disturbance::Cut);
        server.store().put(pod("a", &format!("10.0.1.{round}")));
        server.store().remove("pods", "x", "b");
        if round % 2 == 0 {
            server.store().compact();
        }
        source.settle(&server, &what).await;
        server.faults().clear();
        server.store().put(pod("b", "10.0.0.2"));
        source.settle(&server, &what).await;
    }
}

#[tokio::test]
async fn every_disturbance_of_a_watch_is_survived() {
    let server = server(&apiserver::Options {
        bookmark_interval: Duration::from_millis(200),
        ..apiserver::Options::default()
    });
    fill(&server);
    let mut source = Source::start(&server);
    source.settle(&server, "the start").await;
    let disturbances = [
        Disturbance::Cut,
        Disturbance::End,
        Disturbance::CutLine,
        Disturbance::Error(410),
        Disturbance::Error(500),
        Disturbance::Garbage,
        Disturbance::Repeat(5),
        Disturbance::Swap,
        Disturbance::Mute,
    ];
    for (round, disturbance) in disturbances.iter().enumerate() {
        source.until("following", Source::follows_all).await;
        server.faults().disturb(None, disturbance.clone());
        // Until the watches have taken it, which nobody tells: later it would disturb less.
        source.listen(Duration::from_millis(100)).await;
        // Two versions of one object, and an end that comes before a change of the same.
        let store = server.store();
        store.put(pod("a", &format!("10.0.2.{round}")));
        store.put(pod("a", &format!("10.0.3.{round}")));
        store.put(pod("d", "10.0.0.4"));
        store.remove("pods", "x", "d");
        store.put(namespace("x", &format!("round-{round}")));
        source.settle(&server, &format!("{disturbance:?}")).await;
        // What comes late changes nothing any more.
        server.faults().disturb(None, Disturbance::Repeat(8));
        source.listen(Duration::from_millis(50)).await;
        source.settle(&server, &format!("{disturbance:?}, sent again")).await;
    }
}

#[tokio::test]
async fn a_server_that_is_away_changes_nothing_and_is_taken_up_where_it_was() {
    let server = server(&apiserver::Options::default());
    fill(&server);
    let mut source = Source::start(&server);
    source.settle(&server, "the start").await;
    source.until("following", Source::follows_all).await;
    let (before, told, lists) = (source.world.clone(), source.told, source.lists());
    let stopped = server.stop().unwrap();
    stopped.store().put(pod("a", "10.0.0.9"));
    stopped.store().remove("pods", "x", "b");
    source
        .until("all fail", |source| {
            source.states.values().all(|state| matches!(state, WatchState::Failing { failures: 2.., .. }))
        })
        .await;
    assert!(source.world == before && source.told == told && source.in_sync, "what is known stays");
    let listener = TcpListener::bind(stopped.address).unwrap();
    let server = stopped.start(listener).unwrap();
    source.settle(&server, "back").await;
    source.until("following", Source::follows_all).await;
    assert_eq!((source.told, source.lists()), (told + 2, lists), "nothing is read anew");
}

#[tokio::test]
async fn an_object_that_cannot_be_understood_is_named_and_holds_up_nothing() {
    let server = server(&apiserver::Options::default());
    fill(&server);
    let mut source = Source::start(&server);
    source.settle(&server, "the start").await;
    let before = source.world.clone();
    let mut bad_pod = pod("a", "10.0.0.1");
    bad_pod["status"]["podIP"] = json!({"v4": "10.0.0.7"});
    bad_pod["status"]["podIPs"] = json!("10.0.0.7");
    let mut bad_policy = policy("p");
    bad_policy["spec"]["ingress"][0]["from"] = json!("everybody");
    server.store().put(bad_pod.clone());
    server.store().put(bad_policy);
    server.store().put(pod("c", "10.0.0.3"));
    let strict = |source: &Source| {
        let policy = source.world.policy(&PolicyKey::new("x", "p"));
        policy.is_some_and(|policy| policy.ingress == Some(vec![]))
    };
    source.until("a policy that isolates and allows nothing", strict).await;
    assert!(
        source.problems.keys().any(|origin| origin.ends_with("/p")),
        "problems come before their changes"
    );
    source.until("two problems", |source| source.problems.len() == 2).await;
    source.until("the next pod", |source| source.world.pod(&PodKey::new("x", "c")).is_some()).await;
    let pods = ["/api/v1/namespaces/x/pods/a", "/apis/networking.k8s.io/v1/namespaces/x/networkpolicies/p"];
    assert_eq!(source.problems.keys().collect::<Vec<_>>(), pods);
    let key = PodKey::new("x", "a");
    assert_eq!(source.world.pod(&key), before.pod(&key), "a pod stays what it was: it stays isolated");
    assert!(!source.errors.iter().any(|error| error.contains("understood")), "{:?}", source.errors);

    // Also after everything was read anew.
    source.refresh.send(1).await.unwrap();
    source.until("a refresh", |source| source.refreshed == 1).await;
    assert_eq!(source.world.pod(&key), before.pod(&key));

    server.store().put(pod("a", "10.0.0.8"));
    server.store().put(policy("p"));
    source.settle(&server, "mended").await;
    source.until("no problems", |source| source.problems.is_empty()).await;
}

#[tokio::test]
async fn a_token_that_was_replaced_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "first").unwrap();
    let server = server(&apiserver::Options::default());
    fill(&server);
    server.require_token("first");
    let mut source = Source::start_with(&server, Some(file.clone()));
    source.settle(&server, "the start").await;
    server.require_token("second");
    server.faults().disturb(None, Disturbance::Cut);
    server.store().put(pod("a", "10.0.0.9"));
    source
        .until("refused", |source| {
            let refused = |state: &WatchState| matches!(state, WatchState::Failing { error, .. } if error.contains("401"));
            source.states.values().any(refused)
        })
        .await;
    std::fs::write(&file, "second").unwrap();
    source.settle(&server, "with the new token").await;
}

#[tokio::test]
async fn a_refresh_tells_all_that_was_there_when_it_was_asked_for() {
    let server = server(&apiserver::Options::default());
    fill(&server);
    let mut source = Source::start(&server);
    source.settle(&server, "the start").await;
    source.until("following", Source::follows_all).await;
    for number in 1..=5 {
        // A watch that says nothing must not keep it back.
        server.faults().disturb(None, Disturbance::Mute);
        server.store().put(pod("a", &format!("10.0.4.{number}")));
        let truth = server.store().world();
        source.refresh.send(number).await.unwrap();
        source.until("the refresh", |source| source.refreshed >= number).await;
        assert!(source.world == truth, "refresh {number}");
    }
}

#[tokio::test]
async fn random_changes_and_faults_end_in_what_the_server_has() {
    let options =
        apiserver::Options { bookmark_interval: Duration::from_millis(300), ..apiserver::Options::default() };
    let server = server(&options);
    let mut source = Source::start(&server);
    let seed = seed();
    let mut chaos = Chaos::new(seed);
    for round in 0..12 {
        chaos.round(&server, 12);
        source.settle(&server, &format!("NPM_SEED={seed}, round {round}")).await;
    }
    let done = chaos.done();
    println!("NPM_SEED={seed}: {done:?}, {:?} lists, {} failures", source.lists(), source.failures);
    assert!(done.changes >= 100 && done.faults >= 12, "{done:?}");
}
