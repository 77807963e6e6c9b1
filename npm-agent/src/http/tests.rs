//! The server over real sockets, with a loop that answers or does not.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream as Client};

use super::*;
use crate::reconcile::fake::{Agent, Fake, IN_SYNC, PATIENCE, QUICK};
use crate::source::{Event, WatchState};

/// A server on loopback that ends with the test.
struct Server {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Server {
    fn start(asks: mpsc::Sender<Ask>) -> Self {
        Self::with(router(asks, None))
    }

    fn with(router: Router) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, router) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, _stop: stop }
    }

    fn connect(&self) -> Client {
        let client = Client::connect(self.address).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    /// The code and the body.
    fn get(&self, path: &str) -> (u16, String) {
        let answer =
            exchange(self.connect(), &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }
}

fn exchange(mut client: Client, request: &str) -> String {
    // A server that has read enough may close before it was sent all.
    let _ = client.write_all(request.as_bytes());
    let mut answer = String::new();
    let _ = client.read_to_string(&mut answer);
    answer
}

#[test]
fn ready_means_enforced_and_healthy_means_alive() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    let server = Server::start(agent.asks.clone());
    let waiting = "the source is not in sync\nfake: goal 0 of 1 is programmed\n";
    assert_eq!(server.get("/readyz"), (503, waiting.to_owned()));
    assert_eq!(server.get("/healthz"), (200, "ok\n".to_owned()));

    let state = WatchState::Failing { error: "refused".into(), failures: 2 };
    agent.send(Event::Watch { name: "pods", state: state.clone() });
    agent.seen();
    let (code, reasons) = server.get("/readyz");
    assert_eq!((code, reasons.lines().nth(1)), (503, Some("pods can't be read: refused")));

    agent.send(IN_SYNC);
    agent.settle(0);
    assert_eq!(server.get("/readyz"), (200, "ok\n".to_owned()), "a server may be away for a while");

    fake.fail(1000);
    agent.change([crate::reconcile::fake::policy("p", npm_policy::model::Selector::everything())]);
    agent.change([crate::reconcile::fake::pod("a", [10, 0, 0, 1], &[])]);
    agent.wait(0, |status| status.consecutive_failures > 0);
    assert_eq!(server.get("/readyz").0, 503);
    assert_eq!(server.get("/healthz").0, 200, "a restart would not help");
    assert_eq!(server.get("/").0, 404);
}

#[test]
fn a_loop_that_does_not_answer_is_told_from_one_that_does() {
    let (asks, _nobody_reads) = mpsc::channel(1);
    let server = Server::start(asks);
    assert_eq!(server.get("/readyz").0, 503);
    let (code, body) = server.get("/healthz");
    assert_eq!(code, 200, "not for so long yet");
    assert!(body.starts_with("no answer from the reconcile loop for "), "{body}");
}

#[test]
fn metrics_are_at_their_paths_unless_refused() {
    let agent = Agent::start(&[], QUICK);
    let server = Server::with(router(agent.asks.clone(), Some(Arc::clone(&agent.metrics))));
    agent.metrics.synced();
    for (scope, mark) in [(Scope::Node, "\nnpm_node_in_sync 1\n"), (Scope::Cluster, "")] {
        let (code, body) = server.get(scope.path());
        assert_eq!(code, 200, "{scope:?}");
        assert!(body.contains(mark), "{body}");
    }
    let request = "GET /node-metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let answer = exchange(server.connect(), request).to_lowercase();
    assert!(answer.contains("\r\ncontent-type: text/plain; version=0.0.4\r\n"), "{answer}");

    let refusing = Server::start(agent.asks.clone());
    for scope in Scope::ALL {
        assert_eq!(refusing.get(scope.path()).0, 404, "{scope:?}");
    }
    assert_eq!(refusing.get("/healthz").0, 200);
}

#[test]
fn clients_are_bounded() {
    let agent = Agent::start(&[], QUICK);
    let server = Server::start(agent.asks.clone());
    let long = format!("GET /healthz HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(2 * MAX_HEAD_BYTES));
    assert!(exchange(server.connect(), &long).starts_with("HTTP/1.1 431 "));
    assert!(exchange(server.connect(), "nonsense\r\n\r\n").starts_with("HTTP/1.1 400 "));
    assert!(
        exchange(server.connect(), "POST /healthz HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.1 405 ")
    );

    // All places taken by clients that say nothing: they are sent away.
    let silent: Vec<Client> = (0..MAX_CONNECTIONS).map(|_| server.connect()).collect();
    let start = Instant::now();
    assert_eq!(server.get("/healthz").0, 200);
    assert!(start.elapsed() >= HEAD_PATIENCE / 2, "there was a place all the same");
    drop(silent);

    let client = server.connect();
    client.shutdown(Shutdown::Both).unwrap();
    assert_eq!(server.get("/healthz").0, 200);
}

#[test]
fn a_port_that_is_taken_is_waited_for() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = other.local_addr().unwrap();
        let waiting = tokio::spawn(bind(address));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(other);
        let listener = timeout(PATIENCE, waiting).await.unwrap().unwrap();
        assert_eq!(listener.local_addr().unwrap(), address);
    });
}
