//! The HTTP server: probes for the kubelet, metrics for Prometheus.
//!
//! It is reachable by whoever reaches the node, so it reads only, bounds what a client can hold (connections, header
//! bytes, time), and never stands in the way of enforcement: a port that is taken is tried again, not an error.
//!
//! | path | answers |
//! | --- | --- |
//! | `/healthz` | 200 while the process does its work; a restart helps where it is not |
//! | `/readyz` | 200 when everything that was seen is enforced, else 503 with the reasons, a line each |
//! | `/node-metrics`, `/cluster-metrics` | what was counted and measured, in Prometheus' text format |

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
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

/// How many bytes the head of a request may have.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// How long a probe waits for the loop: less than the second that a kubelet waits.
const PROBE_PATIENCE: Duration = Duration::from_millis(800);

/// For how long the loop may give no answer before the process counts as dead: the first compile of a large cluster
/// takes seconds on a busy machine.
const MAX_MUTE: Duration = Duration::from_secs(60);

/// How long to wait after `accept` failed: it does when the process is out of file descriptors, and at once again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How many answers to Prometheus are written at once: those of a large cluster have megabytes. More wait.
const MAX_SCRAPES: usize = 2;

/// Serves for ever; without `metrics`, probes only.
pub async fn serve(address: SocketAddr, asks: mpsc::Sender<Ask>, metrics: Option<Arc<Metrics>>) {
    let listener = bind(address).await;
    accept(listener, router(asks, metrics)).await;
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
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    converse(stream, router).await;
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

async fn converse(stream: TcpStream, router: Router) {
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
}

fn router(asks: mpsc::Sender<Ask>, metrics: Option<Arc<Metrics>>) -> Router {
    let shared = Shared { asks, heard: Arc::new(Mutex::new(Instant::now())) };
    let probes = Router::new().route(HEALTH_PATH, get(healthz)).route(READY_PATH, get(readyz));
    let probes = probes.with_state(shared);
    let Some(metrics) = metrics else { return probes };
    let places = Arc::new(Semaphore::new(MAX_SCRAPES));
    Scope::ALL.into_iter().fold(probes, |router, scope| {
        let (metrics, places) = (Arc::clone(&metrics), Arc::clone(&places));
        router.route(scope.path(), get(move || scrape(metrics, scope, places)))
    })
}

/// Everything of one scope. It is gathered on another thread: on this one, probes are answered.
async fn scrape(metrics: Arc<Metrics>, scope: Scope, places: Arc<Semaphore>) -> Response {
    let rendered = async {
        let _place = places.acquire().await.ok()?;
        tokio::task::spawn_blocking(move || metrics.render(scope)).await.ok()
    };
    match rendered.await {
        Some(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        // The process is ending.
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

impl Shared {
    /// How things stand; `None`: the loop does not answer in time.
    async fn status(&self) -> Option<Status> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.asks.send(Ask { freshness: Freshness::Now, reply }).await.ok()?;
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
    let Some(status) = shared.status().await else {
        let mute = shared.mute().as_secs();
        let reason = format!("no answer from the reconcile loop for {mute} s\n");
        return text(StatusCode::SERVICE_UNAVAILABLE, reason);
    };
    let Report { ready, reasons, status: _ } = Report::from(status);
    match ready {
        true => text(StatusCode::OK, "ok\n".to_owned()),
        false => {
            text(StatusCode::SERVICE_UNAVAILABLE, reasons.iter().map(|line| format!("{line}\n")).collect())
        }
    }
}

fn text(code: StatusCode, body: String) -> Response {
    let headers = [(CONTENT_TYPE, "text/plain; charset=utf-8"), (CACHE_CONTROL, "no-store")];
    (code, headers, body).into_response()
}

#[cfg(test)]
mod tests;
