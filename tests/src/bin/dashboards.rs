//! What every panel of the dashboards shows for two nodes with the same world, one under each backend: real agents, real
//! kernels, a real Prometheus. `cargo xtask dashboards` draws it.
//!
//! ```text
//! one directory of manifests, always changing ─┬─► agent, iptables ─► a lab of namespaces ┐ /node-metrics
//!                                              └─► agent, eBPF ─────► another, alike ─────┴────► Prometheus ─► JSON
//! ```
//!
//! Both agents are told that they are the same node, so both enforce the same policies on the same pods, and take up the
//! same changes within the same moment.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Parser;
use npm_agent::backend::meter::Timekeeping;
use npm_policy::flow::Transport;
use npm_policy::model::Protocol;
use npm_tests::lab::agent::{Agent, Settings, binary};
use npm_tests::lab::netns::Netns;
use npm_tests::lab::probe::Probe;
use npm_tests::lab::{Lab, Spec};
use npm_tests::monitoring::{Prometheus, panels, relay};
use npm_tests::statistics::Statistics;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const BACKENDS: [&str; 2] = ["iptables", "ebpf"];
const NODE: &str = "node-1";
/// Where agents serve their metrics.
const PORT: u16 = 10091;
/// Pods of the node, each a namespace.
const LOCAL_PODS: u8 = 16;
/// Pods of other nodes: 254 at most.
const OTHER_PODS: u16 = 240;
/// Values of the label that policies tell pods apart by.
const APPS: u16 = 24;
/// Policies at the start; two select each application.
const POLICIES: u16 = 48;
/// Seconds between scrapes, and between points of a graph.
const STEP: u32 = 5;
/// What Grafana takes rates over: four scrapes.
const RATE_INTERVAL: &str = "20s";
/// Between changes, apart from rollouts.
const PAUSE: Duration = Duration::from_millis(700);

/// Runs two agents under load and writes what the dashboards' queries give
#[derive(Parser)]
struct Arguments {
    /// Where the dashboards are
    dashboards: PathBuf,
    /// What to write
    output: PathBuf,
    /// How long the load lasts
    #[arg(long, default_value_t = 300)]
    seconds: u32,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // The eBPF program's time is measured where the node asks for it.
    let mut statistics = Statistics::hold()?;
    statistics.set(Timekeeping::On)?;
    let manifests = tempfile::tempdir().context("making a directory of manifests")?;
    let mut cluster = Cluster { directory: manifests.path().to_owned(), turn: 0 };
    cluster.begin()?;
    let mut nodes = Vec::new();
    for backend in BACKENDS {
        nodes.push(Node::start(backend, manifests.path()).with_context(|| backend.to_owned())?);
    }
    let prometheus = Prometheus::start(&configuration(&nodes)?, &[])?;
    prometheus.wait("sum(npm_node_in_sync)", |nodes| nodes == 2.0)?;
    let start = seconds();
    println!("{} seconds of changes and connections", arguments.seconds);
    load(&mut cluster, &mut nodes, Duration::from_secs(u64::from(arguments.seconds)))?;
    // The last changes arrive, and are scraped.
    for node in &mut nodes {
        node.agent.wait()?;
    }
    std::thread::sleep(Duration::from_secs(2 * u64::from(STEP)));
    let figures = figures(&prometheus, &arguments.dashboards, start, seconds())?;
    std::fs::write(&arguments.output, serde_json::to_string(&figures)?).context("writing the figures")?;
    for node in nodes {
        node.stop()?;
    }
    Ok(())
}

/// Both agents as a fleet, with one of them in place of the Service that answers for the cluster.
fn configuration(nodes: &[Node]) -> Result<String> {
    let mut text = format!(
        "global: {{scrape_interval: {STEP}s}}\nscrape_configs:\n\
         - job_name: azure-npm-node-metrics\n  metrics_path: /node-metrics\n  static_configs:\n"
    );
    let target = |node: &Node| {
        let (address, backend) = (node.metrics, node.backend);
        format!("  - targets: [\"{address}\"]\n    labels: {{instance: node-{backend}}}\n")
    };
    nodes.iter().for_each(|node| text.push_str(&target(node)));
    text.push_str(
        "- job_name: azure-npm-cluster-metrics\n  metrics_path: /cluster-metrics\n  static_configs:\n",
    );
    text.push_str(&target(nodes.first().context("a node")?));
    Ok(text)
}

/// What disturbs the peace, and when: in shares of the whole time.
const ROLLOUT: std::ops::Range<f64> = 0.3..0.5;
const BAD_POLICY: std::ops::Range<f64> = 0.6..0.8;
const STRANGER: f64 = 0.7;

fn load(cluster: &mut Cluster, nodes: &mut [Node], lasts: Duration) -> Result<()> {
    let start = Instant::now();
    let mut stranger_comes = true;
    loop {
        let share = start.elapsed().as_secs_f64() / lasts.as_secs_f64();
        if share >= 1.0 {
            return Ok(());
        }
        match ROLLOUT.contains(&share) {
            true => cluster.roll_out()?,
            false => cluster.change()?,
        }
        cluster.bad_policy(if BAD_POLICY.contains(&share) { Wanted::There } else { Wanted::Gone })?;
        if share > STRANGER && std::mem::take(&mut stranger_comes) {
            // Somebody deletes our jump. eBPF has no rules that others could delete.
            let iptables = nodes.iter().find(|node| node.backend == "iptables").context("iptables")?;
            iptables.netns.exec("iptables-nft", &["-w", "-D", "FORWARD", "1"])?;
        }
        for node in nodes.iter_mut() {
            node.connect(cluster.turn)?;
        }
        std::thread::sleep(PAUSE);
    }
}

/// What the queries of each dashboard give: by file name, panel and letter.
fn figures(prometheus: &Prometheus, directory: &Path, start: f64, end: f64) -> Result<Value> {
    let mut dashboards = Map::new();
    let mut empty = Vec::new();
    for (name, dashboard) in panels::dashboards(directory)? {
        let mut figures: Map<String, Value> = Map::new();
        for query in panels::queries(&dashboard) {
            let expression = panels::substituted(&query.expression, RATE_INTERVAL);
            let result = match query.instant {
                true => prometheus.query(&expression)?,
                false => prometheus.range(&expression, start, end, STEP)?,
            };
            if result.is_empty() {
                empty.push(format!("{name}: {} {}", query.title, query.letter));
            }
            let panel = figures.entry(query.panel.to_string()).or_insert_with(|| json!({}));
            panel[&query.letter] = result.into();
        }
        dashboards.insert(name, figures.into());
    }
    println!("queries without data, as in a fleet where nothing failed: {empty:#?}");
    Ok(json!({"from": start, "to": end, "step": STEP, "dashboards": dashboards}))
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64().floor())
}

/// A lab of one node with its agent.
struct Node {
    backend: &'static str,
    // Dropped in this order: the agent, what it left, its namespaces.
    agent: Agent,
    swept: Swept,
    metrics: std::net::SocketAddr,
    netns: Netns,
    lab: Lab,
    _directory: TempDir,
}

/// Takes away what an agent left on the node: eBPF objects are pinned outside of the namespace.
struct Swept(Netns);

impl Drop for Swept {
    fn drop(&mut self) {
        let swept = binary().and_then(|agent| self.0.exec(&agent.to_string_lossy(), &["cleanup", "--force"]));
        if let Err(error) = swept {
            eprintln!("what the agent programmed is left behind: {error:#}");
        }
    }
}

impl Node {
    fn start(backend: &'static str, manifests: &Path) -> Result<Self> {
        let pods: Vec<(String, [String; 2])> =
            (0..LOCAL_PODS).map(|number| (format!("local-{number}"), local(number))).collect();
        let pods: Vec<(&str, [&str; 2])> =
            pods.iter().map(|(name, pair)| (name.as_str(), [pair[0].as_str(), pair[1].as_str()])).collect();
        let mut lab = Lab::build(&Spec::one_node(&pods)?).context("building the lab")?;
        lab.listen(&[Transport::Port(Protocol::Tcp, 80)])?;
        let netns = lab.netns("node")?.clone();
        let directory = tempfile::tempdir().context("making a directory for the agent")?;
        let more = ["--iptables-variant", "nft", "--instance", netns.name(), "--verify-interval", "10s"];
        let settings = Settings {
            backend: backend.to_owned(),
            node: NODE.to_owned(),
            manifests: manifests.to_owned(),
            directory: directory.path().to_owned(),
            more: more.map(str::to_owned).to_vec(),
        };
        let swept = Swept(netns.clone());
        let mut agent = Agent::start(&netns, settings)?;
        agent.wait()?;
        let metrics = relay::into_namespace(&netns, PORT)?;
        Ok(Self { backend, agent, swept, metrics, netns, lab, _directory: directory })
    }

    /// Connections from some pod to all others: some are allowed, some are not.
    fn connect(&mut self, turn: u16) -> Result<()> {
        let from = self.lab.find(&format!("local-{}", turn % u16::from(LOCAL_PODS)))?;
        let mut probes = Vec::new();
        for number in 0..LOCAL_PODS {
            let to = self.lab.find(&format!("local-{number}"))?;
            let pair = |index: usize| self.lab.endpoints()[index].addresses.clone();
            for (source, destination) in pair(from).into_iter().zip(pair(to)).filter(|_| to != from) {
                let transport = Transport::Port(Protocol::Tcp, 80);
                probes.push(Probe { from, source, destination, transport, expected: None });
            }
        }
        self.lab.probe(&probes).map(drop)
    }

    fn stop(self) -> Result<()> {
        let Self { agent, swept, lab, .. } = self;
        agent.terminate()?;
        drop(swept);
        drop(lab);
        Ok(())
    }
}

fn local(number: u8) -> [String; 2] {
    [format!("10.241.0.{}", 10 + number), format!("fd00:241::{:x}", 10 + u16::from(number))]
}

/// Whether an object is to be there.
enum Wanted {
    There,
    Gone,
}

/// A cluster that changes, as a directory of manifests.
struct Cluster {
    directory: PathBuf,
    turn: u16,
}

impl Cluster {
    fn begin(&self) -> Result<()> {
        self.namespaces("silver")?;
        for number in 0..LOCAL_PODS {
            self.pod(&format!("local-{number}"), NODE, &local(number), u16::from(number))?;
        }
        for number in 0..OTHER_PODS {
            self.other(number, number)?;
        }
        (0..POLICIES).try_for_each(|number| self.policy(number, 80))
    }

    /// One change, of each kind in turn.
    fn change(&mut self) -> Result<()> {
        self.turn += 1;
        let turn = self.turn;
        let round = turn / 8;
        match turn % 8 {
            0 | 4 => self.other(turn % OTHER_PODS, turn),
            1 => self.policy(turn % POLICIES, 1000 + turn),
            // A pod of the node comes, and goes.
            2 => {
                let number = 100 + (round % 50) as u8;
                self.pod("guest", NODE, &local(number), round)
            }
            3 => self.policy(POLICIES, 80),
            5 => self.namespaces(if round.is_multiple_of(2) { "gold" } else { "silver" }),
            6 => self.remove("guest"),
            _ => self.remove(&format!("policy-{POLICIES}")),
        }
    }

    /// A dozen pods of other nodes are replaced at once.
    fn roll_out(&mut self) -> Result<()> {
        for _ in 0..12 {
            self.turn += 1;
            self.other(self.turn % OTHER_PODS, self.turn / 3)?;
        }
        self.change()
    }

    /// A policy that no API server would take is there, or not.
    fn bad_policy(&self, wanted: Wanted) -> Result<()> {
        let (path, name) = (self.path("bad"), "bad");
        match (wanted, path.exists()) {
            (Wanted::There, false) => {
                let spec = "{podSelector: {matchLabels: {app: app-0}}, ingress: [{ports: [{port: 70000}]}]}";
                self.write(name, &policy_text(name, spec))
            }
            (Wanted::Gone, true) => self.remove(name),
            (Wanted::There, true) | (Wanted::Gone, false) => Ok(()),
        }
    }

    fn namespaces(&self, tier: &str) -> Result<()> {
        let text = format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: shop}}}}\n---\n\
             {{apiVersion: v1, kind: Namespace, metadata: {{name: partner, labels: {{tier: {tier}}}}}}}\n"
        );
        self.write("namespaces", &text)
    }

    fn other(&self, number: u16, app: u16) -> Result<()> {
        let addresses = [format!("10.64.0.{}", number + 1), format!("fd00:64::{:x}", number + 1)];
        self.pod(&format!("other-{number}"), "node-2", &addresses, app)
    }

    fn pod(&self, name: &str, node: &str, addresses: &[String; 2], app: u16) -> Result<()> {
        for address in addresses {
            address.parse::<IpAddr>().with_context(|| format!("{address} is no address"))?;
        }
        // Every fifth of the others belongs to the partner.
        let partner = name.starts_with("other-") && name.ends_with(['0', '5']);
        let namespace = if partner { "partner" } else { "shop" };
        let mut text =
            format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, ");
        let _ = write!(text, "labels: {{app: app-{}}}}}\nspec: {{nodeName: {node}}}\n", app % APPS);
        let [v4, v6] = addresses;
        let _ = writeln!(text, "status: {{phase: Running, podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]}}");
        self.write(name, &text)
    }

    /// An application lets in another, pods of gold partners, and a block of addresses.
    fn policy(&self, number: u16, port: u16) -> Result<()> {
        let (subject, peer) = (number % APPS, (number * 7 + 1) % APPS);
        let block = format!("203.0.{}.0/24", number % 256);
        let spec = format!(
            "{{podSelector: {{matchLabels: {{app: app-{subject}}}}}, ingress: [{{from: [\
             {{podSelector: {{matchLabels: {{app: app-{peer}}}}}}}, \
             {{namespaceSelector: {{matchLabels: {{tier: gold}}}}, podSelector: {{}}}}, \
             {{ipBlock: {{cidr: {block}}}}}], ports: [{{port: {port}}}, {{port: 443}}]}}]}}"
        );
        let name = format!("policy-{number}");
        self.write(&name, &policy_text(&name, &spec))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.yaml"))
    }

    /// In one step: an agent reads the old text or the new one.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let begun = self.directory.join(format!("{name}.begun"));
        std::fs::write(&begun, text).with_context(|| format!("writing {name}"))?;
        std::fs::rename(&begun, self.path(name)).with_context(|| format!("naming {name}"))
    }

    fn remove(&self, name: &str) -> Result<()> {
        match std::fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {name}"))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

fn policy_text(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}
