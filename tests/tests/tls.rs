//! The Kubernetes source over TLS, as a cluster's API server speaks it: who it is has to be proven, and what the agent
//! has proves who the agent is.
#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use npm_agent::source::kube::{Credentials, Options, run};
use npm_agent::source::{Event, WatchState};
use npm_tests::apiserver::{self, Server};
use npm_tests::tls::{Authority, Identity, Proxy};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(60);

const LOOPBACK: &str = "127.0.0.1";

/// A server with a namespace, its authority, and the source's kubeconfig.
struct Stage {
    server: Server,
    directory: TempDir,
    authority: Authority,
}

impl Stage {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind((LOOPBACK, 0))?;
        let server = Server::start(listener, &apiserver::Options::default())?;
        server.store().put(json!({"kind": "Namespace", "metadata": {"name": "x"}}));
        let directory = tempfile::tempdir()?;
        let authority = Authority::new(directory.path(), "authority")?;
        Ok(Self { server, directory, authority })
    }

    fn proxy(
        &self,
        listener: TcpListener,
        identity: &Identity,
        clients: Option<&Authority>,
    ) -> Result<Proxy> {
        Proxy::start(listener, self.server.address(), identity, clients)
    }

    fn write_kubeconfig(
        &self,
        address: SocketAddr,
        authority: &Path,
        client: Option<&Identity>,
    ) -> Result<()> {
        let user = match client {
            Some(own) => json!({"client-certificate": own.certificate, "client-key": own.key}),
            None => json!({}),
        };
        let cluster = json!({"server": format!("https://{address}"), "certificate-authority": authority});
        let config: Value = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": user}],
        });
        // In one step: the source may be reading it.
        let (path, new) = (self.directory.path().join("kubeconfig"), self.directory.path().join("new"));
        std::fs::write(&new, config.to_string()).context("writing a kubeconfig")?;
        std::fs::rename(&new, &path).context("replacing a kubeconfig")
    }

    fn source(&self) -> Source {
        let path = self.directory.path().join("kubeconfig");
        let options =
            Options { credentials: Credentials::Kubeconfig(path), watch_timeout: Duration::from_secs(2) };
        let (sender, events) = mpsc::channel(64);
        let (refresh, refresh_end) = mpsc::channel(1);
        let task = tokio::spawn(async move { drop(run(options, sender, refresh_end).await) });
        Source { events, task, _refresh: refresh }
    }
}

struct Source {
    events: mpsc::Receiver<Event>,
    task: tokio::task::JoinHandle<()>,
    _refresh: mpsc::Sender<u64>,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a source came to.
#[derive(Debug, PartialEq)]
enum End {
    InSync,
    Failed(String),
}

impl Source {
    /// The next time that it knows everything, or that a watch fails; nothing may be told before.
    async fn next(&mut self) -> Result<End> {
        loop {
            let event = tokio::time::timeout(PATIENCE, self.events.recv()).await.context("nothing comes")?;
            match event.context("the source has ended")? {
                Event::InSync(_) => return Ok(End::InSync),
                Event::Watch { state: WatchState::Failing { error, .. }, .. } => {
                    return Ok(End::Failed(error));
                }
                Event::Changes(_) | Event::Problems { .. } | Event::Watch { .. } | Event::Refreshed(_) => {}
            }
        }
    }

    async fn until_in_sync(&mut self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            match self.next().await? {
                End::InSync => return Ok(()),
                End::Failed(error) if tokio::time::Instant::now() > deadline => {
                    bail!("never in sync: {error}")
                }
                End::Failed(_) => {}
            }
        }
    }
}

fn listener() -> Result<TcpListener> {
    TcpListener::bind((LOOPBACK, 0)).context("listening")
}

#[tokio::test]
async fn a_server_is_believed_that_the_authority_has_signed() -> Result<()> {
    let stage = Stage::new()?;
    let proxy = stage.proxy(listener()?, &stage.authority.sign("server", LOOPBACK)?, None)?;
    stage.write_kubeconfig(proxy.address(), stage.authority.certificate(), None)?;
    let end = stage.source().next().await?;
    ensure!(end == End::InSync, "{end:?}");
    Ok(())
}

#[tokio::test]
async fn nobody_else_is_believed() -> Result<()> {
    let stage = Stage::new()?;
    let other = Authority::new(stage.directory.path(), "other")?;
    // Another authority's word, and the right one's for another address.
    for identity in [other.sign("server", LOOPBACK)?, stage.authority.sign("elsewhere", "127.0.0.2")?] {
        let before = stage.server.requests();
        let proxy = stage.proxy(listener()?, &identity, None)?;
        stage.write_kubeconfig(proxy.address(), stage.authority.certificate(), None)?;
        match stage.source().next().await? {
            End::InSync => bail!("{identity:?} is believed"),
            End::Failed(error) => ensure!(error.contains("certificate"), "{error}"),
        }
        ensure!(stage.server.requests() == before, "something was asked of {identity:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_client_certificate_is_shown() -> Result<()> {
    let stage = Stage::new()?;
    let clients = Authority::new(stage.directory.path(), "clients")?;
    let proxy = stage.proxy(listener()?, &stage.authority.sign("server", LOOPBACK)?, Some(&clients))?;
    let authority = stage.authority.certificate();
    stage.write_kubeconfig(proxy.address(), authority, Some(&clients.sign("agent", LOOPBACK)?))?;
    let end = stage.source().next().await?;
    ensure!(end == End::InSync, "{end:?}");
    stage.write_kubeconfig(proxy.address(), authority, None)?;
    let end = stage.source().next().await?;
    ensure!(matches!(end, End::Failed(_)), "nobody need show anything: {end:?}");
    Ok(())
}

#[tokio::test]
async fn an_authority_that_was_replaced_is_read_again() -> Result<()> {
    let stage = Stage::new()?;
    let old = stage.authority.sign("server", LOOPBACK)?;
    let new = Authority::new(stage.directory.path(), "new")?;
    let proxy = stage.proxy(listener()?, &new.sign("server", LOOPBACK)?, None)?;
    stage.write_kubeconfig(proxy.address(), stage.authority.certificate(), None)?;
    let mut source = stage.source();
    let end = source.next().await?;
    ensure!(matches!(end, End::Failed(_)), "{old:?}: {end:?}");
    stage.write_kubeconfig(proxy.address(), new.certificate(), None)?;
    source.until_in_sync().await
}
