//! The agent with what the DaemonSet grants and nothing else: its user, its capabilities, its writable places, on either
//! backend. And with one capability less, which has to fail: what is granted is needed.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::programs::LinkOrder;
use aya::programs::tc::TcAttachOptions;
use npm_agent::backend::meter::Timekeeping;
use npm_agent::config::value::BackendKind;
use npm_policy::flow::Transport;
use npm_policy::model::Protocol;
use npm_tests::lab::agent::{Agent, Settings, get};
use npm_tests::lab::netns::Netns;
use npm_tests::lab::other::Other;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Lab, Spec, require_root};
use npm_tests::statistics::Statistics;
use serde_json::Value;

const CLIENT: [&str; 2] = ["10.241.0.2", "fd00:241::2"];
const SERVER: [&str; 2] = ["10.241.0.3", "fd00:241::3"];
const PORTS: [u16; 2] = [80, 443];

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

/// Makes everything read-only but the places that follow (up to `--`), as a container's file systems are, and becomes the
/// rest. What a place holds is the node's own.
const CONFINE: &str = r#"
set -eu
mount --make-rprivate /
while [ "$1" != -- ]; do mount --bind "$1" "$1"; shift; done
shift
mount --bind /proc/sys /proc/sys
for place in / /sys /proc/sys; do mount -o remount,bind,ro "$place"; done
if touch /etc/npm-agent-was-here 2>/dev/null; then echo "the file system is writable"; exit 1; fi
exec "$@"
"#;

/// What a container of `deploy/` is granted.
struct Grant {
    /// Without `CAP_`, in small letters.
    capabilities: BTreeSet<String>,
    /// The paths that it can write.
    writable: Vec<String>,
}

fn shipped(name: &str) -> Result<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| format!("parsing {}", path.display()))
}

fn strings(value: &Value) -> Result<Vec<String>> {
    serde_json::from_value(value.clone()).with_context(|| format!("a list of strings: {value}"))
}

/// Capabilities as setpriv calls them.
fn small(names: &[String]) -> BTreeSet<String> {
    names.iter().map(|name| name.to_lowercase()).collect()
}

fn path(mount: &Value) -> Result<String> {
    mount["mountPath"].as_str().map(str::to_owned).context("a mount's path")
}

impl Grant {
    /// What a container of a DaemonSet is granted.
    fn of_container(set: &Value) -> Result<Self> {
        let container = &set["spec"]["template"]["spec"]["containers"][0];
        let security = &container["securityContext"];
        ensure!(security["runAsUser"] == 0 && security["privileged"] == false, "{security}");
        ensure!(security["allowPrivilegeEscalation"] == false, "{security}");
        ensure!(security["readOnlyRootFilesystem"] == true, "{security}");
        ensure!(strings(&security["capabilities"]["drop"])? == ["ALL"], "{security}");
        let capabilities = small(&strings(&security["capabilities"]["add"])?);
        let mounts = container["volumeMounts"].as_array().context("no mounts")?;
        let writable = mounts.iter().filter(|mount| mount["readOnly"] != true);
        Ok(Self { capabilities, writable: writable.map(path).collect::<Result<_>>()? })
    }

    fn of(backend: BackendKind) -> Result<Self> {
        let mut grant = Self::of_container(&shipped("base/daemonset.yaml")?)?;
        if backend == BackendKind::Ebpf {
            let component = shipped("components/ebpf/kustomization.yaml")?;
            let patch = component["patches"][0]["patch"].as_str().context("no patch")?;
            let patch: Vec<Value> = serde_saphyr::from_str(patch).context("reading the patch")?;
            let value = |end: &str| {
                let ends = |line: &&Value| line["path"].as_str().is_some_and(|path| path.ends_with(end));
                patch.iter().find(ends).map(|line| &line["value"])
            };
            grant.capabilities = small(&strings(value("/capabilities/add").context("no capabilities")?)?);
            grant.writable.push(path(value("/volumeMounts/-").context("no mount")?)?);
        }
        Ok(grant)
    }

    /// The program that confines, and its arguments.
    fn confinement(&self, capabilities: &BTreeSet<String>, more: &Path) -> Vec<String> {
        let words = ["unshare", "--mount", "sh", "-c", CONFINE, "confine"].map(str::to_owned);
        let places = self.writable.iter().filter(|place| Path::new(place).exists()).cloned();
        let mut all: Vec<String> = words.into_iter().chain(places).collect();
        all.extend([more.to_string_lossy().into_owned(), "--".to_owned(), "setpriv".to_owned()]);
        let granted: String = capabilities.iter().map(|name| format!(",+{name}")).collect();
        all.extend(["--no-new-privs".to_owned(), format!("--bounding-set=-all{granted}")]);
        all.extend([format!("--inh-caps=-all{granted}"), "--".to_owned()]);
        all
    }
}

/// Waits until the agent enforces; an attempt that failed is an error at once, though the agent tries again.
fn settle(agent: &mut Agent) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match agent.status() {
            Ok(status) if status["ready"] == true => return Ok(()),
            Ok(status) => {
                let reasons = status["reasons"].to_string();
                ensure!(!reasons.contains(" failed "), "{reasons}");
            }
            // Before it listens.
            Err(error) => ensure!(agent.is_running()?, "{error:#}: {}", agent.log()),
        }
        ensure!(Instant::now() < deadline, "it is neither ready nor failing: {}", agent.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until the agent names another's program in front of ours, which the kernel gives it by number only.
fn told_of_others(node: &Netns, agent: &mut Agent) -> Result<()> {
    let other = Other::attach(node, "veth0", TcAttachOptions::TcxOrder(LinkOrder::first()))?;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let told = agent.status()?["escapes"].to_string();
        if told.contains("program-before") && told.contains("number ") && told.contains("veth0") {
            return other.detach(node);
        }
        ensure!(Instant::now() < deadline, "nobody says that another's program comes first: {told}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What is seen of an agent.
struct Seen {
    /// By traffic, of its policy: allowed, denied.
    outcomes: Vec<Outcome>,
    /// By Prometheus.
    metrics: String,
}

/// Starts an agent with these capabilities and looks at what it does.
fn seen(
    backend: BackendKind,
    dialect: Dialect,
    grant: &Grant,
    capabilities: &BTreeSet<String>,
) -> Result<Seen> {
    let mut lab = Lab::build(&Spec::one_node(&[("client", CLIENT), ("server", SERVER)])?)?;
    let ports = PORTS.map(|port| Transport::Port(Protocol::Tcp, port));
    lab.listen(&ports)?;
    let node = lab.netns("node")?.clone();
    let directory = tempfile::tempdir()?;
    let manifests = directory.path().join("manifests");
    std::fs::create_dir(&manifests)?;
    std::fs::write(manifests.join("x.yaml"), MANIFESTS)?;
    let settings = Settings {
        backend: backend.to_string(),
        node: "node".to_owned(),
        manifests,
        directory: directory.path().to_owned(),
        more: ["--instance", node.name(), "--iptables-variant", dialect.name(), "--verify-interval", "1s"]
            .map(str::to_owned)
            .to_vec(),
    };
    let under = grant.confinement(capabilities, directory.path());
    let mut agent = Agent::start_under(&node, settings, under)?;
    let settled = settle(&mut agent);
    let seen = settled.and_then(|()| {
        if backend == BackendKind::Ebpf {
            told_of_others(&node, &mut agent)?;
        }
        let (from, source) = (lab.find("client")?, CLIENT[0].parse()?);
        let destination = SERVER[0].parse()?;
        let probes = ports.map(|transport| Probe { from, source, destination, transport, expected: None });
        let outcomes = lab.probe(&probes)?;
        let (_, metrics) = get(&node, "127.0.0.1:10091", "/node-metrics")?;
        Ok(Seen { outcomes, metrics })
    });
    agent.kill()?;
    let cleanup = Grant::of_container(&shipped("overlays/cleanup/daemonset.yaml")?)?;
    let mut words = cleanup.confinement(&cleanup.capabilities, directory.path());
    words.extend([npm_tests::lab::agent::binary()?.to_string_lossy().into_owned(), "cleanup".to_owned()]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    node.exec(words[0], &words[1..]).context("cleaning up with what the overlay grants")?;
    seen
}

fn enforces_with_what_is_granted(backend: BackendKind, check: fn(&str) -> Result<()>) -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let grant = Grant::of(backend)?;
    let all = grant.capabilities.clone();
    for dialect in Dialect::BOTH {
        let Seen { outcomes, metrics } =
            seen(backend, dialect, &grant, &all).with_context(|| format!("with {all:?}"))?;
        ensure!(outcomes == [Outcome::Answered, Outcome::Blocked], "{dialect:?} with {all:?}: {outcomes:?}");
        check(&metrics)?;
    }
    for less in &all {
        let mut others = all.clone();
        others.remove(less);
        // It asks for more than iptables-nft: raw sockets.
        let seen = seen(backend, Dialect::Legacy, &grant, &others).map(|seen| seen.outcomes);
        ensure!(seen.is_err(), "it works without {less}: {seen:?}");
    }
    Ok(())
}

#[test]
fn iptables_needs_what_is_granted_and_no_more() -> Result<()> {
    enforces_with_what_is_granted(BackendKind::Iptables, |_| Ok(()))
}

#[test]
fn ebpf_needs_what_is_granted_and_no_more() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut statistics = Statistics::hold()?;
    statistics.set(Timekeeping::On)?;
    enforces_with_what_is_granted(BackendKind::Ebpf, |metrics| {
        // It is read within the container: what the node has the kernel count, and the count.
        for (name, least) in [
            ("npm_node_program_statistics", 1.0),
            ("npm_node_program_runs_total", 2.0),
            ("npm_node_program_run_seconds_total", 1e-9),
        ] {
            let line = metrics.lines().find(|line| line.starts_with(&format!("{name}{{")));
            let number = line.and_then(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
            ensure!(number.is_some_and(|number| number >= least), "{name} is {number:?}:\n{metrics}");
        }
        Ok(())
    })
}
