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
        Self::with(router(Served { asks, metrics: None, access: DebugAccess::default() }))
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
        self.get_from("localhost", path)
    }

    fn get_from(&self, host: &str, path: &str) -> (u16, String) {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let answer = exchange(self.connect(), &request);
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
    assert_eq!(server.get("/nothing").0, 404);
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
    let server = Server::with(router(Served {
        asks: agent.asks.clone(),
        metrics: Some(Arc::clone(&agent.metrics)),
        access: DebugAccess::default(),
    }));
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

/// A world with a secret in it, served.
fn secret() -> (Agent, &'static str) {
    let mut agent = Agent::start(&[], QUICK);
    agent.change([
        crate::reconcile::fake::pod("hidden", [10, 0, 0, 7], &[]),
        crate::reconcile::fake::policy("hidden", npm_policy::model::Selector::everything()),
    ]);
    agent.send(IN_SYNC);
    agent.seen();
    (agent, "hidden")
}

/// Everything that says something of policies, but the first page.
fn guarded() -> Vec<String> {
    let documents = Document::ALL.map(|document| document.path().to_owned());
    let pages = ["/policies", "/policy?name=x%2Fhidden", "/pods", "/sets", "/set", "/warnings"];
    let verdict = "/verdict?from=x/hidden&to=10.0.0.9&protocol=TCP&port=80";
    documents.into_iter().chain(pages.map(str::to_owned)).chain([verdict.to_owned()]).collect()
}

#[test]
fn what_policies_say_is_for_those_who_may_see_it() {
    let (agent, secret) = secret();
    let served = |access| Served { asks: agent.asks.clone(), metrics: None, access };
    let server = Server::with(router(served(DebugAccess::Loopback)));
    let (code, page) = server.get("/");
    assert!(code == 200 && page.contains("<h1>Node node-1</h1>"), "{page}");
    for path in guarded() {
        let (code, body) = server.get(&path);
        assert_eq!(code, 200, "{path}");
        assert!(
            body.contains(secret) || ["/set", "/sets", "/warnings", "/debug/sets"].contains(&path.as_str()),
            "{path}: {body}"
        );
        let (code, body) = server.get_from("evil.example", &path);
        assert_eq!((code, body.contains(secret)), (403, false), "{path}: {body}");
    }
    let (code, page) = server.get_from("evil.example", "/");
    assert!(code == 200 && page.contains("ready") && !page.contains("node-1"), "{page}");

    let closed = Server::with(router(served(DebugAccess::Nobody)));
    for path in guarded() {
        assert_eq!(closed.get(&path).0, 404, "{path}");
    }
    let (code, page) = closed.get("/");
    assert!(code == 200 && page.contains("switched off") && !page.contains("node-1"), "{page}");
    assert_eq!(closed.get("/readyz").0, 200);

    let open = Server::with(router(served(DebugAccess::Anyone)));
    for path in guarded() {
        assert_eq!(open.get_from("node-1", &path).0, 200, "{path}");
    }
}

/// The address decides, which a test on loopback can't have: so the router is asked by itself.
#[test]
fn a_client_that_is_not_on_loopback_is_shown_whether_the_agent_is_ready() {
    let (agent, secret) = secret();
    let served = Served { asks: agent.asks.clone(), metrics: None, access: DebugAccess::Loopback };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let router = router(served);
        let ask = async |from: Option<&str>, path: &str| {
            let mut request =
                Request::builder().uri(path).header("host", "localhost").body(Body::empty()).unwrap();
            if let Some(from) = from {
                request.extensions_mut().insert(access::Client { address: from.parse().unwrap() });
            }
            let answer = router.clone().oneshot(request).await.unwrap();
            let code = answer.status().as_u16();
            let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
            (code, String::from_utf8(body.to_vec()).unwrap())
        };
        for path in guarded() {
            assert_eq!(ask(Some("127.0.0.1"), &path).await.0, 200, "{path}");
            for from in [Some("10.0.0.9"), Some("fd00::9"), None] {
                let (code, body) = ask(from, &path).await;
                assert_eq!((code, body.contains(secret)), (403, false), "{path} from {from:?}: {body}");
            }
        }
        let (code, page) = ask(Some("10.0.0.9"), "/").await;
        assert!(code == 200 && page.contains("ready: everything"), "{page}");
        assert!(!page.contains(secret) && !page.contains("node-1") && page.len() < 2000, "{page}");
        assert_eq!(ask(Some("10.0.0.9"), "/readyz").await.0, 200);
        assert_eq!(ask(Some("10.0.0.9"), STYLE).await.0, 200);
    });
}

const STYLE: &str = page::STYLE_PATH;

#[test]
fn pages_forbid_what_they_do_not_need() {
    let (agent, _) = secret();
    let server = Server::start(agent.asks.clone());
    for path in ["/", "/policies", "/debug/world", STYLE] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let answer = exchange(server.connect(), &request);
        let (head, _) = answer.split_once("\r\n\r\n").unwrap();
        for wanted in [
            "content-security-policy: default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; \
             frame-ancestors 'none'",
            "x-content-type-options: nosniff",
            "x-frame-options: DENY",
            "referrer-policy: no-referrer",
            "cross-origin-resource-policy: same-origin",
        ] {
            assert!(head.lines().any(|line| line == wanted), "{path}: {wanted}: {head}");
        }
        let kept = head.lines().any(|line| line == "cache-control: no-store");
        assert_eq!(kept, path != STYLE, "{path}: {head}");
    }
    let (_, page) = server.get("/");
    assert!(!page.contains("<script") && !page.contains("style=") && !page.contains("http:"), "{page}");
}

/// Pages follow the world.
#[test]
fn a_page_shows_what_there_is_at_that_moment() {
    let (mut agent, _) = secret();
    let server = Server::start(agent.asks.clone());
    assert!(!server.get("/pods").1.contains("x/later"));
    agent.change([crate::reconcile::fake::pod("later", [10, 0, 0, 8], &[])]);
    agent.seen();
    assert!(server.get("/pods").1.contains("x/later"));
    let world: serde_json::Value = serde_json::from_str(&server.get("/debug/world").1).unwrap();
    assert_eq!(world["pods"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_loop_that_is_mute_is_said_to_be() {
    let (asks, answers) = mpsc::channel(1);
    let server = Server::start(asks);
    drop(answers);
    for path in ["/", "/pods", "/debug/world"] {
        let (code, body) = server.get(path);
        assert!(
            code == 503 && body.starts_with("no answer from the reconcile loop"),
            "{path}: {code} {body}"
        );
    }
}
