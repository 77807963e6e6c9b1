//! How the source's watches stand, as they have told.

use std::collections::BTreeMap;
use std::time::Instant;

use tracing::{debug, info, warn};

use crate::source::WatchState;
use crate::status::report::WatchStatus;

/// The watches, by name.
#[derive(Debug, Default)]
pub(super) struct Watches(BTreeMap<&'static str, Watching>);

#[derive(Debug)]
struct Watching {
    state: WatchState,
    /// Since when changes do not come as they happen.
    unwatched_since: Option<Instant>,
    failures: u64,
    lists: u64,
}

impl Watches {
    /// Notes how a watch stands.
    pub(super) fn note(&mut self, name: &'static str, state: WatchState) {
        let watching = self.0.entry(name).or_insert_with(|| Watching {
            state: WatchState::Listing,
            unwatched_since: Some(Instant::now()),
            failures: 0,
            lists: 0,
        });
        match &state {
            WatchState::Following { lists } => {
                watching.lists = *lists;
                if let (WatchState::Failing { .. }, Some(since)) = (&watching.state, watching.unwatched_since)
                {
                    info!(watch = name, unwatched_s = since.elapsed().as_secs(), "watched again");
                }
                watching.unwatched_since = None;
            }
            WatchState::Listing => {
                watching.unwatched_since.get_or_insert_with(Instant::now);
            }
            WatchState::Failing { error, failures } => {
                watching.failures += 1;
                watching.unwatched_since.get_or_insert_with(Instant::now);
                // One failure is what a load balancer does to a long connection.
                match failures {
                    0 | 1 => debug!(watch = name, error, "watch failed, trying again"),
                    _ if watching.state == state => {}
                    _ => warn!(watch = name, error, failures, "not watched; what is known stays in force"),
                }
            }
        }
        watching.state = state;
    }

    /// As of now.
    pub(super) fn status(&self) -> Vec<WatchStatus> {
        let status = |(name, watching): (&&'static str, &Watching)| {
            let Watching { state, unwatched_since, failures, lists } = watching;
            let last_error = match state {
                WatchState::Failing { error, failures: _ } => Some(error.clone()),
                WatchState::Listing | WatchState::Following { .. } => None,
            };
            let unwatched = unwatched_since.map(|since| since.elapsed()).unwrap_or_default();
            WatchStatus {
                name: (*name).to_owned(),
                following: matches!(state, WatchState::Following { .. }),
                unwatched_ms: u64::try_from(unwatched.as_millis()).unwrap_or(u64::MAX),
                failures: *failures,
                lists: *lists,
                last_error,
            }
        };
        self.0.iter().map(status).collect()
    }
}
