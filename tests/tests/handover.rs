//! One backend follows the other on the same node: open connections live on, what is denied stays denied, and nothing of
//! the first is left.
#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use npm_common::layout::SCHEMA;
use npm_policy::flow::Transport;
use npm_policy::model::Protocol;
use npm_tests::lab::agent::{Agent, Settings};
use npm_tests::lab::netns::Netns;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Lab, Spec, require_root};

const CLIENT: [&str; 2] = ["10.241.0.2", "fd00:241::2"];
const SERVER: [&str; 2] = ["10.241.0.3", "fd00:241::3"];
const OPEN: u16 = 80;
const SHUT: u16 = 443;

/// The client may reach the server at one port.
const MANIFESTS: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: x}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client, namespace: x, labels: {app: client}}, spec: {nodeName: node}, status: {phase: Running, podIPs: [{ip: 10.241.0.2}, {ip: "fd00:241::2"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: server, namespace: x, labels: {app: server}}, spec: {nodeName: node}, status: {phase: Running, podIPs: [{ip: 10.241.0.3}, {ip: "fd00:241::3"}]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: x}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
"#;

struct Connection(TcpStream);

impl Connection {
    fn open(from: &Netns, to: IpAddr) -> Result<Self> {
        let stream = from.run(|| Ok(TcpStream::connect((to, OPEN))?))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self(stream))
    }

    fn echo(&mut self, word: &[u8; 4]) -> Result<()> {
        let mut answer = [0; 4];
        self.0.write_all(word)?;
        self.0.read_exact(&mut answer).context("a connection that was open is cut")?;
        ensure!(answer == *word, "another answer");
        Ok(())
    }
}

/// What iptables has of ours.
fn rules(node: &Netns, dialect: Dialect) -> Result<String> {
    let mut all = String::new();
    for program in ["iptables", "ip6tables"] {
        all += &node.exec(&format!("{program}-{}-save", dialect.name()), &["-t", "filter"])?;
    }
    all += &node.exec("ipset", &["list", "-name"])?;
    Ok(all)
}

fn is_pinned(instance: &str) -> bool {
    Path::new("/sys/fs/bpf/npm-agent").join(instance).join(format!("v{SCHEMA}")).is_dir()
}

#[test]
fn one_backend_follows_the_other_and_cuts_nothing() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (dialect, choice) in
        [(Dialect::Nft, "kfuncs"), (Dialect::Legacy, "maps"), (Dialect::Nft, "probe,maps,clsact")]
    {
        let mut lab = Lab::build(&Spec::one_node(&[("client", CLIENT), ("server", SERVER)])?)?;
        let ports = [OPEN, SHUT].map(|port| Transport::Port(Protocol::Tcp, port));
        lab.listen(&ports)?;
        let (node, client) = (lab.netns("node")?.clone(), lab.netns("client")?.clone());
        let directory = tempfile::tempdir()?;
        let manifests = directory.path().join("manifests");
        std::fs::create_dir(&manifests)?;
        std::fs::write(manifests.join("x.yaml"), MANIFESTS)?;
        let start = |backend: &str| -> Result<Agent> {
            let more = ["--iptables-variant", dialect.name(), "--instance", node.name()];
            let settings = Settings {
                backend: backend.to_owned(),
                node: "node".to_owned(),
                manifests: manifests.clone(),
                directory: directory.path().to_owned(),
                more: more.map(str::to_owned).to_vec(),
            };
            // Where proofs are in maps, they are listed of what exists when the second backend begins.
            let under = vec!["env".to_owned(), format!("NPM_EBPF_CHOICE={choice}")];
            let mut agent = Agent::start_under(&node, settings, under)?;
            agent.wait().with_context(|| format!("waiting for the agent with {backend}"))?;
            Ok(agent)
        };
        let from = lab.find("client")?;
        let mut connections: Vec<Connection> = Vec::new();
        for (round, backend) in ["iptables", "ebpf", "iptables", "ebpf"].into_iter().enumerate() {
            let agent = start(backend).with_context(|| format!("round {round}"))?;
            let rules = rules(&node, dialect)?;
            let (has_rules, has_pins) = (rules.contains("AZURE-NPM"), is_pinned(node.name()));
            let has_sets = rules.contains("azure-npm-");
            let is_iptables = backend == "iptables";
            ensure!(
                (has_rules, has_sets, has_pins) == (is_iptables, is_iptables, !is_iptables),
                "round {round}, {backend}: rules {has_rules}, sets {has_sets}, pins {has_pins}"
            );
            ensure!(is_iptables != rules.contains("NPM-AGENT-CONNTRACK"), "the rule that tracks connections");
            for (index, destination) in SERVER.iter().enumerate() {
                let destination: IpAddr = destination.parse()?;
                let source = CLIENT[index].parse()?;
                let probes =
                    ports.map(|transport| Probe { from, source, destination, transport, expected: None });
                let seen = lab.probe(&probes)?;
                ensure!(seen == [Outcome::Answered, Outcome::Blocked], "round {round}, {backend}: {seen:?}");
                connections.push(Connection::open(&client, destination)?);
            }
            for connection in &mut connections {
                connection.echo(b"here").with_context(|| format!("round {round}, {backend}"))?;
            }
            agent.terminate()?;
            for connection in &mut connections {
                connection.echo(b"left").with_context(|| format!("round {round}, after {backend}"))?;
            }
        }
        node.exec(&npm_tests::lab::agent::binary()?.to_string_lossy(), &["cleanup"])?;
        ensure!(!is_pinned(node.name()), "cleanup leaves pins");
        ensure!(!rules(&node, dialect)?.contains("NPM-AGENT"), "cleanup leaves a chain");
    }
    Ok(())
}
