//! One HTTP connection to an API server at a time: credentials, TLS, time limits, and answers as they come.
//!
//! kube-rs reads kubeconfigs and in-cluster credentials, refreshes tokens and makes the TLS connection. What it would do
//! above that is done here another way: it retries by itself where nobody sees it, reads answers without a time limit,
//! logs bodies that it can't decode, and drops a watch's line that was cut short without a word.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, RETRY_AFTER, USER_AGENT};
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::Config;
use kube::client::{Body, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::time::timeout;
use tower::{BoxError, ServiceBuilder};

use super::wire::ApiError;

/// How long making a TCP connection may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// After so long without a packet the peer is asked whether it is still there, and again every so often.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// So many times; then the connection is dead.
const KEEPALIVE_RETRIES: u32 = 3;

/// How much of a refusal is read.
const MAX_REFUSAL_BYTES: usize = 64 << 10;

/// The longest pause that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Where credentials come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// The pod's service account, and the address that every container finds in its environment.
    InCluster,
    /// The current context of a kubeconfig file.
    Kubeconfig(PathBuf),
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// Not in a cluster, or without a service account.
    #[error("cannot use the pod's service account (outside a cluster --kubeconfig names the credentials)")]
    InCluster(#[from] kube::config::InClusterError),
    /// The kubeconfig can't be used.
    #[error("cannot use the kubeconfig {}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<kube::config::KubeconfigError>,
    },
    /// TLS or the way to authenticate can't be set up.
    #[error("cannot use the credentials")]
    Setup(#[source] Box<kube::Error>),
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("no answer")]
    Unanswered(#[source] Box<kube::Error>),
    #[error("no answer for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the API server answers {code}: {}", said(.error))]
    Refused { code: StatusCode, error: ApiError, retry_after: Option<Duration> },
    #[error("the connection broke")]
    Broken(#[source] kube::Error),
    #[error("the answer is longer than {} MiB", .0 >> 20)]
    TooLong(usize),
}

fn said(error: &ApiError) -> &str {
    if error.message.is_empty() { "no message" } else { &error.message }
}

/// A client with credentials as they were when it was made.
pub(super) struct Client(kube::Client);

impl Client {
    /// Reads the credentials. Nothing is sent yet.
    pub(super) async fn open(credentials: &Credentials) -> Result<Self, CredentialsError> {
        let config = match credentials {
            Credentials::InCluster => Config::incluster()?,
            Credentials::Kubeconfig(path) => {
                let unusable =
                    |source| CredentialsError::Kubeconfig { path: path.clone(), source: Box::new(source) };
                let kubeconfig = Kubeconfig::read_from(path).map_err(unusable)?;
                let options = KubeConfigOptions::default();
                Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(unusable)?
            }
        };
        Self::of(&config).map_err(|source| CredentialsError::Setup(Box::new(source)))
    }

    fn of(config: &Config) -> Result<Self, kube::Error> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_PATIENCE));
        // A watch on a quiet cluster is silent for a minute: only so a dead peer is told from that.
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE));
        tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        let tls = config.rustls_https_connector_with_connector(tcp)?;
        let http = hyper_util::client::legacy::Builder::new(TokioExecutor::new()).build(tls);
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer()?)
            .layer(config.extra_headers_layer()?)
            .map_err(BoxError::from)
            .service(http);
        Ok(Self(kube::Client::new(service, config.default_namespace.clone())))
    }

    /// Asks for a path with its query, and gives the answer as soon as it begins.
    pub(super) async fn get(&self, path: &str, patience: Duration) -> Result<Answer, RequestError> {
        let request = Request::get(path)
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, concat!("npm-agent/", env!("CARGO_PKG_VERSION")))
            .body(Body::empty())
            .map_err(|error| RequestError::Unanswered(Box::new(kube::Error::HttpError(error))))?;
        let response = match timeout(patience, self.0.send(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(RequestError::Unanswered(Box::new(error))),
            Err(_elapsed) => return Err(RequestError::Silent(patience)),
        };
        let code = response.status();
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after = retry_after.and_then(|value| value.trim().parse().ok()).map(Duration::from_secs);
        let mut answer = Answer { body: response.into_body() };
        if code.is_success() {
            return Ok(answer);
        }
        // A refusal is told by its code also where its body can't be read.
        let body = answer.whole(MAX_REFUSAL_BYTES, patience).await.unwrap_or_default();
        let error = serde_json::from_slice(&body).unwrap_or_default();
        let retry_after = retry_after.map(|after| after.min(MAX_RETRY_AFTER));
        Err(RequestError::Refused { code, error, retry_after })
    }
}

/// An answer that is still coming.
pub(super) struct Answer {
    body: Body,
}

impl Answer {
    /// The next part; `None`: it ended as it should.
    pub(super) async fn part(&mut self, patience: Duration) -> Result<Option<Bytes>, RequestError> {
        loop {
            return match timeout(patience, self.body.frame()).await {
                Ok(None) => Ok(None),
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(part) => Ok(Some(part)),
                    Err(_trailers) => continue,
                },
                Ok(Some(Err(error))) => Err(RequestError::Broken(error)),
                Err(_elapsed) => Err(RequestError::Silent(patience)),
            };
        }
    }

    /// All of it, which must come without a longer pause than this.
    pub(super) async fn whole(&mut self, max_bytes: usize, pause: Duration) -> Result<Vec<u8>, RequestError> {
        let mut whole = Vec::new();
        while let Some(part) = self.part(pause).await? {
            if whole.len() + part.len() > max_bytes {
                return Err(RequestError::TooLong(max_bytes));
            }
            whole.extend_from_slice(&part);
        }
        Ok(whole)
    }
}
