//! Looks at the node again and again: on a timer, when interfaces change, when other pods are to be protected.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use tracing::{debug, warn};

use super::survey::survey;
use super::{Board, Escape, Origin, Subject, held};
use crate::exec::Tools;
use crate::interfaces::follow::{FollowError, Follower};
use crate::netlink::any_readable;

/// The pause between two looks, however much happens.
const PAUSE: Duration = Duration::from_millis(500);

/// Looks once, then starts a thread in the calling thread's network namespace that goes on every `interval` and on every
/// change, for as long as the process lives.
///
/// # Errors
/// The thread could not be started. What can't be looked at is on the board.
pub fn start(board: Board, interval: Duration, tools: Tools) -> io::Result<()> {
    let mut watch = Watch { board, interval, tools, follower: None };
    watch.look();
    std::thread::Builder::new().name("escapes".to_owned()).spawn(move || watch.run())?;
    Ok(())
}

struct Watch {
    board: Board,
    interval: Duration,
    tools: Tools,
    /// None until it could be opened.
    follower: Option<Follower>,
}

impl Watch {
    fn run(mut self) {
        loop {
            let looked = Instant::now();
            if let Err(error) = self.wait(looked + self.interval) {
                warn!(%error, "cannot wait for changes of the node, looking at intervals");
                std::thread::sleep(self.interval);
            }
            std::thread::sleep((looked + PAUSE).saturating_duration_since(Instant::now()));
            self.look();
        }
    }

    /// Waits for something to happen, or for the deadline.
    fn wait(&self, deadline: Instant) -> io::Result<()> {
        let wake = self.board.wake();
        let mut files = vec![PollFd::new(&wake, PollFlags::IN)];
        let events = self.follower.as_ref().map(|follower| follower.as_fd());
        files.extend(events.as_ref().map(|events| PollFd::new(events, PollFlags::IN)));
        any_readable(&mut files, deadline).map(drop)
    }

    fn look(&mut self) {
        self.board.woken();
        let start = Instant::now();
        let mut found = BTreeSet::new();
        if let Err(error) = self.follow() {
            let reason = format!("{error}: {}", error.source);
            found.insert(Escape::Unknown { subject: Subject::Interfaces, reason });
        }
        let nothing = BTreeMap::new();
        let interfaces = self.follower.as_ref().map_or(&nothing, Follower::known);
        found.extend(survey(interfaces, &self.board.protected(), &self.tools));
        if let Some((held, locals)) = self.board.held() {
            found.extend(held::escapes(interfaces, held, &locals));
        }
        let (reasons, duration) = (found.len(), start.elapsed());
        debug!(reasons, ?duration, interfaces = interfaces.len(), "looked at the node");
        self.board.replace(Origin::Node, found);
    }

    /// Takes everything that has happened. One that fails is opened anew the next time.
    fn follow(&mut self) -> Result<(), FollowError> {
        let follower = match self.follower.take() {
            Some(mut follower) => {
                follower.wait(Duration::ZERO)?;
                follower
            }
            None => Follower::open()?,
        };
        self.follower = Some(follower);
        Ok(())
    }
}
