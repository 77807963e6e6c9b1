//! The loop between source and backends: drain, compile, publish.
//!
//! ```text
//! source ─ Event ─► Reconcile (owns the Compiler) ─ newest Goal ─► Worker (owns a backend, own thread)
//!                      ▲                                    Worker ...
//! status, pages ─ Ask ─┘
//! ```
//!
//! The loop never waits for a backend: it leaves the newest goal with each worker and goes on. Everything that is
//! queued when it comes back is one batch and at most one new goal, so a single event is programmed at once and a
//! burst is merged while the kernel is busy with the one before.

pub use crate::backoff;
mod watches;
pub mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use npm_policy::compile::{Compiler, Warning};
use npm_policy::goal::Goal;
use npm_policy::world::{Change, Objects, World};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, error, info, warn};

use self::watches::Watches;
use self::worker::{Target, Worker};
use crate::denied::Log;
use crate::escape::Board;
use crate::metrics::Metrics;
use crate::metrics::journal::Journal;
use crate::source::{Completeness, Event, Problem};
use crate::status::report::{EscapeStatus, ObjectProblem, SourceStatus, Status, WorldStatus};

/// How many events are taken in one go; more wait for the next. It bounds how long a question waits for its answer.
const MAX_BATCH: usize = 1024;

/// Whose state a status is about.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// The node.
    pub node: String,
    /// The agent's name.
    pub instance: String,
    /// How the configuration makes this agent differ from what the API promises.
    pub known_differences: Vec<String>,
}

/// A question to the loop. Where the answer goes, nobody may be listening any more.
#[derive(Debug)]
pub enum Ask {
    /// How things stand.
    Status {
        /// Whether the answer has to include everything that the source can see at the time of the question.
        freshness: Freshness,
        /// Where the answer goes.
        reply: oneshot::Sender<Status>,
    },
    /// What there is.
    Sight {
        /// The revision of the objects that the asker has.
        known: Option<u64>,
        /// Where the answer goes.
        reply: oneshot::Sender<Sight>,
    },
}

/// What the loop knows and wants, as pointers: a copy of it holds up the loop for no longer than it takes to count the
/// objects.
#[derive(Clone, Debug)]
pub struct Sight {
    /// How things stand.
    pub status: Status,
    /// Another number, another world or another goal.
    pub revision: u64,
    /// The objects; `None` where the asker has those of this revision.
    pub objects: Option<Objects>,
    /// The newest goal; an empty one before the source is in sync.
    pub goal: Goal,
}

/// How current an answer has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// The source re-reads everything first.
    Refreshed,
    /// As things stand.
    Now,
}

/// The ends that the loop holds.
#[derive(Debug)]
pub struct Channels {
    /// From the source.
    pub events: mpsc::Receiver<Event>,
    /// Refresh requests to the source, by number.
    pub refresh: mpsc::Sender<u64>,
    /// Questions.
    pub asks: mpsc::Receiver<Ask>,
}

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The source has gone; what is programmed stays so.
    SourceGone,
}

/// The loop's state.
pub struct Reconcile {
    identity: Identity,
    started: SystemTime,
    compiler: Compiler,
    workers: Vec<Worker>,
    sync: Sync,
    problems: BTreeMap<String, Vec<Problem>>,
    watches: Watches,
    warnings: BTreeSet<Warning>,
    published: Option<Target>,
    /// Counts the changes of world and goal.
    revision: u64,
    /// The number of the newest refresh request, and of the newest that the source has been told of.
    asked: u64,
    sent: u64,
    waiting: Vec<(u64, oneshot::Sender<Status>)>,
    /// Where it stands why traffic escapes judgement; it is told which addresses are to be protected.
    board: Option<Board>,
    /// Who wants to know which pod holds an address.
    log: Option<Log>,
    metrics: Arc<Metrics>,
    journal: Journal,
}

/// Whether the source has sent everything that was there when it started.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Sync {
    Waiting,
    /// All but this. What an earlier process enforces may be in there, so it stays as it is; where there is nothing of
    /// that kind, what was sent is stricter than nothing.
    Incomplete(Vec<String>),
    Done,
}

impl Reconcile {
    /// Makes a loop that programs `identity.node` through `workers`.
    pub fn new(identity: Identity, workers: Vec<Worker>, metrics: Arc<Metrics>) -> Self {
        Self {
            compiler: Compiler::new(identity.node.as_str()),
            identity,
            started: SystemTime::now(),
            workers,
            sync: Sync::Waiting,
            problems: BTreeMap::new(),
            watches: Watches::default(),
            warnings: BTreeSet::new(),
            published: None,
            revision: 0,
            asked: 0,
            sent: 0,
            waiting: Vec::new(),
            board: None,
            log: None,
            journal: Journal::new(Arc::clone(&metrics)),
            metrics,
        }
    }

    /// The same with this board in its status.
    pub fn with_board(self, board: Board) -> Self {
        Self { board: Some(board), ..self }
    }

    /// The same, telling this log which pods hold which addresses.
    pub fn with_log(self, log: Option<Log>) -> Self {
        Self { log, ..self }
    }

    /// The same with goals that name the addresses of all pods of the node: for backends that hold back others.
    pub fn with_locals(self) -> Self {
        Self { compiler: self.compiler.with_locals(), ..self }
    }

    /// Runs the loop on a thread of its own, which lasts until the source has gone or the process ends: compiling a
    /// large change must not hold up signals and sockets.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(self, channels: Channels) -> std::io::Result<oneshot::Receiver<Ended>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let (ended, outcome) = oneshot::channel();
        std::thread::Builder::new().name("reconcile".to_owned()).spawn(move || {
            let reason = runtime.block_on(self.run(channels));
            if ended.send(reason).is_err() {
                debug!(?reason, "nobody waits for the end of the loop");
            }
        })?;
        Ok(outcome)
    }

    /// Runs until the source has gone.
    pub async fn run(mut self, channels: Channels) -> Ended {
        let Channels { mut events, refresh, mut asks } = channels;
        let mut batch = Vec::with_capacity(MAX_BATCH);
        loop {
            tokio::select! {
                count = events.recv_many(&mut batch, MAX_BATCH) => {
                    if count == 0 {
                        return Ended::SourceGone;
                    }
                    self.take(batch.drain(..));
                }
                Some(ask) = asks.recv() => self.answer(ask),
                // The source takes one request at a time; those that come meanwhile are one request, the newest.
                permit = refresh.reserve(), if self.sent < self.asked => match permit {
                    Ok(permit) => {
                        permit.send(self.asked);
                        self.sent = self.asked;
                    }
                    Err(mpsc::error::SendError(())) => return Ended::SourceGone,
                },
            }
        }
    }

    /// Takes events that were queued, and publishes the goal that holds after all of them.
    fn take(&mut self, events: impl Iterator<Item = Event>) {
        let mut changes: Vec<Change> = Vec::new();
        let mut refreshed = None;
        for event in events {
            match event {
                Event::Changes(more) => changes.extend(more),
                Event::Problems { origin, problems } => self.replace_problems(origin, problems),
                Event::InSync(completeness) => {
                    // What came before was there at the start, what comes after is an event of the cluster.
                    self.compile(std::mem::take(&mut changes));
                    self.journal.in_sync();
                    self.in_sync(completeness);
                }
                Event::Watch { name, state } => self.watches.note(name, state),
                Event::Refreshed(number) => refreshed = refreshed.max(Some(number)),
            }
        }
        self.compile(changes);
        match self.sync {
            Sync::Waiting => {}
            Sync::Incomplete(_) | Sync::Done => {
                self.publish();
                self.metrics.counted(self.compiler.census(), self.compiler.world().size());
            }
        }
        let problems = self.problems.values().map(Vec::len).sum();
        self.metrics.complaints(problems, self.warnings.len());
        if let Some(number) = refreshed {
            let (answered, waiting) = self.waiting.drain(..).partition(|(asked, _)| *asked <= number);
            self.waiting = waiting;
            for (_, reply) in answered {
                self.reply(reply);
            }
        }
    }

    fn compile(&mut self, changes: Vec<Change>) {
        if !changes.is_empty() {
            debug!(objects = changes.len(), "changes");
            self.revision += 1;
            let addresses = self.log.is_some().then(|| addresses(&changes, self.compiler.world()));
            self.journal.take(&mut self.compiler, changes);
            if let (Some(log), Some(addresses)) = (&self.log, addresses) {
                let world = self.compiler.world();
                for address in addresses {
                    log.holder(address, world.holder(address).map(|pod| pod.key.clone()));
                }
            }
            self.replace_warnings();
        }
    }

    fn in_sync(&mut self, completeness: Completeness) {
        match completeness {
            Completeness::Complete => {
                info!("source is in sync");
                self.sync = Sync::Done;
                self.metrics.synced();
            }
            Completeness::Incomplete { unread } if self.sync != Sync::Done => {
                let held = self.workers.iter().any(Worker::inherits);
                let done = if held {
                    "what an earlier process programmed stays as it is until then"
                } else {
                    "only what could be read is enforced until then"
                };
                error!(unread = unread.join(", "), done, "not all that was there at the start can be read");
                self.sync = Sync::Incomplete(unread);
            }
            Completeness::Incomplete { unread } => {
                debug!(unread = unread.join(", "), "incomplete after it was complete: passed over");
            }
        }
    }

    /// Leaves the goal with the workers, if it is another than the one they have. Those that inherit get none before
    /// the source has read everything.
    fn publish(&mut self) {
        let is_complete = self.sync == Sync::Done;
        let mut goal = self.compiler.goal();
        if !is_complete {
            // Who is missing here may run all the same, and is not to be held back for that.
            goal.locals = None;
        }
        let generation = match &self.published {
            Some(published) if published.goal == goal => {
                // It may have been held back until now.
                for worker in self.workers.iter().filter(|worker| is_complete && worker.inherits()) {
                    worker.publish(published.clone());
                }
                self.journal.settled();
                return;
            }
            Some(published) => published.generation + 1,
            None => 1,
        };
        let Goal { sets, programs, subjects, locals } = &goal;
        debug!(
            generation,
            sets = sets.len(),
            policies = programs.len(),
            subjects = subjects.len(),
            "new goal"
        );
        if let Some(board) = &self.board {
            board.locals(locals.clone().unwrap_or_default());
            board.protect(subjects.values().flatten().copied().collect());
        }
        let target = Target { generation, goal };
        self.journal.published(generation);
        for worker in self.workers.iter().filter(|worker| is_complete || !worker.inherits()) {
            worker.publish(target.clone());
        }
        self.published = Some(target);
        self.revision += 1;
    }

    fn replace_problems(&mut self, origin: String, problems: Vec<Problem>) {
        let old = self.problems.remove(&origin).unwrap_or_default();
        self.journal.problems(self.compiler.world(), &origin, &old, &problems);
        for problem in problems.iter().filter(|problem| !old.contains(problem)) {
            warn!(
                origin,
                object = problem.object,
                problem = problem.message,
                "object taken strictly or not at all"
            );
        }
        for problem in old.iter().filter(|problem| !problems.contains(problem)) {
            info!(origin, object = problem.object, "problem is gone");
        }
        if !problems.is_empty() {
            self.problems.insert(origin, problems);
        }
    }

    fn replace_warnings(&mut self) {
        let warnings: BTreeSet<Warning> = self.compiler.warnings().into_iter().collect();
        for warning in warnings.difference(&self.warnings) {
            warn!(%warning, "cluster state to look at");
        }
        self.warnings = warnings;
    }

    fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Status { freshness: Freshness::Now, reply } => self.reply(reply),
            Ask::Status { freshness: Freshness::Refreshed, reply } => {
                self.asked += 1;
                // Who has gone would be kept for as long as the source does not answer.
                self.waiting.retain(|(_, reply)| !reply.is_closed());
                self.waiting.push((self.asked, reply));
            }
            Ask::Sight { known, reply } => {
                if reply.send(self.sight(known)).is_err() {
                    debug!("nobody waits for the sight any more");
                }
            }
        }
    }

    fn sight(&self, known: Option<u64>) -> Sight {
        let is_known = known == Some(self.revision);
        Sight {
            status: self.status(),
            revision: self.revision,
            objects: (!is_known).then(|| self.compiler.world().objects()),
            goal: self.published.as_ref().map(|published| published.goal.clone()).unwrap_or_default(),
        }
    }

    fn reply(&self, reply: oneshot::Sender<Status>) {
        if reply.send(self.status()).is_err() {
            debug!("nobody waits for the status any more");
        }
    }

    fn status(&self) -> Status {
        let size = self.compiler.world().size();
        let problems = self.problems.iter().flat_map(|(origin, problems)| {
            problems.iter().map(|Problem { object, message }| ObjectProblem {
                origin: origin.clone(),
                object: object.clone(),
                message: message.clone(),
            })
        });
        let published = self.published.as_ref();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.identity.node.clone(),
            instance: self.identity.instance.clone(),
            started: self.started,
            known_differences: self.identity.known_differences.clone(),
            source: SourceStatus {
                in_sync: self.sync == Sync::Done,
                unread: match &self.sync {
                    Sync::Incomplete(unread) => unread.clone(),
                    Sync::Waiting | Sync::Done => Vec::new(),
                },
                problems: problems.collect(),
                watches: self.watches.status(),
            },
            warnings: self.warnings.iter().map(ToString::to_string).collect(),
            world: WorldStatus {
                pods: size.pods,
                namespaces: size.namespaces,
                policies: size.policies,
                local_subjects: published.map_or(0, |published| published.goal.subjects.len()),
            },
            generation: published.map_or(0, |published| published.generation),
            backends: self.workers.iter().map(Worker::progress).collect(),
            escapes: self.board.iter().flat_map(Board::current).map(EscapeStatus::from).collect(),
        }
    }
}

/// The addresses whose holder these changes may change.
fn addresses(changes: &[Change], world: &World) -> BTreeSet<IpAddr> {
    let mut addresses = BTreeSet::new();
    for change in changes {
        match change {
            Change::Pod(key, pod) => {
                addresses.extend(world.pod(key).into_iter().flat_map(|pod| pod.addresses.iter()).copied());
                addresses.extend(pod.iter().flat_map(|pod| pod.addresses.iter()).copied());
            }
            Change::Namespace(..) | Change::Policy(..) => {}
        }
    }
    addresses
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
