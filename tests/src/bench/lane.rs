//! New flows as packets through a node's namespace, and the CPU time that they take.
//!
//! ```text
//!  generator ── veth ── node (routes everything on; filters) ── veth ── sink (drops: nothing there is its own)
//! ```
//!
//! Every packet opens a flow of its own. A veth hands a packet on within the sender's `send`, and the node's and the
//! sink's work is softirq on its behalf: so the CPU time of the sending thread is the whole way of the packet. The thread
//! stays on one CPU and runs before all ordinary ones, which else would take over softirqs of ours; what that CPU's
//! ksoftirqd takes over is added. Of the batches the median counts. The same for every lane: lanes differ in what
//! filters. Sending and receiving is in all figures, so ratios are smaller than what filters has to do alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramInfo, SchedClassifier, TcAttachType};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use npm_agent::backend::Backend;
use npm_agent::backend::meter::Timekeeping;
use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::{Family, Goal};
use npm_policy::model::Protocol;

use super::world::Kind;
use crate::exec;
use crate::lab::netns::Netns;
use crate::lab::node::Layout;
use crate::lab::packet::{self, Ends, IpSender, Segment};
use crate::lab::service::Dialect;
use crate::lab::{Host, Lab, Spec};
use crate::programs;
use crate::random::SplitMix;
use crate::statistics::Statistics;

/// Where the node sends everything: to the sink, which has this address on paper only.
const NEXT_HOP: [(&str, &str); 2] = [("-4", "169.254.9.9"), ("-6", "fe80::99")];
/// The node's device towards the sink: the second pod's.
pub(super) const OUT: &str = "veth1";

/// A node that filters, between a generator and a sink.
pub struct Lane {
    /// What filters, for people.
    pub name: String,
    lab: Lab,
    sender: IpSender,
    backend: Option<Box<dyn Backend>>,
    /// Keeps the empty program.
    empty: Option<aya::Ebpf>,
    /// That at the way out, whose time is of interest.
    program: Option<ProgramInfo>,
    port: u16,
}

impl Lane {
    /// Makes the namespaces. The node tracks connections, and filters nothing.
    ///
    /// # Errors
    /// The caller is not root, or a program is missing.
    pub fn open(name: &str, dialect: Dialect) -> Result<Self> {
        let host = |name: &str, v4: &str, v6: &str| -> Result<Host> {
            Ok(Host { name: name.to_owned(), addresses: vec![v4.parse()?, v6.parse()?] })
        };
        let mut lab = Lab::build(&Spec {
            layout: Layout::Routed,
            nodes: vec![host("node", "10.240.0.4", "fd00:240::4")?],
            pods: vec![
                (0, host("generator", "10.250.0.1", "fd00:250::1")?),
                (0, host("sink", "10.250.0.2", "fd00:250::2")?),
            ],
            externals: Vec::new(),
        })?;
        lab.stop_listening();
        let node = lab.netns("node")?;
        let link = lab.netns("sink")?.exec("ip", &["-o", "link", "show", "eth0"])?;
        let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        let mac = mac.with_context(|| format!("no address in {link}"))?;
        for (family, hop) in NEXT_HOP {
            node.exec(
                "ip",
                &[family, "neigh", "replace", hop, "lladdr", mac, "dev", OUT, "nud", "permanent"],
            )?;
            node.exec("ip", &[family, "route", "replace", "default", "via", hop, "dev", OUT, "onlink"])?;
        }
        for family in Family::BOTH {
            // A rule about connections makes the kernel track them, as every node with Services does.
            let rule = ["-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "ACCEPT"];
            node.exec(&dialect.program(family, ""), &rule)?;
        }
        let sender = lab.netns("generator")?.run(IpSender::open)?;
        Ok(Self {
            name: name.to_owned(),
            lab,
            sender,
            backend: None,
            empty: None,
            program: None,
            port: 20_000,
        })
    }

    /// The node's namespace: a backend works in that of the thread that makes and calls it.
    ///
    /// # Errors
    /// None: the node is there.
    pub fn node(&self) -> Result<&Netns> {
        self.lab.netns("node")
    }

    /// The namespace of this name.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn netns(&self, name: &str) -> Result<&Netns> {
        self.lab.netns(name)
    }

    /// Sends from the generator.
    pub(super) fn sender(&self) -> &IpSender {
        &self.sender
    }

    /// Makes the node filter.
    ///
    /// # Errors
    /// The backend can't be made, or does not take the goal whole.
    pub fn enforce(
        &mut self,
        make: impl FnOnce() -> Result<Box<dyn Backend>> + Send,
        goal: &Goal,
    ) -> Result<()> {
        let node = self.node()?.clone();
        let backend = self.backend.insert(node.run(make)?);
        let applied = node.run(|| Ok(backend.apply(goal)?))?;
        ensure!(applied.degraded.is_empty(), "the kernel would not take all: {:?}", applied.degraded);
        Ok(())
    }

    /// Puts a program that does nothing where the eBPF backend's would be.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn put_empty(&mut self) -> Result<()> {
        let mut object = programs::object()?;
        let program = programs::program(&mut object, "nothing")?;
        program.load().context("loading the empty program")?;
        self.program = Some(self.node()?.run(|| {
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            program.attach_with_options(OUT, TcAttachType::Egress, first)?;
            Ok(program.info()?)
        })?);
        self.empty = Some(object);
        Ok(())
    }

    /// The program whose time is of interest is pinned there.
    ///
    /// # Errors
    /// There is none.
    pub fn watch(&mut self, pinned: &Path) -> Result<()> {
        self.program = Some(SchedClassifier::from_pin(pinned)?.info()?);
        Ok(())
    }

    /// What the program at the way out has spent until now. `None`: there is none.
    pub(super) fn spent(&self) -> Result<Option<Spent>> {
        self.program.as_ref().map(Spent::of).transpose()
    }

    /// As many packets as `count`, each of a connection of its own, round the flows.
    fn packets(&mut self, flows: &[Flow], count: usize) -> Result<Vec<Vec<u8>>> {
        let packets = flows.iter().cycle().take(count).map(|flow| {
            let Transport::Port(protocol, port) = flow.transport else { bail!("{flow} has no port") };
            self.port = if self.port == u16::MAX { 20_000 } else { self.port + 1 };
            let source = SocketAddr::new(flow.source, self.port);
            let ends = Ends { source, destination: SocketAddr::new(flow.destination, port) };
            match protocol {
                Protocol::Tcp => packet::tcp(ends, Segment::Syn, 1),
                Protocol::Udp => packet::udp(ends, b"new flow"),
                Protocol::Sctp => bail!("{flow}: SCTP is not sent here"),
            }
        });
        packets.collect()
    }

    /// Packets that have arrived at the sink.
    fn arrived(&self) -> Result<u64> {
        self.lab.netns("sink")?.run(|| {
            // Of the thread's own namespace (proc_net(5)).
            let text = std::fs::read_to_string("/proc/thread-self/net/dev").context("reading counters")?;
            let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("no eth0")?;
            let packets = line.split_whitespace().nth(1).context("no count of packets")?;
            packets.parse().context("a count of packets")
        })
    }

    fn forget_connections(&self) -> Result<()> {
        self.node()?.exec("conntrack", &["-F"]).map(drop)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // What is pinned outlives the namespace.
        let Some(mut backend) = self.backend.take() else { return };
        let removed = self.node().and_then(|node| node.run(|| Ok(backend.remove()?)));
        if let Err(error) = removed {
            eprintln!("{} is not removed: {error:#}", self.name);
        }
    }
}

/// Packets that go before those that are timed: what is cold because another lane was measured before is not the lane's own.
const LEAD: usize = 64;

/// Sends batches from one CPU.
pub struct Clock {
    /// Of the kernel's thread that does this CPU's softirqs when there are too many.
    ksoftirqd: ClockId,
}

impl Clock {
    /// Moves the calling thread to the last CPU, before all ordinary threads. Call it on a thread made for the purpose.
    ///
    /// # Errors
    /// The caller is not root.
    pub fn start() -> Result<Self> {
        let cpu = std::thread::available_parallelism().context("counting CPUs")?.get() - 1;
        let mut set = CpuSet::new();
        set.set(cpu).context("choosing a CPU")?;
        sched_setaffinity(Pid::from_raw(0), &set).context("staying on a CPU")?;
        exec::run_first()?;
        let name = format!("ksoftirqd/{cpu}\n");
        let pid = std::fs::read_dir("/proc").context("listing processes")?.find_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
            (std::fs::read_to_string(entry.path().join("comm")).ok()? == name).then_some(pid)
        });
        let pid = Pid::from_raw(pid.with_context(|| format!("no thread {name}"))?);
        let ksoftirqd = ClockId::pid_cpu_clock_id(pid).context("the clock of ksoftirqd")?;
        Ok(Self { ksoftirqd })
    }

    fn now(&self) -> Result<Duration> {
        let own = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("asking for the time")?;
        let other = clock_gettime(self.ksoftirqd).context("asking for ksoftirqd's time")?;
        Ok(Duration::from(own) + Duration::from(other))
    }

    /// The CPU time of one packet of a batch, of which the first 64 (`LEAD`) are not timed, and checks that all arrive, or none.
    ///
    /// # Errors
    /// A packet can't be sent; too few or too many arrive: then the time is not that of what was asked.
    pub fn time(&self, lane: &mut Lane, (kind, flows): (Kind, &[Flow]), count: usize) -> Result<Duration> {
        let packets = lane.packets(flows, count)?;
        let (lead, timed) = packets.split_at(LEAD.min(count / 2));
        let before = lane.arrived()?;
        for packet in lead {
            lane.sender.send(packet)?;
        }
        let began = self.now()?;
        for packet in timed {
            lane.sender.send(packet)?;
        }
        let took = self.now()?.saturating_sub(began);
        let arrived = lane.arrived()? - before;
        // Neighbour discovery and its likes arrive too, a few.
        let expected = match (kind, &lane.backend) {
            (Kind::Hit, _) | (Kind::Miss, None) => count as u64,
            (Kind::Miss, Some(_)) => 0,
        };
        ensure!(
            (expected..=expected + 10).contains(&arrived),
            "{}: {arrived} of {count} packets arrived, {expected} should",
            lane.name
        );
        lane.forget_connections()?;
        Ok(took / u32::try_from(timed.len())?)
    }
}

/// The median, of at least one.
pub fn median(numbers: &[f64]) -> Option<f64> {
    interval(numbers).map(|[_, median, _]| median)
}

/// The median in the middle; left and right of it what it is between with a probability of 95 of 100, whatever the numbers are
/// distributed like (the normal approximation to the ranks' binomial distribution). Of at least one.
pub fn interval(numbers: &[f64]) -> Option<[f64; 3]> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    let last = count.checked_sub(1)?;
    let low = (((count as f64 - 1.96 * (count as f64).sqrt()) / 2.0).max(0.0)) as usize;
    let at = |index: usize| sorted.get(index).copied();
    Some([at(low)?, (at(last / 2)? + at(count / 2)?) / 2.0, at(last - low)?])
}

/// What was measured, by kind and family; one number for each round, in their order.
pub type Series<T> = BTreeMap<(Kind, Family), Vec<T>>;

/// A lane and what goes through it.
pub struct Course<'a> {
    /// The lane.
    pub lane: Lane,
    /// What is sent, in turn.
    pub flows: &'a Series<Flow>,
}

/// What one packet takes.
#[derive(Clone, Debug, Default)]
pub struct Times {
    /// CPU time of its way through the lane, in seconds.
    pub way: Series<f64>,
    /// Of that, by the kernel's count, the time of the program at the node's way out, in nanoseconds. In rounds of their own:
    /// counting takes time. Empty: there is no program.
    pub program: Series<f64>,
}

/// Measures all lanes in turn, so many rounds, in another order each time: who comes next finds the caches as who came before has
/// left them. What disturbs one disturbs the others.
///
/// # Errors
/// As [`Clock::time`].
pub fn measure(courses: &mut [Course<'_>], rounds: u32, count: usize) -> Result<Vec<Times>> {
    let mut times = vec![Times::default(); courses.len()];
    let mut numbers = SplitMix(1);
    let mut order: Vec<usize> = (0..courses.len()).collect();
    crate::lab::netns::on_fresh_thread(|| {
        let mut statistics = Statistics::hold()?;
        statistics.set(Timekeeping::Off)?;
        let clock = Clock::start()?;
        // The first round warms up: neighbours, caches.
        for round in 0..=rounds {
            for class in classes(courses) {
                numbers.shuffle(&mut order);
                for index in &order {
                    let Course { lane, flows } = &mut courses[*index];
                    let Some(flows) = flows.get(&class) else { continue };
                    let time = clock.time(lane, (class.0, flows), count)?;
                    if round > 0 {
                        times[*index].way.entry(class).or_default().push(time.as_secs_f64());
                    }
                }
            }
        }
        statistics.set(Timekeeping::On)?;
        for _ in 0..rounds {
            for class in classes(courses) {
                numbers.shuffle(&mut order);
                for index in &order {
                    let Course { lane, flows } = &mut courses[*index];
                    let Some(flows) = flows.get(&class) else { continue };
                    let Some(began) = lane.spent()? else { continue };
                    clock.time(lane, (class.0, flows), count)?;
                    let spent = lane.spent()?.context("the program is gone")?.since(began);
                    spent.expect(count as u64)?;
                    times[*index].program.entry(class).or_default().push(spent.per_run());
                }
            }
        }
        Ok(times)
    })
}

/// All kinds and families of flows.
fn classes(courses: &[Course<'_>]) -> BTreeSet<(Kind, Family)> {
    courses.iter().flat_map(|course| course.flows.keys().copied()).collect()
}

/// What the kernel counts of a program, where it counts (`kernel.bpf_stats_enabled`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Spent {
    nanoseconds: u128,
    /// How often it ran.
    runs: u64,
}

impl Spent {
    /// Until now.
    pub(super) fn of(program: &ProgramInfo) -> Result<Self> {
        let now = aya::programs::loaded_programs()
            .filter_map(|program| program.ok())
            .find(|other| other.id() == program.id())
            .context("the program is gone")?;
        Ok(Self { nanoseconds: now.run_time().as_nanos(), runs: now.run_count() })
    }

    /// What has been added.
    pub(super) fn since(self, earlier: Self) -> Self {
        Self { nanoseconds: self.nanoseconds - earlier.nanoseconds, runs: self.runs - earlier.runs }
    }

    /// Checks that it ran for each of so many packets. Neighbour discovery and its likes pass it too, a few.
    ///
    /// # Errors
    /// It ran otherwise, or nobody counts: then the mean says nothing.
    pub(super) fn expect(self, packets: u64) -> Result<()> {
        let runs = self.runs;
        ensure!((packets..=packets + 10).contains(&runs), "{runs} runs for {packets} packets");
        Ok(())
    }

    /// The mean of a run, in nanoseconds.
    pub(super) fn per_run(self) -> f64 {
        self.nanoseconds as f64 / self.runs as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_of_ranks() {
        let numbers: Vec<f64> = (0..61).rev().map(f64::from).collect();
        assert_eq!(interval(&numbers), Some([22.0, 30.0, 38.0]));
        assert_eq!(interval(&[3.0, 1.0]), Some([1.0, 2.0, 3.0]));
        assert_eq!((interval(&[5.0]), interval(&[])), (Some([5.0; 3]), None));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
