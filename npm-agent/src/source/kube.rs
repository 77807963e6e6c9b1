//! The Kubernetes source: pods, namespaces and policies of the whole cluster, listed and watched.
//!
//! ```text
//!              ┌─ pods ────────┐  lines ─► trimmed objects ─► what differs from what was told ─► Event
//!  API server ─┼─ namespaces ──┤
//!              └─ policies ────┘  each on its own: what one can't do holds up no other
//! ```
//!
//! Everything is in sync when all three have been listed once. From then on what is known stays whatever happens to the
//! server: a watch that fails says so ([`Event::Watch`]) and tries again, for ever. After a gap everything is listed
//! anew, and what is not there any more is deleted.
//!
//! kube-rs makes the connection; lists and watches are read here. Its `watcher` retries streaming lists for ever where a
//! server has none, drops a line that was cut short and goes on behind it, and asks for pages at the price of a whole
//! typed pod each: all three would lose updates or memory that we promise to keep.

mod client;
mod failure;
mod known;
mod lines;
mod pools;
mod watch;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch as channel};
use tokio::task::JoinSet;

pub use self::client::{Credentials, CredentialsError};
use self::watch::Watch;
use super::convert::Kind;
use super::{Completeness, Event};

/// What is watched.
const KINDS: [Kind; 3] = [Kind::Namespace, Kind::NetworkPolicy, Kind::Pod];

/// How to watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How to reach the API server.
    pub credentials: Credentials,
    /// How long one watch lasts before it is asked for anew (up to a quarter longer, at random). A server that is silent
    /// for so long and 5 s more is taken for dead.
    pub watch_timeout: Duration,
}

/// Why the source ended.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    /// There are no credentials at the start. (Later the watches try again.)
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// A watch panicked.
    #[error("a watch failed")]
    Watch(#[from] tokio::task::JoinError),
}

/// A watch has read everything that was there when it was asked for the refresh with this number.
#[derive(Clone, Copy, Debug)]
struct Listed {
    kind: Kind,
    wanted: u64,
}

/// What a kind's watch is called.
fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Pod => "pods",
        Kind::Namespace => "namespaces",
        Kind::NetworkPolicy => "networkpolicies",
    }
}

/// Watches until nobody listens any more.
///
/// # Errors
/// There are no credentials at the start, or a defect of ours.
pub async fn run(
    options: Options,
    events: mpsc::Sender<Event>,
    mut refresh: mpsc::Receiver<u64>,
) -> Result<(), KubeError> {
    client::Client::open(&options.credentials).await?;
    let options = Arc::new(options);
    let (wanted, wanted_end) = channel::channel(0);
    let (listed, mut lists) = mpsc::channel(KINDS.len());
    let mut watches = JoinSet::new();
    for kind in KINDS {
        let ends = (events.clone(), wanted_end.clone(), listed.clone());
        watches.spawn(Watch::new(kind, Arc::clone(&options), ends.0, ends.1, ends.2).run());
    }
    let mut done: BTreeMap<Kind, u64> = BTreeMap::new();
    let (mut in_sync, mut answered, mut refreshable) = (false, 0, true);
    loop {
        tokio::select! {
            Some(Listed { kind, wanted }) = lists.recv() => {
                // What was listed was sent before this.
                done.insert(kind, wanted);
            }
            number = refresh.recv(), if refreshable => match number {
                Some(number) => drop(wanted.send(number)),
                None => refreshable = false,
            },
            Some(ended) = watches.join_next() => ended?,
            () = events.closed() => return Ok(()),
        }
        if done.len() < KINDS.len() {
            continue;
        }
        let mut told = Vec::new();
        if !std::mem::replace(&mut in_sync, true) {
            told.push(Event::InSync(Completeness::Complete));
        }
        let number = done.values().copied().min().unwrap_or_default();
        if number > answered {
            answered = number;
            told.push(Event::Refreshed(number));
        }
        for event in told {
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
    }
}
