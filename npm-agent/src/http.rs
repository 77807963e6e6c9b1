//! The HTTP server: probes for the kubelet, metrics for Prometheus, pages for people, the debug API for tools.
//!
//! It is reachable by whoever reaches the node, so it reads only, bounds what a client can hold (connections, header
//! bytes, time, large bodies), shows what policies say to those only who may see it, and never stands in the way of
//! enforcement: a port that is taken is tried again, not an error.
//!
//! | path | answers |
//! | --- | --- |
//! | `/healthz` | 200 while the process does its work; a restart helps where it is not |
//! | `/readyz` | 200 when everything that was seen is enforced, else 503 with the reasons, a line each |
//! | `/node-metrics`, `/cluster-metrics` | what was counted and measured, in Prometheus' text format |
//! | `/` | the status page for those who may see it, else whether the agent is ready |
//! | `/policies`, `/pods`, `/sets`, `/verdict`, ... | the rest of the status page |
//! | `/debug/...`, `/npm/v1/debug/manager` | JSON for tools |

mod access;
mod debug;
mod page;
mod shelf;
mod view;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tower::ServiceExt;
use tracing::{debug, info, warn};

use self::access::Client;
use self::debug::Document;
use self::shelf::Shelf;
use self::view::Viewer;
use crate::backoff::Backoff;
use crate::config::value::DebugAccess;
use crate::metrics::{self, Metrics, Scope};
use crate::reconcile::{Ask, Freshness};
use crate::status::report::{Report, Status};

/// Where the process says that it is alive.
pub const HEALTH_PATH: &str = "/healthz";

/// Where it says that everything that was seen is enforced.
pub const READY_PATH: &str = "/readyz";

/// How many clients at once; more wait until one has gone.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may take to send the head of a request, and be silent between two.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);

/// How long a connection lasts at most, whatever is said on it.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);

/// How many bytes the head of a request may have. Bodies are not read.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// How long a probe waits for the loop: less than the second that a kubelet waits.
const PROBE_PATIENCE: Duration = Duration::from_millis(800);

/// For how long the loop may give no answer before the process counts as dead: the first compile of a large cluster
/// takes seconds on a busy machine.
const MAX_MUTE: Duration = Duration::from_secs(60);

/// How long to wait after `accept` failed: it does when the process is out of file descriptors, and at once again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How many answers to Prometheus are in memory at once, for each scope: those of a large cluster have megabytes.
const MAX_SCRAPES: usize = 4;

/// How many versions of each document of the debug API are in memory at once; the world of a large cluster has 10 MB.
const MAX_DOCUMENTS: usize = 2;

/// What is served, and to whom.
#[derive(Clone)]
pub struct Served {
    /// Where the loop is asked.
    pub asks: mpsc::Sender<Ask>,
    /// What Prometheus gets; `None`: it is refused.
    pub metrics: Option<Arc<Metrics>>,
    /// Who may see what policies say.
    pub access: DebugAccess,
}

/// Serves for ever.
pub async fn serve(address: SocketAddr, served: Served) {
    let listener = bind(address).await;
    accept(listener, router(served)).await;
}

/// Binds the address, as soon as it can be.
async fn bind(address: SocketAddr) -> TcpListener {
    let backoff = Backoff { first: Duration::from_secs(1), most: Duration::from_secs(30) };
    let mut failures = 0;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                info!(%address, "HTTP server");
                return listener;
            }
            Err(error) => {
                failures += 1;
                warn!(%address, %error, "no HTTP server: probes fail; policies are enforced all the same");
                sleep(backoff.delay(failures)).await;
            }
        }
    }
}

async fn accept(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let (router, client) = (router.clone(), Client { address: from.ip() });
                tokio::spawn(async move {
                    converse(stream, client, router).await;
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "HTTP server cannot accept");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, client: Client, router: Router) {
    let router = router.map_request(move |mut request: axum::http::Request<Incoming>| {
        request.extensions_mut().insert(client);
        request
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    match timeout(CONNECTION_LIFE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "HTTP client"),
        Err(_elapsed) => debug!("HTTP client stayed too long"),
    }
}

/// What the handlers share.
#[derive(Clone)]
struct Shared {
    asks: mpsc::Sender<Ask>,
    /// When the loop was last known to answer; at first the start.
    heard: Arc<Mutex<Instant>>,
    viewer: Arc<Viewer>,
    access: DebugAccess,
    /// How many pages are being written.
    pages: Arc<Semaphore>,
}

fn router(Served { asks, metrics, access }: Served) -> Router {
    let viewer = Arc::new(Viewer::new(asks.clone()));
    let (heard, pages) = (Arc::new(Mutex::new(Instant::now())), Arc::new(Semaphore::new(1)));
    let shared = Shared { asks, heard, viewer, access, pages };
    let open = Router::new().route(HEALTH_PATH, get(healthz)).route(READY_PATH, get(readyz));
    let open = open.route("/", get(root)).route(page::STYLE_PATH, get(page::style));
    let open = Scope::ALL.into_iter().fold(open, |router, scope| {
        let Some(metrics) = metrics.clone() else { return router };
        let shelf = Arc::new(Shelf::new(MAX_SCRAPES));
        router.route(scope.path(), get(move || scrape(metrics, scope, shelf)))
    });
    let guarded = Document::ALL.into_iter().fold(page::router(), |router, document| {
        let shelf = Arc::new(Shelf::new(MAX_DOCUMENTS));
        router.route(document.path(), get(move |State(shared): State<Shared>| show(shared, document, shelf)))
    });
    let guarded = guarded.route_layer(from_fn_with_state(access, access::guard));
    open.merge(guarded).with_state(shared)
}

/// Everything of one scope. It is gathered on another thread: on this one, probes are answered. Who has waited for another
/// one's answer shares the next: no answer is older than its question.
async fn scrape(metrics: Arc<Metrics>, scope: Scope, shelf: Arc<Shelf<Instant>>) -> Response {
    let asked = Instant::now();
    let render = move || (Instant::now(), metrics.render(scope));
    match shelf.body(move |began| *began >= asked, render).await {
        Some(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        // The process is ending.
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// A document of the debug API.
async fn show(shared: Shared, document: Document, shelf: Arc<Shelf<u64>>) -> Response {
    let Some((_, view)) = shared.viewer.look().await else { return mute(&shared) };
    let wanted = view.revision;
    let body = shelf.body(move |key| *key == wanted, move || (wanted, document.render(&view))).await;
    match body {
        Some(text) => secure([(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")], text),
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// An answer that no browser takes for something else, or shows within another page.
fn secure<const N: usize>(headers: [(axum::http::HeaderName, &'static str); N], body: Bytes) -> Response {
    let fixed = [
        ("content-security-policy", page::CONTENT_POLICY),
        ("cross-origin-resource-policy", "same-origin"),
        ("referrer-policy", "no-referrer"),
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
    ];
    (headers, fixed, Body::from(body)).into_response()
}

/// The status page, or as much of it as everybody may see.
async fn root(State(shared): State<Shared>, request: Request) -> Response {
    match access::admit(shared.access, request.extensions().get(), request.headers()) {
        Ok(()) => page::overview(shared).await,
        Err(refusal) => page::outside(shared.status().await, refusal),
    }
}

impl Shared {
    /// How things stand; `None`: the loop does not answer in time.
    async fn status(&self) -> Option<Status> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.asks.send(Ask::Status { freshness: Freshness::Now, reply }).await.ok()?;
            answer.await.ok()
        };
        let status = timeout(PROBE_PATIENCE, asked).await.ok().flatten()?;
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Some(status)
    }

    fn mute(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

async fn healthz(State(shared): State<Shared>) -> Response {
    if shared.status().await.is_some() {
        return text(StatusCode::OK, "ok\n".to_owned());
    }
    let mute = shared.mute();
    let code = if mute > MAX_MUTE { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    text(code, format!("no answer from the reconcile loop for {} s\n", mute.as_secs()))
}

async fn readyz(State(shared): State<Shared>) -> Response {
    let Some(status) = shared.status().await else { return mute(&shared) };
    let Report { ready, reasons, status: _ } = Report::from(status);
    match ready {
        true => text(StatusCode::OK, "ok\n".to_owned()),
        false => {
            text(StatusCode::SERVICE_UNAVAILABLE, reasons.iter().map(|line| format!("{line}\n")).collect())
        }
    }
}

/// The loop does not answer.
fn mute(shared: &Shared) -> Response {
    let mute = shared.mute().as_secs();
    let reason = format!("no answer from the reconcile loop for {mute} s\n");
    text(StatusCode::SERVICE_UNAVAILABLE, reason)
}

fn text(code: StatusCode, body: String) -> Response {
    let headers = [(CONTENT_TYPE, "text/plain; charset=utf-8"), (CACHE_CONTROL, "no-store")];
    (code, headers, body).into_response()
}

#[cfg(test)]
mod tests;
