//! The asking end of the status socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::report::{Report, Request};
use crate::reconcile::Freshness;

/// From one look to the next while waiting.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Asks the agent behind one socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers at {}", socket.display())]
    NoAgent {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke or took too long.
    #[error("the agent at {} does not answer", socket.display())]
    NoAnswer {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It answers something else than a status, as another version may.
    #[error("the answer of the agent at {} is not understood", socket.display())]
    Unreadable {
        /// The socket.
        socket: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// It says that it can't.
    #[error("the agent at {} refuses: {message}", socket.display())]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// What it says.
        message: String,
    },
}

/// Why waiting was given up.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// There was no answer to the last question.
    #[error("gave up after {waited:?}")]
    NoStatus {
        /// How long it was waited.
        waited: Duration,
        /// What came instead.
        #[source]
        source: ClientError,
    },
    /// Not everything is programmed.
    #[error("not ready after {waited:?}: {}", reasons.join("; "))]
    NotReady {
        /// How long it was waited.
        waited: Duration,
        /// Why.
        reasons: Vec<String>,
        /// The last answer.
        report: Box<Report>,
    },
}

impl Client {
    /// A client of the agent behind this socket. Nothing is asked yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks once; the answer must begin to come within `patience`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status(&self, freshness: Freshness, patience: Duration) -> Result<Report, ClientError> {
        let socket = || self.socket.clone();
        let mut stream = UnixStream::connect(&self.socket)
            .map_err(|source| ClientError::NoAgent { socket: socket(), source })?;
        let no_answer = |source| ClientError::NoAnswer { socket: socket(), source };
        let request = Request { refresh: freshness == Freshness::Refreshed };
        let unreadable = |source| ClientError::Unreadable { socket: socket(), source };
        let mut line = serde_json::to_vec(&request).map_err(unreadable)?;
        line.push(b'\n');
        // A timeout of zero would be none.
        let patience = patience.max(Duration::from_millis(1));
        stream.set_read_timeout(Some(patience)).map_err(no_answer)?;
        stream.set_write_timeout(Some(patience)).map_err(no_answer)?;
        stream.write_all(&line).map_err(no_answer)?;
        let mut answer = String::new();
        if BufReader::new(stream).read_line(&mut answer).map_err(no_answer)? == 0 {
            return Err(no_answer(io::ErrorKind::UnexpectedEof.into()));
        }
        // By hand, not as an untagged enum: that says only that nothing fits, not which field is missing.
        let answer: serde_json::Value = serde_json::from_str(&answer).map_err(unreadable)?;
        if let Some(message) = answer.get("error").and_then(serde_json::Value::as_str) {
            return Err(ClientError::Refused { socket: socket(), message: message.to_owned() });
        }
        serde_json::from_value(answer).map_err(unreadable)
    }

    /// Waits until every backend has programmed everything that the source can see now. An agent that is not there
    /// yet is waited for; one that is started again meanwhile is asked again.
    ///
    /// # Errors
    /// See [`WaitError`].
    pub fn wait(&self, patience: Duration) -> Result<Report, WaitError> {
        let start = Instant::now();
        let left = || patience.saturating_sub(start.elapsed());
        loop {
            let error = match self.status(Freshness::Refreshed, left()) {
                Ok(seen) => match self.wait_for(&seen, &left)? {
                    Some(report) => return Ok(report),
                    None => None,
                },
                Err(error) => Some(error),
            };
            if let Some(source) = error
                && left().is_zero()
            {
                return Err(WaitError::NoStatus { waited: patience, source });
            }
            std::thread::sleep(POLL_INTERVAL.min(left()));
        }
    }

    /// Waits until what was seen is programmed; `None`: the agent is another one.
    fn wait_for(&self, seen: &Report, left: &impl Fn() -> Duration) -> Result<Option<Report>, WaitError> {
        let wanted = seen.status.generation;
        let mut report = seen.clone();
        let start = Instant::now();
        loop {
            let reasons = report.status.reasons(wanted);
            if reasons.is_empty() {
                return Ok(Some(report));
            }
            if left().is_zero() {
                let waited = start.elapsed();
                return Err(WaitError::NotReady { waited, reasons, report: Box::new(report) });
            }
            std::thread::sleep(POLL_INTERVAL.min(left()));
            match self.status(Freshness::Now, left()) {
                Ok(next) if next.status.started == seen.status.started => report = next,
                // It has been started again, or has gone: begin anew.
                Ok(_) | Err(ClientError::NoAgent { .. }) => return Ok(None),
                // The deadline, mostly. What it said last is more than that it says nothing.
                Err(
                    ClientError::NoAnswer { .. }
                    | ClientError::Unreadable { .. }
                    | ClientError::Refused { .. },
                ) => {}
            }
        }
    }
}
