//! The manifests source: plain Kubernetes YAML or JSON in files, read once or watched.
//!
//! ```text
//! inotify ─┐
//! refresh ─┼─► look: list, read what changed, convert ─► all objects ─► what differs from what was told ─► Event
//! timer ───┘
//! ```
//!
//! A file that can't be read, or is no good YAML any more, keeps its last good objects: breaking a file never opens a
//! pod. A file that is gone takes its objects along. What was never read whole since the start is told of with
//! [`Event::InSync`]: an earlier process may have known it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use npm_policy::world::Change;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

use self::store::{News, Store};
use super::{Completeness, Event, Problem};

mod store;
mod text;
mod tree;

/// How long it must be quiet after a change before the files are read: whoever writes them may not be done.
const QUIET: Duration = Duration::from_millis(100);

/// How long reading may be put off while it is never quiet.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often to look without a reason: watches miss what happens behind links and on network file systems.
const RESCAN: Duration = Duration::from_secs(30);

/// The same while something may still be going on, or while there is no watch.
const RESCAN_SOON: Duration = Duration::from_secs(2);

/// How long a refresh waits for files that are begun to be written.
const BEGUN_PATIENCE: Duration = Duration::from_secs(2);

/// What some files hold.
#[derive(Debug, Default)]
pub struct Reading {
    /// The objects, each once.
    pub changes: Vec<Change>,
    /// What is wrong, in the order of the files.
    pub problems: Vec<Problem>,
    /// Files and directories that could not be read at all; each has its problem.
    pub unread: Vec<PathBuf>,
}

/// Reads files, and the manifests (`*.yaml`, `*.yml`, `*.json`) in directories to any depth, once.
pub fn read(paths: &[PathBuf]) -> Reading {
    let mut store = Store::new(paths.to_vec());
    let News { changes, problems, look_again: _, is_begun: _ } = store.look();
    Reading { changes, problems: problems.into_values().flatten().collect(), unread: store.unread() }
}

/// Why the source ended.
#[derive(Debug, thiserror::Error)]
pub enum ManifestsError {
    /// The directory can't be listed at the start. (Later the last good objects stay.)
    #[error("cannot read the manifests in {directory}")]
    Directory {
        /// The directory.
        directory: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The thread that reads the files panicked.
    #[error("reading manifests failed")]
    Reader(#[from] tokio::task::JoinError),
}

/// Reads the manifests in a directory, tells what they hold, and what changes, until nobody listens any more.
///
/// # Errors
/// The directory can't be listed at the start, or a defect of ours.
pub async fn run(
    directory: PathBuf,
    events: mpsc::Sender<Event>,
    mut refresh: mpsc::Receiver<u64>,
) -> Result<(), ManifestsError> {
    std::fs::read_dir(&directory)
        .map_err(|source| ManifestsError::Directory { directory: directory.display().to_string(), source })?;
    // One place: whether anything happened is all that counts.
    let (happened, mut happenings) = mpsc::channel(1);
    let mut watch = Watch::start(&directory, &happened);
    let mut store = Store::new(vec![directory.clone()]);
    let mut refreshable = true;
    let mut asked: Vec<Asked> = Vec::new();
    let mut completeness = None;
    loop {
        let news;
        (store, news) = tokio::task::spawn_blocking(move || {
            let news = store.look();
            (store, news)
        })
        .await?;
        let problems = news.problems.into_iter();
        let mut told: Vec<Event> =
            problems.map(|(origin, problems)| Event::Problems { origin, problems }).collect();
        if !news.changes.is_empty() {
            told.push(Event::Changes(news.changes));
        }
        told.extend(watch.news(&directory));
        // Once all was read it stays so: what breaks later keeps its objects.
        if completeness != Some(Completeness::Complete) {
            let now = store.completeness();
            if completeness.as_ref() != Some(&now) {
                told.push(Event::InSync(now.clone()));
                completeness = Some(now);
            }
        }
        let now = Instant::now();
        let (answered, waiting) = asked.drain(..).partition(|asked| !news.is_begun || asked.latest <= now);
        asked = waiting;
        told.extend(answered.into_iter().map(|asked| Event::Refreshed(asked.number)));
        for event in told {
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
        let rescan = match (asked.is_empty(), news.look_again || !watch.works()) {
            (false, _) => QUIET,
            (true, true) => RESCAN_SOON,
            (true, false) => RESCAN,
        };
        tokio::select! {
            _ = happenings.recv() => settle(&mut happenings).await,
            () = tokio::time::sleep(rescan) => {
                watch = watch.kept_or_restarted(&directory, &happened);
            }
            () = events.closed() => return Ok(()),
            number = refresh.recv(), if refreshable => match number {
                Some(number) => {
                    let latest = Instant::now() + BEGUN_PATIENCE;
                    asked.push(Asked { number, latest });
                    while let Ok(number) = refresh.try_recv() {
                        asked.push(Asked { number, latest });
                    }
                }
                None => refreshable = false,
            },
        }
    }
}

/// A refresh that was asked for.
struct Asked {
    number: u64,
    /// When to answer at the latest, although a file is still empty.
    latest: Instant,
}

/// Waits until it is quiet, or patience ends.
async fn settle(happenings: &mut mpsc::Receiver<()>) {
    let end = Instant::now() + PATIENCE;
    while let Ok(Some(())) = tokio::time::timeout_at(end.min(Instant::now() + QUIET), happenings.recv()).await
    {
        if Instant::now() >= end {
            return;
        }
    }
}

/// A watch on a directory, if there could be one.
struct Watch {
    /// Kept for its drop, which ends the watch.
    watcher: Result<RecommendedWatcher, notify::Error>,
    /// Which directory it is on: the path may come to mean another.
    on: Option<(u64, u64)>,
    /// What was told of the watch itself.
    told: Vec<Problem>,
}

impl Watch {
    fn start(directory: &Path, happened: &mpsc::Sender<()>) -> Self {
        let happened = happened.clone();
        let on = identity(directory);
        let note = move |event: notify::Result<notify::Event>| {
            // Our own reading is an event too.
            let is_read = event
                .is_ok_and(|event| matches!(event.kind, notify::EventKind::Access(kind) if !is_write(kind)));
            if !is_read {
                // Full: it is known that something happened. Closed: nobody asks.
                let _ = happened.try_send(());
            }
        };
        let watcher = notify::recommended_watcher(note)
            .and_then(|mut watcher| watcher.watch(directory, RecursiveMode::Recursive).map(|()| watcher));
        Self { watcher, on, told: Vec::new() }
    }

    fn works(&self) -> bool {
        self.watcher.is_ok()
    }

    /// What to tell of the watch itself.
    fn news(&mut self, directory: &Path) -> Option<Event> {
        let origin = format!("watch of {}", directory.display());
        let problems = match &self.watcher {
            Ok(_) => Vec::new(),
            Err(error) => {
                let message =
                    format!("cannot watch: {error}; looking every {} s instead", RESCAN_SOON.as_secs());
                vec![Problem { object: directory.display().to_string(), message }]
            }
        };
        if problems == self.told {
            return None;
        }
        self.told.clone_from(&problems);
        Some(Event::Problems { origin, problems })
    }

    fn kept_or_restarted(self, directory: &Path, happened: &mpsc::Sender<()>) -> Self {
        if self.works() && self.on == identity(directory) {
            return self;
        }
        debug!(directory = %directory.display(), "watch restarted");
        Self { told: self.told, ..Self::start(directory, happened) }
    }
}

fn identity(directory: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(directory).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn is_write(kind: notify::event::AccessKind) -> bool {
    kind == notify::event::AccessKind::Close(notify::event::AccessMode::Write)
}
