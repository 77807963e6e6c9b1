//! The agent against a real kube-apiserver with a real etcd, in the node's namespace: with the service account and the
//! ClusterRole that `deploy/` ships, over TLS. What is in the kernel is what the server's objects mean, through changes,
//! restarts of the server, and a history that etcd has forgotten.
//!
//! Opt-in, because the server has to be built first: `cargo xtask test --real-apiserver`. `NPM_REAL_APISERVER` and
//! `NPM_ETCD` are the programs.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use npm_agent::backend::iptables::layout::is_our_jump;
use npm_agent::backend::iptables::render::Rendered;
use npm_agent::backend::iptables::state::State;
use npm_agent::backend::iptables::{Iptables, Options};
use npm_policy::compile::compile;
use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_policy::verdict::oracle;
use npm_policy::world::World;
use npm_tests::apiserver::store::world_of;
use npm_tests::exec::{run, run_with_input, start};
use npm_tests::lab::agent::{Agent, Settings};
use npm_tests::lab::netns::Netns;
use npm_tests::lab::node::Layout;
use npm_tests::lab::{Host, Lab, Spec};
use npm_tests::table::Table;
use npm_tests::tls::{Authority, Identity};
use serde_json::{Value, json};
use tempfile::TempDir;

const NODE: &str = "n1";
const PORT: u16 = 80;
const PODS: [(&str, &str); 3] = [("a", "10.241.0.2"), ("b", "10.241.0.3"), ("c", "10.241.0.4")];
const PATIENCE: Duration = Duration::from_secs(120);

const ADMIN: &str = "admin-token";
const AGENT: &str = "agent-token";

/// A program that is killed when dropped.
struct Running(Child);

impl Running {
    fn kill(&mut self) -> Result<()> {
        self.0.kill().context("killing a server")?;
        self.0.wait().context("waiting for a server").map(drop)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None))
            && let Err(error) = self.kill()
        {
            eprintln!("{error:#}");
        }
    }
}

struct Stage {
    // Dropped in this order: what runs in the namespace before the namespace.
    agent: Option<Agent>,
    apiserver: Option<Running>,
    _etcd: Running,
    lab: Lab,
    kubectl: PathBuf,
    identity: Identity,
    authority: Authority,
    directory: TempDir,
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Whether something comes true before patience ends.
fn eventually(mut holds: impl FnMut() -> Result<bool>) -> Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if holds()? {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

impl Stage {
    fn build() -> Result<Self> {
        let tools = std::env::var_os("NPM_MANIFEST_TOOLS").context("NPM_MANIFEST_TOOLS is not set")?;
        let kubectl = Path::new(&tools).join("kubectl");
        let host = |name: &str, address: &str| -> Result<Host> {
            Ok(Host { name: name.to_owned(), addresses: vec![address.parse()?] })
        };
        let pods = PODS.iter().map(|(name, address)| Ok((0, host(name, address)?)));
        let lab = Lab::build(&Spec {
            layout: Layout::Routed,
            nodes: vec![host(NODE, "10.240.0.4")?],
            pods: pods.collect::<Result<_>>()?,
            externals: vec![],
        })?;
        let directory = tempfile::tempdir()?;
        let authority = Authority::new(directory.path(), "authority")?;
        let identity = authority.sign("kube-apiserver", "127.0.0.1")?;
        let tokens = format!(
            "{ADMIN},admin,1,\"system:masters\"\n\
             {AGENT},system:serviceaccount:kube-system:azure-npm,2,\"system:serviceaccounts\"\n"
        );
        std::fs::write(directory.path().join("tokens"), tokens).context("writing tokens")?;
        let data = text(&directory.path().join("etcd"));
        let etcd = std::env::var("NPM_ETCD").context("NPM_ETCD is not set")?;
        let log = File::create(directory.path().join("etcd.log")).context("making a log")?;
        let etcd = lab.netns(NODE)?.run(|| {
            let urls = ["http://127.0.0.1:2379", "http://127.0.0.1:2380"];
            let args =
                ["--data-dir", &data, "--listen-client-urls", urls[0], "--advertise-client-urls", urls[0]];
            let peers = ["--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1]];
            let initial = ["--initial-cluster", "default=http://127.0.0.1:2380"];
            start(&etcd, &[args.as_slice(), &peers, &initial].concat(), &log)
        })?;
        let mut stage = Self {
            agent: None,
            apiserver: None,
            _etcd: Running(etcd),
            lab,
            kubectl,
            identity,
            authority,
            directory,
        };
        for (name, token) in [("admin", ADMIN), ("agent", AGENT)] {
            std::fs::write(stage.path(name), stage.kubeconfig(token)).context("writing a kubeconfig")?;
        }
        stage.start_server()?;
        Ok(stage)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn node(&self) -> Result<&Netns> {
        self.lab.netns(NODE)
    }

    fn kubeconfig(&self, token: &str) -> String {
        let cluster = json!({"server": "https://127.0.0.1:6443", "certificate-authority": self.authority.certificate()});
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": {"token": token}}],
        })
        .to_string()
    }

    fn start_server(&mut self) -> Result<()> {
        let program = std::env::var("NPM_REAL_APISERVER").context("NPM_REAL_APISERVER is not set")?;
        let key = text(&self.identity.key);
        let args = [
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            "--secure-port=6443".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-signing-key-file={key}"),
            // Its certificate holds the public key: the server reads none from a key in this form.
            format!("--service-account-key-file={}", text(&self.identity.certificate)),
            format!("--token-auth-file={}", text(&self.path("tokens"))),
            format!("--tls-cert-file={}", text(&self.identity.certificate)),
            format!("--tls-private-key-file={key}"),
        ];
        let log = File::options().create(true).append(true).open(self.path("apiserver.log"))?;
        let child = self.node()?.run(|| start(&program, &args, &log))?;
        self.apiserver = Some(Running(child));
        let ready = eventually(|| Ok(self.kubectl(&["get", "--raw", "/readyz"]).is_ok()))?;
        ensure!(ready, "the API server is not ready: {}", self.log("apiserver.log"));
        Ok(())
    }

    fn stop_server(&mut self) -> Result<()> {
        self.apiserver.take().context("the API server runs")?.kill()
    }

    /// The end of a log.
    fn log(&self, name: &str) -> String {
        let all = std::fs::read_to_string(self.path(name)).unwrap_or_default();
        let lines: Vec<&str> = all.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn words<'a>(&'a self, config: &'a str, cache: &'a str, args: &[&'a str]) -> Vec<&'a str> {
        [&["--kubeconfig", config, "--cache-dir", cache], args].concat()
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        let (config, cache) = (text(&self.path("admin")), text(&self.path("cache")));
        let program = text(&self.kubectl);
        self.node()?.run(|| run(&program, &self.words(&config, &cache, args)))
    }

    /// Creates or changes an object; of a pod also its status.
    fn apply(&self, object: &Value) -> Result<()> {
        let (config, cache) = (text(&self.path("admin")), text(&self.path("cache")));
        let (program, input) = (text(&self.kubectl), object.to_string());
        let words = self.words(&config, &cache, &["apply", "--filename", "-"]);
        self.node()?.run(|| run_with_input(&program, &words, &input))?;
        if object["kind"] == "Pod" {
            let name = object["metadata"]["name"].as_str().context("a name")?;
            let patch = json!({"status": object["status"]}).to_string();
            self.kubectl(&[
                "--namespace",
                "lab",
                "patch",
                "pod",
                name,
                "--subresource",
                "status",
                "--type",
                "merge",
                "--patch",
                &patch,
            ])?;
        }
        Ok(())
    }

    fn world(&self) -> Result<World> {
        let kinds = "namespaces,pods,networkpolicies";
        let list = self.kubectl(&["get", kinds, "--all-namespaces", "--output", "json"])?;
        Ok(world_of(serde_json::from_str(&list).context("reading kubectl's list")?))
    }

    fn start_agent(&mut self) -> Result<()> {
        let kubeconfig = text(&self.path("agent"));
        let more = ["--source", "kube", "--kubeconfig", &kubeconfig, "--watch-timeout", "5s"];
        let more = more.iter().chain(&["--listening-address", "127.0.0.1"]);
        let settings = Settings {
            backend: "iptables".into(),
            node: NODE.into(),
            manifests: "".into(),
            directory: self.directory.path().to_owned(),
            more: more.map(|word| (*word).to_owned()).collect(),
        };
        self.agent = Some(Agent::start(self.node()?, settings)?);
        Ok(())
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("the agent runs")
    }

    /// What our chains and sets are in the kernel.
    fn kernel(&self) -> Result<BTreeMap<Family, State>> {
        self.node()?.run(|| {
            let mut read = Iptables::new(Options::default())?.read()?;
            for state in read.values_mut() {
                state.forward.retain(is_our_jump);
            }
            Ok(read)
        })
    }

    /// Waits until the kernel holds what the server's objects mean.
    fn settle(&self, what: &str) -> Result<()> {
        let rendered = Rendered::of(&compile(&self.world()?, NODE).0);
        let wanted: BTreeMap<Family, State> = [(Family::V4, rendered.v4), (Family::V6, rendered.v6)].into();
        // While it is being written it may not be readable.
        if eventually(|| Ok(self.kernel().is_ok_and(|kernel| kernel == wanted)))? {
            return Ok(());
        }
        bail!(
            "{what}: the kernel is not what the server means: {:#}\n{}",
            self.agent()?.status()?,
            self.agent()?.log()
        )
    }

    /// Probes every pair of pods as the oracle says.
    fn probe(&mut self) -> Result<()> {
        let world = self.world()?;
        let transport = Transport::Port(Protocol::Tcp, PORT);
        self.lab.listen(&[transport])?;
        let pods: Vec<usize> = PODS.iter().map(|(name, _)| self.lab.find(name)).collect::<Result<_>>()?;
        let expected = |flow: &Flow| Some(oracle(&world, flow).decision());
        for (family, observed) in self.lab.matrix(&pods, &[transport], &expected)? {
            let mut wanted = Table::new(observed.endpoints.clone());
            for (from, source) in pods.iter().enumerate() {
                for (to, destination) in pods.iter().enumerate().filter(|(to, _)| *to != from) {
                    let address =
                        |pod: &usize| self.lab.endpoints()[*pod].address(family).context("an address");
                    let flow =
                        Flow { source: address(source)?, destination: address(destination)?, transport };
                    wanted.set(transport, from, to, oracle(&world, &flow).decision());
                }
            }
            let differences = observed.differences(&wanted);
            ensure!(differences.is_empty(), "{family:?}: {differences:?}");
        }
        Ok(())
    }

    /// Lets etcd forget everything before now.
    fn compact(&self) -> Result<()> {
        // The revision is in every answer's head.
        let ask = |path: &str, body: &str| -> Result<Value> {
            let url = format!("http://127.0.0.1:2379{path}");
            let answer = self.node()?.run(|| run("curl", &["--silent", "--fail", "--data", body, &url]))?;
            serde_json::from_str(&answer).with_context(|| format!("reading {answer:?}"))
        };
        let answer = ask("/v3/kv/range", r#"{"key": "AA=="}"#)?;
        let revision = answer["header"]["revision"].as_str().context("a revision")?.to_owned();
        ask("/v3/kv/compaction", &json!({"revision": revision, "physical": true}).to_string()).map(drop)
    }
}

fn pod((name, address): (&str, &str), app: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "lab", "name": name, "labels": {"app": app}},
        "spec": {"nodeName": NODE, "containers": [{"name": "c", "image": "none", "ports": [{"name": "http", "containerPort": PORT}]}]},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    })
}

/// A policy that lets only this app to b.
fn only_from(app: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "lab", "name": "only"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "b"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": app}}}], "ports": [{"port": "http"}]}],
        },
    })
}

#[test]
#[ignore = "opt-in, it needs a built kube-apiserver: cargo xtask test --real-apiserver"]
fn what_a_real_server_has_is_enforced() -> Result<()> {
    let mut stage = Stage::build()?;
    let deploy = text(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy"));
    stage.kubectl(&["apply", "--kustomize", &deploy])?;
    let list =
        stage.kubectl(&["auth", "can-i", "--list", "--as", "system:serviceaccount:kube-system:azure-npm"])?;
    ensure!(list.contains("networkpolicies.networking.k8s.io"), "{list}");
    stage.kubectl(&["create", "namespace", "lab"])?;
    for named in PODS {
        stage.apply(&pod(named, named.0))?;
    }
    stage.apply(&only_from("a"))?;
    stage.start_agent()?;
    stage.settle("the start")?;
    stage.probe()?;

    for app in ["c", "a", "c"] {
        stage.apply(&only_from(app))?;
        stage.settle("a policy that changed")?;
    }
    stage.probe()?;
    stage.kubectl(&["--namespace", "lab", "label", "--overwrite", "pod", "a", "app=c"])?;
    stage.settle("a label that changed")?;
    stage.probe()?;

    // The server is away: what is enforced stays. Then it is back, and tells what it had been told meanwhile.
    let before = stage.kernel()?;
    stage.stop_server()?;
    let failing = eventually(|| {
        let watches = stage.agent()?.status()?["source"]["watches"].clone();
        let watches = watches.as_array().context("watches")?.clone();
        Ok(watches.iter().all(|watch| watch["following"] == false))
    })?;
    ensure!(failing, "{:#}", stage.agent()?.status()?);
    ensure!(stage.kernel()? == before, "what is enforced has changed");
    stage.start_server()?;
    stage.apply(&only_from("b"))?;
    stage.settle("a server that was away")?;

    // The history is gone: the point where the watches were is none that the server knows (410).
    stage.stop_server()?;
    stage.compact()?;
    stage.start_server()?;
    stage.kubectl(&["--namespace", "lab", "delete", "pod", "a", "--force", "--grace-period=0"])?;
    stage.apply(&only_from("c"))?;
    stage.compact()?;
    stage.settle("a history that is forgotten")?;

    stage.kubectl(&["delete", "namespace", "lab", "--wait=false"])?;
    stage.kubectl(&["--namespace", "lab", "delete", "networkpolicy", "only"])?;
    stage.settle("a policy that is gone")?;
    stage.agent()?;
    stage.agent.take().context("the agent runs")?.terminate()
}
