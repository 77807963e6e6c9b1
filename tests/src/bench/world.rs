//! The world that is measured: a node with 110 pods and N policies that select them, by the seed the same every time.
//!
//! No two policies are alike. At least N/2 peer expressions are distinct; every eighth policy names blocks of addresses
//! instead, in both families, with an except. Ports are single ones, ranges, several at once, named ones, and any. A pod
//! is selected by up to 90 policies, by 92 where 10,000 policies share 110 pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use npm_policy::compile::compile;
use npm_policy::flow::{Decision, Flow, Judgement, Transport};
use npm_policy::goal::{Family, Goal};
use npm_policy::model::{
    Block, Labels, NamedPort, Namespace, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork,
    PodPhase, Policy, PolicyKey, Port, Ports, Protocol, Requirement, Rule, Selector,
};
use npm_policy::world::{Change, World};

use crate::random::SplitMix;

/// The node that is measured.
pub const NODE: &str = "node-a";
/// Pods of the node.
pub const LOCAL_PODS: u32 = 110;
/// Policies that select one pod at most, as long as there are no more than 9,900 of them.
pub const MOST_ON_A_POD: u32 = 90;

const NAMESPACE: &str = "bench";
/// Values of the label that peers are told apart by.
const APPS: u32 = 500;

/// How large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Policies: N.
    pub policies: u32,
    /// Pods of other nodes.
    pub other_pods: u32,
}

/// The world, and what it is like.
#[derive(Debug)]
pub struct BenchWorld {
    /// The cluster.
    pub world: World,
    /// What the node must enforce.
    pub goal: Goal,
    /// Distinct peer expressions and blocks.
    pub peers: usize,
    /// The policies that select a pod: of the pod with the most.
    pub most_on_a_pod: u32,
}

/// Flows of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A policy allows it, and an end is isolated.
    Hit,
    /// No policy allows it, and an end is isolated.
    Miss,
}

impl BenchWorld {
    /// Makes it.
    ///
    /// # Errors
    /// It is not as described: a mistake of this file.
    pub fn make(size: Size) -> Result<Self> {
        let Size { policies, other_pods } = size;
        let mut world = World::default();
        let namespace = Namespace::new(NAMESPACE, Labels::new());
        world.apply(Change::Namespace(NAMESPACE.into(), Some(namespace)));
        for number in 0..LOCAL_PODS {
            world.apply(pod(&local_name(number), NODE, local_addresses(number), "pod", &local_name(number)));
        }
        for number in 0..other_pods {
            let app = format!("a{}", number % APPS);
            world.apply(pod(&format!("o{number}"), "node-b", other_addresses(number), "app", &app));
        }
        let mut load = vec![0u32; LOCAL_PODS as usize];
        let (mut distinct, mut contents) = (BTreeSet::new(), BTreeSet::new());
        for number in 0..policies {
            let subjects = subjects(number, &mut load);
            let policy = policy(number, &subjects);
            for rule in policy.ingress.iter().chain(&policy.egress).flatten() {
                match &rule.peers {
                    Peers::Only(peers) => distinct.extend(peers.iter().map(|peer| format!("{peer:?}"))),
                    Peers::Any => {}
                }
            }
            let Policy { key: _, subjects, ingress, egress } = &policy;
            contents.insert(format!("{subjects:?} {ingress:?} {egress:?}"));
            world.apply(Change::Policy(policy.key.clone(), Some(policy)));
        }
        let goal = compile(&world, NODE).0;
        let most_on_a_pod = load.iter().copied().max().unwrap_or(0);
        let as_described = contents.len() == policies as usize
            && distinct.len() * 2 >= policies as usize
            && goal.programs.len() == policies as usize
            && most_on_a_pod <= MOST_ON_A_POD.max(policies.div_ceil(LOCAL_PODS - 1));
        ensure!(
            as_described,
            "{policies} policies: {} contents, {} peers, {} programs, {most_on_a_pod} on one pod",
            contents.len(),
            distinct.len(),
            goal.programs.len()
        );
        Ok(Self { world, goal, peers: distinct.len(), most_on_a_pod })
    }

    /// New flows of one kind and family with an isolated end on the node, for both directions, and by every kind of peer
    /// and port: so many, or all there are when that is less.
    ///
    /// # Errors
    /// There is none.
    pub fn flows(&self, kind: Kind, family: Family, count: usize, seed: u64) -> Result<Vec<Flow>> {
        let mut numbers = SplitMix(seed);
        let mut flows = BTreeSet::new();
        let policies: Vec<_> = self.world.policies().collect();
        for _ in 0..count * 200 {
            if flows.len() == count {
                break;
            }
            let policy = policies[(numbers.next() % policies.len() as u64) as usize];
            let Some(flow) = self.candidate(policy, family, kind, &mut numbers) else { continue };
            let verdict = self.goal.verdict(&flow);
            let isolated = |judgement: &Judgement| !matches!(judgement, Judgement::NotIsolated);
            let decision = match kind {
                Kind::Hit => Decision::Allow,
                Kind::Miss => Decision::Deny,
            };
            if verdict.decision() == decision && (isolated(&verdict.ingress) || isolated(&verdict.egress)) {
                flows.insert(flow);
            }
        }
        ensure!(!flows.is_empty(), "no {kind:?} of {family:?} found");
        Ok(flows.into_iter().collect())
    }

    /// A flow that the policy may be about.
    fn candidate(&self, policy: &Policy, family: Family, kind: Kind, numbers: &mut SplitMix) -> Option<Flow> {
        let mut pick = |count: usize| (numbers.next() % count.max(1) as u64) as usize;
        let inbound = policy.egress.is_none() || (policy.ingress.is_some() && pick(2) == 0);
        let rules = if inbound { policy.ingress.as_ref()? } else { policy.egress.as_ref()? };
        let rule = rules.first()?;
        let Peers::Only(peers) = &rule.peers else { return None };
        let local = self.matching(&policy.subjects).nth(0)?;
        let local = local.addresses.iter().copied().find(|address| Family::of(*address) == family)?;
        let mut peer = match &peers[pick(peers.len())] {
            Peer::Pods { pods, .. } => {
                let pods: Vec<_> = self.matching(pods).take(8).collect();
                let pod = pods.get(pick(pods.len()))?;
                pod.addresses.iter().copied().find(|address| Family::of(*address) == family)?
            }
            Peer::Block(block) => block.cidr.addr(),
        };
        let mut port = match &rule.ports {
            Ports::Any => (Protocol::Udp, 9),
            Ports::Only(ports) => match &ports[pick(ports.len())] {
                Port::Range { protocol, first, last } => (*protocol, first.midpoint(*last)),
                Port::Named { protocol, .. } => (*protocol, 8080),
            },
        };
        if kind == Kind::Miss {
            // Another peer, or another port.
            if pick(2) == 0 {
                peer = outsider(family, numbers.next());
            } else {
                port = (Protocol::Tcp, 60_000 + (numbers.next() % 5000) as u16);
            }
        }
        let transport = Transport::Port(port.0, port.1);
        let (source, destination) = if inbound { (peer, local) } else { (local, peer) };
        (Family::of(peer) == family).then_some(Flow { source, destination, transport })
    }

    /// The pods that a selector of this world matches: it names values of one label.
    fn matching<'a>(&'a self, selector: &'a Selector) -> impl Iterator<Item = &'a Arc<Pod>> {
        selector.requirements().flat_map(|Requirement { key, operator }| match operator {
            Operator::In(values) => {
                values.iter().flat_map(|value| self.world.pods_with(key, value)).collect::<Vec<_>>()
            }
            Operator::NotIn(_) | Operator::Exists | Operator::DoesNotExist => Vec::new(),
        })
    }
}

/// The pods that a policy selects: the next in turn; and the first one too, as long as it has room.
fn subjects(number: u32, load: &mut [u32]) -> BTreeSet<u32> {
    let mut next = number % LOCAL_PODS;
    if load[next as usize] >= MOST_ON_A_POD {
        // The one with the least, when its turn comes too early.
        next = (0..LOCAL_PODS).min_by_key(|pod| load[*pod as usize]).unwrap_or(next);
    }
    let mut subjects = BTreeSet::from([next]);
    if load[0] < MOST_ON_A_POD {
        subjects.insert(0);
    }
    for pod in &subjects {
        load[*pod as usize] += 1;
    }
    subjects
}

fn policy(number: u32, subjects: &BTreeSet<u32>) -> Policy {
    let peers = if number % 8 == 7 { blocks(number) } else { vec![pods(number / 2)] };
    let rules = vec![Rule { peers: Peers::Only(peers), ports: ports(number) }];
    let (ingress, egress) = match number % 3 {
        0 => (Some(rules.clone()), Some(rules)),
        1 => (Some(rules), None),
        _ => (None, Some(rules)),
    };
    Policy {
        key: PolicyKey::new(NAMESPACE, format!("policy-{number}")),
        subjects: one_of("pod", subjects.iter().map(|pod| local_name(*pod))),
        ingress,
        egress,
    }
}

/// Pods with one of two values, another pair for each number below 5,000 and more.
fn pods(number: u32) -> Peer {
    let first = number % APPS;
    let second = (first + 1 + number / APPS) % APPS;
    let pods = one_of("app", [first, second].map(|app| format!("a{app}")));
    Peer::Pods { namespaces: NamespaceScope::Named(NAMESPACE.into()), pods }
}

fn blocks(number: u32) -> Vec<Peer> {
    let [_, _, high, low] = number.to_be_bytes();
    let v4 = (Ipv4Addr::new(172, 16 | high >> 4, high << 4 | low >> 4, low << 4), 28, 30);
    let v6 = (Ipv6Addr::new(0x2001, 0xdb8, u16::from_be_bytes([high, low]), 0, 0, 0, 0, 0), 48, 64);
    let block = |address: IpAddr, cidr: u8, except: u8, last: IpAddr| {
        let net = |address, length| ipnet::IpNet::new_assert(address, length).trunc();
        Peer::Block(Block { cidr: net(address, cidr), except: BTreeSet::from([net(last, except)]) })
    };
    let v4_last = Ipv4Addr::from(u32::from(v4.0) | 0xf);
    let v6_last = Ipv6Addr::from(u128::from(v6.0) | 0xffff << 64);
    vec![block(v4.0.into(), v4.1, v4.2, v4_last.into()), block(v6.0.into(), v6.1, v6.2, v6_last.into())]
}

fn ports(number: u32) -> Ports {
    let range = |protocol, first: u32, len: u16| {
        let first = first as u16;
        Port::Range { protocol, first, last: first + len }
    };
    let ports = match number % 16 {
        0 | 4 | 8 | 12 => vec![range(Protocol::Tcp, 1000 + number % 20_000, 0)],
        1 | 5 | 9 | 13 => vec![range(Protocol::Tcp, 1000 + number % 20_000, 100)],
        2 | 6 | 10 | 14 => vec![
            range(Protocol::Udp, 53, 0),
            range(Protocol::Tcp, 443, 0),
            range(Protocol::Udp, 1000 + number % 20_000, 15),
        ],
        3 | 7 | 11 => vec![
            Port::Named { protocol: Protocol::Tcp, name: "http".into() },
            range(Protocol::Tcp, 1000 + number % 20_000, 1),
        ],
        _ => return Ports::Any,
    };
    Ports::Only(ports)
}

fn one_of(key: &str, values: impl IntoIterator<Item = String>) -> Selector {
    let values = values.into_iter().map(Arc::from).collect();
    Selector::new([Requirement { key: key.into(), operator: Operator::In(values) }])
}

fn pod(name: &str, node: &str, addresses: [IpAddr; 2], label: &str, value: &str) -> Change {
    let key = PodKey::new(NAMESPACE, name);
    let http = NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 };
    let pod = Pod {
        key: key.clone(),
        node: Some(node.into()),
        labels: Labels::from([(label.into(), value.into())]),
        addresses: addresses.into(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [http].into(),
        created: 0,
    };
    Change::Pod(key, Some(pod))
}

fn local_name(number: u32) -> String {
    format!("p{number}")
}

fn local_addresses(number: u32) -> [IpAddr; 2] {
    let host = number as u16 + 10;
    [Ipv4Addr::new(10, 1, 0, host as u8).into(), Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, host).into()]
}

fn other_addresses(number: u32) -> [IpAddr; 2] {
    let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 0)) + number + 1);
    [v4.into(), Ipv6Addr::new(0xfd00, 0x64, 0, 0, 0, 0, (number >> 16) as u16, number as u16).into()]
}

/// An address that no policy names and no pod has.
fn outsider(family: Family, number: u64) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(198, 18, (number >> 8) as u8, number as u8).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, number as u16).into(),
    }
}

/// The first flow's kinds and families, in the order of the tables.
///
/// # Errors
/// A kind has no flow.
pub fn all_flows(world: &BenchWorld, count: usize, seed: u64) -> Result<BTreeMap<(Kind, Family), Vec<Flow>>> {
    let kinds =
        [Kind::Hit, Kind::Miss].into_iter().flat_map(|kind| Family::BOTH.map(|family| (kind, family)));
    kinds
        .map(|(kind, family)| {
            let flows = world.flows(kind, family, count, seed);
            Ok(((kind, family), flows.with_context(|| format!("{} policies", world.goal.programs.len()))?))
        })
        .collect()
}
