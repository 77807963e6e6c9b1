//! A netlink socket (netlink(7)): requests and what answers them, and datagrams that come by themselves.
//!
//! Only the kernel is listened to. What messages mean is for those who ask.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NlasIterator};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recvfrom, sendto,
    socket_with,
};

/// Messages that netlink itself has (linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// The length of `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// The length of `struct nlattr`.
const ATTRIBUTE_HEADER_LEN: usize = 4;

/// The kernel fills a datagram of a list up to 32 kB (netlink_dump, net/netlink/af_netlink.c), and goes beyond only for a
/// message that is larger by itself.
const DATAGRAM_LEN: usize = 64 << 10;

/// How long the kernel may take for one answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A socket in the network namespace that the thread was in which opened it.
#[derive(Debug)]
pub(crate) struct Socket {
    file: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What there is to read.
#[derive(Debug)]
pub(crate) enum Received<'a> {
    /// Nothing yet.
    Nothing,
    /// The kernel had no room, or we had none: something is lost.
    Overrun,
    /// Messages, for [`frames`].
    Datagram(&'a [u8]),
}

/// Whether a list is of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listed {
    /// It changed while it was told: something may be missing, or there twice.
    Torn,
    /// It is.
    Whole,
}

/// One message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: u16,
    flags: u16,
    sequence: u32,
    pub(crate) payload: &'a [u8],
}

impl Socket {
    /// Opens a socket of a protocol (`None`: NETLINK_ROUTE, which is 0) that hears these multicast groups.
    pub(crate) fn open(protocol: Option<Protocol>, groups: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let file = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        bind(&file, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { file, sequence: 0, buffer: vec![0; DATAGRAM_LEN] })
    }

    /// Sends a request and gives each answer, by its kind and what it holds, until the kernel says that there are no
    /// more. With [`netlink_packet_core::NLM_F_DUMP`] it lists; other requests need
    /// [`netlink_packet_core::NLM_F_ACK`], or they have no end.
    ///
    /// # Errors
    /// The kernel refuses, or does not answer whole.
    pub(crate) fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(u16, &[u8]) -> io::Result<()>,
    ) -> io::Result<Listed> {
        self.sequence = self.sequence.wrapping_add(1);
        let asked = self.sequence;
        let request = request(kind, flags | NLM_F_REQUEST, asked, body);
        sendto(&self.file, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let deadline = Instant::now() + PATIENCE;
        let mut listed = Listed::Whole;
        loop {
            if !readable(&self.file, deadline)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let bytes = match self.receive()? {
                Received::Datagram(bytes) => bytes,
                Received::Overrun => return Err(Errno::NOBUFS.into()),
                Received::Nothing => continue,
            };
            for frame in frames(bytes) {
                let Frame { kind, flags, sequence, payload } = frame?;
                // An earlier request that failed half-way may have left answers.
                if sequence != asked {
                    continue;
                }
                if flags & NLM_F_DUMP_INTR != 0 {
                    listed = Listed::Torn;
                }
                match kind {
                    DONE => return Ok(listed),
                    ERROR => match payload.first_chunk().map(|number| i32::from_ne_bytes(*number)) {
                        Some(0) => return Ok(listed),
                        Some(number) => return Err(io::Error::from_raw_os_error(number.saturating_neg())),
                        None => return Err(malformed("an error without a number")),
                    },
                    _ => each(kind, payload)?,
                }
            }
        }
    }

    /// One datagram from the kernel, if there is one.
    pub(crate) fn receive(&mut self) -> io::Result<Received<'_>> {
        let length = loop {
            match recvfrom(&self.file, self.buffer.as_mut_slice(), RecvFlags::TRUNC) {
                Ok((_, length, from)) => {
                    // Other processes may send to this socket too.
                    let from = from.and_then(|from| SocketAddrNetlink::try_from(from).ok());
                    if from.is_some_and(|from| from.pid() == 0) {
                        break length;
                    }
                }
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::NOBUFS) => return Ok(Received::Overrun),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        if length > self.buffer.len() {
            // Next time there is room.
            self.buffer.resize(length, 0);
            return Ok(Received::Overrun);
        }
        Ok(Received::Datagram(&self.buffer[..length]))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Waits until there is something to read, or for the deadline.
pub(crate) fn readable(file: impl AsFd, deadline: Instant) -> io::Result<bool> {
    any_readable(&mut [PollFd::new(&file, PollFlags::IN)], deadline)
}

/// Waits until there is something to read from any of them, or for the deadline.
pub(crate) fn any_readable(files: &mut [PollFd<'_>], deadline: Instant) -> io::Result<bool> {
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        match poll(files, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The messages of a datagram. An error ends them.
pub(crate) fn frames(bytes: &[u8]) -> impl Iterator<Item = io::Result<Frame<'_>>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut rest);
        let Ok(packet) = NetlinkBuffer::new_checked(bytes) else {
            return Some(Err(malformed("a message is cut")));
        };
        let length = usize::try_from(packet.length()).unwrap_or(usize::MAX);
        let Some(payload) = bytes.get(HEADER_LEN..length) else {
            return Some(Err(malformed("a message is shorter than its header")));
        };
        // Messages begin at multiples of four.
        rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Frame {
            kind: packet.message_type(),
            flags: packet.flags(),
            sequence: packet.sequence_number(),
            payload,
        }))
    })
}

fn request(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = [&[0; HEADER_LEN], body].concat();
    let length = u32::try_from(bytes.len()).expect("requests are short");
    let mut packet = NetlinkBuffer::new(&mut bytes);
    packet.set_length(length);
    packet.set_message_type(kind);
    packet.set_flags(flags);
    packet.set_sequence_number(sequence);
    bytes
}

/// Attributes, one behind the other: the kind of each, and what it holds. One that is cut ends them.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = io::Result<(u16, &[u8])>> {
    NlasIterator::new(bytes).map(|attribute| {
        let attribute = attribute.map_err(|_cut| malformed("an attribute is cut"))?;
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        let held = attribute.into_inner().get(ATTRIBUTE_HEADER_LEN..length);
        Ok((kind, held.ok_or_else(|| malformed("an attribute is cut"))?))
    })
}

/// An attribute, for a request.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(ATTRIBUTE_HEADER_LEN + value.len()).expect("requests are short");
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// `N` bytes from `start`.
pub(crate) fn array<const N: usize>(bytes: &[u8], start: usize) -> Option<[u8; N]> {
    bytes.get(start..)?.first_chunk().copied()
}

/// Text that ends with a zero byte, or at its end.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// What the kernel says is not what it should be.
pub(crate) fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
