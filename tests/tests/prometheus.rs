//! The shipped rules, scrape configurations and dashboards, in a real Prometheus that scrapes running agents.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_agent::escape::{Escape, Origin};
use npm_agent::metrics::Scope;
use npm_policy::goal::Family;
use npm_policy::model::{
    Namespace, Peers, Pod, PodKey, PodNetwork, PodPhase, Policy, PolicyKey, Ports, Rule, Selector,
};
use npm_policy::world::Change;
use npm_tests::exec;
use npm_tests::monitoring::agent::Scrapable;
use npm_tests::monitoring::panels::{self, Query};
use npm_tests::monitoring::{PATIENCE, Prometheus, is_installed};
use serde_json::Value;

const NODES: [&str; 2] = ["n1", "n2"];

fn deployed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

fn read(name: &str) -> Result<String> {
    std::fs::read_to_string(deployed(name)).with_context(|| format!("reading deploy/{name}"))
}

#[test]
fn promtool_takes_the_rules_and_their_tests_pass() -> Result<()> {
    if !is_installed() {
        return Ok(());
    }
    for name in ["npm", "azure-npm-documented"] {
        let path = |end: &str| deployed(&format!("prometheus/{name}.{end}.yaml")).display().to_string();
        exec::run("promtool", &["check", "rules", &path("rules")])?;
        exec::run("promtool", &["test", "rules", &path("rules.test")])?;
    }
    Ok(())
}

#[test]
fn promtool_takes_every_metric() -> Result<()> {
    if !is_installed() {
        return Ok(());
    }
    let agent = Scrapable::start("n1", "iptables")?;
    agent.change(world());
    agent.in_sync();
    agent.change(vec![policy("more", Allowed::Anybody)]);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = Scope::ALL.map(|scope| agent.metrics.render(scope)).concat();
        if text.contains("npm_add_policy_exec_time_count") {
            return exec::run_with_input("promtool", &["check", "metrics"], &text).map(drop);
        }
        ensure!(Instant::now() < deadline, "the policy has no time: {text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A scrape configuration as shipped, with targets as Kubernetes' service discovery would give them in place of it:
/// Debian's Prometheus 2.42 is built without.
fn with_targets(config: &str, targets: &[(&str, &[(&str, &str)])]) -> String {
    let mut discovered = String::from("  static_configs:\n");
    for (address, labels) in targets {
        discovered.push_str(&format!("  - targets: [\"{address}\"]\n    labels:\n"));
        for (name, value) in *labels {
            discovered.push_str(&format!("      __meta_kubernetes_{name}: \"{value}\"\n"));
        }
    }
    let mut text = String::new();
    let mut lines = config.lines();
    while let Some(line) = lines.next() {
        match line.trim() {
            "kubernetes_sd_configs:" => {
                assert!(lines.next().is_some_and(|role| role.trim().starts_with("- role: ")));
                text.push_str(&discovered);
            }
            _ => text.push_str(&format!("{line}\n")),
        }
    }
    text
}

/// The targets of a job: addresses that are asked, with the labels `instance` and `pod`.
fn targets(prometheus: &Prometheus, job: &str) -> Result<BTreeSet<(String, String, String)>> {
    let data = prometheus.api("targets?state=active")?;
    let targets = data["activeTargets"].as_array().context("no targets")?;
    let label = |target: &Value, name: &str| target["labels"][name].as_str().unwrap_or_default().to_owned();
    let of_job = targets.iter().filter(|target| target["labels"]["job"] == job);
    Ok(of_job
        .map(|target| {
            let url = target["scrapeUrl"].as_str().unwrap_or_default().to_owned();
            (url, label(target, "instance"), label(target, "pod"))
        })
        .collect())
}

#[test]
fn the_scrape_configurations_find_the_agents_and_nobody_else() -> Result<()> {
    if !is_installed() {
        return Ok(());
    }
    let documented = with_targets(
        &read("prometheus/prometheus-server-scrape-config.yaml")?,
        &[
            (
                "127.0.0.81:10250",
                &[("namespace", "kube-system"), ("service_name", "npm-metrics-cluster-service")],
            ),
            (
                "127.0.0.82:10250",
                &[("namespace", "default"), ("service_name", "npm-metrics-cluster-service")],
            ),
            ("127.0.0.83:10250", &[("namespace", "kube-system"), ("service_name", "kube-dns")]),
        ],
    );
    let pods = with_targets(
        &read("prometheus/prometheus-server-alternative-scrape-config.yaml")?,
        &[
            (
                "127.0.0.84:8080",
                &[
                    ("namespace", "kube-system"),
                    ("pod_annotationpresent_azure_npm_scrapeable", "true"),
                    ("pod_name", "azure-npm-1"),
                    ("pod_node_name", "n1"),
                ],
            ),
            (
                "127.0.0.85:53",
                &[("namespace", "kube-system"), ("pod_name", "coredns-1"), ("pod_node_name", "n1")],
            ),
            (
                "127.0.0.86",
                &[("namespace", "default"), ("pod_annotationpresent_azure_npm_scrapeable", "true")],
            ),
        ],
    );
    let config = format!("global: {{scrape_interval: 1h}}\nscrape_configs:\n{documented}{pods}");
    let prometheus = Prometheus::start(&config, &[])?;
    let found = |job: &str, count: usize| -> Result<BTreeSet<(String, String, String)>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = targets(&prometheus, job)?;
            if found.len() >= count || Instant::now() > deadline {
                return Ok(found);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let target = |url: &str, instance: &str, pod: &str| (url.to_owned(), instance.to_owned(), pod.to_owned());
    let nodes = ["127.0.0.81", "127.0.0.82", "127.0.0.83"].map(|address| {
        target(&format!("http://{address}:10091/node-metrics"), &format!("{address}:10091"), "")
    });
    assert_eq!(found("azure-npm-node-metrics", 3)?, nodes.into());
    let cluster = target("http://127.0.0.81:10250/cluster-metrics", "127.0.0.81:10250", "");
    assert_eq!(found("azure-npm-cluster-metrics", 1)?, [cluster].into());
    let pod = target("http://127.0.0.84:10091/node-metrics", "n1", "azure-npm-1");
    assert_eq!(found("azure-npm-node-metrics-from-pod-config", 1)?, [pod].into());
    Ok(())
}

fn pod(name: &str, node: &str, last: u8) -> Change {
    let key = PodKey::new("x", name);
    let pod = Pod {
        key: key.clone(),
        node: Some(node.into()),
        labels: [("app".into(), name.into())].into(),
        addresses: [[10, 0, 0, last].into()].into(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [].into(),
        created: 0,
    };
    Change::Pod(key, Some(pod))
}

/// Whom a policy lets in.
enum Allowed {
    Nobody,
    Anybody,
}

/// A policy that selects every pod.
fn policy(name: &str, allowed: Allowed) -> Change {
    let key = PolicyKey::new("x", name);
    let rules = match allowed {
        Allowed::Nobody => Vec::new(),
        Allowed::Anybody => vec![Rule { peers: Peers::Any, ports: Ports::Any }],
    };
    let subjects = Selector::everything();
    let policy = Policy { key: key.clone(), subjects, ingress: Some(rules), egress: None };
    Change::Policy(key, Some(policy))
}

fn namespace() -> Change {
    Change::Namespace("x".into(), Some(Namespace::new("x", [].into())))
}

fn world() -> Vec<Change> {
    vec![namespace(), pod("a", NODES[0], 1), pod("b", NODES[1], 2), policy("all", Allowed::Anybody)]
}

/// Two nodes with the same cluster and different backends, and the Prometheus that asks them.
struct Fleet {
    agents: [Scrapable; 2],
    prometheus: Prometheus,
}

impl Fleet {
    fn start() -> Result<Self> {
        let agents = [Scrapable::start(NODES[0], "iptables")?, Scrapable::start(NODES[1], "ebpf")?];
        let target = |index: usize| {
            let (address, node) = (agents[index].address, NODES[index]);
            format!("  - targets: [\"{address}\"]\n    labels: {{instance: {node}, pod: agent-{node}}}\n")
        };
        let config = format!(
            "global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}\n\
             rule_files: [npm.rules.yaml, azure-npm-documented.rules.yaml]\n\
             scrape_configs:\n\
             - job_name: azure-npm-node-metrics\n  metrics_path: /node-metrics\n  static_configs:\n{}{}\
             - job_name: azure-npm-cluster-metrics\n  metrics_path: /cluster-metrics\n  static_configs:\n{}",
            target(0),
            target(1),
            target(1),
        );
        let rules = ["npm.rules.yaml", "azure-npm-documented.rules.yaml"];
        let mut files = Vec::new();
        for name in rules {
            files.push((name, read(&format!("prometheus/{name}"))?));
        }
        let fleet = Self { agents, prometheus: Prometheus::start(&config, &files)? };
        fleet.each(|agent| {
            agent.change(world());
            agent.in_sync();
        });
        fleet.prometheus.wait("sum(npm_node_in_sync)", |nodes| nodes == 2.0)?;
        fleet.prometheus.wait("sum(npm_node_applied_generation)", |nodes| nodes == 2.0)?;
        Ok(fleet)
    }

    fn each(&self, act: impl Fn(&Scrapable)) {
        self.agents.iter().for_each(act);
    }

    /// Changes everywhere, and waits until both have the result.
    fn change(&self, changes: &[Change]) -> Result<()> {
        let goals = self.prometheus.wait("sum(npm_node_goal_generation)", |_| true)?;
        self.each(|agent| agent.change(changes.to_vec()));
        self.prometheus.wait("sum(npm_node_applied_generation)", |applied| applied >= goals + 2.0)?;
        Ok(())
    }

    /// Waits until exactly these alerts are pending or firing.
    fn alerts(&self, wanted: &[&str]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let alerts = self.prometheus.alerts()?;
            if alerts == wanted {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "alerts {alerts:?}, wanted {wanted:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until every agent was asked so many times more.
    fn scraped(&self, times: u32) -> Result<()> {
        let asked = self.prometheus.wait("min(count_over_time(up[1h]))", |_| true)?;
        self.prometheus.wait("min(count_over_time(up[1h]))", |now| now >= asked + f64::from(times))?;
        Ok(())
    }
}

#[test]
fn documented_alerts_fire_on_a_failure_and_are_quiet_otherwise() -> Result<()> {
    if !is_installed() {
        return Ok(());
    }
    let fleet = Fleet::start()?;
    fleet.change(&[pod("c", NODES[0], 3), pod("d", NODES[1], 4), policy("more", Allowed::Anybody)])?;
    fleet.scraped(6)?;
    fleet.alerts(&[])?;
    let [one, other] = &fleet.agents;
    let cluster = one.metrics.render(Scope::Cluster);
    assert_eq!(cluster, other.metrics.render(Scope::Cluster), "the nodes count differently");
    assert!(cluster.contains("npm_num_policies 2\n"), "{cluster}");

    // A policy that can't be taken as it is, on both nodes, since both read it.
    fleet.each(|agent| agent.problem("NetworkPolicy x/bad", "port 70000 is no port"));
    let bad = "sum(npm_add_policy_exec_time_count{had_error='true'})";
    fleet.prometheus.wait(bad, |failures| failures == 2.0)?;
    const DOCUMENTED: &str = "azure-npm-documented.rules.yaml: AzureNPMFailureCreatePolicy";
    const CORRECTED: &str = "npm.rules.yaml: AzureNPMFailureCreatePolicy";
    const PROBLEMS: &str = "npm.rules.yaml: NpmObjectProblems";
    fleet.alerts(&[DOCUMENTED, CORRECTED, PROBLEMS])?;

    // Pods that take longer than 100 ms.
    fleet.each(|agent| agent.problem("NetworkPolicy x/bad", ""));
    one.script(|script| script.takes = Duration::from_millis(150));
    let slow = [pod("e", NODES[0], 5), pod("f", NODES[0], 6), pod("g", NODES[0], 7)];
    fleet.each(|agent| agent.change(slow.to_vec()));
    const DOCUMENTED_SLOW: &str =
        "azure-npm-documented.rules.yaml: AzureNPMHighControllerPodCreateTimeMedian";
    const CORRECTED_SLOW: &str = "npm.rules.yaml: AzureNPMHighControllerPodCreateTimeMedian";
    fleet.alerts(&[DOCUMENTED, DOCUMENTED_SLOW, CORRECTED, CORRECTED_SLOW])?;

    // A kernel that refuses everything, and somebody who edits the rules.
    one.script(|script| script.failures = usize::MAX);
    other.script(|script| script.drift = vec!["a chain was gone".to_owned()]);
    fleet.each(|agent| agent.change(vec![pod("h", NODES[0], 8)]));
    const FAILING: &str = "npm.rules.yaml: NpmApplyFailing";
    const DRIFT: &str = "npm.rules.yaml: NpmDrift";
    fleet.alerts(&[DOCUMENTED, DOCUMENTED_SLOW, CORRECTED, CORRECTED_SLOW, FAILING, DRIFT])?;

    // Traffic that nobody judges, a map that is nearly full: pending, for minutes. (A surge of drops takes an hour: promtool.)
    one.board.replace(Origin::Backend, [Escape::ConntrackRuleGone { family: Family::V4 }].into());
    other.script(|script| script.entries = 99);
    const ESCAPES: &str = "npm.rules.yaml: NpmTrafficEscapes";
    const FULL: &str = "npm.rules.yaml: NpmMapNearlyFull";
    fleet.alerts(&[DOCUMENTED, DOCUMENTED_SLOW, CORRECTED, CORRECTED_SLOW, FAILING, DRIFT, FULL, ESCAPES])
}

#[test]
fn a_refused_manifest_fires_the_documented_alert_once() -> Result<()> {
    if !is_installed() {
        return Ok(());
    }
    let directory = tempfile::tempdir().context("making a directory of manifests")?;
    let write = |name: &str, text: &str| {
        std::fs::write(directory.path().join(name), text).with_context(|| format!("writing {name}"))
    };
    write(
        "a.yaml",
        "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x}, spec: {nodeName: n1},\
         status: {phase: Running, podIPs: [{ip: 10.0.0.1}]}}",
    )?;
    let agent = Scrapable::over_manifests(NODES[0], "iptables", directory.path())?;
    let config = format!(
        "global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}\n\
         rule_files: [npm.rules.yaml]\n\
         scrape_configs:\n\
         - job_name: azure-npm-node-metrics\n  metrics_path: /node-metrics\n  static_configs:\n\
         \x20 - targets: [\"{}\"]\n",
        agent.address
    );
    let prometheus = Prometheus::start(&config, &[("npm.rules.yaml", read("prometheus/npm.rules.yaml")?)])?;
    prometheus.wait("npm_node_in_sync", |in_sync| in_sync == 1.0)?;
    let policy = |port: u32| {
        format!(
            "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: web, namespace: x}},\
             spec: {{podSelector: {{}}, policyTypes: [Ingress], ingress: [{{ports: [{{port: {port}}}]}}]}}}}"
        )
    };
    let counted = |metric: &str, had_error: bool| {
        prometheus.value(&format!("sum({metric}_count{{had_error=\"{had_error}\"}})"))
    };
    const CREATED: &str = "npm_add_policy_exec_time";
    const CHANGED: &str = "npm_controller_policy_exec_time";
    write("web.yaml", &policy(70_000))?;
    prometheus.wait("sum(npm_add_policy_exec_time_count{had_error=\"true\"})", |failures| failures >= 1.0)?;
    prometheus.wait("count(ALERTS{alertname=\"AzureNPMFailureCreatePolicy\"})", |alerts| alerts == 1.0)?;
    // The strict reading was programmed, and is no success of the same version.
    prometheus.wait("npm_node_policies", |policies| policies == 1.0)?;
    assert_eq!((counted(CREATED, true)?, counted(CREATED, false)?), (Some(1.0), None));

    write("web.yaml", &policy(80))?;
    prometheus.wait("sum(npm_controller_policy_exec_time_count)", |changed| changed >= 1.0)?;
    assert_eq!((counted(CHANGED, false)?, counted(CHANGED, true)?), (Some(1.0), None));
    assert_eq!(counted(CREATED, true)?, Some(1.0));
    Ok(())
}

#[test]
fn every_query_of_every_dashboard_gives_data() -> Result<()> {
    if !is_installed() {
        return Ok(());
    }
    let fleet = Fleet::start()?;
    // Objects are created and changed, with and without success.
    fleet.change(&[pod("c", NODES[0], 3), pod("d", NODES[1], 4), policy("more", Allowed::Anybody)])?;
    fleet.change(&[policy("more", Allowed::Nobody), pod("c", NODES[0], 5), pod("d", NODES[1], 6)])?;
    let fail_once = |agent: &Scrapable| agent.script(|script| script.failures = 1);
    fleet.each(fail_once);
    fleet.change(&[policy("more", Allowed::Anybody), pod("c", NODES[0], 7), pod("d", NODES[1], 8)])?;
    fleet.each(fail_once);
    fleet.change(&[policy("third", Allowed::Anybody), pod("e", NODES[0], 20), pod("f", NODES[1], 21)])?;
    // Namespaces count where a selector of theirs leads to this node's sets; a refused one counts everywhere.
    fleet.each(|agent| agent.problem("Namespace x", "planted"));
    fleet
        .prometheus
        .wait("sum(npm_controller_namespace_exec_time_count{had_error='true'})", |count| count >= 2.0)?;
    // A rate needs two samples.
    fleet.scraped(4)?;

    let tracked = Path::new("/proc/sys/net/netfilter/nf_conntrack_count").exists();
    let mut count = 0;
    for (name, dashboard) in panels::dashboards(&deployed("grafana"))? {
        check_variables(&fleet.prometheus, &dashboard)?;
        for Query { panel: _, title, letter, expression, legend, instant: _ } in panels::queries(&dashboard) {
            let result = fleet.prometheus.query(&panels::substituted(&expression, "1m"));
            let result = result.with_context(|| format!("{name}: {title} {letter}"))?;
            let optional = expression.contains("conntrack") && !tracked;
            ensure!(!result.is_empty() || optional, "{name}: {title} {letter}: no data: {expression}");
            for label in legend.split("{{").skip(1).filter_map(|rest| rest.split("}}").next()) {
                let has = |sample: &Value| sample["metric"][label].is_string();
                ensure!(result.iter().all(has), "{title} {letter}: no label {label}: {expression}");
            }
            count += 1;
        }
    }
    assert!(count >= 50, "{count} queries");
    println!("{count} queries give data");
    Ok(())
}

/// Every variable that is looked up has something to choose from.
fn check_variables(prometheus: &Prometheus, dashboard: &Value) -> Result<()> {
    let mut checked = 0;
    for variable in dashboard["templating"]["list"].as_array().context("no variables")? {
        let Some(definition) = variable["query"]["query"].as_str() else { continue };
        let inner = definition.trim_start_matches("label_values(").trim_end_matches(')');
        let (metric, label) = inner.split_once(", ").context("a metric and a label")?;
        let samples = prometheus.query(&format!("count by ({label}) ({metric})"))?;
        // Clusters are told apart by an external label that one cluster alone does not have.
        let has = |sample: &Value| sample["metric"][label].is_string() || label == "cluster";
        ensure!(!samples.is_empty() && samples.iter().all(has), "{definition}: nothing to choose from");
        checked += 1;
    }
    ensure!(checked == 3, "cluster, node and backend are variables: {checked}");
    Ok(())
}
