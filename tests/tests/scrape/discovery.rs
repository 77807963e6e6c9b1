//! The shipped scrape configurations, to the letter: a Prometheus that finds running agents through the API server.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_tests::lab::require_root;
use npm_tests::monitoring::Prometheus;
use serde_json::{Value, json};

use super::{Fleet, NODES, PATIENCE};

/// Names a Prometheus that knows Kubernetes: Debian 12's is built without.
const PROGRAM: &str = "NPM_PROMETHEUS";

/// Where the nodes' agents listen.
const ADDRESSES: [&str; 2] = ["10.240.0.4", "10.240.0.5"];

/// The address of the Service that leads to any agent.
const SERVICE: &str = "10.96.0.10";

/// Names the Service as a cluster's DNS does, and becomes Prometheus.
const WITH_HOSTS: &str = r#"mount --make-rprivate / && mount --bind "$0" /etc/hosts && exec "$@""#;

/// Says loudly when there is none; in CI that is a failure.
fn program() -> Option<PathBuf> {
    let program = std::env::var_os(PROGRAM).map(PathBuf::from);
    if program.is_none() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{PROGRAM} is not set");
        eprintln!("SKIPPED, NOT TESTED: {PROGRAM} is not set (cargo xtask test sets it)");
    }
    program
}

fn shipped(name: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name);
    std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// A shipped configuration for a Prometheus that is no pod: told where the API server is.
fn outside(config: &str, kubeconfig: &Path) -> String {
    let mut text = String::new();
    for line in config.lines() {
        text.push_str(&format!("{line}\n"));
        if line.starts_with("  - role: ") {
            text.push_str(&format!("    kubeconfig_file: {}\n", kubeconfig.display()));
        }
    }
    text
}

/// What a cluster has of the agents: the Service, nodes, the DaemonSet's pods. And what is not theirs.
fn objects() -> Result<Vec<Value>> {
    let mut objects: Vec<Value> = vec![serde_saphyr::from_str(&shipped("base/service.yaml")?)?];
    let system = |name: &str| json!({"namespace": "kube-system", "name": name});
    objects
        .push(json!({"kind": "Service", "metadata": system("kube-dns"), "spec": {"ports": [{"port": 53}]}}));
    objects.push(json!({
        "kind": "Pod", "metadata": system("coredns"),
        "spec": {"nodeName": "n1", "containers": [{"name": "coredns", "ports": [{"containerPort": 53}]}]},
        "status": {"phase": "Running", "podIP": "10.241.0.9", "podIPs": [{"ip": "10.241.0.9"}]},
    }));
    let set: Value = serde_saphyr::from_str(&shipped("base/daemonset.yaml")?)?;
    for ((node, _), address) in NODES.into_iter().zip(ADDRESSES) {
        let addresses = json!([{"type": "InternalIP", "address": address}]);
        let status = json!({"addresses": addresses, "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}}});
        objects.push(json!({"kind": "Node", "metadata": {"name": node}, "status": status}));
        let mut agent = set["spec"]["template"].clone();
        agent["kind"] = "Pod".into();
        agent["metadata"]["namespace"] = "kube-system".into();
        agent["metadata"]["name"] = format!("azure-npm-{node}").into();
        agent["spec"]["nodeName"] = node.into();
        agent["status"] = json!({"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]});
        objects.push(agent);
    }
    Ok(objects)
}

/// What is asked: job, URL, instance, pod, and whether it answers.
fn targets(prometheus: &Prometheus) -> Result<BTreeSet<[String; 5]>> {
    let data = prometheus.api("targets?state=active")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let target = |target: &Value| {
        let labels = &target["labels"];
        [&labels["job"], &target["scrapeUrl"], &labels["instance"], &labels["pod"], &target["health"]]
            .map(text)
    };
    Ok(data["activeTargets"].as_array().context("no targets")?.iter().map(target).collect())
}

#[test]
fn prometheus_finds_the_agents_through_the_api_server() -> Result<()> {
    let Some(program) = program() else { return Ok(()) };
    if !require_root() {
        return Ok(());
    }
    let fleet = Fleet::start()?;
    for object in objects()? {
        fleet.server.store().put(object);
    }
    let node = fleet.lab.netns("n1")?;
    // As kube-proxy does it for whoever asks on the node.
    let rule =
        ["-w", "-t", "nat", "-A", "OUTPUT", "-d", SERVICE, "-p", "tcp", "--dport", "9000", "-j", "DNAT"];
    node.exec("iptables-nft", &[&rule[..], &["--to-destination", "10.240.0.5:10091"]].concat())?;

    let directory = tempfile::tempdir()?;
    let (hosts, kubeconfig) = (directory.path().join("hosts"), directory.path().join("kubeconfig"));
    std::fs::write(&hosts, format!("{SERVICE} npm-metrics-cluster-service.kube-system.svc\n"))?;
    std::fs::write(&kubeconfig, fleet.server.kubeconfig(None))?;
    let mut config = "global: {scrape_interval: 1s}\nscrape_configs:\n".to_owned();
    for name in ["prometheus-server-scrape-config", "prometheus-server-alternative-scrape-config"] {
        config.push_str(&outside(&shipped(&format!("prometheus/{name}.yaml"))?, &kubeconfig));
    }
    let words = ["unshare", "--mount", "sh", "-c", WITH_HOSTS].map(str::to_owned);
    let more = [&hosts, &program].map(|path| path.to_string_lossy().into_owned());
    node.run(|| {
        let prometheus = Prometheus::start_as(&[&words[..], &more[..]].concat(), &config, &[])?;
        let node_job = |address: &str, node: &str| {
            ["azure-npm-node-metrics", &format!("http://{address}:10091/node-metrics"), node, "", "up"]
                .map(str::to_owned)
        };
        let pod_job = |address: &str, node: &str| {
            let (url, pod) = (format!("http://{address}:10091/node-metrics"), format!("azure-npm-{node}"));
            ["azure-npm-node-metrics-from-pod-config", &url, node, &pod, "up"].map(str::to_owned)
        };
        const CLUSTER: &str = "npm-metrics-cluster-service.kube-system.svc:9000";
        let url = format!("http://{CLUSTER}/cluster-metrics");
        let mut wanted: BTreeSet<[String; 5]> =
            [["azure-npm-cluster-metrics", &url, CLUSTER, "", "up"].map(str::to_owned)].into();
        for ((node, _), address) in NODES.into_iter().zip(ADDRESSES) {
            wanted.extend([node_job(address, node), pod_job(address, node)]);
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = targets(&prometheus)?;
            if found == wanted {
                break;
            }
            ensure!(Instant::now() < deadline, "{found:#?}: {}", prometheus.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        prometheus.wait("count(npm_node_in_sync{instance=~'n1|n2'} == 1)", |nodes| nodes == 4.0)?;
        prometheus.wait("npm_num_policies", |policies| policies == 2.0)?;
        ensure!(prometheus.query("npm_ipset_counts")?.is_empty(), "the advanced metrics are not asked for");
        Ok(())
    })
}
