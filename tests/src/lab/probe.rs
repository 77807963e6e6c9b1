//! Probes: new connections of every kind, all at once, and what became of each.
//!
//! Every attempt has a source port (or echo id) of its own, so that no earlier probe makes it part of an established
//! connection. A probe is called blocked only after 300 ms without a sign of its last attempt.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, recvfrom, setsockopt,
    socket, sockopt,
};
use npm_policy::flow::{Decision, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;

use super::Endpoint;
use super::netns::on_fresh_thread;
use super::packet::{Identity, Sctp, SctpChunk, echo_request, raw_socket, send_raw};
use super::responder::Responder;

/// How long nothing may be heard after the last attempt until a probe counts as blocked.
const QUIET: Duration = Duration::from_millis(300);
/// When the attempts are made, counted from the start.
const ATTEMPTS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(70), Duration::from_millis(140)];
/// How long an expected delivery is waited for, and how often it is tried again meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(250);

/// A new connection to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The endpoint that it starts from: an index into the lab's endpoints.
    pub from: usize,
    /// The source: one of that endpoint's addresses, of the destination's family.
    pub source: IpAddr,
    /// The destination: an endpoint's or a Service's address.
    pub destination: IpAddr,
    /// What is sent: TCP, UDP, SCTP or an echo request.
    pub transport: Transport,
    /// With [`Decision::Allow`] a delivery is waited for longer, which makes a slow machine no failure.
    pub expected: Option<Decision>,
}

/// What became of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// Nothing arrived anywhere.
    Blocked,
    /// It arrived at some endpoint, and no answer came back.
    Arrived,
    /// It was answered. (An answer proves the arrival.)
    Answered,
}

impl Outcome {
    /// What a filter that gives this outcome has decided.
    pub fn decision(self) -> Decision {
        match self {
            Self::Blocked => Decision::Deny,
            Self::Arrived | Self::Answered => Decision::Allow,
        }
    }
}

/// The next free source port (or echo id) of each endpoint and protocol.
#[derive(Debug, Default)]
pub(super) struct Ports(BTreeMap<(usize, u8), u16>);

impl Ports {
    /// Ports from 20,000 up: above what the lab's endpoints listen to, mostly; one in use is passed over.
    pub(super) fn next(&mut self, endpoint: usize, transport: Transport) -> u16 {
        let protocol = match transport {
            Transport::Port(protocol, _) => protocol.number(),
            Transport::Portless(number) => number,
        };
        let port = self.0.entry((endpoint, protocol)).or_insert(u16::MAX);
        *port = if *port == u16::MAX { 20_000 } else { *port + 1 };
        *port
    }
}

/// Sends all probes at once and tells what became of each, in order.
pub(super) fn send_all(
    endpoints: &[Endpoint],
    probes: &[Probe],
    responder: &Responder,
    ports: &mut Ports,
) -> Result<Vec<Outcome>> {
    responder.forget();
    on_fresh_thread(|| {
        let mut volley = Volley {
            endpoints,
            probes,
            ports,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll")?,
            sockets: BTreeMap::new(),
            shared: BTreeMap::new(),
            asked: BTreeMap::new(),
            sent: vec![Vec::new(); probes.len()],
            answered: vec![false; probes.len()],
        };
        volley.fire()?;
        let outcomes = volley.sent.iter().zip(&volley.answered).map(|(sent, answered)| match answered {
            true => Outcome::Answered,
            false if sent.iter().any(|identity| responder.heard(*identity).is_some()) => Outcome::Arrived,
            false => Outcome::Blocked,
        });
        Ok(outcomes.collect())
    })
}

/// A socket that waits for an answer.
#[derive(Debug)]
enum Waiting {
    /// A connection in the making, or one that waits for its echo.
    Tcp(TcpStream, usize, Handshake),
    /// A connected datagram socket.
    Udp(UdpSocket, usize),
    /// A raw socket that many probes share.
    Raw(OwnedFd),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handshake {
    Pending,
    Done,
}

struct Volley<'a> {
    endpoints: &'a [Endpoint],
    probes: &'a [Probe],
    ports: &'a mut Ports,
    epoll: Epoll,
    sockets: BTreeMap<RawFd, Waiting>,
    /// Raw sockets by endpoint, source address and protocol.
    shared: BTreeMap<(usize, IpAddr, u8), RawFd>,
    /// Which probe an answer to a raw packet belongs to: by the protocol, our address, and the echo id or port.
    asked: BTreeMap<Identity, usize>,
    sent: Vec<Vec<Identity>>,
    answered: Vec<bool>,
}

impl Volley<'_> {
    fn fire(&mut self) -> Result<()> {
        let start = Instant::now();
        for at in ATTEMPTS {
            self.listen_until(start + at, Wanted::Any)?;
            self.attempt(Wanted::Any)?;
        }
        self.listen_until(start + ATTEMPTS[ATTEMPTS.len() - 1] + QUIET, Wanted::Any)?;
        while self.open(Wanted::Expected) && start.elapsed() < PATIENCE {
            self.attempt(Wanted::Expected)?;
            self.listen_until(Instant::now() + RETRY, Wanted::Expected)?;
        }
        Ok(())
    }

    /// Whether a wanted probe still has no answer.
    fn open(&self, wanted: Wanted) -> bool {
        self.probes.iter().zip(&self.answered).any(|(probe, answered)| !answered && wanted.includes(probe))
    }

    /// Sends every wanted probe that has no answer yet once more.
    fn attempt(&mut self, wanted: Wanted) -> Result<()> {
        let mut order: Vec<usize> = (0..self.probes.len()).collect();
        order.sort_by_key(|index| self.probes[*index].from);
        let mut inside = None;
        for index in order {
            let probe = self.probes[index];
            if self.answered[index] || !wanted.includes(&probe) {
                continue;
            }
            if inside.replace(probe.from) != Some(probe.from) {
                let endpoint = self.endpoints.get(probe.from).context("no such endpoint")?;
                endpoint.netns.enter()?;
            }
            self.send(index, probe)
                .with_context(|| format!("probing {} from {}", probe.destination, probe.source))?;
        }
        Ok(())
    }

    fn send(&mut self, index: usize, probe: Probe) -> Result<()> {
        if probe.source.is_ipv4() != probe.destination.is_ipv4() {
            bail!("the addresses are of different families");
        }
        match probe.transport {
            Transport::Port(Protocol::Tcp, port) => self.send_tcp(index, probe, port),
            Transport::Port(Protocol::Udp, port) => self.send_udp(index, probe, port),
            Transport::Port(Protocol::Sctp, port) => {
                let source = self.ports.next(probe.from, probe.transport);
                let tag = sctp_tag(source);
                let init = Sctp { source, destination: port, verification: 0, tag, chunk: SctpChunk::Init };
                self.send_raw(index, probe, source, SockProtocol::Sctp, &init.to_bytes())
            }
            Transport::Portless(1 | 58) => {
                let family = Family::of(probe.destination);
                let protocol = match family {
                    Family::V4 => SockProtocol::Icmp,
                    Family::V6 => SockProtocol::IcmpV6,
                };
                let id = self.ports.next(probe.from, probe.transport);
                self.send_raw(index, probe, id, protocol, &echo_request(family, id, 1))
            }
            Transport::Portless(number) => bail!("protocol {number} has no probe"),
        }
    }

    fn send_tcp(&mut self, index: usize, probe: Probe, port: u16) -> Result<()> {
        let descriptor = self.bound(index, probe, SockType::Stream)?;
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        // Closing sends RST: no TIME_WAIT stays behind.
        setsockopt(&descriptor, sockopt::Linger, &linger).context("setting SO_LINGER")?;
        let to = SockaddrStorage::from(SocketAddr::new(probe.destination, port));
        match connect(descriptor.as_raw_fd(), &to) {
            Ok(()) | Err(nix::Error::EINPROGRESS) => {}
            // A route that leads nowhere is an outcome, not a mistake of ours.
            Err(nix::Error::ENETUNREACH | nix::Error::EHOSTUNREACH | nix::Error::EPERM) => return Ok(()),
            Err(error) => return Err(error).context("connecting"),
        }
        self.watch(Waiting::Tcp(descriptor.into(), index, Handshake::Pending), EpollFlags::EPOLLOUT)
    }

    fn send_udp(&mut self, index: usize, probe: Probe, port: u16) -> Result<()> {
        let descriptor = self.bound(index, probe, SockType::Datagram)?;
        let to = SockaddrStorage::from(SocketAddr::new(probe.destination, port));
        connect(descriptor.as_raw_fd(), &to).context("connecting")?;
        let socket = UdpSocket::from(descriptor);
        // EPERM is the OUTPUT hook's refusal: an outcome.
        drop(socket.send(&(index as u64).to_be_bytes()));
        self.watch(Waiting::Udp(socket, index), EpollFlags::EPOLLIN)
    }

    /// A socket bound to the probe's source address and a fresh port.
    fn bound(&mut self, index: usize, probe: Probe, kind: SockType) -> Result<OwnedFd> {
        let family = match probe.source {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        let descriptor = socket(family, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
            .context("opening a socket")?;
        for _ in 0..u16::MAX {
            let port = self.ports.next(probe.from, probe.transport);
            let local = SockaddrStorage::from(SocketAddr::new(probe.source, port));
            match bind(descriptor.as_raw_fd(), &local) {
                Ok(()) => {
                    self.sent[index].push(Identity::new(probe.source, probe.transport, port));
                    return Ok(descriptor);
                }
                Err(nix::Error::EADDRINUSE) => {}
                Err(error) => return Err(error).context("binding a socket"),
            }
        }
        bail!("no free port")
    }

    fn send_raw(
        &mut self,
        index: usize,
        probe: Probe,
        port: u16,
        protocol: SockProtocol,
        packet: &[u8],
    ) -> Result<()> {
        let identity = Identity::new(probe.source, probe.transport, port);
        let key = (probe.from, probe.source, identity.protocol);
        let descriptor = match self.shared.get(&key) {
            Some(descriptor) => *descriptor,
            None => {
                let socket = raw_socket(Family::of(probe.source), protocol)?;
                let local = SockaddrStorage::from(SocketAddr::new(probe.source, 0));
                bind(socket.as_raw_fd(), &local).context("binding a raw socket")?;
                let descriptor = socket.as_raw_fd();
                self.watch(Waiting::Raw(socket), EpollFlags::EPOLLIN)?;
                self.shared.insert(key, descriptor);
                descriptor
            }
        };
        self.sent[index].push(identity);
        self.asked.insert(identity, index);
        if let Some(Waiting::Raw(socket)) = self.sockets.get(&descriptor) {
            // EPERM, no route: outcomes.
            let _ = send_raw(socket, packet, probe.destination);
        }
        Ok(())
    }

    fn watch(&mut self, waiting: Waiting, flags: EpollFlags) -> Result<()> {
        let descriptor = match &waiting {
            Waiting::Tcp(socket, ..) => socket.as_fd(),
            Waiting::Udp(socket, _) => socket.as_fd(),
            Waiting::Raw(socket) => socket.as_fd(),
        };
        let key = descriptor.as_raw_fd();
        self.epoll.add(descriptor, EpollEvent::new(flags, key as u64)).context("watching a socket")?;
        self.sockets.insert(key, waiting);
        Ok(())
    }

    /// Takes answers until then, or until every wanted probe has one.
    fn listen_until(&mut self, deadline: Instant, wanted: Wanted) -> Result<()> {
        let mut events = [EpollEvent::empty(); 128];
        while self.open(wanted) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // Rounded up, or the last millisecond would spin.
            let timeout =
                EpollTimeout::try_from(left + Duration::from_millis(1)).context("a long deadline")?;
            let ready = match self.epoll.wait(&mut events, timeout) {
                Ok(ready) => ready,
                Err(nix::Error::EINTR) => continue,
                Err(error) => return Err(error).context("waiting for answers"),
            };
            for event in &events[..ready] {
                self.take(event.data() as RawFd)?;
            }
        }
        Ok(())
    }

    /// Reads what has come on one socket. A socket that is done or broken is closed.
    fn take(&mut self, descriptor: RawFd) -> Result<()> {
        let mut buffer = [0; 512];
        let Some(waiting) = self.sockets.get_mut(&descriptor) else { return Ok(()) };
        let done = match waiting {
            Waiting::Tcp(stream, index, handshake @ Handshake::Pending) => {
                *handshake = Handshake::Done;
                // A refusal is no answer from a server; what arrived was heard over there.
                if stream.take_error().context("asking a socket for its error")?.is_some()
                    || stream.write_all(&(*index as u64).to_be_bytes()).is_err()
                {
                    true
                } else {
                    let mut event = EpollEvent::new(EpollFlags::EPOLLIN, descriptor as u64);
                    self.epoll.modify(&*stream, &mut event).context("watching a socket")?;
                    false
                }
            }
            Waiting::Tcp(stream, index, Handshake::Done) => match stream.read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => false,
                Ok(8) if buffer[..8] == (*index as u64).to_be_bytes() => {
                    self.answered[*index] = true;
                    true
                }
                Ok(_) | Err(_) => true,
            },
            Waiting::Udp(socket, index) => match socket.recv(&mut buffer) {
                Ok(8) if buffer[..8] == (*index as u64).to_be_bytes() => {
                    self.answered[*index] = true;
                    true
                }
                // An ICMP error: the next attempt has its own socket.
                Ok(_) | Err(_) => false,
            },
            Waiting::Raw(socket) => {
                while let Ok((len, _)) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer) {
                    let local = self.shared.iter().find(|(_, shared)| **shared == descriptor);
                    let index = local
                        .and_then(|((_, address, protocol), _)| {
                            answer_to(*address, *protocol, &buffer[..len])
                        })
                        .and_then(|identity| self.asked.get(&identity));
                    if let Some(index) = index {
                        self.answered[*index] = true;
                    }
                }
                false
            }
        };
        if done {
            self.sockets.remove(&descriptor);
        }
        Ok(())
    }
}

/// Which probes count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// All.
    Any,
    /// Those that are expected to be delivered.
    Expected,
}

impl Wanted {
    fn includes(self, probe: &Probe) -> bool {
        match self {
            Self::Any => true,
            Self::Expected => probe.expected == Some(Decision::Allow),
        }
    }
}

/// The tag of an association that starts from a port.
fn sctp_tag(port: u16) -> u32 {
    (u32::from(port) << 16) | 0x4e50
}

/// What an echo reply or INIT ACK, read from a raw socket of `local`, answers.
fn answer_to(local: IpAddr, protocol: u8, packet: &[u8]) -> Option<Identity> {
    let start = match local {
        // A raw IPv4 socket gives the header too (raw(7)), an IPv6 one does not (RFC 3542, 3).
        IpAddr::V4(_) => usize::from(packet.first()? & 15) * 4,
        IpAddr::V6(_) => 0,
    };
    let packet = packet.get(start..)?;
    let port = match (protocol, packet.first()?) {
        (1, 0) | (58, 129) => u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?),
        (132, _) => {
            let answer = Sctp::parse(packet).filter(|answer| answer.chunk == SctpChunk::InitAck)?;
            // Our tag carries our port, so an answer to somebody else's INIT is not taken for ours.
            let ours = sctp_tag(answer.destination);
            (answer.verification == ours).then_some(answer.destination)?
        }
        _ => return None,
    };
    Some(Identity { source: local, protocol, port })
}
