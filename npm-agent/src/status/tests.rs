//! The status socket from both ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use npm_policy::model::Selector;
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::client::{ClientError, WaitError};
use super::server::{Server, ServerError};
use super::*;
use crate::reconcile::fake::{Agent, Fake, IN_SYNC, PATIENCE, QUICK, namespace, pod, policy};
use crate::reconcile::worker::Timing;
use crate::reconcile::{Ask, Freshness};
use crate::source::Event;

/// An agent with its socket. The server ends when the process does.
struct Served {
    directory: TempDir,
    fake: Fake,
    events: mpsc::Sender<Event>,
}

impl Served {
    /// Serves an agent whose source answers every refresh at once.
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let fake = Fake::default();
        let agent = Agent::start(&[&fake], QUICK);
        serve(directory.path().join("run/agent.sock"), agent.asks.clone());
        let events = agent.events.clone();
        std::thread::spawn(move || {
            let Agent { mut refresh, events, .. } = agent;
            while let Some(number) = refresh.blocking_recv() {
                if events.blocking_send(Event::Refreshed(number)).is_err() {
                    break;
                }
            }
        });
        Self { directory, fake, events }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("run/agent.sock")
    }

    fn client(&self) -> Client {
        Client::new(self.socket())
    }

    fn send(&self, event: Event) {
        self.events.blocking_send(event).unwrap();
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn serve(path: PathBuf, asks: mpsc::Sender<Ask>) {
    let (bound, ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        runtime().block_on(async {
            let server = Server::bind(&path).unwrap();
            bound.send(()).unwrap();
            server.serve(asks).await;
        });
    });
    ready.recv_timeout(PATIENCE).unwrap();
}

fn bind(path: &Path) -> Result<Server, ServerError> {
    runtime().block_on(async { Server::bind(path) })
}

#[test]
fn the_answer_is_the_loops_state() {
    let served = Served::start();
    served.send(Event::Changes(vec![namespace("x"), pod("a", [10, 0, 0, 1], &[])]));
    let report = served.client().status(Freshness::Refreshed, PATIENCE).unwrap();
    assert!(!report.ready);
    assert_eq!(report.reasons, ["the source is not in sync", "fake: goal 0 of 1 is programmed"]);
    assert_eq!((report.status.world.pods, report.status.generation), (1, 0));
    assert_eq!(report.status.known_differences, ["a difference"]);

    served.send(Event::Changes(vec![policy("all", Selector::everything())]));
    served.send(IN_SYNC);
    let report = served.client().wait(PATIENCE).unwrap();
    assert!(report.ready, "{:?}", report.reasons);
    let backend = &report.status.backends[0];
    assert_eq!((backend.name.as_str(), backend.generation, report.status.generation), ("fake", 1, 1));
    assert_eq!((backend.size.policies, backend.size.rules, report.status.world.local_subjects), (1, 1, 1));
    let last = backend.last_apply.unwrap();
    assert!(last.at >= report.status.started && last.set_writes == 1);

    let text = serde_json::to_string(&report).unwrap();
    let again: report::Report = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_string(&again).unwrap(), text);
}

#[test]
fn waiting_ends_when_what_was_there_is_programmed_and_not_before() {
    let served = Served::start();
    served.send(IN_SYNC);
    served.client().wait(PATIENCE).unwrap();
    served.fake.hold();
    served.send(Event::Changes(vec![
        namespace("x"),
        pod("a", [10, 0, 0, 1], &[]),
        policy("all", Selector::everything()),
    ]));
    let patience = Duration::from_secs(2);
    match served.client().wait(patience).unwrap_err() {
        WaitError::NotReady { reasons, .. } => assert_eq!(reasons, ["fake: goal 1 of 2 is programmed"]),
        other @ WaitError::NoStatus { .. } => panic!("{other}"),
    }
    served.fake.release();
    let report = served.client().wait(PATIENCE).unwrap();
    assert_eq!(report.status.backends[0].generation, 2);
}

#[test]
fn waiting_for_a_failing_backend_says_why() {
    let served = Served::start();
    served.fake.fail(usize::MAX);
    served.send(IN_SYNC);
    let error = served.client().wait(Duration::from_secs(2)).unwrap_err().to_string();
    assert!(error.contains("fake: goal 0 of 1 is programmed"), "{error}");
    assert!(error.contains("last: apply: fake failed with exit status: 4: planted"), "{error}");
}

#[test]
fn a_read_back_that_hangs_is_not_ready() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::default();
    let timing = Timing { verify_interval: Duration::from_millis(100), ..QUICK };
    let agent = Agent::start(&[&fake], timing);
    let socket = directory.path().join("agent.sock");
    serve(socket.clone(), agent.asks.clone());
    let client = Client::new(socket);
    let ask = || client.status(Freshness::Now, PATIENCE).unwrap();
    let until_ready = |ready: bool| {
        let start = Instant::now();
        loop {
            let report = ask();
            if report.ready == ready {
                return report;
            }
            assert!(start.elapsed() < PATIENCE, "{:?}", report.reasons);
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    agent.send(IN_SYNC);
    until_ready(true);
    fake.hold();
    until_ready(false);
    let start = Instant::now();
    loop {
        let reasons = ask().reasons;
        let says = |text: &str| reasons.iter().any(|reason| reason.starts_with(text));
        if says("fake: not read back for ") && says("fake: one attempt has been under way for ") {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{reasons:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    fake.release();
    assert_eq!(until_ready(true).reasons, Vec::<String>::new());
}

#[test]
fn waiting_waits_for_an_agent_too() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let client = Client::new(&socket);
    assert!(matches!(client.status(Freshness::Now, PATIENCE), Err(ClientError::NoAgent { .. })));
    let start = Instant::now();
    let error = client.wait(Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, WaitError::NoStatus { source: ClientError::NoAgent { .. }, .. }), "{error}");
    assert!(start.elapsed() >= Duration::from_millis(100));

    let waiting = std::thread::spawn(move || client.wait(PATIENCE));
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.send(IN_SYNC);
    serve(socket, agent.asks.clone());
    let number = agent.refresh.blocking_recv().unwrap();
    agent.send(Event::Refreshed(number));
    assert_eq!(waiting.join().unwrap().unwrap().status.generation, 1);
}

#[test]
fn a_source_that_does_not_answer_is_not_waited_for_longer_than_asked() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let fake = Fake::default();
    let agent = Agent::start(&[&fake], QUICK);
    agent.send(IN_SYNC);
    serve(socket.clone(), agent.asks.clone());
    let start = Instant::now();
    let error = Client::new(socket).wait(Duration::from_secs(1)).unwrap_err();
    assert!(matches!(error, WaitError::NoStatus { source: ClientError::NoAnswer { .. }, .. }), "{error}");
    assert!(start.elapsed() < PATIENCE);
}

/// Answers the first request with this status, and takes the others without a word.
fn falls_silent(path: &Path, report: &report::Report) {
    let listener = UnixListener::bind(path).unwrap();
    let answer = serde_json::to_string(report).unwrap() + "\n";
    std::thread::spawn(move || {
        let mut silent = Vec::new();
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            if number == 0 {
                stream.write_all(answer.as_bytes()).unwrap();
            }
            silent.push(stream);
        }
    });
}

#[test]
fn an_agent_that_falls_silent_is_reported_with_what_it_said_last() {
    let served = Served::start();
    let report = served.client().status(Freshness::Now, PATIENCE).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    falls_silent(&socket, &report);
    match Client::new(socket).wait(Duration::from_secs(2)).unwrap_err() {
        WaitError::NotReady { reasons, .. } => assert_eq!(reasons, report.reasons),
        other @ WaitError::NoStatus { .. } => panic!("{other}"),
    }
}

#[test]
fn an_agent_that_always_starts_anew_is_not_asked_without_a_pause() {
    let served = Served::start();
    let mut report = served.client().status(Freshness::Now, PATIENCE).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = String::new();
            BufReader::new(&stream).read_line(&mut request).unwrap();
            count.fetch_add(1, Ordering::Relaxed);
            report.status.started += Duration::from_secs(1);
            stream.write_all((serde_json::to_string(&report).unwrap() + "\n").as_bytes()).unwrap();
        }
    });
    Client::new(socket).wait(Duration::from_secs(1)).unwrap_err();
    // A pause of 20 ms before each question.
    assert!((2..=55).contains(&asked.load(Ordering::Relaxed)), "{asked:?}");
}

#[test]
fn a_bad_request_is_refused_and_harms_nobody() {
    let served = Served::start();
    for request in ["\n", "{\"refresh\": 1}\n", "{\"reboot\": true}\n", &"x".repeat(100_000)] {
        let mut stream = UnixStream::connect(served.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The agent stops reading a request that is too long.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = String::new();
        if stream.read_to_string(&mut answer).is_ok() {
            assert!(answer.starts_with("{\"error\":\"request is not understood: "), "{answer}");
        }
    }
    let mut silent = UnixStream::connect(served.socket()).unwrap();
    served.client().status(Freshness::Now, PATIENCE).unwrap();
    silent.write_all(b"{}\n").unwrap();
    let mut answer = String::new();
    silent.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("{\"ready\":false,"), "{answer}");
}

#[test]
fn the_socket_is_its_owners_only() {
    let served = Served::start();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&served.socket()), 0o600);
    assert_eq!(mode(served.socket().parent().unwrap()), 0o755);
}

#[test]
fn a_second_agent_is_refused_and_a_dead_ones_socket_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    // What a killed agent leaves behind: a socket that nobody listens to, and an unlocked lock file.
    drop(UnixListener::bind(&path).unwrap());
    std::fs::write(directory.path().join("agent.sock.lock"), "").unwrap();

    let runtime = runtime();
    let first = runtime.block_on(async { Server::bind(&path) }).unwrap();
    let error = bind(&path).unwrap_err();
    assert!(matches!(error, ServerError::Taken { .. }), "{error}");
    UnixStream::connect(&path).unwrap();
    drop(first);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
    let _ = bind(&path).unwrap();
}

#[test]
fn a_path_that_no_socket_can_have_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let error = bind(&directory.path().join("s".repeat(120))).unwrap_err();
    assert!(matches!(error, ServerError::Io { .. }), "{error}");
    let error = bind(Path::new("/proc/no/such/agent.sock")).unwrap_err();
    assert!(matches!(error, ServerError::Io { .. }), "{error}");
}
