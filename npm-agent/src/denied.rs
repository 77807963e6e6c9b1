//! The log of denied flows: whose packets were dropped, by which policies, a line a flow and not a packet.
//!
//! ```text
//! a backend ── Packet ──► Digest ── now and then ──► Log::line ──► Line ──► the log
//! reconcile ── who holds which address ──────────────────▲
//! a backend ── the goal in force ────────────────────────┘
//! ```
//!
//! Counting is not done here: backends count every packet, logged or not.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use npm_policy::flow::{Decision, Flow, Judgement};
use npm_policy::goal::Goal;
use npm_policy::model::PodKey;
use tracing::info;

use crate::backend::meter::Direction;

/// For how long packets of a flow that has had its line are only counted; then one line tells how many.
pub const WINDOW: Duration = Duration::from_secs(10);
/// Lines a second in the long run.
pub const LINES_PER_SECOND: u32 = 10;
/// Lines at once.
pub const BURST: u32 = 50;
/// Flows that are kept in mind: a scan must not fill the memory.
const MAX_FLOWS: usize = 4096;

/// A packet that was dropped.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Packet {
    /// What policies were asked of; `None`: its headers can't be read so far.
    pub flow: Option<Flow>,
    /// Whose policies deny it; empty: it was dropped for another reason.
    pub directions: Vec<Direction>,
    /// Why it was dropped, as the metrics name it.
    pub reason: &'static str,
    /// The number of the interface that it was to leave by.
    pub interface: u32,
}

/// What the log says of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The pod, as `namespace/name`, or the address where no pod has it; empty: not known.
    pub source: String,
    /// The same.
    pub destination: String,
    /// The addresses.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// Protocol and destination port, as `TCP/443`; empty: not known.
    pub port: String,
    /// Whose policies deny it: `ingress`, `egress`, or both with a comma.
    pub direction: String,
    /// The policies that isolate for this and allow it not, as `namespace/name`, with commas.
    pub policies: String,
    /// Why it was dropped, as the metrics name it.
    pub reason: &'static str,
    /// The number of the interface that it was to leave by.
    pub interface: u32,
    /// How many packets the line is about.
    pub packets: u64,
    /// The verdict in words.
    pub verdict: String,
}

impl Line {
    /// Writes it to the log.
    pub fn write(&self) {
        let Self {
            source,
            destination,
            addresses,
            port,
            direction,
            policies,
            reason,
            interface,
            packets,
            verdict,
        } = self;
        let address = |end: Option<IpAddr>| end.map(|address| address.to_string()).unwrap_or_default();
        info!(
            source,
            source_address = address(addresses.map(|(source, _)| source)),
            destination,
            destination_address = address(addresses.map(|(_, destination)| destination)),
            port,
            direction,
            policies,
            reason,
            interface,
            packets,
            verdict,
            "denied"
        );
    }
}

/// Who holds which address, and what is enforced. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    pods: BTreeMap<IpAddr, PodKey>,
    goal: Goal,
}

impl Log {
    /// This pod holds the address from now on, or none does.
    pub fn holder(&self, address: IpAddr, pod: Option<PodKey>) {
        let mut known = self.lock();
        match pod {
            Some(pod) => drop(known.pods.insert(address, pod)),
            None => drop(known.pods.remove(&address)),
        }
    }

    /// This goal is enforced from now on.
    pub fn enforced(&self, goal: &Goal) {
        self.lock().goal = goal.clone();
    }

    /// What is to be said of so many packets. The policies are those of now: one that came after the packet may allow it.
    pub fn line(&self, packet: &Packet, packets: u64) -> Line {
        let Packet { flow, directions, reason, interface } = packet;
        let direction = directions.iter().map(|direction| direction.name()).collect::<Vec<_>>().join(",");
        let mut line = Line {
            source: String::new(),
            destination: String::new(),
            addresses: None,
            port: String::new(),
            direction,
            policies: String::new(),
            reason,
            interface: *interface,
            packets,
            verdict: "the packet can't be read".to_owned(),
        };
        let Some(flow) = flow else { return line };
        let known = self.lock();
        let name = |address: IpAddr| known.pods.get(&address).map_or(address.to_string(), PodKey::to_string);
        (line.source, line.destination) = (name(flow.source), name(flow.destination));
        line.addresses = Some((flow.source, flow.destination));
        line.port = flow.transport.to_string();
        if directions.is_empty() {
            return line;
        }
        let verdict = known.goal.verdict(flow);
        if verdict.decision() == Decision::Allow {
            line.verdict = "policies allow it by now".to_owned();
            return line;
        }
        let policies = directions.iter().flat_map(|direction| {
            let judgement = match direction {
                Direction::Ingress => &verdict.ingress,
                Direction::Egress => &verdict.egress,
            };
            match judgement {
                Judgement::Denied { selected_by } => selected_by.iter().map(ToString::to_string).collect(),
                Judgement::Allowed { .. } | Judgement::NotIsolated => Vec::new(),
            }
        });
        let mut policies: Vec<String> = policies.collect();
        policies.sort();
        policies.dedup();
        line.policies = policies.join(",");
        line.verdict = verdict.explain_as(&line.source, &line.destination, flow.transport);
        line
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // No code panics while it holds the lock, and a panic elsewhere ends the process.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decides which packets get a line.
#[derive(Debug)]
pub struct Digest {
    /// Flows that have had their line, and how many packets came since.
    flows: BTreeMap<Packet, Seen>,
    /// Lines that may be written now.
    allowance: f64,
    /// When that was so.
    at: Instant,
    /// Packets that no line is about.
    unlogged: u64,
}

#[derive(Debug)]
struct Seen {
    since: Instant,
    more: u64,
}

impl Digest {
    /// Nothing seen yet.
    pub fn new(now: Instant) -> Self {
        Self { flows: BTreeMap::new(), allowance: f64::from(BURST), at: now, unlogged: 0 }
    }

    /// A packet was dropped; whether it is to have a line.
    pub fn take(&mut self, packet: &Packet, now: Instant) -> bool {
        if let Some(seen) = self.flows.get_mut(packet) {
            seen.more += 1;
            return false;
        }
        if self.flows.len() >= MAX_FLOWS || !self.may_write(now) {
            self.unlogged += 1;
            return false;
        }
        self.flows.insert(packet.clone(), Seen { since: now, more: 0 });
        true
    }

    /// The flows whose window has ended and that have had more packets than the one with the line: how many.
    pub fn ended(&mut self, now: Instant) -> Vec<(Packet, u64)> {
        let is_over = |seen: &Seen| now.saturating_duration_since(seen.since) >= WINDOW;
        let over: Vec<Packet> =
            self.flows.iter().filter(|(_, seen)| is_over(seen)).map(|(packet, _)| packet.clone()).collect();
        let mut lines = Vec::new();
        for packet in over {
            let Some(Seen { more, .. }) = self.flows.remove(&packet) else { continue };
            if more == 0 {
                continue;
            }
            if self.may_write(now) {
                lines.push((packet, more));
            } else {
                self.unlogged += more;
            }
        }
        lines
    }

    /// Packets that no line is about, so far.
    pub fn unlogged(&self) -> u64 {
        self.unlogged
    }

    fn may_write(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.allowance = (self.allowance + passed * f64::from(LINES_PER_SECOND)).min(f64::from(BURST));
        self.at = now;
        let may = self.allowance >= 1.0;
        if may {
            self.allowance -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use npm_policy::flow::Transport;
    use npm_policy::model::Protocol;

    use super::*;

    fn packet(port: u16) -> Packet {
        let flow = Flow {
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            transport: Transport::Port(Protocol::Tcp, port),
        };
        Packet {
            flow: Some(flow),
            directions: vec![Direction::Ingress],
            reason: "ingress_denied",
            interface: 7,
        }
    }

    #[test]
    fn a_flow_has_a_line_and_the_rest_is_counted() {
        let start = Instant::now();
        let mut digest = Digest::new(start);
        assert!(digest.take(&packet(1), start));
        for _ in 0..1000 {
            assert!(!digest.take(&packet(1), start + WINDOW / 2));
        }
        assert!(digest.take(&packet(2), start + WINDOW / 2), "another flow");
        assert_eq!(digest.ended(start + WINDOW / 2), []);
        assert_eq!(digest.ended(start + WINDOW), [(packet(1), 1000)]);
        assert_eq!(digest.ended(start + WINDOW * 2), [], "one packet has had its line");
        assert!(digest.take(&packet(1), start + WINDOW * 2), "it begins again");
        assert_eq!(digest.unlogged(), 0);
    }

    #[test]
    fn lines_are_limited_and_what_has_none_is_counted() {
        let start = Instant::now();
        let mut digest = Digest::new(start);
        let lines = (0..1000).filter(|port| digest.take(&packet(*port), start)).count();
        assert_eq!((lines, digest.unlogged()), (BURST as usize, 1000 - u64::from(BURST)));
        let second = start + Duration::from_secs(1);
        let lines = (1000..2000).filter(|port| digest.take(&packet(*port), second)).count();
        assert_eq!(lines, LINES_PER_SECOND as usize);
        let mut later = second;
        let mut kept = 0;
        for port in 0..u16::MAX {
            later += Duration::from_millis(150);
            kept += usize::from(digest.take(&packet(port), later));
        }
        assert!(kept <= MAX_FLOWS, "memory is bounded: {kept}");
    }

    #[test]
    fn lines_name_pods_or_addresses() {
        let log = Log::default();
        log.holder([10, 0, 0, 1].into(), Some(PodKey::new("x", "a")));
        let line = log.line(&packet(443), 3);
        assert_eq!((line.source.as_str(), line.destination.as_str()), ("x/a", "10.0.0.2"));
        assert_eq!((line.port.as_str(), line.direction.as_str(), line.packets), ("TCP/443", "ingress", 3));
        assert_eq!(line.verdict, "policies allow it by now", "no goal denies it");
        log.holder([10, 0, 0, 1].into(), None);
        assert_eq!(log.line(&packet(443), 1).source, "10.0.0.1");
        let unread = Packet { flow: None, directions: Vec::new(), reason: "truncated", interface: 0 };
        assert_eq!(log.line(&unread, 1).verdict, "the packet can't be read");
    }
}
