//! A thread that reads which packets the program has dropped, and gives lines of a log.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray, RingBuf};
use npm_common::event::{Dropped, Outcome};
use npm_common::packet::Family;
use npm_policy::flow::{Flow, Transport};
use npm_policy::model::Protocol;

use super::kernel::KernelError;
use super::maps::MapsError;
use crate::backend::meter::Direction;
use crate::denied::{Digest, Line, Log, Packet};

/// The maps, as the object names them.
pub(super) const EVENTS: &str = "DROPPED";
pub(super) const LOST: &str = "UNTOLD";

/// The pause between two looks. The program wakes nobody: that would cost a flood's every packet.
const PAUSE: Duration = Duration::from_millis(100);

/// How often it is said that packets had no line.
const COMPLAINT: Duration = Duration::from_secs(10);

/// Where lines go.
pub type Sink = Arc<dyn Fn(Line) + Send + Sync>;

/// Packets that were denied and are in no line, since the start. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Unlogged(Arc<[AtomicU64; 2]>);

impl Unlogged {
    /// By reason: the ring was full; there were too many lines.
    pub(super) fn counts(&self) -> Vec<(&'static str, u64)> {
        let [lost, limited] = &*self.0;
        vec![("ring_full", lost.load(Ordering::Relaxed)), ("rate_limit", limited.load(Ordering::Relaxed))]
    }

    fn add(&self, lost: u64, limited: u64) {
        self.0[0].fetch_add(lost, Ordering::Relaxed);
        self.0[1].fetch_add(limited, Ordering::Relaxed);
    }
}

/// The thread. Dropping it asks it to end.
#[derive(Debug)]
pub(super) struct Denials {
    stop: Arc<AtomicBool>,
}

impl Denials {
    /// Starts it on the maps of the programs that are loaded. They can be taken once.
    ///
    /// # Errors
    /// A map is missing, or there can be no thread.
    pub(super) fn start(
        ebpf: &mut Ebpf,
        log: Log,
        sink: Sink,
        unlogged: Unlogged,
    ) -> Result<Self, KernelError> {
        let mut take = |name| ebpf.take_map(name).ok_or(KernelError::Missing { name });
        let failed = |name| move |source| MapsError::Map { name, source };
        let ring = RingBuf::try_from(take(EVENTS)?).map_err(failed(EVENTS))?;
        let lost = PerCpuArray::try_from(take(LOST)?).map_err(failed(LOST))?;
        let now = Instant::now();
        let mut reader = Reader {
            ring,
            lost,
            log,
            sink,
            unlogged,
            digest: Digest::new(now),
            known: (0, 0),
            complained: ((0, 0), now),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("drops".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                reader.look(Instant::now());
                std::thread::sleep(PAUSE);
            }
            // What was told until now is not lost.
            reader.look(Instant::now());
        });
        // The thread ends by itself.
        drop(thread.map_err(KernelError::Thread)?);
        Ok(Self { stop })
    }
}

impl Drop for Denials {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Reader {
    ring: RingBuf<MapData>,
    lost: PerCpuArray<MapData, u64>,
    log: Log,
    sink: Sink,
    unlogged: Unlogged,
    digest: Digest,
    /// What was lost, and what had no line, at the last look.
    known: (u64, u64),
    /// The same at the last complaint, and when that was.
    complained: ((u64, u64), Instant),
}

impl Reader {
    fn look(&mut self, now: Instant) {
        while let Some(item) = self.ring.next() {
            let Some(dropped) = item.first_chunk().map(Dropped::from_bytes) else { continue };
            let packet = packet(&dropped);
            if self.digest.take(&packet, now) {
                (self.sink)(self.log.line(&packet, 1));
            }
        }
        for (packet, packets) in self.digest.ended(now) {
            (self.sink)(self.log.line(&packet, packets));
        }
        let lost = self.lost.get(&0, 0).map_or(self.known.0, |values| values.iter().sum());
        let limited = self.digest.unlogged();
        self.unlogged.add(lost.saturating_sub(self.known.0), limited.saturating_sub(self.known.1));
        self.known = (lost, limited);
        let ((lost_then, limited_then), then) = self.complained;
        if self.known != self.complained.0 && now.saturating_duration_since(then) >= COMPLAINT {
            let (lost, limited) = (lost.saturating_sub(lost_then), limited.saturating_sub(limited_then));
            tracing::warn!(lost, limited, "denied packets that are in no line");
            self.complained = (self.known, now);
        }
    }
}

/// What the program has told, in the words of policies.
fn packet(dropped: &Dropped) -> Packet {
    let Dropped { headers, outcome, interface } = dropped;
    let outcome = Outcome::at(*outcome);
    let (source, destination): (IpAddr, IpAddr) = match headers.family() {
        Family::V4 => {
            let (source, destination) = headers.v4();
            (source.into(), destination.into())
        }
        Family::V6 => {
            let (source, destination) = headers.v6();
            (source.into(), destination.into())
        }
    };
    let number = headers.protocol().0;
    let protocol = Protocol::ALL.into_iter().find(|protocol| protocol.number() == number);
    let transport = match (protocol, headers.port()) {
        (Some(protocol), Some((_, port))) => Transport::Port(protocol, port),
        (Some(_) | None, _) => Transport::Portless(number),
    };
    let directions = match outcome {
        Outcome::Ingress => vec![Direction::Ingress],
        Outcome::Egress => vec![Direction::Egress],
        Outcome::Both => vec![Direction::Ingress, Direction::Egress],
        Outcome::NotIp
        | Outcome::Local
        | Outcome::Neighbour
        | Outcome::Proven
        | Outcome::NotIsolated
        | Outcome::IngressAllowed
        | Outcome::EgressAllowed
        | Outcome::BothAllowed
        | Outcome::Truncated
        | Outcome::BadHeader
        | Outcome::TooManyExtensions
        | Outcome::TooManyTags
        | Outcome::NoConnection => Vec::new(),
    };
    let flow = headers.has_addresses().then_some(Flow { source, destination, transport });
    Packet { flow, directions, reason: outcome.name(), interface: *interface }
}
