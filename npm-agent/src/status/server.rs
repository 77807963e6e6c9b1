//! The agent's end of the status socket.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::MAX_REQUEST_BYTES;
use super::report::{Answer, Request};
use crate::lock::{Lock, LockError};
use crate::reconcile::{Ask, Freshness};

/// How long a client may take to say what it wants, and to read what it gets.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);

/// How long a refresh may take. A client that waits less long has gone by then.
const REFRESH_PATIENCE: Duration = Duration::from_secs(120);

/// How long to wait after `accept` failed: it does when the process is out of file descriptors, and at once again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound status socket. Dropping it removes the socket.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// Held as long as the socket is ours.
    _lock: Lock,
}

/// Why there is no status socket.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another agent has it.
    #[error("another agent serves {}", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
        /// What says so.
        #[source]
        source: LockError,
    },
    /// The system refused.
    #[error("cannot make the status socket {}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Server {
    /// Binds the socket, for its owner only, in place of one that a dead agent has left. Its directory is made if
    /// it is not there. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Nothing is bound then, and what another agent has bound is untouched.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let io_error = |source| ServerError::Io { path: path.to_owned(), source };
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(io_error)?;
        }
        let lock = Lock::take_patiently(beside(path, ".lock")).map_err(|source| match source {
            LockError::Held { .. } => ServerError::Taken { path: path.to_owned(), source },
            LockError::Io { source, .. } => io_error(source),
        })?;
        let listener = listen(path).map_err(io_error)?;
        Ok(Self { listener, path: path.to_owned(), _lock: lock })
    }

    /// Answers for ever, one task a client.
    pub async fn serve(self, asks: mpsc::Sender<Ask>) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(converse(stream, asks.clone()))),
                Err(error) => {
                    warn!(%error, "status socket cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!(%error, path = %self.path.display(), "status socket was not removed");
        }
    }
}

/// Binds under another name and renames: whoever finds the socket finds it with its permissions, and one that was
/// left behind is replaced in the same step.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let temporary = beside(path, ".new");
    match std::fs::remove_file(&temporary) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(&temporary)?;
    std::fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
    std::fs::rename(&temporary, path)?;
    Ok(listener)
}

/// The path with something behind its name.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// One request, one answer.
async fn converse(stream: UnixStream, asks: mpsc::Sender<Ask>) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(MAX_REQUEST_BYTES));
    let answer = match timeout(CLIENT_PATIENCE, reader.read_line(&mut line)).await {
        Ok(Ok(_)) => answer(&line, asks).await,
        Ok(Err(error)) => return debug!(%error, "status client cannot be read"),
        Err(_elapsed) => return debug!("status client says nothing"),
    };
    let mut text = match serde_json::to_vec(&answer) {
        Ok(text) => text,
        Err(error) => return warn!(%error, "status has no JSON form"),
    };
    text.push(b'\n');
    match timeout(CLIENT_PATIENCE, writer.write_all(&text)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "status client has gone"),
        Err(_elapsed) => debug!("status client does not read"),
    }
}

async fn answer(line: &str, asks: mpsc::Sender<Ask>) -> Answer {
    let error = |error: String| Answer::Error { error };
    let request: Request = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(cause) => return error(format!("request is not understood: {cause}")),
    };
    let freshness = if request.refresh { Freshness::Refreshed } else { Freshness::Now };
    let (reply, answer) = oneshot::channel();
    if asks.send(Ask::Status { freshness, reply }).await.is_err() {
        return error("the agent is stopping".to_owned());
    }
    match timeout(REFRESH_PATIENCE, answer).await {
        Ok(Ok(status)) => Answer::Status(Box::new(status.into())),
        Ok(Err(_dropped)) => error("the agent is stopping".to_owned()),
        Err(_elapsed) => error(format!("the source did not re-read in {REFRESH_PATIENCE:?}")),
    }
}
