//! `--pod-startup hold`: a pod that is not programmed yet passes nothing but its own node's traffic, from before its
//! interface is there, whether an agent runs or not; and nobody else is held.
#![forbid(unsafe_code)]

#[path = "hold/order.rs"]
mod order;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use npm_policy::flow::Transport;
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::apiserver::{self, Server};
use npm_tests::lab::agent::{Agent, Settings, binary};
use npm_tests::lab::netns::Netns;
use npm_tests::lab::node::Layout;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Host, Lab, Spec, require_root};
use serde_json::{Value, json};
use tempfile::TempDir;

const OPEN: u16 = 80;
const SHUT: u16 = 443;

/// The pods, in the order of their interfaces: veth0, veth1, ..
const PODS: [(&str, [&str; 2]); 4] = [
    ("client", ["10.241.0.2", "fd00:241::2"]),
    ("server", ["10.241.0.3", "fd00:241::3"]),
    ("other", ["10.241.0.4", "fd00:241::4"]),
    ("fresh", ["10.241.0.5", "fd00:241::5"]),
];
const NODE: [&str; 2] = ["10.240.0.4", "fd00:240::4"];
const WORLD: [&str; 2] = ["192.0.2.9", "fd00:9::9"];

/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whoever the server's policy names reaches it at one port; no policy selects the others.
const POLICY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: x}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
"#;

fn pod(name: &str) -> String {
    let [v4, v6] = addresses(name);
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: x, labels: {{app: {name}}}}}, \
         spec: {{nodeName: node}}, status: {{phase: Running, podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]}}}}\n"
    )
}

/// The same as the API server has it.
fn pod_object(name: &str) -> Value {
    let [v4, v6] = addresses(name);
    json!({
        "kind": "Pod", "metadata": {"namespace": "x", "name": name, "labels": {"app": name}},
        "spec": {"nodeName": "node", "containers": []},
        "status": {"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]},
    })
}

fn addresses(name: &str) -> [&'static str; 2] {
    let of_pod = PODS.iter().find(|(pod, _)| *pod == name).map(|(_, addresses)| *addresses);
    of_pod.unwrap_or(if name == "node" { NODE } else { WORLD })
}

/// What the agent is made of.
#[derive(Clone, Copy, Debug)]
struct Setup {
    backend: &'static str,
    dialect: Dialect,
    layout: Layout,
}

/// A node with pods and a host outside.
struct Stage {
    // Dropped in this order: what runs in namespaces before the namespaces.
    agent: Option<Agent>,
    lab: Lab,
    directory: TempDir,
    setup: Setup,
}

impl Stage {
    fn build(setup: Setup) -> Result<Self> {
        let mut spec = Spec::one_node(&PODS)?;
        let addresses = WORLD.map(str::parse).into_iter().collect::<Result<_, _>>()?;
        spec.externals = vec![Host { name: "world".to_owned(), addresses }];
        spec.layout = setup.layout;
        let mut lab = Lab::build(&spec)?;
        let both = [Protocol::Tcp, Protocol::Udp];
        lab.listen(&[OPEN, SHUT].map(|port| both.map(|it| Transport::Port(it, port))).concat())?;
        let directory = tempfile::tempdir()?;
        std::fs::create_dir(directory.path().join("manifests"))?;
        let stage = Self { agent: None, lab, directory, setup };
        let namespace = "{apiVersion: v1, kind: Namespace, metadata: {name: x}}\n";
        stage.write("namespace", namespace)?;
        stage.write("policy", POLICY)?;
        for name in ["client", "server", "other"] {
            stage.write(name, &pod(name))?;
        }
        Ok(stage)
    }

    fn node(&self) -> Result<Netns> {
        Ok(self.lab.netns("node")?.clone())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join("manifests").join(format!("{name}.yaml"))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let fresh = self.directory.path().join("new");
        std::fs::write(&fresh, text)?;
        Ok(std::fs::rename(fresh, self.file(name))?)
    }

    fn settings(&self, startup: &str) -> Result<Settings> {
        let node = self.node()?;
        let more = [
            ["--pod-startup", startup],
            ["--iptables-variant", self.setup.dialect.name()],
            ["--instance", node.name()],
            ["--listening-port", "0"],
        ];
        Ok(Settings {
            backend: self.setup.backend.to_owned(),
            node: "node".to_owned(),
            manifests: self.directory.path().join("manifests"),
            directory: self.directory.path().to_owned(),
            more: more.concat().into_iter().map(str::to_owned).collect(),
        })
    }

    fn start(&mut self, startup: &str) -> Result<()> {
        self.start_with(self.settings(startup)?)
    }

    fn start_with(&mut self, settings: Settings) -> Result<()> {
        self.agent = Some(Agent::start(&self.node()?, settings)?);
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.agent.as_mut().context("the agent runs")?.wait()
    }

    fn kill(&mut self) -> Result<()> {
        self.agent.take().context("the agent runs")?.kill()
    }

    /// Takes the interface of a pod away and gives it another of the same name, as when a pod ends and a new one gets its
    /// address.
    fn plug_anew(&self, name: &str) -> Result<()> {
        let index = PODS.iter().position(|(pod, _)| *pod == name).context("a pod")?;
        let pod = self.lab.netns(name)?;
        let host = format!("veth{index}");
        let [v4, v6] = addresses(name);
        self.node()?.exec_with_input(
            "ip",
            &["-batch", "-"],
            &format!(
                "link del {host}\nlink add {host} type veth peer name eth0 netns {}\n\
                 link set {host} up\naddr add fe80::1/64 dev {host} nodad\n\
                 route add {v4}/32 dev {host}\nroute add {v6}/128 dev {host}\n",
                pod.name()
            ),
        )?;
        pod.exec_with_input(
            "ip",
            &["-batch", "-"],
            &format!(
                "link set eth0 up\naddr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\n\
                 route add 169.254.1.1/32 dev eth0 scope link\nroute add default via 169.254.1.1 dev eth0\n\
                 route add ::/0 via fe80::1 dev eth0\n"
            ),
        )?;
        Ok(())
    }

    /// Tries flows, each in both families and with TCP, UDP and an echo request, all at once: they must come to this.
    fn expect(&mut self, when: &str, flows: &[(&str, &str, u16, Outcome)]) -> Result<()> {
        let mut probes = Vec::new();
        let mut wanted = Vec::new();
        for (from, to, port, outcome) in flows {
            for family in 0..2 {
                let source: IpAddr = addresses(from)[family].parse()?;
                let destination: IpAddr = addresses(to)[family].parse()?;
                let mut transports = vec![
                    Transport::Port(Protocol::Tcp, *port),
                    Transport::Port(Protocol::Udp, *port),
                    Transport::echo(destination),
                ];
                // The policy is about TCP: of other protocols it allows nothing.
                if *to == "server" && *outcome == Outcome::Answered && *from == "client" {
                    transports.truncate(1);
                }
                for transport in transports {
                    let from = self.lab.find(from)?;
                    let expected = Some(outcome.decision());
                    probes.push(Probe { from, source, destination, transport, expected });
                    wanted.push(*outcome);
                }
            }
        }
        let seen = self.lab.probe(&probes)?;
        let wrong = probes.iter().zip(&wanted).zip(&seen).filter(|((_, wanted), seen)| wanted != seen);
        let wrong: Vec<String> = wrong
            .map(|((probe, wanted), seen)| {
                let (from, to) = (probe.source, probe.destination);
                format!("{from} -> {to} {}: {seen:?}, not {wanted:?}", probe.transport)
            })
            .collect();
        let log = self.agent.as_ref().map(Agent::log).unwrap_or_default();
        ensure!(wrong.is_empty(), "{:?}, {when}: {wrong:#?}\n{log}", self.setup);
        Ok(())
    }

    fn expect_beside_others(&mut self, when: &str, flows: &[(&str, &str, u16, Outcome)]) -> Result<()> {
        self.expect(when, &[&OTHERS, flows].concat())
    }

    /// Nothing goes between the new pod and anybody but the node; everybody else is as the policy says.
    fn expect_held(&mut self, when: &str) -> Result<()> {
        use Outcome::{Answered, Blocked};
        self.expect_beside_others(
            when,
            &[
                ("fresh", "client", OPEN, Blocked),
                ("client", "fresh", OPEN, Blocked),
                ("fresh", "server", OPEN, Blocked),
                ("server", "fresh", OPEN, Blocked),
                ("fresh", "world", OPEN, Blocked),
                ("world", "fresh", OPEN, Blocked),
                ("node", "fresh", OPEN, Answered),
                ("fresh", "node", OPEN, Answered),
            ],
        )
    }

    /// The new pod is as every pod: no policy selects it, and the server's does not let it in.
    fn expect_programmed(&mut self, when: &str) -> Result<()> {
        use Outcome::{Answered, Blocked};
        self.expect_beside_others(
            when,
            &[
                ("fresh", "client", OPEN, Answered),
                ("client", "fresh", OPEN, Answered),
                ("fresh", "server", OPEN, Blocked),
                ("server", "fresh", OPEN, Answered),
                ("fresh", "world", OPEN, Answered),
                ("world", "fresh", OPEN, Answered),
                ("node", "fresh", OPEN, Answered),
                ("fresh", "node", OPEN, Answered),
            ],
        )
    }

    /// What iptables and ipset have of what holds.
    fn traces(&self) -> Result<Vec<String>> {
        let node = self.node()?;
        let mut all = String::new();
        for dialect in Dialect::BOTH {
            for family in Family::BOTH {
                all += &node.exec(&dialect.program(family, "-save"), &["-t", "filter"])?;
            }
        }
        all += &node.exec("ipset", &["list", "-name"])?;
        Ok(all.lines().filter(|line| line.to_lowercase().contains("hold")).map(str::to_owned).collect())
    }
}

/// Who is no new pod.
const OTHERS: [(&str, &str, u16, Outcome); 8] = [
    ("client", "server", OPEN, Outcome::Answered),
    ("client", "server", SHUT, Outcome::Blocked),
    ("other", "server", OPEN, Outcome::Blocked),
    ("other", "client", OPEN, Outcome::Answered),
    ("client", "world", OPEN, Outcome::Answered),
    ("world", "client", OPEN, Outcome::Answered),
    ("node", "client", OPEN, Outcome::Answered),
    ("client", "node", OPEN, Outcome::Answered),
];

/// A connection that stays open.
struct Connection(TcpStream);

impl Connection {
    fn open(from: &Netns, to: &str) -> Result<Self> {
        let to: IpAddr = to.parse()?;
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

fn life_of_a_pod(setup: Setup) -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build(setup)?;
    let client = stage.lab.netns("client")?.clone();
    // One is opened before the agent's first start by who is not known to it.
    let mut open = Vec::new();
    for family in 0..2 {
        open.push(Connection::open(&client, addresses("server")[family])?);
        open.push(Connection::open(stage.lab.netns("fresh")?, addresses("other")[family])?);
    }
    stage.start("hold")?;
    stage.wait()?;
    stage.expect_held("a pod that the agent has not heard of")?;

    stage.write("fresh", &pod("fresh"))?;
    stage.wait()?;
    stage.expect_programmed("the pod is programmed")?;
    for connection in &mut open {
        connection.echo(b"live").context("after the first start")?;
    }

    stage.kill()?;
    std::fs::remove_file(stage.file("fresh"))?;
    stage.expect_programmed("no agent runs, the pod is known")?;
    stage.start("hold")?;
    stage.wait()?;
    stage.expect_held("the pod ended while no agent ran")?;

    stage.kill()?;
    stage.plug_anew("fresh")?;
    stage.expect_held("a pod that was made while no agent runs")?;
    stage.write("fresh", &pod("fresh"))?;
    stage.start("hold")?;
    stage.wait()?;
    stage.expect_programmed("an agent has come back")?;
    for connection in open.iter_mut().step_by(2) {
        connection.echo(b"last").context("after all that")?;
    }

    std::fs::remove_file(stage.file("fresh"))?;
    stage.wait()?;
    stage.expect_held("the pod is gone from the API")?;
    stage.kill()?;
    stage.start("allow")?;
    stage.wait()?;
    stage.expect_programmed("the agent is told to hold nobody")?;
    ensure!(stage.traces()?.is_empty(), "allow leaves {:?}", stage.traces()?);
    Ok(())
}

#[test]
fn iptables_nft_holds() -> Result<()> {
    life_of_a_pod(Setup { backend: "iptables", dialect: Dialect::Nft, layout: Layout::Routed })
}

#[test]
fn iptables_legacy_holds() -> Result<()> {
    life_of_a_pod(Setup { backend: "iptables", dialect: Dialect::Legacy, layout: Layout::Routed })
}

#[test]
fn ebpf_holds() -> Result<()> {
    life_of_a_pod(Setup { backend: "ebpf", dialect: Dialect::Nft, layout: Layout::Routed })
}

/// On a bridge, packets from pod to pod are seen by what holds as well, if netfilter is shown them.
#[test]
fn pods_on_a_bridge_are_held() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for backend in ["iptables", "ebpf"] {
        let mut stage = Stage::build(Setup { backend, dialect: Dialect::Nft, layout: Layout::Bridged })?;
        stage.start("hold")?;
        stage.wait()?;
        // Neighbours are sought anew, by who is held too.
        stage.lab.forget_neighbours()?;
        stage.expect_held("a pod that the agent has not heard of")?;
        stage.write("fresh", &pod("fresh"))?;
        stage.wait()?;
        stage.expect_programmed("the pod is programmed")?;
    }
    Ok(())
}

/// Who is not in what could be read may have run for long: nothing is held before everything was read once.
#[test]
fn nobody_is_held_before_the_source_was_read_whole() -> Result<()> {
    use Outcome::Answered;
    if !require_root() {
        return Ok(());
    }
    let mut stage =
        Stage::build(Setup { backend: "iptables", dialect: Dialect::Nft, layout: Layout::Routed })?;
    stage.write("fresh", "{ this is no object")?;
    stage.start("hold")?;
    let enforced = |status: &Value| {
        status["source"]["unread"][0].is_string() && status["backends"][0]["generation"] == json!(1)
    };
    stage.eventually("what could be read is enforced", |stage| {
        let agent = stage.agent.as_ref().context("the agent runs")?;
        // The socket appears shortly after the start.
        Ok(agent.status().is_ok_and(|status| enforced(&status)))
    })?;
    stage.expect("not all was read", &[("other", "server", OPEN, Outcome::Blocked)])?;
    let flows = [("fresh", "client", OPEN, Answered), ("client", "fresh", OPEN, Answered)];
    stage.expect("not all was read", &flows)?;
    std::fs::remove_file(stage.file("fresh"))?;
    stage.wait()?;
    stage.expect_held("all was read")?;
    // An agent that can't read everything keeps what the one before has left.
    stage.kill()?;
    stage.write("fresh", "{ this is no object")?;
    stage.start("hold")?;
    stage.eventually("the agent runs", |stage| {
        let agent = stage.agent.as_ref().context("the agent runs")?;
        Ok(agent.status().is_ok_and(|status| status["source"]["unread"][0].is_string()))
    })?;
    stage.expect_held("another agent can't read everything")
}

/// A name in the configuration that fits nothing is no silent allow.
#[test]
fn names_that_fit_no_interface_are_told() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage =
        Stage::build(Setup { backend: "iptables", dialect: Dialect::Nft, layout: Layout::Routed })?;
    for (names, told) in
        [("azv*", json!("not-held")), ("azv*,veth3", Value::Null), ("azv*,veth2", Value::Null)]
    {
        let mut settings = stage.settings("hold")?;
        settings.more.extend(["--pod-interfaces", names, "--verify-interval", "200ms"].map(str::to_owned));
        stage.write("fresh", &pod("fresh"))?;
        stage.start_with(settings)?;
        stage.wait()?;
        stage.eventually(names, |stage| {
            let status = stage.agent.as_ref().context("the agent runs")?.status()?;
            let looked = status["backends"][0]["verifies"].as_u64() > Some(3);
            let names = |escape: &Value| escape["name"] == json!("not-held");
            let found = status["escapes"].as_array().is_some_and(|escapes| escapes.iter().any(names));
            Ok(looked && found == told.is_string())
        })?;
        std::fs::remove_file(stage.file("fresh"))?;
        stage.wait()?;
        // Only who is behind an interface of the names is held.
        let is_held = names.contains("veth3");
        let outcome = if is_held { Outcome::Blocked } else { Outcome::Answered };
        stage.expect(names, &[("fresh", "client", OPEN, outcome), ("world", "fresh", OPEN, outcome)])?;
        stage.kill()?;
    }
    Ok(())
}

/// What others take out of the rules or the set is put back, and told.
#[test]
fn what_holds_is_repaired_and_removed() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage =
        Stage::build(Setup { backend: "iptables", dialect: Dialect::Nft, layout: Layout::Routed })?;
    // Of sets nobody tells.
    let mut settings = stage.settings("hold")?;
    settings.more.extend(["--verify-interval", "200ms"].map(str::to_owned));
    stage.start_with(settings)?;
    stage.wait()?;
    let node = stage.node()?;
    for (program, args) in [
        ("iptables-nft", "-D FORWARD -m conntrack ! --ctstate RELATED,ESTABLISHED -j NPM-AGENT-HOLD"),
        ("ip6tables-nft", "-F NPM-AGENT-HOLD"),
        ("iptables-nft", "-I FORWARD -j ACCEPT"),
        ("ipset", "add npm-agent-hold-4 10.241.0.5"),
        ("ipset", "del npm-agent-hold-6 fd00:241::2"),
    ] {
        let before = stage.repairs()?;
        node.exec(program, &args.split(' ').collect::<Vec<_>>())?;
        stage.eventually(&format!("{program} {args}: repaired"), |stage| Ok(stage.repairs()? > before))?;
    }
    stage.expect_held("all is repaired")?;
    stage.kill()?;
    node.exec(&binary()?.to_string_lossy(), &["cleanup"])?;
    ensure!(stage.traces()?.is_empty(), "cleanup leaves {:?}", stage.traces()?);
    Ok(())
}

impl Stage {
    /// How much the agent has repaired.
    fn repairs(&self) -> Result<u64> {
        let status = self.agent.as_ref().context("the agent runs")?.status()?;
        status["backends"][0]["drift_repairs"].as_u64().context("a number of repairs")
    }

    /// Waits for something to come true.
    fn eventually(&self, what: &str, holds: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self)? {
            let log = self.agent.as_ref().map(Agent::log).unwrap_or_default();
            ensure!(Instant::now() < deadline, "{what}: it never came\n{log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// How often the way from the API to the packet is measured.
const ROUNDS: usize = 12;

/// From the API server's event to the first packet that passes; and nothing passes before the event. Prints the times.
#[test]
fn the_api_server_lets_pods_go() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for backend in ["iptables", "ebpf"] {
        let mut stage = Stage::build(Setup { backend, dialect: Dialect::Nft, layout: Layout::Routed })?;
        let node = stage.node()?;
        let listener = node.run(|| TcpListener::bind("127.0.0.1:0").context("listening"))?;
        let server = Server::start(listener, &apiserver::Options::default())?;
        let kubeconfig = stage.directory.path().join("kubeconfig");
        std::fs::write(&kubeconfig, server.kubeconfig(None))?;
        let store = server.store();
        store.put(json!({"kind": "Namespace", "metadata": {"name": "x"}}));
        for name in ["client", "server", "other"] {
            store.put(pod_object(name));
        }
        store.put(json!({
            "kind": "NetworkPolicy", "metadata": {"namespace": "x", "name": "server"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "server"}},
                "ingress": [{
                    "from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": OPEN}],
                }],
            },
        }));
        let mut settings = stage.settings("hold")?;
        settings.manifests = PathBuf::new();
        settings.more.extend(["--source", "kube", "--kubeconfig"].map(str::to_owned));
        settings.more.push(kubeconfig.to_string_lossy().into_owned());
        stage.start_with(settings)?;
        stage.wait()?;
        stage.expect_held("the API server has not told of it")?;
        let client = stage.lab.netns("client")?.clone();
        let fresh: IpAddr = addresses("fresh")[0].parse()?;
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            stage.eventually("the pod is held", |_| {
                Ok(!node.exec("ipset", &["save", "npm-agent-hold-4"])?.contains("10.241.0.5"))
            })?;
            // A new port each time: an answered connection lives on.
            let socket = client.run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
            socket.connect((fresh, OPEN))?;
            socket.set_read_timeout(Some(Duration::from_millis(1)))?;
            let passes = || -> Result<bool> {
                socket.send(b"12345678")?;
                Ok(socket.recv(&mut [0; 8]).is_ok())
            };
            for _ in 0..20 {
                ensure!(!passes()?, "{backend}: a packet passes before the event");
            }
            let start = Instant::now();
            store.put(pod_object("fresh"));
            while !passes()? {
                ensure!(start.elapsed() < PATIENCE, "{backend}: the pod is not let go");
            }
            times.push(start.elapsed());
            store.remove("pods", "x", "fresh");
        }
        times.sort();
        let (middle, last) = (times[ROUNDS / 2], times[ROUNDS - 1]);
        println!("{backend}: from the event to the first packet: median {middle:?}, longest {last:?}");
    }
    Ok(())
}

/// From the moment that the interface is made nothing passes, in either direction, while no agent runs.
#[test]
fn an_interface_is_held_from_its_first_packet_on() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for backend in ["iptables", "ebpf"] {
        let mut stage = Stage::build(Setup { backend, dialect: Dialect::Nft, layout: Layout::Routed })?;
        stage.start("hold")?;
        stage.wait()?;
        stage.kill()?;
        let ends = [("client", "fresh"), ("fresh", "client"), ("fresh", "world"), ("world", "fresh")];
        let socket = |name: &str, port: u16| -> Result<UdpSocket> {
            stage.lab.netns(name)?.run(|| Ok(UdpSocket::bind(("0.0.0.0", port))?))
        };
        let hearing = ["client", "fresh", "world"].map(|name| Ok((name, socket(name, 7777)?)));
        let hearing: Vec<(&str, UdpSocket)> = hearing.into_iter().collect::<Result<_>>()?;
        // Each flow has a port of its own: what is sent where the pod will be, and is allowed, may be answered.
        let sending = ends.map(|(from, to)| Ok((socket(from, 0)?, addresses(to)[0])));
        let sending: Vec<(UdpSocket, &str)> = sending.into_iter().collect::<Result<_>>()?;
        let stop = AtomicBool::new(false);
        let sent = [const { AtomicUsize::new(0) }; 4];
        let counts = || sent.each_ref().map(|sent| sent.load(Ordering::Relaxed));
        std::thread::scope(|scope| -> Result<()> {
            for ((socket, to), sent) in sending.iter().zip(&sent) {
                let stop = &stop;
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        // Without its interface the pod has no route.
                        if socket.send_to(b"hello", (*to, 7777)).is_ok() {
                            sent.fetch_add(1, Ordering::Relaxed);
                        }
                        std::thread::sleep(Duration::from_micros(200));
                    }
                });
            }
            let plugged = (0..5).try_for_each(|_| {
                stage.plug_anew("fresh")?;
                let before = counts();
                stage.eventually("packets are sent", |_| {
                    Ok(counts().iter().zip(&before).all(|(sent, before)| *sent > before + 50))
                })
            });
            stop.store(true, Ordering::Relaxed);
            plugged
        })?;
        for (name, socket) in &hearing {
            socket.set_nonblocking(true)?;
            if let Ok((_, from)) = socket.recv_from(&mut [0; 8]) {
                bail!("{backend}: {name} has heard {from}");
            }
        }
        println!("{backend}: packets sent, none heard: {:?}", counts());
        // It is the pod's interface that is held: with the agent told of it the same packets pass.
        stage.write("fresh", &pod("fresh"))?;
        stage.start("hold")?;
        stage.wait()?;
        stage.expect_programmed("the pod is programmed")?;
    }
    Ok(())
}
