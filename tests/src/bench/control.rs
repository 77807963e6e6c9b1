//! The agent before an API server with a large cluster: memory, time to the first programming, and from an event to the
//! kernel.
//!
//! ```text
//! server (a process) ── HTTP ──► agent (a process) ──► kernel ◄── looks ── here
//!     ▲ commands: change a pod, replace pods, expire                       │
//!     └────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The time of an event begins when the server hands its line to the connection, and ends when the kernel's own maps or
//! sets say so, by one clock. What the server takes is not in it.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use npm_agent::backend::ebpf::pins::BPF_FILE_SYSTEM;
use npm_agent::reconcile::Freshness;
use npm_agent::status::client::Client;
use npm_agent::status::report::Report;
use npm_common::layout::{Known, NOBODY, NOT_ISOLATED, Record, SCHEMA, V4, half_of};
use npm_policy::goal::Family;
use npm_policy::names::{kernel_set_name, set_name};
use tempfile::TempDir;

use super::cluster::{Cluster, NODE, Probe, Shown};
use crate::apiserver::sent::monotonic;
use crate::exec;
use crate::lab::agent::{Agent, Settings, binary};
use crate::lab::netns::Netns;
use crate::lab::{Lab, Spec};

/// How long a step may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How the run is.
#[derive(Clone, Debug)]
pub struct Plan {
    /// `ebpf` or `iptables`.
    pub backend: String,
    /// How many namespaces the cluster has.
    pub cluster: Cluster,
    /// Whether the server has streaming lists.
    pub streaming_lists: bool,
    /// Pods replaced a second while events are measured.
    pub churn: u32,
    /// How many events are measured.
    pub probes: u32,
    /// The agent's `--verify-interval`.
    pub verify_interval: String,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Objects that the server holds.
    pub objects: String,
    /// From the start of the process until the first goal was programmed.
    pub first_sync: Spent,
    /// From the moment the server forgot its log until everything was listed anew.
    pub relist: Spent,
    /// Memory after the first sync, after the relist, and at the end.
    pub memory: [Memory; 3],
    /// Single events.
    pub events: Events,
}

/// What single events took, with pods being replaced all the time.
#[derive(Clone, Debug)]
pub struct Events {
    /// While they were measured.
    pub spent: Spent,
    /// Events that the server sent then, and their bytes.
    pub sent: (u64, u64),
    /// Applies then.
    pub applies: u64,
    /// From the server's hand to the kernel, sorted.
    pub latencies: Vec<Duration>,
}

/// A time, and what CPU time processes took in it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// By the clock.
    pub time: Duration,
    /// The agent's CPU time.
    pub agent: Duration,
    /// The server's CPU time.
    pub server: Duration,
}

impl fmt::Display for Spent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [time, agent, server] = [self.time, self.agent, self.server].map(|it| it.as_secs_f64());
        write!(f, "{time:.2} s (CPU time: agent {agent:.2} s, server {server:.2} s)")
    }
}

/// What a process takes, in KiB (proc_pid_status(5)).
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// `VmHWM`: the most that was ever resident.
    pub peak: u64,
    /// `VmRSS`.
    pub now: u64,
    /// `RssAnon`: of that, what is of no file.
    pub anonymous: u64,
}

impl Events {
    /// The latency that this part of the events did not exceed.
    ///
    /// # Panics
    /// Nothing was measured.
    pub fn quantile(&self, part: f64) -> Duration {
        let last = self.latencies.len() - 1;
        // Rank statistics: the smallest that at least this part does not exceed.
        let rank = (part * self.latencies.len() as f64).ceil() as usize;
        self.latencies[rank.saturating_sub(1).min(last)]
    }
}

/// The server's process.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.input, "{command}").context("giving the server a command")?;
        self.line()
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(
            self.output.read_line(&mut line).context("hearing from the server")? > 0,
            "the server has ended"
        );
        Ok(line.trim().to_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server and an agent on a node.
pub struct Stage {
    // Dropped in this order: what runs in namespaces before the namespaces.
    agent: Agent,
    server: Process,
    lab: Lab,
    directory: TempDir,
    instance: String,
    plan: Plan,
    started: Duration,
    /// What the server said of itself.
    pub objects: String,
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Pins are not the namespace's, and would stay.
        let node = self.lab.netns("node").cloned();
        let cleaned = node.and_then(|node| {
            self.agent.kill()?;
            node.exec(&binary()?.to_string_lossy(), &["cleanup"])
        });
        if let Err(error) = cleaned {
            eprintln!("what the agent has pinned is left behind: {error:#}");
        }
    }
}

impl Stage {
    /// Starts both. The agent has programmed nothing yet.
    ///
    /// # Errors
    /// The caller is not root, or a program is missing.
    pub fn start(plan: Plan) -> Result<Self> {
        let lab = Lab::build(&Spec::one_node(&[("pod", ["10.241.0.2", "fd00:241::2"])])?)?;
        let netns = lab.netns("node")?;
        let directory = tempfile::tempdir()?;
        let kubeconfig = directory.path().join("kubeconfig").to_string_lossy().into_owned();
        let mut server = serve(netns, &plan, &kubeconfig)?;
        let objects = server.line()?;
        let instance = netns.name().to_owned();
        let started = monotonic();
        let arguments = [
            ["--source", "kube"],
            ["--kubeconfig", &kubeconfig],
            ["--instance", &instance],
            ["--verify-interval", &plan.verify_interval],
        ];
        let settings = Settings {
            backend: plan.backend.clone(),
            node: NODE.into(),
            manifests: "".into(),
            directory: directory.path().to_owned(),
            more: arguments.concat().into_iter().map(str::to_owned).collect(),
        };
        let agent = Agent::start(netns, settings)?;
        Ok(Self { agent, server, lab, directory, instance, plan, started, objects })
    }

    /// Waits for the first goal to be programmed.
    ///
    /// # Errors
    /// It takes too long.
    pub fn first_sync(&mut self) -> Result<Spent> {
        let before = self.server_time()?;
        self.until("the first goal", |report| {
            report.status.backends.iter().all(|backend| backend.generation > 0)
        })?;
        let time = monotonic() - self.started;
        Ok(Spent { time, agent: self.agent_time()?, server: self.server_time()? - before })
    }

    /// Lets the server forget its log, and waits until the agent has listed everything again.
    ///
    /// # Errors
    /// It takes too long.
    pub fn relist(&mut self) -> Result<Spent> {
        self.spent(|stage| {
            ensure!(stage.server.ask("expire")? == "done", "the server does not expire");
            stage.until("the second list", |report| {
                report.status.source.watches.iter().all(|watch| watch.following && watch.lists >= 2)
            })
        })
        .map(|(spent, ())| spent)
    }

    /// Measures single events, with pods being replaced all the time.
    ///
    /// # Errors
    /// The kernel does not come to show an event.
    pub fn events(&mut self) -> Result<Events> {
        let Plan { churn, probes, cluster, .. } = self.plan;
        ensure!(self.server.ask(&format!("churn {churn}"))? == "done", "no churn");
        // The first ones find what the relist has left to do.
        std::thread::sleep(Duration::from_secs(1));
        let (before, applied) = (self.totals()?, self.applies()?);
        let (spent, mut latencies) = self.spent(|stage| {
            let mut eyes = stage.eyes()?;
            let mut dice = crate::random::SplitMix(1);
            let mut latencies = Vec::new();
            for number in 0..probes {
                std::thread::sleep(Duration::from_millis(20 + dice.next() % 80));
                latencies.push(stage.event(number, cluster, &mut eyes)?);
            }
            Ok(latencies)
        })?;
        let (after, applies) = (self.totals()?, self.applies()? - applied);
        ensure!(self.server.ask("churn 0")? == "done", "the churn does not end");
        latencies.sort_unstable();
        Ok(Events { spent, sent: (after.0 - before.0, after.1 - before.1), applies, latencies })
    }

    fn event(&mut self, number: u32, cluster: Cluster, eyes: &mut Eyes) -> Result<Duration> {
        let probe = cluster.probe(number);
        let answer = self.server.ask(&format!("probe {number}"))?;
        let sent = answer.strip_prefix("sent ").and_then(|text| text.parse().ok()).context("no time")?;
        let sent = Duration::from_nanos(sent);
        let deadline = Instant::now() + PATIENCE;
        while !eyes.see(&self.lab, &probe)? {
            if Instant::now() > deadline {
                bail!(
                    "event {number}: the kernel does not show {:?} of {}: {}",
                    probe.shown,
                    probe.address,
                    self.agent.log()
                );
            }
            std::thread::sleep(eyes.pause());
        }
        Ok(monotonic().saturating_sub(sent))
    }

    /// What the agent's process takes.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> Result<Memory> {
        let path = format!("/proc/{}/status", self.agent.id());
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let field = |name: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
            number.with_context(|| format!("no {name}"))?.parse().context("a number")
        };
        Ok(Memory { peak: field("VmHWM")?, now: field("VmRSS")?, anonymous: field("RssAnon")? })
    }

    fn eyes(&self) -> Result<Eyes> {
        if self.plan.backend == "iptables" {
            return Ok(Eyes::Sets);
        }
        let directory =
            Path::new(BPF_FILE_SYSTEM).join("npm-agent").join(&self.instance).join(format!("v{SCHEMA}"));
        Maps::open(&directory.join("narrow")).map(Box::new).map(Eyes::Maps)
    }

    fn totals(&mut self) -> Result<(u64, u64)> {
        let answer = self.server.ask("totals")?;
        let mut numbers = answer.split(' ').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(events)), Some(Ok(bytes))) => Ok((events, bytes)),
            _ => bail!("no totals: {answer}"),
        }
    }

    fn applies(&self) -> Result<u64> {
        Ok(self.report()?.status.backends.iter().map(|backend| backend.applies).sum())
    }

    fn spent<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<(Spent, T)> {
        let (start, agent, server) = (Instant::now(), self.agent_time()?, self.server_time()?);
        let outcome = work(self)?;
        let time = start.elapsed();
        Ok((Spent { time, agent: self.agent_time()? - agent, server: self.server_time()? - server }, outcome))
    }

    fn report(&self) -> Result<Report> {
        let client = Client::new(self.directory.path().join("socket"));
        Ok(client.status(Freshness::Now, Duration::from_secs(10))?)
    }

    fn until(&mut self, what: &str, wanted: impl Fn(&Report) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        // There may be no socket yet.
        while !self.report().is_ok_and(|report| wanted(&report)) {
            if Instant::now() > deadline {
                bail!("{what} does not come: {}", self.agent.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn agent_time(&self) -> Result<Duration> {
        cpu_time(self.agent.id())
    }

    fn server_time(&self) -> Result<Duration> {
        cpu_time(self.server.child.id())
    }
}

/// Starts the server in the namespace.
fn serve(netns: &Netns, plan: &Plan, kubeconfig: &str) -> Result<Process> {
    let program: PathBuf = binary()?.with_file_name("apiserver");
    ensure!(program.is_file(), "{} does not exist", program.display());
    let namespaces = plan.cluster.namespaces.to_string();
    let mut arguments = vec!["--listen", "127.0.0.1:0", "--kubeconfig", kubeconfig, "--bench", &namespaces];
    if !plan.streaming_lists {
        arguments.push("--no-streaming-lists");
    }
    let mut child = netns.run(|| exec::start_interactive(&program.to_string_lossy(), &arguments))?;
    let input = child.stdin.take().context("an input")?;
    let output = BufReader::new(child.stdout.take().context("an output")?);
    Ok(Process { child, input, output })
}

/// All of it.
///
/// # Errors
/// A step fails or takes too long.
pub fn run(plan: Plan) -> Result<Figures> {
    let mut stage = Stage::start(plan)?;
    let first_sync = stage.first_sync()?;
    let synced = stage.memory()?;
    let relist = stage.relist()?;
    let listed = stage.memory()?;
    let events = stage.events()?;
    let memory = [synced, listed, stage.memory()?];
    Ok(Figures { objects: stage.objects.clone(), first_sync, relist, memory, events })
}

/// CPU time of a process so far (proc_pid_stat(5): utime and stime, in hundredths of a second).
fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let (_, fields) = text.rsplit_once(')').context("a name in parentheses")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    Ok(Duration::from_millis(10 * ticks.sum::<Result<u64, _>>().context("times")?))
}

/// What looks at the kernel.
enum Eyes {
    Maps(Box<Maps>),
    Sets,
}

/// The maps that packets are judged by.
struct Maps {
    generation: Array<MapData, u32>,
    places: HashMap<MapData, V4, u32>,
    records: Array<MapData, [u8; size_of::<Record<V4>>()]>,
}

impl Eyes {
    /// How long to wait between two looks.
    fn pause(&self) -> Duration {
        match self {
            Self::Maps(_) => Duration::from_micros(50),
            Self::Sets => Duration::from_millis(1),
        }
    }

    /// Whether the kernel shows what it should.
    fn see(&mut self, lab: &Lab, probe: &Probe) -> Result<bool> {
        match self {
            Self::Maps(maps) => {
                let known = maps.known(probe.address)?;
                let shown = match known {
                    known if known.ingress != NOT_ISOLATED => Shown::Subject,
                    known if known.row != NOBODY => Shown::Peer,
                    _ => Shown::Nothing,
                };
                Ok(shown == probe.shown)
            }
            Self::Sets => {
                let set = kernel_set_name(&set_name(&probe.set), Family::V4);
                let test = lab.netns("node")?.exec("ipset", &["test", &set, &probe.address.to_string()]);
                Ok(test.is_ok() == (probe.shown != Shown::Nothing))
            }
        }
    }
}

impl Maps {
    fn open(directory: &Path) -> Result<Self> {
        let open = |name: &str| -> Result<Map> {
            let path = directory.join(name);
            let map = MapData::from_pin(&path).and_then(Map::from_map_data);
            map.with_context(|| format!("opening {}", path.display()))
        };
        Ok(Self {
            generation: open("GENERATION")?.try_into().context("the generation")?,
            places: open("PLACES_V4")?.try_into().context("the places")?,
            records: open("RECORDS_V4")?.try_into().context("the records")?,
        })
    }

    /// What packets are told of an address.
    fn known(&self, address: Ipv4Addr) -> Result<Known> {
        let half = half_of(self.generation.get(&0, 0).context("reading the generation")?);
        let Ok(place) = self.places.get(&address.octets(), 0) else { return Ok(Known::NOTHING) };
        let record = self.records.get(&place, 0).context("reading a record")?;
        let (of, halves) = record.split_at(size_of::<V4>());
        let known = &halves[half * size_of::<Known>()..][..size_of::<Known>()];
        let field =
            |index: usize| known[4 * index..][..4].try_into().map(u32::from_ne_bytes).unwrap_or_default();
        if *of != address.octets() {
            return Ok(Known::NOTHING);
        }
        Ok(Known { ingress: field(0), egress: field(1), pod: field(2), row: field(3) })
    }
}
