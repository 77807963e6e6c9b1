//! The far end of every probe: one thread that answers on the ports of all endpoints, and hears what arrives even
//! where nobody answers.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, SockaddrStorage, recvfrom, socket,
};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;

use super::netns::{Netns, on_fresh_thread};
use super::node::Role;
use super::packet::{Identity, Sctp, SctpChunk, raw_socket, send_raw};

/// `PACKET_HOST` of linux/if_packet.h: addressed to this host, not flooded by a bridge nor sent by us.
const PACKET_HOST: u8 = 0;

/// What the responder listens to.
#[derive(Debug)]
enum Ear {
    Listener(TcpListener),
    Stream(TcpStream),
    Udp(UdpSocket),
    /// Raw SCTP; the number of bytes before the SCTP header is read from the packet in IPv4, none in IPv6.
    Sctp(OwnedFd, Family),
    /// A packet socket of the endpoint with this index.
    Sniffer(OwnedFd, usize),
}

impl Ear {
    fn descriptor(&self) -> RawFd {
        match self {
            Self::Listener(socket) => socket.as_raw_fd(),
            Self::Stream(socket) => socket.as_raw_fd(),
            Self::Udp(socket) => socket.as_raw_fd(),
            Self::Sctp(socket, _) | Self::Sniffer(socket, _) => socket.as_raw_fd(),
        }
    }
}

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    ears: Mutex<BTreeMap<RawFd, Ear>>,
    heard: Mutex<BTreeSet<(Identity, usize)>>,
    stop: AtomicBool,
}

/// The thread that answers. Stops when dropped.
#[derive(Debug)]
pub(super) struct Responder {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    open: BTreeSet<(usize, Protocol, u16)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Responder {
    /// Starts it: it sniffs at every host and answers SCTP on every port, and nothing else yet. At a router what
    /// arrives is not yet what passes, so nobody sniffs there.
    pub(super) fn start<'a>(endpoints: impl Iterator<Item = (&'a Netns, Role)> + Send) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll")?;
        let shared = Arc::new(Shared {
            epoll,
            ears: Mutex::default(),
            heard: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        on_fresh_thread(|| {
            for (index, (netns, role)) in endpoints.enumerate() {
                netns.enter()?;
                if role == Role::Host {
                    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
                    let sniffer =
                        socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll)
                            .context("opening a packet socket")?;
                    shared.add(Ear::Sniffer(sniffer, index))?;
                }
                for family in Family::BOTH {
                    shared.add(Ear::Sctp(raw_socket(family, SockProtocol::Sctp)?, family))?;
                }
            }
            Ok(())
        })?;
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("responder".into()).spawn(move || shared.serve())
        };
        Ok(Self { shared, thread: Some(thread.context("starting the responder")?), open: BTreeSet::new() })
    }

    /// Echoes on a port of an endpoint from now on. Done already: nothing happens. SCTP is answered anyway.
    pub(super) fn listen<'a>(
        &mut self,
        wanted: impl Iterator<Item = (usize, &'a Netns, &'a [IpAddr], Protocol, u16)>,
    ) -> Result<()> {
        ensure!(self.thread.is_some(), "nobody answers any more");
        let new: Vec<_> = wanted
            .filter(|(index, _, _, protocol, port)| self.open.insert((*index, *protocol, *port)))
            .collect();
        let shared = &self.shared;
        on_fresh_thread(move || {
            for (_, netns, addresses, protocol, port) in new {
                netns.enter()?;
                for address in addresses {
                    let local = SocketAddr::new(*address, port);
                    let ear = match protocol {
                        Protocol::Tcp => TcpListener::bind(local)
                            .and_then(|socket| socket.set_nonblocking(true).map(|()| Ear::Listener(socket))),
                        Protocol::Udp => UdpSocket::bind(local)
                            .and_then(|socket| socket.set_nonblocking(true).map(|()| Ear::Udp(socket))),
                        Protocol::Sctp => continue,
                    };
                    shared.add(ear.with_context(|| format!("listening on {protocol} {local}"))?)?;
                }
            }
            Ok(())
        })
    }

    /// Forgets what was heard.
    pub(super) fn forget(&self) {
        lock(&self.shared.heard).clear();
    }

    /// The index of the first endpoint where a packet of this identity has arrived.
    pub(super) fn heard(&self, identity: Identity) -> Option<usize> {
        let heard = lock(&self.shared.heard);
        heard.range((identity, 0)..=(identity, usize::MAX)).map(|(_, index)| *index).next()
    }
}

impl Responder {
    /// Closes all its sockets: nothing is heard and answered from here on.
    pub(super) fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the responder panicked");
        }
        lock(&self.shared.ears).clear();
        self.open.clear();
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn add(&self, ear: Ear) -> Result<()> {
        let descriptor = ear.descriptor();
        // The lock is held until the descriptor is in the map, so that its first event finds it.
        let mut ears = lock(&self.ears);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, descriptor as u64);
        let added = match &ear {
            Ear::Listener(socket) => self.epoll.add(socket, event),
            Ear::Stream(socket) => self.epoll.add(socket, event),
            Ear::Udp(socket) => self.epoll.add(socket, event),
            Ear::Sctp(socket, _) | Ear::Sniffer(socket, _) => self.epoll.add(socket, event),
        };
        added.context("watching a socket")?;
        ears.insert(descriptor, ear);
        Ok(())
    }

    fn serve(&self) {
        let mut events = [EpollEvent::empty(); 64];
        while !self.stop.load(Ordering::Relaxed) {
            let ready = match self.epoll.wait(&mut events, 20u8) {
                Ok(ready) => ready,
                Err(nix::Error::EINTR) => 0,
                Err(error) => {
                    eprintln!("the responder cannot wait: {error}");
                    return;
                }
            };
            for event in &events[..ready] {
                let mut accepted = Vec::new();
                let mut ears = lock(&self.ears);
                let descriptor = event.data() as RawFd;
                let Some(ear) = ears.get_mut(&descriptor) else { continue };
                if let Heard::Closed = self.hear(ear, &mut accepted) {
                    ears.remove(&descriptor);
                }
                drop(ears);
                for stream in accepted {
                    if let Err(error) = self.add(Ear::Stream(stream)) {
                        eprintln!("responder: {error:#}");
                    }
                }
            }
        }
    }

    /// Answers everything that waits at one ear.
    fn hear(&self, ear: &mut Ear, accepted: &mut Vec<TcpStream>) -> Heard {
        let mut buffer = [0; 2048];
        match ear {
            Ear::Listener(listener) => {
                while let Ok((stream, _)) = listener.accept() {
                    if stream.set_nonblocking(true).is_ok() {
                        accepted.push(stream);
                    }
                }
                Heard::Open
            }
            Ear::Stream(stream) => loop {
                match stream.read(&mut buffer) {
                    // A peer that has gone away in the meantime is no concern of ours.
                    Ok(0) => return Heard::Closed,
                    Ok(len) if stream.write_all(&buffer[..len]).is_err() => return Heard::Closed,
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Heard::Open,
                    Err(_) => return Heard::Closed,
                }
            },
            Ear::Udp(socket) => loop {
                match socket.recv_from(&mut buffer) {
                    // An answer that can't be sent shows in the probe's outcome.
                    Ok((len, from)) => drop(socket.send_to(&buffer[..len], from)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Heard::Open,
                    // ICMP errors that belong to an earlier answer.
                    Err(_) => {}
                }
            },
            Ear::Sctp(socket, family) => {
                while let Ok((len, from)) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer) {
                    answer_sctp(socket, *family, &buffer[..len], from.as_ref());
                }
                Heard::Open
            }
            Ear::Sniffer(socket, index) => {
                while let Ok((len, from)) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
                    if from.is_some_and(|from| from.pkttype() == PACKET_HOST)
                        && let Some(identity) = Identity::parse(&buffer[..len])
                    {
                        lock(&self.heard).insert((identity, *index));
                    }
                }
                Heard::Open
            }
        }
    }
}

/// Whether an ear stays open.
enum Heard {
    Open,
    Closed,
}

fn answer_sctp(socket: &OwnedFd, family: Family, packet: &[u8], from: Option<&SockaddrStorage>) {
    let Some(from) = from.and_then(address_of) else { return };
    let start = match family {
        Family::V4 => packet.first().map_or(0, |first| usize::from(first & 15) * 4),
        Family::V6 => 0,
    };
    let Some(init) = packet.get(start..).and_then(Sctp::parse) else { return };
    if init.chunk != SctpChunk::Init {
        return;
    }
    let answer = Sctp {
        source: init.destination,
        destination: init.source,
        verification: init.tag,
        tag: !init.tag | 1,
        chunk: SctpChunk::InitAck,
    };
    // An answer that can't be sent shows in the probe's outcome.
    let _ = send_raw(socket, &answer.to_bytes(), from);
}

/// The IP address in a socket address.
pub(super) fn address_of(from: &SockaddrStorage) -> Option<IpAddr> {
    match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
        (Some(from), _) => Some(from.ip().into()),
        (None, Some(from)) => Some(from.ip().into()),
        (None, None) => None,
    }
}
