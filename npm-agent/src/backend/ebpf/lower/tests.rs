//! What only the shape of the maps shows; that the verdicts are right is `tests/tests/ebpf_agreement.rs`'s.

use std::collections::BTreeSet;

use npm_policy::compile::compile;
use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::Family;
use npm_policy::model::{
    Block, Labels, NamedPort, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork, PodPhase,
    Policy as Api, PolicyKey, Port, Ports, Requirement, Rule, Selector,
};
use npm_policy::world::{Change, World};

use super::super::held::Limits;
use super::super::plan::filled;
use super::super::words;
use super::*;

/// A pod of this node, labelled with its name's first letter, whose port `http` has this number.
fn pod(name: &str, addresses: &[&str], http: u16) -> Change {
    let key = PodKey::new("x", name);
    let pod = Pod {
        key: key.clone(),
        node: Some("n".into()),
        labels: Labels::from([("app".into(), name[..1].into())]),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: http }].into(),
        created: 0,
    };
    Change::Pod(key, Some(pod))
}

fn app(name: &str) -> Selector {
    Selector::new([Requirement { key: "app".into(), operator: Operator::In(BTreeSet::from([name.into()])) }])
}

fn pods(name: &str) -> Peer {
    Peer::Pods { namespaces: NamespaceScope::Named("x".into()), pods: app(name) }
}

fn block(cidr: &str, except: &[&str]) -> Peer {
    let except = except.iter().map(|net| net.parse().unwrap()).collect();
    Peer::Block(Block { cidr: cidr.parse().unwrap(), except })
}

fn rule(peers: Vec<Peer>, ports: Ports) -> Rule {
    Rule { peers: Peers::Only(peers), ports }
}

fn http() -> Ports {
    Ports::Only(vec![Port::Named { protocol: Protocol::Tcp, name: "http".into() }])
}

fn tcp(first: u16, last: u16) -> Ports {
    Ports::Only(vec![Port::Range { protocol: Protocol::Tcp, first, last }])
}

fn policy(name: &str, subjects: &str, ingress: Option<Vec<Rule>>, egress: Option<Vec<Rule>>) -> Change {
    let key = PolicyKey::new("x", name);
    Change::Policy(key.clone(), Some(Api { key, subjects: app(subjects), ingress, egress }))
}

fn goal(changes: impl IntoIterator<Item = Change>) -> Goal {
    let mut world = World::default();
    changes.into_iter().for_each(|change| world.apply(change));
    compile(&world, "n").0
}

fn maps(changes: impl IntoIterator<Item = Change>) -> Lowered {
    lower(&goal(changes)).unwrap()
}

#[test]
fn policies_are_shared_by_content() {
    let rules = || Some(vec![rule(vec![pods("c")], tcp(80, 80))]);
    let maps = maps([
        pod("a1", &["10.0.0.1", "10.0.0.2", "fd00::1"], 8080),
        pod("a2", &["10.0.0.3"], 8080),
        pod("b", &["10.0.0.4"], 8080),
        pod("c", &["10.0.0.5"], 8080),
        policy("one", "a", rules(), rules()),
        policy("two", "b", None, rules()),
    ]);
    let endpoint = |ingress, egress, pod| Endpoint { ingress, egress, pod };
    let v4: Vec<_> = maps.v4.endpoints.into_values().collect();
    assert_eq!(v4, [endpoint(1, 1, 1), endpoint(1, 1, 1), endpoint(1, 1, 2), endpoint(0, 1, 3)]);
    assert_eq!(maps.v6.endpoints.into_values().collect::<Vec<_>>(), [endpoint(1, 1, 1)]);
    assert_eq!((maps.policies.len(), maps.segments.len(), maps.rows.len()), (2, 1, 2));
}

#[test]
fn named_ports_of_ingress_are_each_endpoints_own() {
    let maps = maps([
        pod("a1", &["10.0.0.1"], 8080),
        pod("a2", &["10.0.0.2"], 9090),
        policy("one", "a", Some(vec![rule(vec![pods("a")], http())]), None),
    ]);
    let ids: Vec<u32> = maps.v4.endpoints.values().map(|endpoint| endpoint.ingress).collect();
    assert_eq!(ids, [1, 2]);
    let first: Vec<u32> = maps.segments.iter().map(|segment| segment.first).collect();
    assert_eq!(first, [position(6, 8080), position(6, 9090)]);
    assert!(maps.v4.pairs.is_empty() && maps.policies.iter().all(|policy| policy.pairs == 0));
}

#[test]
fn prefixes_hold_all_blocks_that_cover_them() {
    let maps = maps([
        pod("a", &["10.1.0.1"], 8080),
        policy(
            "one",
            "a",
            None,
            Some(vec![rule(
                vec![
                    pods("a"),
                    block("0.0.0.0/0", &[]),
                    block("10.0.0.0/8", &["10.1.0.0/16"]),
                    block("10.1.0.0/24", &[]),
                ],
                Ports::Any,
            )]),
        ),
    ]);
    // The bits in their order: any peer, the pods, the blocks.
    let expected =
        [("0.0.0.0/0", 0b00100), ("10.0.0.0/8", 0b01100), ("10.1.0.0/16", 0b00100), ("10.1.0.0/24", 0b10100)];
    let found: Vec<_> = maps.v4.networks.iter().map(|(prefix, bits)| (prefix.to_string(), bits[0])).collect();
    assert_eq!(found, expected.map(|(prefix, bits)| (prefix.to_owned(), bits)));
    // A pod's row is its own and its blocks'.
    assert_eq!(maps.v4.members[&[10, 1, 0, 1]][0], 0b10110);
    for (address, bits) in [([9, 9, 9, 9], 0b00100), ([10, 9, 9, 9], 0b01100), ([10, 1, 1, 1], 0b00100)] {
        assert_eq!(maps.v4.longest(address).map(|row| row[0]), Some(bits), "{address:?}");
    }
    assert_eq!(maps.v6.longest([0; 16]), None);
}

#[test]
fn what_does_not_fit_is_refused() {
    let blocks = |count: u8| (0..count).map(|n| block(&format!("10.0.{n}.0/24"), &[])).collect();
    let changes = |count| {
        [pod("a", &["10.1.0.1"], 8080), policy("one", "a", Some(vec![rule(blocks(count), Ports::Any)]), None)]
    };
    assert_eq!(lower::<1>(&goal(changes(63))).map(|maps| maps.bits.len()), Ok(64));
    let error = LowerError::Peers { needed: 65, available: 64 };
    assert_eq!(lower::<1>(&goal(changes(64))), Err(error));
    assert_eq!(lower::<2>(&goal(changes(64))).map(|maps| maps.bits.len()), Ok(65));
}

#[test]
fn a_missing_set_allows_nobody() {
    let mut goal = goal([
        pod("a", &["10.0.0.1"], 8080),
        policy("one", "a", Some(vec![rule(vec![pods("a"), block("10.0.0.0/8", &[])], Ports::Any)]), None),
    ]);
    let flow = Flow {
        source: "10.0.0.9".parse().unwrap(),
        destination: "10.0.0.1".parse().unwrap(),
        transport: Transport::Portless(1),
    };
    assert_eq!(
        decision(filled(&lower::<1>(&goal).unwrap(), &Limits::OBJECT).unwrap().decide(&flow)),
        Decision::Allow
    );
    let subjects: Vec<_> = goal.programs.values().map(|program| program.subjects.clone()).collect();
    let left = goal.sets.iter().filter(|(key, _)| subjects.contains(key));
    goal.sets = left.map(|(key, set)| (key.clone(), set.clone())).collect();
    assert_eq!(
        decision(filled(&lower::<1>(&goal).unwrap(), &Limits::OBJECT).unwrap().decide(&flow)),
        Decision::Deny
    );
}

#[test]
fn the_maps_in_words() {
    let goal = goal([
        pod("a", &["10.0.0.1", "fd00::1"], 8080),
        pod("b", &["10.0.0.2"], 9090),
        policy(
            "one",
            "a",
            Some(vec![
                rule(vec![pods("b"), block("10.0.0.0/8", &["10.0.0.0/30"])], http()),
                Rule { peers: Peers::Any, ports: tcp(80, 89) },
            ]),
            Some(vec![rule(vec![pods("b")], http()), rule(vec![pods("b")], tcp(0, 65535))]),
        ),
    ]);
    let expected = "\
# policies: \"any\" is every port and every protocol; a port allows those and its own
policy 1
  any: nobody
  TCP/80-89: anybody
  TCP/8080: ns-x-AND-podlabel-app:b, cidr-10.0.0.0/8-except-10.0.0.0/30
policy 2
  any: TCP namedport:http-AND-ns-x-AND-podlabel-app:b
  TCP: ns-x-AND-podlabel-app:b

# IPv4 endpoints: the isolated addresses of this node's pods
10.0.0.1 (x/a): ingress policy 1, egress policy 2

# IPv4 members: the peer sets of pods' addresses
10.0.0.2: ns-x-AND-podlabel-app:b

# IPv4 networks: the peer sets of other addresses, longest prefix
10.0.0.0/8: cidr-10.0.0.0/8-except-10.0.0.0/30
10.0.0.0/30: nobody

# IPv4 pairs: the peer sets of named ports
10.0.0.2 TCP/9090: TCP namedport:http-AND-ns-x-AND-podlabel-app:b

# IPv6 endpoints: the isolated addresses of this node's pods
fd00::1 (x/a): ingress policy 1, egress policy 2

# IPv6 members: the peer sets of pods' addresses

# IPv6 networks: the peer sets of other addresses, longest prefix

# IPv6 pairs: the peer sets of named ports
";
    assert_eq!(words::text(&goal, &lower::<1>(&goal).unwrap(), &Family::BOTH), expected);
}
