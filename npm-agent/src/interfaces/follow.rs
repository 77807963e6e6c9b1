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
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recvfrom, sendto, socket_with,
};

use super::message::{Malformed, Message, Told, list_request, read};
use super::{Index, Interface};

/// The multicast group of interfaces (RTMGRP_LINK, linux/rtnetlink.h).
const LINKS: u32 = 1;

/// How much of a burst the kernel keeps for us: an event is about 1.5 kB, so some thousand interfaces. More than that is
/// listed anew.
const RECEIVE_BUFFER: usize = 4 << 20;

/// The kernel fills a datagram of a list up to 32 kB (netlink_dump, net/netlink/af_netlink.c), and goes beyond only for an
/// interface that is larger by itself.
const DATAGRAM: usize = 64 << 10;

/// How long the kernel may take for its list.
const LIST_PATIENCE: Duration = Duration::from_secs(10);

/// How often a list that changes while it is told is asked for again. The last one is taken as it is: what it missed is
/// among the events.
const MAX_LISTS: u32 = 5;

/// Why interfaces can't be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The system refuses.
    #[error("cannot {doing} the interfaces of the network namespace")]
    System {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel says something that is not understood.
    #[error("cannot read what the kernel says of interfaces")]
    Malformed(#[source] Malformed),
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
    events: OwnedFd,
    lists: OwnedFd,
    known: BTreeMap<Index, Interface>,
    /// What a list has shown and nobody was told yet.
    untold: Vec<Change>,
    sequence: u32,
    overruns: u64,
    /// Whether events were lost and no list has made up for it yet.
    behind: bool,
    buffer: Vec<u8>,
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
        let events = open(LINKS)?;
        // The forced size needs CAP_NET_ADMIN and knows no limit; the other is cut to a limit.
        set_socket_recv_buffer_size_force(&events, bytes)
            .or_else(|_not_allowed| set_socket_recv_buffer_size(&events, bytes))
            .map_err(system("make room for events of"))?;
        let mut follower = Self {
            events,
            lists: open(0)?,
            known: BTreeMap::new(),
            untold: Vec::new(),
            sequence: 0,
            overruns: 0,
            behind: false,
            buffer: vec![0; DATAGRAM],
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
            if !readable(&self.events, deadline)? {
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
            let messages = match receive(&self.events, &mut self.buffer) {
                Ok(Received::Nothing) => return Ok(()),
                Ok(Received::Messages(messages)) => messages,
                // What was lost, or could not be read, is in the list.
                Ok(Received::Overrun) | Err(FollowError::Malformed(_)) => {
                    self.fall_behind();
                    continue;
                }
                Err(error) => return Err(error),
            };
            for Told { message, .. } in messages {
                match message {
                    Message::Present(interface) => self.present(interface),
                    Message::Gone(index) => self.gone(index),
                    Message::Overrun => self.fall_behind(),
                    Message::Done | Message::Refused(_) | Message::Other => {}
                }
            }
        }
    }

    fn fall_behind(&mut self) {
        self.overruns += 1;
        self.behind = true;
    }

    fn present(&mut self, now: Interface) {
        match self.known.insert(now.index, now.clone()) {
            None => self.untold.push(Change::Appeared(now)),
            Some(before) if before != now => self.untold.push(Change::Altered { before, now }),
            Some(_same) => {}
        }
    }

    fn gone(&mut self, index: Index) {
        if let Some(before) = self.known.remove(&index) {
            self.untold.push(Change::Gone(before));
        }
    }

    /// Asks for all interfaces, and takes what differs from what is known as changes.
    fn list(&mut self) -> Result<(), FollowError> {
        let mut attempt = 1;
        let listed = loop {
            let (listed, interrupted) = self.ask()?;
            if !interrupted || attempt == MAX_LISTS {
                break listed;
            }
            attempt += 1;
        };
        let present: BTreeSet<Index> = listed.iter().map(|interface| interface.index).collect();
        let gone: Vec<Index> = self.known.keys().copied().filter(|index| !present.contains(index)).collect();
        gone.into_iter().for_each(|index| self.gone(index));
        listed.into_iter().for_each(|interface| self.present(interface));
        Ok(())
    }

    /// One list, and whether it changed while it was told.
    fn ask(&mut self) -> Result<(Vec<Interface>, bool), FollowError> {
        let failed = system("list");
        self.sequence = self.sequence.wrapping_add(1);
        let request = list_request(self.sequence);
        sendto(&self.lists, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).map_err(&failed)?;
        let deadline = Instant::now() + LIST_PATIENCE;
        let mut listed = Vec::new();
        let mut any_interrupted = false;
        loop {
            let messages = match receive(&self.lists, &mut self.buffer)? {
                Received::Nothing if readable(&self.lists, deadline)? => continue,
                Received::Nothing => return Err(failed(Errno::TIMEDOUT)),
                Received::Overrun => return Err(failed(Errno::NOBUFS)),
                Received::Messages(messages) => messages,
            };
            // An earlier request that failed half-way may have left answers.
            for told in messages.into_iter().filter(|told| told.sequence == self.sequence) {
                any_interrupted |= told.interrupted;
                match told.message {
                    Message::Present(interface) => listed.push(interface),
                    Message::Done => return Ok((listed, any_interrupted)),
                    Message::Refused(number) => return Err(failed(Errno::from_raw_os_error(number))),
                    Message::Gone(_) | Message::Overrun | Message::Other => {}
                }
            }
        }
    }
}

/// Readable when there is something to [`Follower::wait`] for: for those that wait for other things too.
impl AsFd for Follower {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

enum Received {
    Nothing,
    Messages(Vec<Told>),
    Overrun,
}

fn system(doing: &'static str) -> impl Fn(Errno) -> FollowError {
    move |source| FollowError::System { doing, source: source.into() }
}

fn open(groups: u32) -> Result<OwnedFd, FollowError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let failed = system("open a socket for");
    // NETLINK_ROUTE is netlink's protocol 0, and so the one that is meant without any.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None).map_err(&failed)?;
    bind(&socket, &SocketAddrNetlink::new(0, groups)).map_err(&failed)?;
    Ok(socket)
}

/// One datagram from the kernel, if there is one.
fn receive(socket: &OwnedFd, buffer: &mut Vec<u8>) -> Result<Received, FollowError> {
    loop {
        match recvfrom(socket, buffer.as_mut_slice(), RecvFlags::TRUNC) {
            Ok((_, length, from)) => {
                // Other processes may send to this socket too.
                let from_kernel = from
                    .and_then(|from| SocketAddrNetlink::try_from(from).ok())
                    .is_some_and(|from| from.pid() == 0);
                if !from_kernel {
                    continue;
                }
                let Some(bytes) = buffer.get(..length) else {
                    buffer.resize(length, 0);
                    return Ok(Received::Overrun);
                };
                return read(bytes).map(Received::Messages).map_err(FollowError::Malformed);
            }
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            Err(Errno::NOBUFS) => return Ok(Received::Overrun),
            Err(Errno::INTR) => {}
            Err(error) => return Err(system("hear of")(error)),
        }
    }
}

/// Waits until there is something to read, or for the deadline.
fn readable(socket: &OwnedFd, deadline: Instant) -> Result<bool, FollowError> {
    let failed = system("wait for");
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_too_long| failed(Errno::INVAL))?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(failed(error)),
        }
    }
}
