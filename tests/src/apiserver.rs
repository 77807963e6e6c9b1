//! A Kubernetes API server for tests: real HTTP, real list and watch semantics, and faults where a test wants them.
//!
//! It keeps objects in memory and validates nothing. What it has of the API is what kube clients and kubectl use: get,
//! list (limit, continue, selectors), watch (versions, bookmarks, initial events, 410), create, update, patch, delete,
//! discovery. Its listeners stay in the network namespace that they were made in, so one server serves a whole lab.

mod body;
mod discovery;
pub mod faults;
mod patch;
mod query;
pub mod resource;
pub mod sent;
pub mod store;
mod watch;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use body::Written;
use faults::{Fault, Faults, On};
use patch::Patch;
use query::Query;
use resource::{Resource, Target, target};
use sent::Sent;
use store::{Key, Store, StoreError, Stored};
use watch::{Start, Subject};

/// How the server is.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether a watch may begin with all objects (the feature WatchList): without it, such a request is answered with
    /// 422, as servers before 1.32 do.
    pub streaming_lists: bool,
    /// The time between two bookmarks.
    pub bookmark_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { streaming_lists: true, bookmark_interval: Duration::from_secs(60) }
    }
}

/// What requests have in common.
#[derive(Debug)]
struct Cluster {
    store: Store,
    faults: Faults,
    streaming_lists: AtomicBool,
    bookmark_interval: Duration,
    /// The bearer token that requests must have; `None`: any or none will do.
    token: Mutex<Option<String>>,
    /// Pages that are left of lists, by token.
    pages: Mutex<BTreeMap<String, Pages>>,
    tokens: AtomicU64,
    requests: AtomicU64,
    sent: Sent,
}

#[derive(Debug)]
struct Pages {
    left: Vec<Arc<Stored>>,
    version: u64,
}

/// A running server; it ends when dropped.
#[derive(Debug)]
pub struct Server {
    cluster: Arc<Cluster>,
    address: SocketAddr,
    /// Dropped first: the thread ends on it.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Serves on a listener, on a thread of its own.
    ///
    /// # Errors
    /// The system refuses.
    pub fn start(listener: TcpListener, options: &Options) -> Result<Self> {
        let cluster = Arc::new(Cluster {
            store: Store::default(),
            faults: Faults::default(),
            streaming_lists: AtomicBool::new(options.streaming_lists),
            bookmark_interval: options.bookmark_interval,
            token: Mutex::default(),
            pages: Mutex::default(),
            tokens: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            sent: Sent::default(),
        });
        Self::serve(listener, cluster)
    }

    fn serve(listener: TcpListener, cluster: Arc<Cluster>) -> Result<Self> {
        let address = listener.local_addr().context("asking a listener for its address")?;
        listener.set_nonblocking(true).context("preparing a listener")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let shared = Arc::clone(&cluster);
        let thread = std::thread::Builder::new().name("apiserver".to_owned()).spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                tokio::select! {
                    () = accept(listener, shared) => {}
                    _ = stopped => {}
                }
            });
            // Connections are tasks of the runtime, which ends here.
            runtime.shutdown_background();
        })?;
        Ok(Self { cluster, address, stop: Some(stop), thread: Some(thread) })
    }

    /// Ends the server, with every connection; what it holds can be served again.
    ///
    /// # Errors
    /// The thread panicked.
    pub fn stop(mut self) -> Result<Stopped> {
        self.end();
        Ok(Stopped { cluster: Arc::clone(&self.cluster), address: self.address })
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the API server's thread panicked");
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its objects.
    pub fn store(&self) -> &Store {
        &self.cluster.store
    }

    /// Its faults.
    pub fn faults(&self) -> &Faults {
        &self.cluster.faults
    }

    /// What its watches have sent of changes.
    pub fn sent(&self) -> &Sent {
        &self.cluster.sent
    }

    /// Asks for this bearer token from now on.
    pub fn require_token(&self, token: &str) {
        let mut required = self.cluster.token.lock().unwrap_or_else(PoisonError::into_inner);
        *required = Some(token.to_owned());
    }

    /// Answers streaming lists from now on.
    pub fn serve_streaming_lists(&self) {
        self.cluster.streaming_lists.store(true, Ordering::Relaxed);
    }

    /// Refuses streaming lists from now on.
    pub fn refuse_streaming_lists(&self) {
        self.cluster.streaming_lists.store(false, Ordering::Relaxed);
    }

    /// How many requests there were.
    pub fn requests(&self) -> u64 {
        self.cluster.requests.load(Ordering::Relaxed)
    }

    /// A kubeconfig for it; with `token_file`, the token in that file.
    pub fn kubeconfig(&self, token_file: Option<&std::path::Path>) -> String {
        let user = match token_file {
            Some(path) => json!({"tokenFile": path}),
            None => json!({}),
        };
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": user}],
        })
        .to_string()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// A server that is down, with what it holds.
#[derive(Debug)]
pub struct Stopped {
    cluster: Arc<Cluster>,
    /// Where it listened.
    pub address: SocketAddr,
}

impl Stopped {
    /// Its objects.
    pub fn store(&self) -> &Store {
        &self.cluster.store
    }

    /// Serves them again.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start(self, listener: TcpListener) -> Result<Server> {
        Server::serve(listener, self.cluster)
    }
}

async fn accept(listener: tokio::net::TcpListener, cluster: Arc<Cluster>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let cluster = Arc::clone(&cluster);
        tokio::spawn(async move {
            let service = service_fn(|request| answer(Arc::clone(&cluster), request));
            // A client that goes, and a connection that a fault closes, are what tests are about.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// The error that closes a connection without an answer.
#[derive(Debug)]
struct Hangup;

impl std::fmt::Display for Hangup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("planted")
    }
}

impl std::error::Error for Hangup {}

async fn answer(cluster: Arc<Cluster>, request: Request<Incoming>) -> Result<Response<Written>, Hangup> {
    cluster.requests.fetch_add(1, Ordering::Relaxed);
    let query = Query::parse(request.uri().query());
    let path = request.uri().path().to_owned();
    let target = target(&path);
    let mut cut = None;
    if let Some(Target::Collection(resource, _)) = &target {
        let on = match (query.is_true("watch"), query.is_true("sendInitialEvents")) {
            (true, true) => On::StreamingList,
            (true, false) => On::Watch,
            (false, _) => On::List,
        };
        match cluster.faults.take(on, resource.plural) {
            None => {}
            Some(Fault::Delay(delay)) => tokio::time::sleep(delay).await,
            Some(Fault::Hang) => std::future::pending::<()>().await,
            Some(Fault::Reset) => return Err(Hangup),
            Some(Fault::Garbage) => return Ok(respond(StatusCode::OK, body::whole("\u{1}garbage {\n"))),
            Some(Fault::Truncate(bytes)) => cut = Some(bytes),
            Some(Fault::Refuse { code, retry_after }) => {
                let mut response = refusal(code, "planted");
                if let Some(seconds) = retry_after {
                    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
                }
                return Ok(response);
            }
        }
    }
    let token = cluster.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let shown = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    if token.is_some_and(|token| shown != Some(format!("Bearer {token}").as_str())) {
        return Ok(refusal(401, "Unauthorized"));
    }
    let response = match target {
        Some(Target::Collection(resource, namespace)) if request.method() == Method::GET => {
            match query.is_true("watch") {
                true => start_watch(&cluster, Subject { resource, namespace, query }),
                false => list(&cluster, resource, namespace.as_deref(), &query),
            }
        }
        Some(target) => edit(&cluster, target, request).await,
        None => match discovery::document(&path) {
            Some(document) => found(StatusCode::OK, &document),
            None => refusal(404, "no such path"),
        },
    };
    let Some(bytes) = cut else { return Ok(response) };
    let (head, mut body) = response.into_parts();
    // What comes first is enough to be cut.
    let first = match body.frame().await {
        Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
        Some(Err(_)) | None => bytes::Bytes::new(),
    };
    Ok(Response::from_parts(head, body::broken_off(first.slice(..bytes.min(first.len())))))
}

fn start_watch(cluster: &Arc<Cluster>, subject: Subject) -> Response<Written> {
    let query = &subject.query;
    let start = if query.is_true("sendInitialEvents") {
        if !cluster.streaming_lists.load(Ordering::Relaxed) {
            return refusal(422, "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch");
        }
        if query.get("resourceVersionMatch") != Some("NotOlderThan") {
            return refusal(422, "resourceVersionMatch: Forbidden: must be NotOlderThan");
        }
        Start::Everything { marked: query.is_true("allowWatchBookmarks") }
    } else {
        match query.get("resourceVersion") {
            None | Some("0") => Start::Everything { marked: false },
            Some(version) => match version.parse() {
                Ok(version) if cluster.store.since(version).is_some() => Start::After(version),
                Ok(_) => return refusal(410, "too old resource version"),
                Err(_) => return refusal(400, "Invalid resource version"),
            },
        }
    };
    let (writer, body) = body::written();
    tokio::spawn(watch::run(Arc::clone(cluster), subject, start, writer));
    respond(StatusCode::OK, body)
}

fn list(
    cluster: &Cluster,
    resource: &'static Resource,
    namespace: Option<&str>,
    query: &Query,
) -> Response<Written> {
    let mut pages = cluster.pages.lock().unwrap_or_else(PoisonError::into_inner);
    let Pages { mut left, version } = match query.get("continue") {
        Some(token) => match pages.remove(token) {
            Some(pages) => pages,
            None => return refusal(410, "The provided continue parameter is too old"),
        },
        None => {
            let (objects, version) = cluster.store.list(resource, namespace);
            let left = objects.into_iter().filter(|object| query.selects(&object.value)).collect();
            Pages { left, version }
        }
    };
    let limit =
        query.number("limit").and_then(|limit| usize::try_from(limit).ok()).filter(|limit| *limit > 0);
    let rest = left.split_off(limit.unwrap_or(usize::MAX).min(left.len()));
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if !rest.is_empty() {
        let token = format!("page {}+", cluster.tokens.fetch_add(1, Ordering::Relaxed));
        metadata["continue"] = json!(token);
        pages.insert(token, Pages { left: rest, version });
    }
    let mut text = format!(
        r#"{{"kind":"{}List","apiVersion":"{}","metadata":{metadata},"items":["#,
        resource.kind,
        resource.api_version()
    );
    for (index, object) in left.iter().enumerate() {
        text.extend([if index > 0 { "," } else { "" }, object.text()]);
    }
    text.push_str("]}");
    respond(StatusCode::OK, body::whole(text))
}

/// Everything but lists and watches.
async fn edit(cluster: &Cluster, target: Target, request: Request<Incoming>) -> Response<Written> {
    let method = request.method().clone();
    let content_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or_default().to_owned();
    let Ok(body) = request.into_body().collect().await else { return refusal(400, "the body broke off") };
    let body = body.to_bytes();
    let value = || -> Option<Value> {
        if content_type.contains("yaml") {
            let text = std::str::from_utf8(&body).ok()?;
            return serde_saphyr::from_str(text).ok();
        }
        serde_json::from_slice(&body).ok()
    };
    let store = &cluster.store;
    let outcome = match (&method, target) {
        (&Method::GET, Target::Object(resource, namespace, name)) => {
            store.get(&(resource, namespace, name)).ok_or(StoreError::NotFound)
        }
        (&Method::POST, Target::Collection(resource, namespace)) => {
            let Some(mut value) = value() else { return refusal(400, "no object") };
            if let Some(namespace) = namespace {
                value["metadata"]["namespace"] = json!(namespace);
            }
            match store::key(resource, &value) {
                Some(key) => {
                    let created = store.create(key, value);
                    return created.map_or_else(failed, |stored| found(StatusCode::CREATED, &stored.value));
                }
                None => Err(StoreError::Invalid),
            }
        }
        (&Method::PUT, Target::Object(resource, namespace, name)) => {
            let Some(value) = value() else { return refusal(400, "no object") };
            store.update(&(resource, namespace, name), |_| Some(value))
        }
        (&Method::PATCH, Target::Object(resource, namespace, name)) => {
            let Some(kind) = Patch::of(&content_type) else { return refusal(415, "no such patch") };
            let Some(patch) = value() else { return refusal(400, "no patch") };
            let key: Key = (resource, namespace, name);
            let applies = content_type.contains("apply-patch") && store.get(&key).is_none();
            if applies { store.create(key, patch) } else { store.update(&key, |old| kind.apply(old, &patch)) }
        }
        (&Method::DELETE, Target::Object(resource, namespace, name)) => {
            match store.delete(&(resource, namespace, name)) {
                Ok(_) => {
                    let done = json!({"kind": "Status", "apiVersion": "v1", "status": "Success"});
                    return found(StatusCode::OK, &done);
                }
                Err(error) => Err(error),
            }
        }
        (&Method::DELETE, Target::Collection(resource, namespace)) => {
            let (objects, _) = store.list(resource, namespace.as_deref());
            for object in objects {
                if let Some(key) = store::key(resource, &object.value) {
                    // Another client may have been faster.
                    let _ = store.delete(&key);
                }
            }
            return found(
                StatusCode::OK,
                &json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}),
            );
        }
        (_, Target::Collection(..) | Target::Object(..)) => return refusal(405, "no such method here"),
    };
    outcome.map_or_else(failed, |stored| found(StatusCode::OK, &stored.value))
}

fn failed(error: StoreError) -> Response<Written> {
    match error {
        StoreError::NotFound => refusal(404, "not found"),
        StoreError::AlreadyExists => refusal(409, "already exists"),
        StoreError::Conflict => refusal(409, "the object has been modified"),
        StoreError::Invalid => refusal(422, "invalid"),
    }
}

/// A `Status` of a failure.
fn status(code: u16, message: &str) -> Value {
    let reason = match code {
        400 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        409 if message.starts_with("already") => "AlreadyExists",
        409 => "Conflict",
        410 => "Expired",
        422 => "Invalid",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
        "message": message,
    })
}

fn refusal(code: u16, message: &str) -> Response<Written> {
    let http = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    found(http, &status(code, message))
}

fn found(code: StatusCode, value: &Value) -> Response<Written> {
    respond(code, body::whole(value.to_string()))
}

fn respond(code: StatusCode, body: Written) -> Response<Written> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
