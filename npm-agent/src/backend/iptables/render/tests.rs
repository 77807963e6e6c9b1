//! Rendering a goal, against golden text and rule by rule.

use std::path::PathBuf;

use npm_policy::compile::compile;
use npm_policy::flow::Transport;
use npm_policy::model::{
    Block, Labels, NamedPort, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork, PodPhase,
    Policy, Port, Ports, Protocol, Requirement, Rule as PolicyRule, Selector,
};
use npm_policy::world::{Change, World};

use super::super::interpret::{End, Packet, follow};
use super::*;

fn pod(name: &str, addresses: &[&str]) -> Change {
    let key = PodKey::new("x", name);
    let pod = Pod {
        key: key.clone(),
        node: Some("n1".into()),
        labels: Labels::from([("app".into(), name.into())]),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
        created: 0,
    };
    Change::Pod(key, Some(pod))
}

fn app(name: &str) -> Selector {
    Selector::new([Requirement { key: "app".into(), operator: Operator::In(BTreeSet::from([name.into()])) }])
}

fn block(cidr: &str, except: &[&str]) -> Peer {
    let except = except.iter().map(|net| net.parse().unwrap()).collect();
    Peer::Block(Block { cidr: cidr.parse().unwrap(), except })
}

fn pods(namespaces: NamespaceScope, pods: Selector) -> Peer {
    Peer::Pods { namespaces, pods }
}

fn tcp(first: u16, last: u16) -> Port {
    Port::Range { protocol: Protocol::Tcp, first, last }
}

fn policy(
    name: &str,
    subjects: Selector,
    ingress: Option<Vec<PolicyRule>>,
    egress: Option<Vec<PolicyRule>>,
) -> Change {
    let key = PolicyKey::new("x", name);
    Change::Policy(key.clone(), Some(Policy { key, subjects, ingress, egress }))
}

fn goal(changes: Vec<Change>) -> Goal {
    let mut world = World::default();
    changes.into_iter().for_each(|change| world.apply(change));
    compile(&world, "n1").0
}

fn example() -> Goal {
    let everywhere = NamespaceScope::Matching(Selector::everything());
    let many = (0..9).map(|n| tcp(1000 + 2 * n, 1000 + 2 * n)).collect();
    let rules = vec![
        PolicyRule {
            peers: Peers::Only(vec![
                pods(NamespaceScope::Named("x".into()), app("client")),
                block("0.0.0.0/0", &["0.0.0.0/1", "192.168.0.0/16"]),
            ]),
            ports: Ports::Only(vec![
                tcp(80, 80),
                tcp(0, u16::MAX),
                Port::Named { protocol: Protocol::Tcp, name: "http".into() },
                Port::Range { protocol: Protocol::Sctp, first: 5, last: 7 },
            ]),
        },
        PolicyRule {
            peers: Peers::Only(vec![pods(everywhere, Selector::everything()), block("fd00:1::/64", &[])]),
            ports: Ports::Only(many),
        },
    ];
    goal(vec![
        pod("web", &["10.0.0.1", "fd00::1"]),
        pod("client", &["10.0.0.2", "10.0.1.2", "fd00::2"]),
        policy("deny-all", Selector::everything(), Some(vec![]), Some(vec![])),
        policy("web", app("web"), Some(rules), None),
        policy(
            "egress",
            app("client"),
            None,
            Some(vec![PolicyRule { peers: Peers::Any, ports: Ports::Any }]),
        ),
    ])
}

#[test]
fn golden_text() {
    let rendered = Rendered::of(&example());
    let text = format!(
        "{}\n# IPv4\n{}\n# IPv6\n{}",
        rendered.sets_text(),
        rendered.filter_text(Family::V4),
        rendered.filter_text(Family::V6)
    );
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/backend/iptables/render/golden.txt");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(&file).unwrap(), "UPDATE=1 rewrites {}", file.display());
}

#[test]
fn what_is_written_is_what_is_read() {
    let rendered = Rendered::of(&example());
    let [v4, v6] = rendered.read_back().unwrap();
    assert_eq!(v4, rendered.v4);
    assert_eq!(v6, rendered.v6);
}

#[test]
fn names_fit_the_kernel() {
    let rendered = Rendered::of(&example());
    for state in [&rendered.v4, &rendered.v6] {
        assert!(state.sets.keys().all(|name| name.len() <= 31 && layout::is_our_set(name)));
        assert!(state.chains.keys().all(|name| name.len() <= 28 && layout::is_our_chain(name)));
    }
}

#[test]
fn neighbour_discovery_is_nobodys_business() {
    let rendered = Rendered::of(&goal(vec![
        pod("web", &["fd00::1"]),
        policy("deny-all", Selector::everything(), Some(vec![]), Some(vec![])),
    ]));
    let flow = Flow {
        source: "fd00::1".parse().unwrap(),
        destination: "fd00::9".parse().unwrap(),
        transport: Transport::Portless(ICMPV6),
    };
    for kind in 0..=u8::MAX {
        let mut packet = Packet { icmpv6_type: Some(kind), ..Packet::opening(&flow) };
        let end = follow(&rendered.v6, &mut packet, &mut None).unwrap();
        let passes = NEIGHBOUR_TYPES.contains(&kind);
        assert_eq!(end, if passes { End::GoesOn } else { End::Dropped }, "type {kind}");
    }
}

#[test]
fn no_program_leaves_the_entry_empty() {
    let rendered = Rendered::of(&Goal::default());
    for state in [&rendered.v4, &rendered.v6] {
        assert_eq!(state.chains.len(), 1);
        assert!(state.chains[layout::ENTRY].is_empty());
        assert!(state.sets.is_empty());
    }
}

#[test]
fn the_whole_of_a_family_becomes_halves() {
    let set = |members: &[Member]| block_members(&members.iter().copied().collect());
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    let all = set(&[Member::Include(net("::/0"))]);
    assert_eq!(all, [Member::Include(net("::/1")), Member::Include(net("8000::/1"))].into_iter().collect());
    let half = set(&[Member::Include(net("0.0.0.0/0")), Member::Except(net("128.0.0.0/1"))]);
    assert_eq!(
        half,
        [Member::Include(net("0.0.0.0/1")), Member::Except(net("128.0.0.0/1"))].into_iter().collect()
    );
    let one = set(&[Member::Include(net("10.0.0.1/32"))]);
    assert_eq!(one, [Member::Address("10.0.0.1".parse().unwrap())].into_iter().collect());
}

/// Linear in peers plus ports, not in their product.
#[test]
fn hostile_policies_stay_bounded() {
    let peers = (0..=255).map(|n| block(&format!("10.{n}.0.0/16"), &[])).collect();
    let ports = (0..300).map(|n| tcp(1000 + 2 * n, 1000 + 2 * n)).collect();
    let rule = PolicyRule { peers: Peers::Only(peers), ports: Ports::Only(ports) };
    let rendered = Rendered::of(&goal(vec![
        pod("web", &["10.0.0.1"]),
        policy("p", Selector::everything(), Some(vec![rule.clone()]), None),
        policy("q", Selector::everything(), Some(vec![rule]), None),
    ]));
    let lists = rendered.v4.chains.keys().filter(|name| name.starts_with(layout::PORTS)).count();
    assert_eq!(lists, 1, "shared by content");
    let rules: usize = rendered.v4.chains.values().map(|chain| chain.len()).sum();
    assert!(rules < 256 * 2 + 300 + 30, "{rules} rules");
}

/// A comment of 1,024 bytes or more fails the whole restore (defect A12), and quotes end the text.
#[test]
fn comments_are_tame() {
    let comment = comment_text(&"\"é' \\\n".repeat(100));
    assert!(comment.len() <= MAX_COMMENT_BYTES);
    assert!(comment.bytes().all(|byte| byte == b'_'), "{comment}");
}
