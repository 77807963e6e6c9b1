//! The agent as a process, asked for its metrics over HTTP as Prometheus does.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_agent::backend::meter::Timekeeping;
use npm_agent::metrics::Scope;
use npm_policy::flow::Transport;
use npm_policy::model::Protocol;
use npm_tests::apiserver::{self, Server};
use npm_tests::lab::agent::{Agent, Settings, binary, get};
use npm_tests::lab::netns::Namespaces;
use npm_tests::lab::node::Layout;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::{Host, Lab, Spec, require_root};
use npm_tests::monitoring::{Prometheus, is_installed, panels, relay};
use npm_tests::statistics::Statistics;
use serde_json::{Value, json};

#[path = "scrape/discovery.rs"]
mod discovery;

const NODE: &str = "n1";

/// Not the default: so the setting is honoured.
const ADDRESS: &str = "127.0.0.2:10191";

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

const MANIFESTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: x}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: x}
spec: {nodeName: n1}
status: {phase: Running, podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: x}
spec: {nodeName: n2}
status: {phase: Running, podIPs: [{ip: 10.0.0.2}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: x}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}], ports: [{port: 80}]}]}
";

/// The value of a series that has no label.
fn value(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn a_running_agent_is_scraped_at_both_paths() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let group = Namespaces::create([NODE])?;
    let node = &group.members()[0];
    node.exec("ip", &["link", "set", "lo", "up"])?;
    let directory = tempfile::tempdir()?;
    let manifests = directory.path().join("manifests");
    std::fs::create_dir(&manifests)?;
    std::fs::write(manifests.join("all.yaml"), MANIFESTS)?;
    let config = directory.path().join("npm.json");
    let configure = |toggle: bool| {
        let (address, port) = ADDRESS.split_once(':').context("an address with a port")?;
        let text = format!(
            r#"{{"ListeningAddress": "{address}", "ListeningPort": {port},
                "Toggles": {{"EnablePrometheusMetrics": {toggle}}}}}"#
        );
        std::fs::write(&config, text).context("writing the config file")
    };
    let settings = Settings {
        backend: "iptables".to_owned(),
        node: NODE.to_owned(),
        manifests,
        directory: directory.path().to_owned(),
        more: vec!["--config".to_owned(), config.to_string_lossy().into_owned()],
    };

    configure(true)?;
    let mut agent = Agent::start(node, settings.clone())?;
    agent.wait()?;
    let scraped = |scope: Scope| -> Result<String> {
        let (code, body) = get(node, ADDRESS, scope.path())?;
        ensure!(code == 200, "{scope:?}: {code} {body}");
        Ok(body)
    };
    let (of_node, of_cluster) = (scraped(Scope::Node)?, scraped(Scope::Cluster)?);
    for (text, name, expected) in [
        (&of_node, "npm_node_in_sync", 1.0),
        (&of_node, r#"npm_node_policies{backend="iptables"}"#, 1.0),
        (&of_node, r#"npm_node_applied_generation{backend="iptables"}"#, 1.0),
        (&of_cluster, "npm_num_policies", 1.0),
        // Of both nodes: what is counted is the cluster's.
        (&of_cluster, "npm_pods_watched", 2.0),
    ] {
        ensure!(value(text, name) == Some(expected), "{name} is not {expected}:\n{text}");
    }
    // The kernel was written to, through iptables-restore.
    let restores = value(&of_node, "npm_add_iptables_rule_exec_time_count");
    ensure!(restores.is_some_and(|restores| restores >= 1.0), "{restores:?}:\n{of_node}");
    ensure!(get(node, ADDRESS, "/readyz")? == (200, "ok\n".to_owned()));
    agent.terminate()?;

    let mut refused = settings.clone();
    refused.more.extend(["--log-denied".to_owned(), "flows".to_owned()]);
    let refusal = format!("{:#}", Agent::start(node, refused)?.wait().unwrap_err());
    ensure!(refusal.contains("log-denied flows is of the eBPF backend only"), "{refusal}");

    configure(false)?;
    let mut agent = Agent::start(node, settings)?;
    agent.wait()?;
    ensure!(get(node, ADDRESS, "/healthz")?.0 == 200);
    for scope in Scope::ALL {
        ensure!(get(node, ADDRESS, scope.path())?.0 == 404, "{scope:?} is served");
    }
    agent.terminate()
}

/// The value of the series that has these labels, and perhaps others.
fn series(text: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let with_labels =
        |line: &str| labels.iter().all(|(label, is)| line.contains(&format!("{label}=\"{is}\"")));
    let mut lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    lines.find(|line| with_labels(line))?.rsplit_once(' ')?.1.parse().ok()
}

/// Two nodes with a pod each, an API server on the first that both reach, and on each an agent with a backend of its own.
struct Fleet {
    // Dropped in this order: what runs in namespaces before the namespaces.
    agents: Vec<Agent>,
    server: Server,
    lab: Lab,
    _directories: Vec<tempfile::TempDir>,
}

const NODES: [(&str, &str); 2] = [("n1", "ebpf"), ("n2", "iptables")];
const PODS: [(&str, &str); 2] = [("a", "10.241.0.2"), ("b", "10.241.1.2")];
const PORT: u16 = 10091;
const LISTENING: &str = "127.0.0.1:10091";

impl Fleet {
    fn start() -> Result<Self> {
        let host = |name: &str, address: &str| -> Result<Host> {
            Ok(Host { name: name.to_owned(), addresses: vec![address.parse()?] })
        };
        let pods = PODS.iter().enumerate().map(|(node, (name, address))| Ok((node, host(name, address)?)));
        let mut lab = Lab::build(&Spec {
            layout: Layout::Routed,
            nodes: vec![host("n1", "10.240.0.4")?, host("n2", "10.240.0.5")?],
            pods: pods.collect::<Result<_>>()?,
            externals: vec![],
        })?;
        lab.listen(&PORTS.map(tcp))?;
        let listener = lab.netns("n1")?.run(|| TcpListener::bind("10.240.0.4:0").context("listening"))?;
        let server = Server::start(listener, &apiserver::Options::default())?;
        let mut fleet = Self { agents: Vec::new(), server, lab, _directories: Vec::new() };
        let store = fleet.server.store();
        store.put(json!({"kind": "Namespace", "metadata": {"name": "lab"}}));
        for ((name, address), (node, _)) in PODS.iter().zip(NODES) {
            store.put(pod(name, node, address));
        }
        store.put(policy("out", "a", "egress", "to", "b", &[80, 81]));
        store.put(policy("in", "b", "ingress", "from", "a", &[80]));
        for (node, backend) in NODES {
            fleet.start_agent(node, backend)?;
        }
        fleet.agents.iter_mut().try_for_each(Agent::wait)?;
        Ok(fleet)
    }

    fn start_agent(&mut self, node: &str, backend: &str) -> Result<()> {
        let netns = self.lab.netns(node)?;
        let directory = tempfile::tempdir()?;
        let kubeconfig = directory.path().join("kubeconfig");
        std::fs::write(&kubeconfig, self.server.kubeconfig(None))?;
        let more = [
            ["--source", "kube"],
            ["--kubeconfig", &kubeconfig.to_string_lossy()],
            ["--listening-address", "0.0.0.0"],
            ["--instance", netns.name()],
            ["--verify-interval", "200ms"],
            ["--log-denied", if backend == "ebpf" { "flows" } else { "never" }],
        ];
        let settings = Settings {
            backend: backend.to_owned(),
            node: node.to_owned(),
            manifests: "".into(),
            directory: directory.path().to_owned(),
            more: more.concat().into_iter().map(str::to_owned).collect(),
        };
        self.agents.push(Agent::start(netns, settings)?);
        self._directories.push(directory);
        Ok(())
    }

    fn scrape(&self, node: &str, scope: Scope) -> Result<String> {
        let (code, body) = get(self.lab.netns(node)?, LISTENING, scope.path())?;
        ensure!(code == 200, "{node}: {scope:?}: {code} {body}");
        Ok(body)
    }

    /// Scrapes until it is as wanted.
    fn wait(&self, node: &str, scope: Scope, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.scrape(node, scope)?;
            if wanted(&text) {
                return Ok(text);
            }
            ensure!(Instant::now() < deadline, "{node} does not come to it:\n{text}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What becomes of connections from one pod to the other at each of the ports.
    fn outcomes(&mut self) -> Result<Vec<Outcome>> {
        let (source, destination) = (PODS[0].1.parse()?, PODS[1].1.parse()?);
        let from = self.lab.find("a")?;
        let probe = |port| Probe { from, source, destination, transport: tcp(port), expected: None };
        self.lab.probe(&PORTS.map(probe))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.agents.clear();
        // What the eBPF backend has pinned outlives namespaces.
        for (node, _) in NODES {
            let cleaned =
                self.lab.netns(node).and_then(|netns| netns.exec(&binary()?.to_string_lossy(), &["cleanup"]));
            if let Err(error) = cleaned {
                eprintln!("{node}: {error:#}");
            }
        }
    }
}

/// One that both sides allow, one that the destination denies, one that the source denies.
const PORTS: [u16; 3] = [80, 81, 443];

fn tcp(port: u16) -> Transport {
    Transport::Port(Protocol::Tcp, port)
}

fn pod(name: &str, node: &str, address: &str) -> Value {
    json!({
        "kind": "Pod", "metadata": {"namespace": "lab", "name": name, "labels": {"app": name}},
        "spec": {"nodeName": node, "containers": []},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    })
}

fn policy(name: &str, of: &str, direction: &str, side: &str, peer: &str, ports: &[u16]) -> Value {
    let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port})).collect();
    let rule = json!([{side: [{"podSelector": {"matchLabels": {"app": peer}}}], "ports": ports}]);
    let kind = if direction == "egress" { "Egress" } else { "Ingress" };
    json!({
        "kind": "NetworkPolicy", "metadata": {"namespace": "lab", "name": name},
        "spec": {"podSelector": {"matchLabels": {"app": of}}, "policyTypes": [kind], direction: rule},
    })
}

#[test]
fn two_backends_tell_of_one_cluster_and_each_of_its_packets() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut fleet = Fleet::start()?;
    let same = |fleet: &Fleet, policies: f64| -> Result<String> {
        let counts = |text: &str| value(text, "npm_num_policies") == Some(policies);
        let [one, other] = NODES.map(|(node, _)| fleet.wait(node, Scope::Cluster, counts));
        let (one, other) = (one?, other?);
        ensure!(one == other, "the nodes count differently:\n{one}\n{other}");
        Ok(one)
    };
    let text = same(&fleet, 2.0)?;
    ensure!(value(&text, "npm_pods_watched") == Some(2.0), "{text}");
    ensure!(series(&text, "npm_ipset_counts", &[]).is_some(), "sets have counts:\n{text}");

    assert_eq!(fleet.outcomes()?, [Outcome::Answered, Outcome::Blocked, Outcome::Blocked]);
    let count = |backend: &'static str, direction: &'static str, verdict: &'static str| {
        move |text: &str| {
            let labels = [("backend", backend), ("direction", direction), ("verdict", verdict)];
            series(text, "npm_node_verdicts_total", &labels)
        }
    };
    let at_least_one = |count: Option<f64>| count.is_some_and(|count| count >= 1.0);
    // The source's node judges what goes out, and counts in the kernel.
    let text = fleet.wait("n1", Scope::Node, |text| {
        at_least_one(count("ebpf", "egress", "denied")(text))
            && count("ebpf", "egress", "allowed")(text).is_some_and(|allowed| allowed >= 2.0)
    })?;
    assert_eq!(count("ebpf", "ingress", "denied")(&text), Some(0.0), "{text}");
    for (name, labels, least) in [
        ("npm_node_drops_total", ("reason", "egress_denied"), 1.0),
        ("npm_node_passes_total", ("reason", "egress_allowed"), 2.0),
        ("npm_node_passes_total", ("reason", "established"), 1.0),
        ("npm_node_store_entries", ("store", "pods_ipv4"), 2.0),
        ("npm_node_store_entries", ("store", "policies"), 1.0),
        ("npm_node_store_entries", ("store", "segments"), 1.0),
        ("npm_node_store_entries", ("store", "peer_sets"), 2.0),
        ("npm_node_store_limit", ("store", "rows"), 1000.0),
    ] {
        let found = series(&text, name, &[("backend", "ebpf"), labels]);
        ensure!(found.is_some_and(|found| found >= least), "{name} {labels:?}: {found:?}:\n{text}");
    }
    assert_eq!(series(&text, "npm_node_drops_total", &[("reason", "truncated")]), Some(0.0));
    assert_eq!(series(&text, "npm_node_escapes", &[("reason", "ipvs"), ("effect", "none")]), Some(0.0));
    ensure!(value(&text, "npm_node_conntrack_entries").is_some_and(|entries| entries >= 1.0), "{text}");

    // It names the flow, once.
    let log = fleet.agents[0].log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("does not allow TCP/443")).collect();
    ensure!(lines.len() == 1, "{lines:?} in\n{log}");
    for part in ["lab/a", "lab/b", "10.241.1.2", "egress", "lab/out"] {
        ensure!(lines[0].contains(part), "{part}: {}", lines[0]);
    }

    // The destination's node judges what comes in. Its rules are read every now and then.
    let text =
        fleet.wait("n2", Scope::Node, |text| at_least_one(count("iptables", "ingress", "denied")(text)))?;
    assert_eq!(count("iptables", "egress", "denied")(&text), Some(0.0), "{text}");
    assert_eq!(count("iptables", "ingress", "allowed")(&text), None, "iptables can't tell");
    let sets = series(&text, "npm_node_store_entries", &[("backend", "iptables"), ("store", "sets")]);
    ensure!(sets.is_some_and(|sets| sets >= 2.0), "{sets:?}:\n{text}");

    // A policy more writes the chain anew that counts denied packets: what it counted stays counted.
    let denied = count("iptables", "ingress", "denied")(&text);
    fleet.server.store().put(policy("more", "b", "ingress", "from", "b", &[9]));
    same(&fleet, 3.0)?;
    let of_iptables = |name: &'static str| move |text: &str| series(text, name, &[("backend", "iptables")]);
    let (policies, verifies) =
        (of_iptables("npm_node_policies"), of_iptables("npm_node_verify_seconds_count"));
    let text = fleet.wait("n2", Scope::Node, |text| policies(text) == Some(2.0))?;
    let text = fleet.wait("n2", Scope::Node, |later| verifies(later) > verifies(&text))?;
    ensure!(count("iptables", "ingress", "denied")(&text) >= denied, "{denied:?} before:\n{text}");
    Ok(())
}

/// What the kernel has timed of the program until now: runs, seconds.
fn timed(text: &str) -> Result<(f64, f64)> {
    let of = |name: &str| {
        series(text, name, &[("backend", "ebpf")]).with_context(|| format!("no {name} in\n{text}"))
    };
    Ok((of("npm_node_program_runs_total")?, of("npm_node_program_run_seconds_total")?))
}

/// Seconds that a packet may take in the program on a machine that stops now and then.
const PLAUSIBLE: std::ops::Range<f64> = 10e-9..10e-3;

/// Whether the eBPF agent's node has its program timed.
const STATISTICS: &str = r#"npm_node_program_statistics{backend="ebpf"}"#;

#[test]
fn the_program_is_timed_while_the_node_has_it_timed() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    // Each makes three packets at least, one for each port.
    const ROUNDS: u32 = 10;
    let mut statistics = Statistics::hold()?;
    let mut fleet = Fleet::start()?;
    for timekeeping in [Timekeeping::Off, Timekeeping::On, Timekeeping::Off] {
        statistics.set(timekeeping)?;
        let before = timed(&fleet.scrape("n1", Scope::Node)?)?;
        for _ in 0..ROUNDS {
            fleet.outcomes()?;
        }
        let text = fleet.scrape("n1", Scope::Node)?;
        let now = timed(&text)?;
        match timekeeping {
            Timekeeping::Off => {
                assert_eq!(value(&text, STATISTICS), Some(0.0), "{text}");
                ensure!(now == before, "{before:?} became {now:?}");
            }
            Timekeeping::On => {
                assert_eq!(value(&text, STATISTICS), Some(1.0), "{text}");
                let (runs, seconds) = (now.0 - before.0, now.1 - before.1);
                ensure!(runs >= f64::from(ROUNDS * 3), "{runs} runs");
                ensure!(PLAUSIBLE.contains(&(seconds / runs)), "{seconds} seconds for {runs} runs");
            }
        }
    }
    let text = fleet.scrape("n2", Scope::Node)?;
    ensure!(!text.contains("npm_node_program_"), "nothing is timed under iptables:\n{text}");
    Ok(())
}

#[test]
fn the_dashboards_show_the_programs_time() -> Result<()> {
    if !require_root() || !is_installed() {
        return Ok(());
    }
    let mut statistics = Statistics::hold()?;
    statistics.set(Timekeeping::On)?;
    let mut fleet = Fleet::start()?;
    let mut config = "global: {scrape_interval: 500ms}\nscrape_configs:\n\
                      - job_name: nodes\n  metrics_path: /node-metrics\n  static_configs:\n"
        .to_owned();
    for (node, _) in NODES {
        let address = relay::into_namespace(fleet.lab.netns(node)?, PORT)?;
        config.push_str(&format!("  - targets: [\"{address}\"]\n    labels: {{instance: {node}}}\n"));
    }
    let prometheus = Prometheus::start(&config, &[])?;
    prometheus.wait("count(npm_node_verdicts_total)", |series| series > 0.0)?;

    let grafana = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/grafana");
    let dashboards = panels::dashboards(&grafana)?;
    let all = dashboards.iter().flat_map(|(_, dashboard)| panels::queries(dashboard));
    let queries: Vec<_> = all.filter(|query| query.expression.contains("npm_node_program_")).collect();
    ensure!(queries.len() == 2, "the time and whether there is one: {queries:?}");
    let deadline = Instant::now() + PATIENCE;
    for query in queries {
        let expression = panels::substituted(&query.expression, "1m");
        let result = loop {
            fleet.outcomes()?;
            let result = prometheus.query(&expression)?;
            // A rate needs two scrapes, and packets between them.
            if !result.is_empty() || Instant::now() > deadline {
                break result;
            }
        };
        let [one] = result.as_slice() else { anyhow::bail!("{expression}: {result:?}") };
        let number: f64 = one["value"][1].as_str().context("a number")?.parse()?;
        let wanted = if expression.contains("seconds") { PLAUSIBLE } else { 1.0..1.5 };
        ensure!(one["metric"]["instance"] == "n1" && wanted.contains(&number), "{expression}: {one}");
    }
    Ok(())
}
