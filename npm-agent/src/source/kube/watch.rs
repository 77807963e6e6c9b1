//! One watch: everything there is, then every change, for ever, whatever the server does.
//!
//! ```text
//!           ┌──── 410, a version from the past, a refresh ────┐
//!           ▼                                                 │
//!  list: a watch that begins with all objects; ──────────► follow ──► ended or broken: on from the last version
//!        pages, where there is none or it failed              ▲              │
//!                                                             └──────────────┘
//! ```
//!
//! A line that can't be understood ends the watch, which begins again at the last version that was understood: so the
//! server sends it again. If that does not help, everything is listed. What is known stays all the time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info};

use super::client::{Answer, Client, RequestError};
use super::failure::{End, Failure};
use super::known::{Known, News, version};
use super::lines::{Fill, Lines};
use super::wire::{self, Line};
use super::{Listed, Options, name};
use crate::backoff::{Backoff, spread};
use crate::source::convert::Kind;
use crate::source::{Event, WatchState};

/// How many objects a page of a list has: with 20 KiB an object, 2 MiB. A page is in memory as a whole.
const PAGE_OBJECTS: usize = 100;

/// The longest page.
const MAX_PAGE_BYTES: usize = 128 << 20;

/// How many changes wait to be told while the first list is read.
const MAX_UNTOLD: usize = 256;

/// How long an answer may take to begin, and a list to go on.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a watch may be silent that had bookmarks: servers send one a minute.
const BOOKMARK_PATIENCE: Duration = Duration::from_secs(150);

/// How much longer than agreed a watch may be silent, at most.
const OVERTIME: Duration = Duration::from_secs(5);

/// A watch that has lasted so long works.
const WORKS: Duration = Duration::from_secs(1);

/// One watch.
pub(super) struct Watch {
    kind: Kind,
    options: Arc<Options>,
    events: mpsc::Sender<Event>,
    /// The number of the newest refresh that was asked for.
    wanted: watch::Receiver<u64>,
    listed: mpsc::Sender<Listed>,
    known: Known,
    client: Option<Client>,
    /// Everything up to this version is known; `None`: everything is to be read.
    version: Option<String>,
    /// How often all was read.
    lists: u64,
    /// Failures since something worked.
    failures: u32,
    /// Whether the next list is by pages, because a streaming one failed: a server may not have them and not say so.
    needs_pages: bool,
}

/// A watch that was begun.
struct Stream {
    lines: Lines,
    begun: Instant,
    /// How long the server was told to keep it up.
    limit: Duration,
    has_bookmarks: bool,
}

impl Watch {
    pub(super) fn new(
        kind: Kind,
        options: Arc<Options>,
        events: mpsc::Sender<Event>,
        wanted: watch::Receiver<u64>,
        listed: mpsc::Sender<Listed>,
    ) -> Self {
        Self {
            kind,
            options,
            events,
            wanted,
            listed,
            known: Known::new(kind),
            client: None,
            version: None,
            lists: 0,
            failures: 0,
            needs_pages: false,
        }
    }

    /// Watches until nobody listens any more.
    pub(super) async fn run(mut self) {
        let backoff = Backoff { first: Duration::from_millis(200), most: Duration::from_secs(30) };
        loop {
            let failure = match self.attempt().await {
                Ok(()) => continue,
                Err(End::Unheard) => return,
                Err(End::Failed(failure)) => failure,
            };
            self.failures = self.failures.saturating_add(1);
            if failure.needs_list(self.failures) {
                self.version = None;
            }
            // The next attempt reads credentials anew: they may be what has changed.
            self.client = None;
            let pause = backoff.delay(self.failures).max(failure.pause_asked_for());
            let state = WatchState::Failing { error: failure.text(), failures: self.failures };
            if self.tell_state(state).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.events.closed() => return,
            }
        }
    }

    /// Lists and follows, or goes on, until the watch ends as it should.
    async fn attempt(&mut self) -> Result<(), End> {
        let Some(version) = &self.version else { return self.list().await };
        let query = format!("resourceVersion={}", encoded(version));
        let stream = self.begin(&query).await?;
        self.follow(stream).await
    }

    /// Reads everything, and follows where that was the beginning of a watch.
    async fn list(&mut self) -> Result<(), End> {
        let wanted = *self.wanted.borrow_and_update();
        debug!(watch = name(self.kind), wanted, "listing");
        if self.failures == 0 {
            self.tell_state(WatchState::Listing).await?;
        }
        self.known.begin_list();
        let mut news = News::default();
        let outcome = match std::mem::replace(&mut self.needs_pages, false) {
            true => self.pages(&mut news).await.map(|version| (version, None)),
            false => self.streamed_or_pages(&mut news).await,
        };
        let (at, stream) = match outcome {
            Ok(listed) => listed,
            Err(end) => {
                // What was read is true all the same.
                self.tell(news).await?;
                return Err(end);
            }
        };
        self.known.end_list(version(Some(&at)), &mut news);
        self.tell(news).await?;
        info!(watch = name(self.kind), objects = self.known.len(), "listed");
        self.version = Some(at);
        self.lists += 1;
        self.needs_pages = false;
        self.listed.send(Listed { kind: self.kind, wanted }).await.map_err(|_gone| End::Unheard)?;
        match stream {
            Some(stream) => self.follow(stream).await,
            None => Ok(()),
        }
    }

    async fn streamed_or_pages(&mut self, news: &mut News) -> Result<(String, Option<Stream>), End> {
        self.needs_pages = true;
        match self.streamed(news).await {
            Err(End::Failed(failure)) if failure.has_no_streaming_lists() => {
                debug!(watch = name(self.kind), reason = failure.text(), "no streaming lists");
                self.pages(news).await.map(|version| (version, None))
            }
            outcome => outcome.map(|(version, stream)| (version, Some(stream))),
        }
    }

    /// Reads everything as the beginning of a watch: the server need not hold it all for us at once.
    async fn streamed(&mut self, news: &mut News) -> Result<(String, Stream), End> {
        let mut stream = self.begin("sendInitialEvents=true&resourceVersionMatch=NotOlderThan").await?;
        let patience = self.patience();
        loop {
            match stream.lines.fill(patience).await? {
                Fill::More => {}
                Fill::Ended | Fill::Cut => return Err(Failure::Cut.into()),
                Fill::Silent => return Err(RequestError::Silent(patience).into()),
            }
            while let Some(text) = stream.lines.next() {
                match wire::line(self.kind, text)? {
                    Line::Applied(item) => self.known.listed(item, news),
                    Line::Deleted(item) => self.known.deleted(&item, news),
                    Line::Bookmark { version, ends_list: true } => return Ok((version, stream)),
                    Line::Bookmark { version: _, ends_list: false } => {}
                    Line::Error(error) => return Err(Failure::Event(error).into()),
                }
            }
            self.tell_much(news).await?;
        }
    }

    /// Reads everything page by page.
    async fn pages(&mut self, news: &mut News) -> Result<String, End> {
        let patience = self.patience();
        let mut path = format!("{}?limit={PAGE_OBJECTS}", path(self.kind));
        loop {
            let mut answer = self.client().await?.get(&path, patience).await?;
            let body = answer.whole(MAX_PAGE_BYTES, patience).await?;
            let (metadata, items) = wire::page(self.kind, &body)?;
            drop(body);
            items.into_iter().for_each(|item| self.known.listed(item, news));
            self.tell_much(news).await?;
            match metadata.next.filter(|next| !next.is_empty()) {
                Some(next) => {
                    path =
                        format!("{}?limit={PAGE_OBJECTS}&continue={}", self::path(self.kind), encoded(&next));
                }
                None => {
                    let version = metadata.resource_version.filter(|version| !version.is_empty());
                    return version.ok_or(Failure::NoVersion.into());
                }
            }
        }
    }

    /// Takes what comes until the watch ends.
    async fn follow(&mut self, mut stream: Stream) -> Result<(), End> {
        let Stream { lines, begun, limit, has_bookmarks } = &mut stream;
        let deadline = *begun + *limit + OVERTIME.min(self.options.watch_timeout / 3);
        let mut is_quiet = true;
        if self.failures == 0 {
            self.tell_state(WatchState::Following { lists: self.lists }).await?;
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let patience = match (self.failures, *has_bookmarks) {
                (0, false) => left,
                (0, true) => left.min(BOOKMARK_PATIENCE),
                (_, _) => WORKS,
            };
            let fill = tokio::select! {
                fill = lines.fill(patience) => fill?,
                _ = self.wanted.changed() => {
                    self.version = None;
                    return Ok(());
                }
                () = self.events.closed() => return Err(End::Unheard),
            };
            let mut news = News::default();
            let mut outcome = Ok(());
            while let Some(text) = lines.next() {
                is_quiet = false;
                let line = wire::line(self.kind, text).map_err(Failure::from);
                outcome = line.and_then(|line| self.take(line, has_bookmarks, &mut news));
                if outcome.is_err() {
                    break;
                }
            }
            self.tell(news).await?;
            outcome?;
            match fill {
                Fill::More => {}
                Fill::Silent if self.failures > 0 => {}
                Fill::Silent => return Err(RequestError::Silent(patience).into()),
                Fill::Cut => return Err(Failure::Cut.into()),
                Fill::Ended if is_quiet && begun.elapsed() < WORKS => return Err(Failure::Refusing.into()),
                Fill::Ended => return Ok(()),
            }
            if self.failures > 0 {
                self.failures = 0;
                self.tell_state(WatchState::Following { lists: self.lists }).await?;
            }
        }
    }

    /// Takes one line.
    fn take(&mut self, line: Line, has_bookmarks: &mut bool, news: &mut News) -> Result<(), Failure> {
        match line {
            Line::Applied(item) => {
                self.advance(item.version());
                self.known.applied(item, news);
            }
            Line::Deleted(item) => {
                self.advance(item.version());
                self.known.deleted(&item, news);
            }
            Line::Bookmark { version: now, ends_list: _ } => {
                *has_bookmarks = true;
                let (at, before) = (version(Some(&now)), version(self.version.as_deref()));
                if at.is_some() && at < before {
                    let before = self.version.take().unwrap_or_default();
                    return Err(Failure::Rewound { before, now });
                }
                self.known.sent_up_to(at);
                self.version = Some(now);
            }
            Line::Error(error) => return Err(Failure::Event(error)),
        }
        Ok(())
    }

    /// Where to go on from when the watch breaks. Never back: what was sent twice is not asked for a third time.
    fn advance(&mut self, now: Option<&str>) {
        let Some(now) = now.filter(|now| !now.is_empty()) else { return };
        let is_back = matches!((version(Some(now)), version(self.version.as_deref())), (Some(now), Some(at)) if now < at);
        if !is_back {
            self.version = Some(now.to_owned());
        }
    }

    /// Begins a watch.
    async fn begin(&mut self, query: &str) -> Result<Stream, End> {
        let begun = Instant::now();
        let limit = Duration::from_secs(spread(self.options.watch_timeout).as_secs().max(1));
        let (path, seconds) = (path(self.kind), limit.as_secs());
        let path = format!("{path}?watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&{query}");
        let patience = self.patience();
        let answer: Answer = self.client().await?.get(&path, patience).await?;
        Ok(Stream { lines: Lines::new(answer), begun, limit, has_bookmarks: false })
    }

    async fn client(&mut self) -> Result<&Client, End> {
        let client = match self.client.take() {
            Some(client) => client,
            None => Client::open(&self.options.credentials).await?,
        };
        Ok(self.client.insert(client))
    }

    fn patience(&self) -> Duration {
        PATIENCE.min(self.options.watch_timeout)
    }

    /// Tells what has gathered, if there is much of it. A list after the first is told in one piece.
    async fn tell_much(&mut self, news: &mut News) -> Result<(), End> {
        if self.lists > 0 || news.changes.len() < MAX_UNTOLD {
            return Ok(());
        }
        self.tell(std::mem::take(news)).await
    }

    async fn tell(&mut self, News { changes, problems }: News) -> Result<(), End> {
        for (origin, problems) in problems {
            self.send(Event::Problems { origin, problems }).await?;
        }
        if !changes.is_empty() {
            self.send(Event::Changes(changes)).await?;
        }
        Ok(())
    }

    async fn tell_state(&mut self, state: WatchState) -> Result<(), End> {
        self.send(Event::Watch { name: name(self.kind), state }).await
    }

    async fn send(&mut self, event: Event) -> Result<(), End> {
        self.events.send(event).await.map_err(|_gone| End::Unheard)
    }
}

/// Where a kind's objects of all namespaces are.
fn path(kind: Kind) -> &'static str {
    match kind {
        Kind::Pod => "/api/v1/pods",
        Kind::Namespace => "/api/v1/namespaces",
        Kind::NetworkPolicy => "/apis/networking.k8s.io/v1/networkpolicies",
    }
}

/// A text as the value of a query (RFC 3986: all but the unreserved characters spelled out).
fn encoded(text: &str) -> String {
    let spelled = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(spelled).collect()
}
