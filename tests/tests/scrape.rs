//! The agent as a process, asked for its metrics over HTTP as Prometheus does.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_agent::metrics::Scope;
use npm_tests::lab::agent::{Agent, Settings};
use npm_tests::lab::netns::{Namespaces, Netns};
use npm_tests::lab::require_root;

const NODE: &str = "n1";

/// Not the default: so the setting is honoured.
const ADDRESS: &str = "127.0.0.2:10191";

/// How long the server may take to listen, and to answer.
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

/// Code and body. The server listens shortly after the start: until then it is asked again.
fn get(node: &Netns, path: &str) -> Result<(u16, String)> {
    node.run(|| {
        let deadline = Instant::now() + PATIENCE;
        let mut stream = loop {
            match TcpStream::connect(ADDRESS) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error).context("reaching the agent"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("a head and a body")?;
        Ok((head.split(' ').nth(1).context("a code")?.parse()?, body.to_owned()))
    })
}

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
        let (code, body) = get(node, scope.path())?;
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
    ensure!(get(node, "/readyz")? == (200, "ok\n".to_owned()));
    agent.terminate()?;

    configure(false)?;
    let mut agent = Agent::start(node, settings)?;
    agent.wait()?;
    ensure!(get(node, "/healthz")?.0 == 200);
    for scope in Scope::ALL {
        ensure!(get(node, scope.path())?.0 == 404, "{scope:?} is served");
    }
    agent.terminate()
}
