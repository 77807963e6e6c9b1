//! The netlink socket: requests in, answers out, nothing lost unnoticed.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NetlinkBuffer};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::ConntrackError;
use super::wire::{self, Ask, Header};

/// Room for one read. The kernel fills a dump's messages up to 32 KiB, if the reader has the room (Linux,
/// net/netlink/af_netlink.c, `netlink_dump`).
const BUFFER_LEN: usize = 64 * 1024;

/// The kernel answers within the system call that asks; nothing is waited for longer than this.
const PATIENCE: Duration = Duration::from_secs(10);

/// `NLMSG_ERROR` and `NLMSG_DONE` (include/uapi/linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// How a read of the whole table ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dump {
    /// All of it was read.
    Whole,
    /// The table changed its form meanwhile (`NLM_F_DUMP_INTR`): something may be missing or there twice.
    Torn,
}

#[derive(Debug)]
pub(super) struct Socket {
    file: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// A socket in the network namespace of the calling thread, where it stays.
    pub(super) fn open() -> Result<Self, ConntrackError> {
        let flags = SocketFlags::CLOEXEC;
        let opened = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            flags,
            Some(netlink::NETFILTER),
        )
        .and_then(|file| {
            sockopt::set_socket_timeout(&file, Timeout::Recv, Some(PATIENCE))?;
            // The kernel: any port of ours, no groups.
            rustix::net::bind(&file, &SocketAddrNetlink::new(0, 0))?;
            rustix::net::connect(&file, &SocketAddrNetlink::new(0, 0))?;
            Ok(file)
        });
        let file = opened.map_err(ConntrackError::of)?;
        Ok(Self { file, sequence: 0, buffer: vec![0; BUFFER_LEN] })
    }

    fn next_sequence(&mut self) -> u32 {
        // 0 is what the kernel's own notices carry.
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        self.sequence
    }

    fn send(&self, request: &[u8]) -> Result<(), ConntrackError> {
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(&self.file, request, SendFlags::empty()));
        match sent {
            Ok(length) if length == request.len() => Ok(()),
            Ok(_) => Err(ConntrackError::System { source: io::ErrorKind::WriteZero.into() }),
            Err(error) => Err(ConntrackError::of(error)),
        }
    }

    /// Reads one datagram and gives its messages, whatever they answer, to `each`.
    fn receive(
        &mut self,
        mut each: impl FnMut(&NetlinkBuffer<&[u8]>) -> Result<(), ConntrackError>,
    ) -> Result<(), ConntrackError> {
        let buffer = &mut self.buffer;
        let length = loop {
            match rustix::net::recv(&self.file, &mut buffer[..], RecvFlags::TRUNC) {
                Ok((_, length)) => break length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(ConntrackError::Silent { after: PATIENCE }),
                Err(Errno::NOBUFS) => return Err(ConntrackError::Overrun),
                Err(error) => return Err(ConntrackError::of(error)),
            }
        };
        let mut rest = buffer.get(..length).ok_or(ConntrackError::Malformed)?;
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).or(Err(ConntrackError::Malformed))?;
            each(&message)?;
            let aligned = (message.length() as usize).next_multiple_of(4);
            rest = rest.get(aligned..).unwrap_or_default();
        }
        Ok(())
    }

    /// Asks for everything, and gives the attributes of each message that the kernel shows to `each`.
    pub(super) fn dump(
        &mut self,
        filter: impl FnOnce(&mut Vec<u8>),
        mut each: impl FnMut(&[u8]) -> Result<(), ConntrackError>,
    ) -> Result<Dump, ConntrackError> {
        let sequence = self.next_sequence();
        let mut request = Vec::new();
        let header = Header { ask: Ask::Show, flags: NLM_F_DUMP, sequence, family: None };
        wire::message(&mut request, header, filter);
        self.send(&request)?;
        let mut dump = Dump::Whole;
        let mut ended = false;
        while !ended {
            self.receive(|message| {
                if message.sequence_number() != sequence || ended {
                    return Ok(());
                }
                if message.flags() & NLM_F_DUMP_INTR != 0 {
                    dump = Dump::Torn;
                }
                match message.message_type() {
                    // Either says how it ended, and what was shown before an error is not all.
                    DONE | ERROR => {
                        ended = true;
                        if let Some(error) = outcome(message)? {
                            return Err(ConntrackError::of(error));
                        }
                    }
                    wire::ENTRY => each(attributes(message)?)?,
                    _ => {}
                }
                Ok(())
            })?;
        }
        Ok(dump)
    }

    /// Sends one message and gives the attributes of the answer of type `wanted`, if the kernel has one.
    pub(super) fn ask<T>(
        &mut self,
        ask: Ask,
        wanted: u16,
        family: Option<std::net::IpAddr>,
        body: impl FnOnce(&mut Vec<u8>),
        read: impl Fn(&[u8]) -> Result<T, ConntrackError>,
    ) -> Result<Option<T>, ConntrackError> {
        let sequence = self.next_sequence();
        let flags = netlink_packet_core::NLM_F_ACK;
        let mut request = Vec::new();
        wire::message(&mut request, Header { ask, flags, sequence, family }, body);
        self.send(&request)?;
        let mut answer = None;
        let mut ended = false;
        while !ended {
            self.receive(|message| {
                if message.sequence_number() != sequence {
                    return Ok(());
                }
                match message.message_type() {
                    ERROR => {
                        ended = true;
                        match outcome(message)? {
                            None | Some(Errno::NOENT) => {}
                            Some(error) => return Err(ConntrackError::of(error)),
                        }
                    }
                    found if found == wanted => answer = Some(read(attributes(message)?)?),
                    _ => {}
                }
                Ok(())
            })?;
        }
        Ok(answer)
    }

    /// Sends a message for each item and gives the kernel's outcome of each, in order: `None` is success.
    pub(super) fn batch<T>(
        &mut self,
        items: &[T],
        write: impl Fn(&mut Vec<u8>, u32, &T),
    ) -> Result<Vec<Option<Errno>>, ConntrackError> {
        let mut request = Vec::new();
        let first = self.sequence;
        for item in items {
            let sequence = self.next_sequence();
            write(&mut request, sequence, item);
        }
        if items.is_empty() {
            return Ok(Vec::new());
        }
        self.send(&request)?;
        let mut outcomes: Vec<Option<Option<Errno>>> = vec![None; items.len()];
        let mut open = items.len();
        while open > 0 {
            self.receive(|message| {
                let index = message.sequence_number().wrapping_sub(first).wrapping_sub(1) as usize;
                if message.message_type() == ERROR
                    && let Some(slot) = outcomes.get_mut(index)
                    && slot.is_none()
                {
                    *slot = Some(outcome(message)?);
                    open -= 1;
                }
                Ok(())
            })?;
        }
        Ok(outcomes.into_iter().map(Option::flatten).collect())
    }
}

fn attributes<'a>(message: &NetlinkBuffer<&'a [u8]>) -> Result<&'a [u8], ConntrackError> {
    wire::attributes_of(message.payload()).or(Err(ConntrackError::Malformed))
}

/// What an acknowledgement says: nothing, or why not.
fn outcome(message: &NetlinkBuffer<&[u8]>) -> Result<Option<Errno>, ConntrackError> {
    let code = message.payload().get(..4).ok_or(ConntrackError::Malformed)?;
    let code = i32::from_ne_bytes(code.try_into().or(Err(ConntrackError::Malformed))?);
    Ok((code != 0).then(|| Errno::from_raw_os_error(-code)))
}
