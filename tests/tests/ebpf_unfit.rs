//! Goals that the eBPF maps can't hold: one policy that is too large keeps no other from being enforced.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::choice::Choice;
use npm_agent::backend::ebpf::enforcer::Ebpf;
use npm_common::layout::MAX_NETWORKS;
use npm_policy::compile::compile;
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::model::{PolicyKey, Protocol};
use npm_tests::lab::netns::Netns;
use npm_tests::lab::observer::{self, End, Observer, Stream, Which};
use npm_tests::lab::require_root;
use npm_tests::lab::service::Dialect;
use npm_tests::pair::{Stage, world};
use npm_tests::scenario::enforcer::{Means, ebpf};

const A: &str = "10.241.0.2";
const B: &str = "10.241.0.3";

/// So many of them fit, and twice as many do not.
const NETWORKS: u32 = MAX_NETWORKS * 3 / 5;

/// A policy for pod a that allows a network to come in, but for so many single addresses of it.
fn networks(name: &str, network: u8, count: u32) -> String {
    let mut policy = policy(name, "a", "");
    let _ = write!(policy, "{{ipBlock: {{cidr: {network}.0.0.0/8, except: [");
    for number in 0..count {
        let _ = write!(policy, "{}/32, ", outside(network, number, 1));
    }
    policy + "]}}]}]}}\n---\n"
}

/// A policy for pod a that allows so many selections of pods to come in, none of which selects any.
fn selectors(name: &str, count: u32) -> String {
    let mut policy = policy(name, "a", "");
    for number in 0..count {
        let _ = write!(policy, "{{podSelector: {{matchLabels: {{of: {name}-{number}}}}}}}, ");
    }
    policy + "]}]}}\n---\n"
}

/// A policy for pod b that allows pod a to reach a port.
fn port(port: u16) -> String {
    let ports = format!("ports: [{{protocol: UDP, port: {port}}}], ");
    policy("port", "b", &ports) + "{podSelector: {matchLabels: {app: a}}}]}]}}\n---\n"
}

fn policy(name: &str, of: &str, ports: &str) -> String {
    format!(
        "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: {name}, namespace: x}}, \
         spec: {{podSelector: {{matchLabels: {{app: {of}}}}}, policyTypes: [Ingress], ingress: [{{{ports}from: ["
    )
}

fn outside(network: u8, number: u32, last: u8) -> IpAddr {
    let [_, high, low, _] = (number << 8).to_be_bytes();
    IpAddr::from([network, high, low, last])
}

fn start(node: &Netns) -> Result<Ebpf> {
    ebpf(node, Choice::default(), Dialect::Nft)
}

/// The agent's backend on a node with both pods.
struct Node {
    stage: Stage,
    backend: Ebpf,
    /// New flows from pod a to pod b, to a port that a policy allows through all of it.
    bystander: Option<Observer>,
}

/// The port of the bystander.
const ALWAYS: u16 = 70;

impl Node {
    fn build() -> Result<Self> {
        let stage = Stage::build(Means::Nothing)?;
        observer::prepare(stage.node())?;
        let backend = start(stage.node())?;
        let mut node = Self { stage, backend, bystander: None };
        ensure!(node.apply(&[])?.is_empty());
        let end = |address: &str| -> Result<End> {
            let netns = node.stage.lab.endpoints()[node.stage.pod(address)?].netns.clone();
            Ok(End { netns, address: address.parse()? })
        };
        let (from, to) = (end(A)?, end(B)?);
        let stream = Stream { from, to, protocol: Protocol::Udp, port: ALWAYS, rate: 500 };
        node.bystander = Some(Observer::start(stream)?);
        Ok(node)
    }

    /// Nobody who has nothing to do with it has noticed.
    fn end(mut self) -> Result<()> {
        let trace = self.bystander.take().context("it is watched")?.stop()?;
        let lost = trace.runs(Which::Lost);
        ensure!(lost.is_empty(), "packets of another policy are lost: {lost:?}");
        ensure!(trace.sent.len() > 100, "hardly any packet was sent");
        Ok(())
    }

    /// Another process goes on with the node.
    fn restart(&mut self) -> Result<()> {
        self.backend = start(self.stage.node())?;
        Ok(())
    }

    /// Applies policies, and one with a network of its own; gives those that allow less than they say.
    fn apply(&mut self, policies: &[String]) -> Result<Vec<PolicyKey>> {
        let ports = format!("ports: [{{protocol: UDP, port: {ALWAYS}}}], ");
        let bystander = policy("always", "b", &ports) + "{ipBlock: {cidr: 10.241.0.0/30}}]}]}}\n---\n";
        let goal = compile(&world(&(bystander + &policies.concat()))?, "node-a").0;
        let backend = &mut self.backend;
        let applied = self.stage.node().run(|| Ok(backend.apply(&goal)?))?;
        applied.degraded.iter().for_each(|degraded| println!("{degraded:?}"));
        Ok(applied.degraded.into_iter().map(|degraded| degraded.policy).collect())
    }

    /// The same without a change.
    fn verify(&mut self) -> Result<Vec<PolicyKey>> {
        let backend = &mut self.backend;
        let applied = self.stage.node().run(|| Ok(backend.verify()?))?;
        ensure!(applied.drift.is_empty(), "{:?}", applied.drift);
        Ok(applied.degraded.into_iter().map(|degraded| degraded.policy).collect())
    }

    /// What the program in the kernel says of a packet.
    fn allows(&mut self, source: impl Into<Source>, destination: &str, port: u16) -> Result<bool> {
        let transport = Transport::Port(Protocol::Udp, port);
        let flow = Flow { source: source.into().0, destination: destination.parse()?, transport };
        Ok(self.backend.decide(&flow)? == Decision::Allow)
    }
}

/// An address, or its text.
struct Source(IpAddr);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        Self(address)
    }
}

impl From<&str> for Source {
    fn from(text: &str) -> Self {
        Self(text.parse().expect("an address"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let Self { stage, backend, bystander: _ } = self;
        if let Err(error) = stage.node().run(|| Ok(backend.remove()?)) {
            eprintln!("pins are left behind: {error:#}");
        }
    }
}

#[test]
fn too_many_networks_of_one_policy_stop_no_other() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut node = Node::build()?;
    let (one, two) = (networks("one", 20, NETWORKS), networks("two", 30, NETWORKS));
    let is = |name: &str| [PolicyKey::new("x", name)];
    let out = node.apply(&[one.clone(), port(80)])?;
    ensure!(out.is_empty(), "one of them fits: {out:?}");
    ensure!(node.allows(outside(20, 5, 2), A, 9)? && !node.allows(outside(30, 5, 2), A, 9)?);
    ensure!(!node.allows(outside(20, 5, 1), A, 9)?, "it is an exception");
    ensure!(node.allows(A, B, 80)? && !node.allows(A, B, 81)?);

    // Both do not: what one of them allows is left out. What else the same change brings is in force.
    ensure!(node.apply(&[one.clone(), two.clone(), port(81)])? == is("one"));
    ensure!(!node.allows(outside(20, 5, 2), A, 9)? && node.allows(outside(30, 5, 2), A, 9)?);
    ensure!(!node.allows(A, B, 80)? && node.allows(A, B, 81)?);
    ensure!(!node.allows(B, A, 9)?, "pod a is isolated");
    // So does what comes later, by what differs, and nothing changes by itself.
    ensure!(node.apply(&[one.clone(), two.clone(), port(82)])? == is("one"));
    ensure!(!node.allows(A, B, 81)? && node.allows(A, B, 82)?);
    ensure!(node.verify()? == is("one"));
    ensure!(!node.allows(outside(20, 5, 2), A, 9)? && node.allows(A, B, 82)?);

    // It is the same whatever came before.
    node.restart()?;
    ensure!(node.apply(&[one.clone(), two.clone(), port(82)])? == is("one"));
    ensure!(!node.allows(outside(20, 5, 2), A, 9)? && node.allows(A, B, 82)?);

    // When policies change there may be room.
    let less = networks("one", 20, 10);
    ensure!(node.apply(&[less, two.clone(), port(82)])?.is_empty());
    ensure!(node.allows(outside(20, 5, 2), A, 9)? && node.allows(outside(30, 5, 2), A, 9)?);
    ensure!(node.apply(&[one.clone(), two, port(82)])? == is("one"));
    ensure!(node.apply(&[one, port(82)])?.is_empty());
    ensure!(node.verify()?.is_empty() && node.allows(outside(20, 5, 2), A, 9)?);

    // What fits, but not beside what was there before, is whole at once.
    ensure!(node.apply(&[networks("one", 40, NETWORKS), port(82)])?.is_empty());
    ensure!(node.allows(outside(40, 5, 2), A, 9)? && !node.allows(outside(20, 5, 2), A, 9)?);
    node.end()
}

#[test]
fn too_many_peers_of_one_policy_stop_no_other() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut node = Node::build()?;
    let (small, large) = (selectors("small", 600), selectors("large", 10_000));
    ensure!(node.apply(&[port(80)])?.is_empty());
    let out = node.apply(&[small.clone(), large, port(81)])?;
    ensure!(out == [PolicyKey::new("x", "large")], "{out:?}");
    ensure!(node.allows(A, B, 81)? && !node.allows(A, B, 80)? && !node.allows(B, A, 9)?);
    ensure!(node.apply(&[small, port(80)])?.is_empty());
    ensure!(node.allows(A, B, 80)? && !node.allows(A, B, 81)?);
    node.end()
}
