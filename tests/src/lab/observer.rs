//! Watches a filter while it changes: thousands of first packets of new flows a second, each with a number, and which
//! of them arrived.
//!
//! A sender sends crafted UDP datagrams or TCP SYNs with ever-changing source ports; a packet socket in the
//! destination's namespace takes down the numbers. The destination itself drops them before its own stack sees them
//! (raw table), so nobody answers. Packets between namespaces are forwarded within the sender's `send`, so the time
//! at which a packet met the filter lies between the two times that are recorded around the call.
//!
//! Senders run before ordinary threads; with both of a pair at 6,000 a second a machine of two cores has room left
//! for what changes the filter. A machine whose hypervisor gives its cores to others makes pauses all the same: what
//! happens in them goes unseen, so a stream tells how much it has seen ([`Observer::view`]), and whoever needs more
//! goes on.

use std::io::IoSliceMut;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg,
    setsockopt, socket, sockopt,
};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;

use super::netns::Netns;
use super::node::write_setting;
use super::packet::{Ends, IpSender, Segment, tcp, udp};
use super::service::Dialect;
use crate::exec;

/// The first source port of new flows. All above it are used in turn.
const FIRST_PORT: u16 = 1024;
/// How long the receiver listens after the last packet was sent.
const SETTLE: Duration = Duration::from_millis(200);
/// Room for what the receiver has not read yet, in bytes.
const BUFFER: usize = 64 << 20;
/// In a longer pause between two packets a change of a millisecond may go unseen.
pub const BLIND: Duration = Duration::from_millis(1);
/// Marks our packets: the first payload bytes of UDP.
const MARK: [u8; 4] = *b"npmo";

/// One end of a stream of flows.
#[derive(Clone, Debug)]
pub struct End {
    /// Where it lives.
    pub netns: Netns,
    /// Its address.
    pub address: IpAddr,
}

/// A stream of new flows from one end to another.
#[derive(Clone, Debug)]
pub struct Stream {
    /// Where the flows come from.
    pub from: End,
    /// Where they go.
    pub to: End,
    /// TCP (SYNs) or UDP.
    pub protocol: Protocol,
    /// The destination port, the same for all.
    pub port: u16,
    /// How many new flows a second.
    pub rate: u32,
}

/// A stream that runs.
#[derive(Debug)]
pub struct Observer {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
    sender: JoinHandle<Result<Vec<Sent>>>,
    receiver: JoinHandle<Result<Vec<u32>>>,
    progress: Arc<Mutex<Progress>>,
    stream: Stream,
}

/// How far a sender is.
#[derive(Debug)]
struct Progress {
    sent: u32,
    /// The last packet, or the start.
    last: Instant,
    /// The sum of the pauses that were longer than [`BLIND`].
    blind: Duration,
}

/// What a stream has seen up to some time.
#[derive(Clone, Copy, Debug)]
pub struct View {
    at: Instant,
    sent: u32,
    blind: Duration,
}

impl View {
    /// How many packets were sent.
    pub fn sent(&self) -> u32 {
        self.sent
    }

    /// The share of the time since `earlier`, from 0 to 1, in which a change of a millisecond would have been seen.
    pub fn seen_since(&self, earlier: &Self) -> f64 {
        let blind = self.blind.saturating_sub(earlier.blind).as_secs_f64();
        (1.0 - blind / self.seconds_since(earlier)).clamp(0.0, 1.0)
    }

    /// New flows a second since `earlier`.
    pub fn rate_since(&self, earlier: &Self) -> f64 {
        f64::from(self.sent - earlier.sent) / self.seconds_since(earlier)
    }

    fn seconds_since(&self, earlier: &Self) -> f64 {
        (self.at - earlier.at).as_secs_f64().max(f64::EPSILON)
    }
}

/// A packet that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Just before.
    pub before: Instant,
    /// Just after.
    pub after: Instant,
}

/// What became of a stream.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Every packet, by its number.
    pub sent: Vec<Sent>,
    /// Whether the packet of this number arrived.
    pub arrived: Vec<bool>,
}

/// A run of packets that all arrived, or all did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The number of the first.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// From the packet before it to the packet behind it: the state that the run shows lasted no longer.
    pub at_most: Duration,
}

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that arrived.
    Arrived,
    /// Those that did not.
    Lost,
}

/// Prepares a node for streams: entries of flows that nobody answers leave conntrack within a second, so that its
/// table does not fill, and the time until a source port comes round again is enough to make it a new flow.
///
/// # Errors
/// The kernel lacks a setting.
pub fn prepare(node: &Netns) -> Result<()> {
    node.run(|| {
        write_setting("net/netfilter/nf_conntrack_udp_timeout", "1")?;
        write_setting("net/netfilter/nf_conntrack_tcp_timeout_syn_sent", "1")
    })
}

impl Observer {
    /// Starts a stream. Its first packets are sent at once.
    ///
    /// # Errors
    /// A socket or the destination's drop rule can't be made; the protocol is SCTP; the rate is 0.
    pub fn start(stream: Stream) -> Result<Self> {
        if stream.rate == 0 || stream.protocol == Protocol::Sctp {
            bail!("a stream of {} flows of {} a second cannot be sent", stream.rate, stream.protocol);
        }
        deafen(&stream)?;
        let sniffer = stream.to.netns.run(sniffer)?;
        let packets = stream.from.netns.run(IpSender::open)?;
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let receiver = {
            let (stream, done) = (stream.clone(), Arc::clone(&done));
            std::thread::Builder::new()
                .name("observe".into())
                .spawn(move || receive(&sniffer, &stream, &done))
        };
        let receiver = receiver.context("starting a receiver")?;
        let progress =
            Arc::new(Mutex::new(Progress { sent: 0, last: Instant::now(), blind: Duration::ZERO }));
        let sender = {
            let (stream, stop, progress) = (stream.clone(), Arc::clone(&stop), Arc::clone(&progress));
            let send = move || send(&packets, &stream, &stop, &progress);
            std::thread::Builder::new().name("send".into()).spawn(send)
        };
        Ok(Self { stop, done, sender: sender.context("starting a sender")?, receiver, progress, stream })
    }

    /// What it has seen so far. A pause that goes on counts up to this instant.
    pub fn view(&self) -> View {
        let Progress { sent, last, blind } = *self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let at = Instant::now();
        let pause = at.saturating_duration_since(last);
        View { at, sent, blind: if pause > BLIND { blind + pause } else { blind } }
    }

    /// Ends the stream and tells what became of it.
    ///
    /// # Errors
    /// A packet could not be sent, or the receiver's buffer overflowed: then nothing is known.
    pub fn stop(self) -> Result<Trace> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = join(self.sender);
        std::thread::sleep(SETTLE);
        self.done.store(true, Ordering::Relaxed);
        let numbers = join(self.receiver)?;
        hear(&self.stream)?;
        let sent = sent?;
        let mut arrived = vec![false; sent.len()];
        for number in numbers {
            let cell = arrived.get_mut(number as usize).context("a packet arrived that was never sent")?;
            if std::mem::replace(cell, true) {
                bail!("packet {number} arrived twice");
            }
        }
        Ok(Trace { sent, arrived })
    }
}

impl Trace {
    /// The runs of packets that arrived, or that did not, in order.
    pub fn runs(&self, which: Which) -> Vec<Run> {
        let wanted = which == Which::Arrived;
        let mut runs = Vec::new();
        let mut first = None;
        for (number, arrived) in self.arrived.iter().chain([&!wanted]).enumerate() {
            match (first, *arrived == wanted) {
                (None, true) => first = Some(number),
                (Some(start), false) => {
                    first = None;
                    let begin = self.sent[usize::max(start, 1) - 1].before;
                    let end = self.sent[usize::min(number, self.sent.len() - 1)].after;
                    runs.push(Run { first: start, count: number - start, at_most: end - begin });
                }
                (None, false) | (Some(_), true) => {}
            }
        }
        runs
    }

    /// How many packets arrived, or did not.
    pub fn count(&self, which: Which) -> usize {
        let wanted = which == Which::Arrived;
        self.arrived.iter().filter(|arrived| **arrived == wanted).count()
    }

    /// The packets, arrived or lost, of those that were sent wholly within a span of time.
    pub fn count_within(&self, which: Which, from: Instant, to: Instant) -> usize {
        let wanted = which == Which::Arrived;
        let within = |sent: &Sent| sent.before >= from && sent.after <= to;
        self.sent
            .iter()
            .zip(&self.arrived)
            .filter(|(sent, arrived)| within(sent) && **arrived == wanted)
            .count()
    }

    /// Flows a second, on average.
    pub fn rate(&self) -> f64 {
        match (self.sent.first(), self.sent.last()) {
            (Some(first), Some(last)) => self.sent.len() as f64 / (last.after - first.before).as_secs_f64(),
            (None, _) | (_, None) => 0.0,
        }
    }

    /// The longest time between two packets: a change that lasted longer was seen, one that was shorter may not have
    /// been.
    pub fn longest_pause(&self) -> Duration {
        self.sent.windows(2).map(|pair| pair[1].after - pair[0].before).max().unwrap_or_default()
    }
}

fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Lets the destination drop the stream's packets before its own stack, and its conntrack, see them.
fn deafen(stream: &Stream) -> Result<()> {
    raw_table(stream, "-A")
}

/// Undoes [`deafen`].
fn hear(stream: &Stream) -> Result<()> {
    raw_table(stream, "-D")
}

fn raw_table(stream: &Stream, what: &str) -> Result<()> {
    let program = Dialect::Nft.program(Family::of(stream.to.address), "");
    let (protocol, port) = (stream.protocol.to_string().to_lowercase(), stream.port.to_string());
    let (source, rule) = (stream.from.address.to_string(), ["-w", "-t", "raw", what, "PREROUTING"]);
    let mut args = rule.to_vec();
    args.extend(["-s", &source, "-p", &protocol, "--dport", &port, "-j", "DROP"]);
    stream.to.netns.exec(&program, &args).context("keeping the destination silent").map(drop)
}

fn sniffer() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let sniffer = socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll)
        .context("opening a packet socket")?;
    setsockopt(&sniffer, sockopt::RcvBufForce, &BUFFER).context("making room for packets")?;
    setsockopt(&sniffer, sockopt::RxqOvfl, &1).context("asking for the count of lost packets")?;
    Ok(sniffer)
}

fn send(
    packets: &IpSender,
    stream: &Stream,
    stop: &AtomicBool,
    progress: &Mutex<Progress>,
) -> Result<Vec<Sent>> {
    // Otherwise the kernel may wake us up to 50 us late, for every packet.
    nix::sys::prctl::set_timerslack(1).context("setting the timer slack")?;
    exec::run_first()?;
    let pause = Duration::from_secs(1) / stream.rate;
    let start = Instant::now();
    let mut sent: Vec<Sent> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let number = u32::try_from(sent.len()).context("too many packets for one stream")?;
        let due = start + pause * number;
        if let Some(early) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(early);
        }
        let packet = render(stream, number)?;
        let before = Instant::now();
        packets.send(&packet)?;
        sent.push(Sent { before, after: Instant::now() });
        let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
        let pause = before.saturating_duration_since(progress.last);
        progress.blind += if pause > BLIND { pause } else { Duration::ZERO };
        (progress.sent, progress.last) = (number + 1, before);
    }
    Ok(sent)
}

fn render(stream: &Stream, number: u32) -> Result<Vec<u8>> {
    let ports = u32::from(u16::MAX - FIRST_PORT) + 1;
    let source = FIRST_PORT + u16::try_from(number % ports).context("a port")?;
    let ends = Ends {
        source: SocketAddr::new(stream.from.address, source),
        destination: SocketAddr::new(stream.to.address, stream.port),
    };
    match stream.protocol {
        Protocol::Tcp => tcp(ends, Segment::Syn, number),
        Protocol::Udp => {
            let mut payload = MARK.to_vec();
            payload.extend(number.to_be_bytes());
            udp(ends, &payload)
        }
        Protocol::Sctp => bail!("SCTP streams are not sent"),
    }
}

fn receive(sniffer: &OwnedFd, stream: &Stream, done: &AtomicBool) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    let mut buffer = [0; 256];
    let mut overflow = cmsg_space!(u32);
    loop {
        // Asked first: what came before is read after.
        let last = done.load(Ordering::Relaxed);
        match poll(&mut [PollFd::new(sniffer.as_fd(), PollFlags::POLLIN)], 20u8) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("waiting for packets"),
        }
        loop {
            let len = {
                let mut room = [IoSliceMut::new(&mut buffer)];
                let none = MsgFlags::empty();
                match recvmsg::<LinkAddr>(sniffer.as_raw_fd(), &mut room, Some(&mut overflow), none) {
                    Ok(message) => {
                        for control in message.cmsgs().context("reading control messages")? {
                            if let ControlMessageOwned::RxqOvfl(lost @ 1..) = control {
                                bail!("the receiver was too slow and lost {lost} packets");
                            }
                        }
                        message.bytes
                    }
                    Err(nix::Error::EAGAIN) => break,
                    Err(error) => return Err(error).context("receiving packets"),
                }
            };
            numbers.extend(number_of(stream, &buffer[..len]));
        }
        if last {
            return Ok(numbers);
        }
    }
}

/// The number of a packet of the stream.
fn number_of(stream: &Stream, packet: &[u8]) -> Option<u32> {
    let (source, protocol, start) = match packet.first()? >> 4 {
        4 => {
            let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            (IpAddr::from(source), packet[9], 20)
        }
        6 => {
            let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            (IpAddr::from(source), packet[6], 40)
        }
        _ => return None,
    };
    let destination = u16::from_be_bytes(packet.get(start + 2..start + 4)?.try_into().ok()?);
    if source != stream.from.address || protocol != stream.protocol.number() || destination != stream.port {
        return None;
    }
    let at = match stream.protocol {
        Protocol::Tcp => start + 4,
        Protocol::Udp if packet.get(start + 8..start + 12)? == MARK => start + 12,
        Protocol::Udp | Protocol::Sctp => return None,
    };
    Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?))
}
