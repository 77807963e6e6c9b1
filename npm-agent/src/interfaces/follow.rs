//! Follows the interfaces of a network namespace: the list, then every change, with a deadline and without a runtime.
//!
//! ```text
//! subscribe ─► list ─► changes to what was known ─► events, one by one ─┐
//!                ▲                                                      │ the kernel had no room for all of them
//!                └──────────────────────────────────────────────────────┘
//! ```
//!
//! The subscription comes before the list, so nothing falls between them. An event carries the whole interface, so one
//! that the list has overtaken is put right by the next.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_packet_core::NLM_F_DUMP;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};

use super::message::{Message, RTM_GETLINK, list_body, read};
use super::{Index, Interface};
use crate::netlink::{Listed, Received, Socket, frames, malformed, readable};

/// The multicast group of interfaces (RTMGRP_LINK, linux/rtnetlink.h).
const LINKS: u32 = 1;

/// How much of a burst the kernel keeps for us: an event is about 1.5 kB, so some thousand interfaces. More than that is
/// listed anew.
const RECEIVE_BUFFER: usize = 4 << 20;

/// How often a list that changes while it is told is asked for again. The last one is taken as it is: what it missed is
/// among the events.
const MAX_LISTS: u32 = 5;

/// Why interfaces can't be followed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} the interfaces of the network namespace")]
pub struct FollowError {
    /// What was tried.
    pub doing: &'static str,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// What became of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is new in the namespace.
    Appeared(Interface),
    /// It is not what it was: another name, state, master...
    Altered {
        /// As it was.
        before: Interface,
        /// As it is.
        now: Interface,
    },
    /// It is not in the namespace any more.
    Gone(Interface),
}

/// Follows the interfaces of the network namespace that the thread was in which opened it.
#[derive(Debug)]
pub struct Follower {
    events: Socket,
    lists: Socket,
    known: BTreeMap<Index, Interface>,
    /// What has changed and nobody was told yet.
    untold: Vec<Change>,
    overruns: u64,
    /// Whether events were lost and no list has made up for it yet.
    behind: bool,
}

impl Follower {
    /// Subscribes, then lists. [`Follower::known`] is what there is; [`Follower::wait`] tells what changes from there.
    ///
    /// # Errors
    /// The system refuses, or the kernel says something that is not understood.
    pub fn open() -> Result<Self, FollowError> {
        Self::with_receive_buffer(RECEIVE_BUFFER)
    }

    /// As [`Follower::open`], with room for so many bytes of events that nobody has read.
    ///
    /// # Errors
    /// As [`Follower::open`].
    pub fn with_receive_buffer(bytes: usize) -> Result<Self, FollowError> {
        let socket = |groups| Socket::open(None, groups).map_err(failed("open a socket for"));
        let events = socket(LINKS)?;
        // The forced size needs CAP_NET_ADMIN and knows no limit; the other is cut to a limit.
        set_socket_recv_buffer_size_force(&events, bytes)
            .or_else(|_not_allowed| set_socket_recv_buffer_size(&events, bytes))
            .map_err(|error| failed("make room for events of")(error.into()))?;
        let mut follower = Self {
            events,
            lists: socket(0)?,
            known: BTreeMap::new(),
            untold: Vec::new(),
            overruns: 0,
            behind: false,
        };
        follower.list()?;
        follower.untold.clear();
        Ok(follower)
    }

    /// The interfaces after the last [`Follower::wait`].
    pub fn known(&self) -> &BTreeMap<Index, Interface> {
        &self.known
    }

    /// How often events were lost and made up for by a list.
    pub fn overruns(&self) -> u64 {
        self.overruns
    }

    /// Waits for changes, `patience` at most: none in the answer means that nothing has changed. With a `patience` of
    /// zero it takes what is there.
    ///
    /// # Errors
    /// As [`Follower::open`]. The next call goes on from there, and nothing is lost.
    pub fn wait(&mut self, patience: Duration) -> Result<Vec<Change>, FollowError> {
        let deadline = Instant::now() + patience;
        loop {
            self.drain()?;
            if !self.untold.is_empty() {
                return Ok(std::mem::take(&mut self.untold));
            }
            if !readable(&self.events, deadline).map_err(failed("wait for"))? {
                return Ok(Vec::new());
            }
        }
    }

    /// Takes every event that is there.
    fn drain(&mut self) -> Result<(), FollowError> {
        loop {
            if self.behind {
                self.list()?;
                self.behind = false;
            }
            // What was lost, or could not be read, is in the list.
            let heard = match self.events.receive().map_err(failed("hear of"))? {
                Received::Nothing => return Ok(()),
                Received::Overrun => None,
                Received::Datagram(bytes) => messages(bytes),
            };
            match heard {
                Some(messages) => messages.into_iter().for_each(|message| self.take(message)),
                None => {
                    self.overruns += 1;
                    self.behind = true;
                }
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Present(now) => match self.known.insert(now.index, now.clone()) {
                None => self.untold.push(Change::Appeared(now)),
                Some(before) if before != now => self.untold.push(Change::Altered { before, now }),
                Some(_same) => {}
            },
            Message::Gone(index) => {
                if let Some(before) = self.known.remove(&index) {
                    self.untold.push(Change::Gone(before));
                }
            }
            Message::Other => {}
        }
    }

    /// Asks for all interfaces, and takes what differs from what is known as changes.
    fn list(&mut self) -> Result<(), FollowError> {
        let mut listed = Vec::new();
        for _attempt in 0..MAX_LISTS {
            listed.clear();
            let each = |kind, payload: &[u8]| {
                listed.push(read(kind, payload).map_err(malformed)?);
                Ok(())
            };
            let whole =
                self.lists.ask(RTM_GETLINK, NLM_F_DUMP, &list_body(), each).map_err(failed("list"))?;
            if whole == Listed::Whole {
                break;
            }
        }
        let present: BTreeSet<Index> = listed.iter().filter_map(Message::present).collect();
        let gone: Vec<Index> = self.known.keys().copied().filter(|index| !present.contains(index)).collect();
        gone.into_iter().map(Message::Gone).chain(listed).for_each(|message| self.take(message));
        Ok(())
    }
}

/// Readable when there is something to [`Follower::wait`] for: for those that wait for other things too.
impl AsFd for Follower {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

/// The messages of a datagram; `None`: they can't be read.
fn messages(bytes: &[u8]) -> Option<Vec<Message>> {
    frames(bytes).map(|frame| frame.ok().and_then(|frame| read(frame.kind, frame.payload).ok())).collect()
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> FollowError {
    move |source| FollowError { doing, source }
}
