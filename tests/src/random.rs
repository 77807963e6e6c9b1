//! Random worlds, changes and flows: small, crowded, and made to collide.
//!
//! Few names, labels, ports and addresses, so that objects meet: selectors match about half of the pods, blocks nest and
//! touch pods, ports fall on the edges of ranges, addresses are claimed twice. `tests/agreement.rs` asserts that every
//! feature of the API decides its share of the flows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use npm_policy::flow::{Flow, Transport};
use npm_policy::model::{
    Block, Labels, NamedPort, Namespace, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork,
    PodPhase, Policy, PolicyKey, Port, Ports, Protocol, Requirement, Rule, Selector,
};
use npm_policy::shared::Shared;
use npm_policy::world::{Change, World};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;

/// The nodes that pods run on.
pub const NODES: [&str; 2] = ["n1", "n2"];
const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const PODS: [&str; 4] = ["a", "b", "c", "d"];
const POLICIES: [&str; 4] = ["p", "q", "r", "s"];
const KEYS: [&str; 3] = ["app", "tier", "env"];
const VALUES: [&str; 3] = ["", "web", "db"];
const PORT_NAMES: [&str; 3] = ["http", "dns", "peer"];
/// Ports that ranges begin and end at, their neighbours, and the ends of the whole.
const PORTS: [u16; 8] = [0, 1, 79, 80, 81, 443, 65534, 65535];

/// The changes that make a whole world, in an order of no meaning.
pub fn world() -> impl Strategy<Value = Vec<Change>> {
    (namespaces(), pods(), policies(1..=7)).prop_map(|(namespaces, pods, policies)| {
        let mut changes = namespaces;
        changes.extend(pods);
        changes.extend(policies);
        changes
    })
}

/// A crowd: 150 pods, 60 policies with long lists of peers and ports, so that lists outgrow what a rule can hold.
pub fn crowd() -> impl Strategy<Value = Vec<Change>> {
    let rule = || {
        (vec(peer(), 1..=12), vec(port(), 1..=20))
            .prop_map(|(peers, ports)| Rule { peers: Peers::Only(peers), ports: Ports::Only(ports) })
    };
    let direction = move || prop_oneof![1 => Just(None), 2 => vec(rule(), 1..=3).prop_map(Some)];
    let policy = (policy(), direction(), direction()).prop_map(|(policy, ingress, egress)| Policy {
        ingress,
        egress,
        ..policy
    });
    (namespaces(), vec(pod(), 150), vec(policy, 60)).prop_map(|(mut changes, pods, policies)| {
        for (index, mut pod) in pods.into_iter().enumerate() {
            let number = u8::try_from(index).expect("at most 150 pods");
            pod.key.name = format!("{}-{index}", pod.key.name).into();
            // In the same networks as everywhere, but nobody else's.
            pod.addresses = BTreeSet::from([
                IpAddr::V4(Ipv4Addr::new(10, 0, number % 3, 10 + number)),
                IpAddr::V6(Ipv6Addr::new(
                    0xfd00,
                    0,
                    0,
                    0,
                    0,
                    0,
                    u16::from(number % 3),
                    0x10 + u16::from(number),
                )),
            ]);
            changes.push(Change::Pod(pod.key.clone(), Some(pod)));
        }
        for (index, mut policy) in policies.into_iter().enumerate() {
            policy.key.name = format!("{}-{index}", policy.key.name).into();
            changes.push(Change::Policy(policy.key.clone(), Some(policy)));
        }
        changes
    })
}

/// A sequence of single changes over a small set of keys: additions, replacements and deletions.
pub fn sequence(length: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = Vec<Change>> {
    let gone = prop_oneof![
        (select(&NAMESPACES[..]), select(&PODS[..]))
            .prop_map(|(ns, name)| Change::Pod(PodKey::new(ns, name), None)),
        select(&NAMESPACES[..]).prop_map(|ns| Change::Namespace(ns.into(), None)),
        (select(&NAMESPACES[..]), select(&POLICIES[..]))
            .prop_map(|(ns, name)| Change::Policy(PolicyKey::new(ns, name), None)),
    ];
    let there = prop_oneof![
        5 => pod().prop_map(|pod| Change::Pod(pod.key.clone(), Some(pod))),
        2 => namespace().prop_map(|namespace| Change::Namespace(Arc::clone(&namespace.name), Some(namespace))),
        4 => policy().prop_map(|policy| Change::Policy(policy.key.clone(), Some(policy))),
    ];
    vec(prop_oneof![3 => there, 1 => gone], length)
}

/// The world that these changes make.
pub fn world_of(changes: impl IntoIterator<Item = Change>) -> World {
    let mut world = World::default();
    for change in changes {
        world.apply(change);
    }
    world
}

/// Flows between the addresses that matter in a world: pods', blocks' edges, and hosts outside, over ports at the
/// edges of what policies name. `per_world` of them, chosen by the seed.
pub fn flows(world: &World, per_world: usize, seed: u64) -> Vec<Flow> {
    let mut addresses: BTreeSet<IpAddr> =
        world.pods().flat_map(|pod| pod.addresses.iter().copied()).collect();
    addresses.extend((0..4).map(|last| IpAddr::V4(Ipv4Addr::new(10, 0, 9, last))));
    addresses.insert(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7)));
    addresses.insert(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7)));
    let addresses: Vec<IpAddr> = addresses.into_iter().collect();
    let pods: Vec<IpAddr> =
        addresses.iter().copied().filter(|address| world.holder(*address).is_some()).collect();
    let mut numbers = SplitMix(seed);
    let mut flows = Vec::with_capacity(per_world);
    let mut tries = 0;
    while flows.len() < per_world && tries < per_world * 20 {
        tries += 1;
        // One end is a pod, mostly: two hosts outside are nobody's business.
        let pod = if pods.is_empty() { &addresses } else { &pods };
        let (one, other) = (numbers.pick(pod), numbers.pick(&addresses));
        let (source, destination) =
            if numbers.next().is_multiple_of(2) { (one, other) } else { (other, one) };
        if source.is_ipv4() != destination.is_ipv4() {
            continue;
        }
        flows.push(Flow { source, destination, transport: transport(world, destination, &mut numbers) });
    }
    flows
}

fn transport(world: &World, destination: IpAddr, numbers: &mut SplitMix) -> Transport {
    let named: Vec<&NamedPort> =
        world.holder(destination).map(|pod| pod.ports.iter().collect()).unwrap_or_default();
    match numbers.next() % 8 {
        0 => Transport::echo(destination),
        1..=4 if !named.is_empty() => {
            let port = named[usize::try_from(numbers.next() % named.len() as u64).expect("below a length")];
            Transport::Port(port.protocol, port.port)
        }
        _ => {
            let protocol = [Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
            Transport::Port(numbers.pick(&protocol), numbers.pick(&PORTS))
        }
    }
}

/// How often a counterexample is made smaller, at the most: `NPM_SHRINK`, or `default`. Who only asks whether there is
/// one (`cargo xtask mutants`) sets 0.
///
/// # Panics
/// `NPM_SHRINK` is no number.
pub fn shrink_iterations(default: u32) -> u32 {
    std::env::var("NPM_SHRINK").map_or(default, |text| text.parse().expect("NPM_SHRINK is a number"))
}

/// A small generator of numbers for choices that need no shrinking (Steele et al., SplitMix64).
#[derive(Clone, Debug)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "an endless sequence of its own, not an Iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of several, which must not be empty.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.next() % of.len() as u64).expect("below a length")]
    }

    /// Puts them into another order, every one as likely (Fisher and Yates).
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            all.swap(last, usize::try_from(self.next() % (last as u64 + 1)).expect("an index"));
        }
    }
}

fn text(of: &'static [&'static str]) -> impl Strategy<Value = Arc<str>> + Clone {
    select(of).prop_map(Arc::from)
}

fn labels() -> impl Strategy<Value = Labels> {
    btree_map(text(&KEYS), text(&VALUES), 0..=3).prop_map(|labels| labels.into_iter().collect())
}

fn namespaces() -> impl Strategy<Value = Vec<Change>> {
    vec(namespace(), 0..=3).prop_map(|namespaces| {
        let change = |namespace: Namespace| Change::Namespace(Arc::clone(&namespace.name), Some(namespace));
        namespaces.into_iter().map(change).collect()
    })
}

fn namespace() -> impl Strategy<Value = Namespace> {
    (text(&NAMESPACES), labels()).prop_map(|(name, labels)| Namespace::new(name, labels))
}

fn pods() -> impl Strategy<Value = Vec<Change>> {
    vec(pod(), 6..=16).prop_map(|pods| {
        let pods: BTreeMap<PodKey, Pod> = pods.into_iter().map(|pod| (pod.key.clone(), pod)).collect();
        pods.into_iter().map(|(key, pod)| Change::Pod(key, Some(pod))).collect()
    })
}

/// Pods live in 10.0.0.0/22 and fd00::/64, close together, so that they meet blocks and each other's addresses.
fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        4 => (0u8..3, 1u8..7).prop_map(|(third, last)| IpAddr::V4(Ipv4Addr::new(10, 0, third, last))),
        3 => (0u16..3, 1u16..6).prop_map(|(seventh, last)| {
            IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, seventh, last))
        }),
    ]
}

fn pod() -> impl Strategy<Value = Pod> {
    let node = prop_oneof![8 => select(&NODES[..]).prop_map(Some), 1 => Just(None)];
    let network = prop_oneof![4 => Just(PodNetwork::Own), 1 => Just(PodNetwork::Host)];
    let phase = prop_oneof![4 => Just(PodPhase::Active), 1 => Just(PodPhase::Ended)];
    let addresses = btree_set(address(), 0..=3);
    let ports = btree_set(named_port(), 1..=4);
    let names = (text(&NAMESPACES), text(&PODS));
    (names, node, labels(), addresses, network, phase, ports, 0i64..3).prop_map(
        |((namespace, name), node, labels, addresses, network, phase, ports, created)| Pod {
            key: PodKey::new(namespace, name),
            node: node.map(Arc::from),
            labels,
            addresses,
            network,
            phase,
            ports: ports.into(),
            created,
        },
    )
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![3 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp), 1 => Just(Protocol::Sctp)]
}

fn named_port() -> impl Strategy<Value = NamedPort> {
    let port = select(&PORTS[1..]);
    (text(&PORT_NAMES), protocol(), port).prop_map(|(name, protocol, port)| NamedPort {
        name,
        protocol,
        port,
    })
}

fn policies(count: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<Change>> {
    vec(policy(), count).prop_map(|policies| {
        policies.into_iter().map(|policy| Change::Policy(policy.key.clone(), Some(policy))).collect()
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    let direction = || {
        prop_oneof![
            2 => Just(None),
            1 => Just(Some(Vec::new())),
            8 => vec(rule(), 1..=4).prop_map(Some),
        ]
    };
    (text(&NAMESPACES), text(&POLICIES), selector(2), direction(), direction()).prop_map(
        |(namespace, name, subjects, ingress, egress)| Policy {
            key: PolicyKey::new(namespace, name),
            subjects,
            ingress,
            egress,
        },
    )
}

fn rule() -> impl Strategy<Value = Rule> {
    let peers = prop_oneof![
        3 => Just(Peers::Any),
        9 => vec(peer(), 1..=4).prop_map(Peers::Only),
        1 => Just(Peers::Only(Vec::new())),
    ];
    let ports = prop_oneof![
        4 => Just(Ports::Any),
        10 => vec(port(), 2..=6).prop_map(Ports::Only),
        1 => Just(Ports::Only(Vec::new())),
    ];
    (peers, ports).prop_map(|(peers, ports)| Rule { peers, ports })
}

fn peer() -> impl Strategy<Value = Peer> {
    let scope = prop_oneof![
        3 => text(&NAMESPACES).prop_map(NamespaceScope::Named),
        5 => namespace_selector().prop_map(NamespaceScope::Matching),
    ];
    prop_oneof![
        9 => (scope, pod_selector()).prop_map(|(namespaces, pods)| Peer::Pods { namespaces, pods }),
        4 => block().prop_map(Peer::Block),
    ]
}

fn namespace_selector() -> impl Strategy<Value = Selector> {
    let by_name = btree_set(text(&NAMESPACES), 1..=2).prop_map(|names| {
        let key = npm_policy::model::NAMESPACE_NAME_LABEL.into();
        Selector::new([Requirement { key, operator: Operator::In(names) }])
    });
    prop_oneof![3 => selector(1), 4 => by_name]
}

/// One requirement, mostly: none selects everybody and two often nobody.
fn pod_selector() -> impl Strategy<Value = Selector> {
    let requirements = prop_oneof![
        1 => vec(requirement(), 0),
        5 => vec(requirement(), 1),
        1 => vec(requirement(), 2),
    ];
    requirements.prop_map(Selector::new)
}

fn selector(most: usize) -> impl Strategy<Value = Selector> {
    vec(requirement(), 0..=most).prop_map(Selector::new)
}

fn requirement() -> impl Strategy<Value = Requirement> {
    let values = || btree_set(text(&VALUES), 1..=2);
    let operator = prop_oneof![
        4 => values().prop_map(Operator::In),
        5 => values().prop_map(Operator::NotIn),
        2 => Just(Operator::Exists),
        2 => Just(Operator::DoesNotExist),
    ];
    (text(&KEYS), operator).prop_map(|(key, operator)| Requirement { key, operator })
}

fn block() -> impl Strategy<Value = Block> {
    (address(), select(&[0u8, 1, 8, 16, 22, 24, 29, 30, 31, 32][..]), vec((address(), 1u8..=8), 0..=2))
        .prop_map(|(address, prefix, excepts)| {
            let cidr = net(address, prefix);
            let except = excepts
                .into_iter()
                .map(|(address, longer)| net(address, prefix + longer))
                .filter(|except| cidr.contains(except) && except.prefix_len() > cidr.prefix_len())
                .collect();
            Block { cidr, except }
        })
}

/// The block of this length around an address; for IPv6, of the same number of host bits.
fn net(address: IpAddr, v4_prefix: u8) -> IpNet {
    let prefix = v4_prefix.min(32);
    match address {
        IpAddr::V4(address) => Ipv4Net::new(address, prefix).expect("at most 32").trunc().into(),
        // /0, /1 and /8 stay what they are: fd00::/8 holds all pods, ::/1 none.
        IpAddr::V6(address) => {
            let prefix = if prefix <= 8 { prefix } else { prefix + 96 };
            Ipv6Net::new(address, prefix).expect("at most 128").trunc().into()
        }
    }
}

fn port() -> impl Strategy<Value = Port> {
    let range = (protocol(), select(&PORTS[1..]), select(&PORTS[1..])).prop_map(|(protocol, one, other)| {
        Port::Range { protocol, first: one.min(other), last: one.max(other) }
    });
    let single = (protocol(), select(&PORTS[1..])).prop_map(|(protocol, port)| Port::Range {
        protocol,
        first: port,
        last: port,
    });
    let all = protocol().prop_map(|protocol| Port::Range { protocol, first: 0, last: u16::MAX });
    let named = (protocol(), text(&PORT_NAMES)).prop_map(|(protocol, name)| Port::Named { protocol, name });
    prop_oneof![3 => range, 6 => single, 2 => all, 9 => named]
}

/// A large cluster in the changes that make it: `namespaces` x (`pods` pods, `policies` policies), every hundredth pod
/// on `node`. Policies select by label, name peers by label in their own and in other namespaces.
pub fn cluster(namespaces: u32, pods: u32, policies: u32, node: &str) -> Vec<Change> {
    let mut changes = Vec::new();
    for n in 0..namespaces {
        let namespace: Arc<str> = format!("team-{n}").into();
        let team = Labels::from([("team".into(), format!("{}", n % 20).into())]);
        changes.push(Change::Namespace(
            Arc::clone(&namespace),
            Some(Namespace::new(Arc::clone(&namespace), team)),
        ));
        for p in 0..pods {
            let number = n * pods + p;
            let key = PodKey::new(Arc::clone(&namespace), format!("pod-{p}"));
            let labels = Labels::from([
                ("app".into(), format!("app-{}", p % 10).into()),
                ("tier".into(), format!("tier-{}", p % 3).into()),
            ]);
            let on = if number.is_multiple_of(100) {
                node.into()
            } else {
                format!("node-{}", number % 100).into()
            };
            let address = Ipv4Addr::from(0x0a00_0000 + number);
            let pod = Pod {
                key: key.clone(),
                node: Some(on),
                labels,
                addresses: BTreeSet::from([IpAddr::V4(address)]),
                network: PodNetwork::Own,
                phase: PodPhase::Active,
                ports: Shared::from([NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }]),
                created: 1,
            };
            changes.push(Change::Pod(key, Some(pod)));
        }
        for p in 0..policies {
            let key = PolicyKey::new(Arc::clone(&namespace), format!("policy-{p}"));
            let label = |key: &str, value: String| Requirement {
                key: key.into(),
                operator: Operator::In(BTreeSet::from([value.into()])),
            };
            let own = Peer::Pods {
                namespaces: NamespaceScope::Named(Arc::clone(&namespace)),
                pods: Selector::new([label("app", format!("app-{}", (p + 1) % 10))]),
            };
            let other = Peer::Pods {
                namespaces: NamespaceScope::Matching(Selector::new([label(
                    "team",
                    format!("{}", (n + p) % 20),
                )])),
                pods: Selector::new([label("tier", format!("tier-{}", p % 3))]),
            };
            let http = Port::Named { protocol: Protocol::Tcp, name: "http".into() };
            let rule = Rule { peers: Peers::Only(vec![own, other]), ports: Ports::Only(vec![http]) };
            let policy = Policy {
                key: key.clone(),
                subjects: Selector::new([label("app", format!("app-{p}"))]),
                ingress: Some(vec![rule.clone()]),
                egress: Some(vec![rule]),
            };
            changes.push(Change::Policy(key, Some(policy)));
        }
    }
    changes
}
