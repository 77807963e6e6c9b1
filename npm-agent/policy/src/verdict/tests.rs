//! Every rule of the API that the oracle decides, by small worlds: who may open what to whom.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::*;
use crate::flow::Decision;
use crate::model::{NamedPort, Namespace, PodKey, Policy, PolicyKey, Protocol};
use crate::world::Change;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| (Arc::from(*key), Arc::from(*value))).collect()
}

fn split(key: &str) -> (&str, &str) {
    key.split_once('/').unwrap_or(("default", key))
}

/// A running pod with one label `app=<name>` beside `more`.
fn pod(key: &str, addresses: &[&str], more: &[(&str, &str)]) -> Pod {
    let (namespace, name) = split(key);
    let mut all = labels(more);
    all.entry("app".into()).or_insert_with(|| name.into());
    Pod {
        key: PodKey::new(namespace, name),
        node: Some("n1".into()),
        labels: all,
        addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: BTreeSet::new().into(),
        created: 0,
    }
}

/// `web:TCP/80`
fn with_ports(mut pod: Pod, ports: &[&str]) -> Pod {
    for it in ports {
        let (name, port) = it.split_once(':').unwrap();
        let Transport::Port(protocol, port) = transport(port) else { panic!("{it}") };
        pod.ports.insert(NamedPort { name: name.into(), protocol, port });
    }
    pod
}

fn op(key: &str, operator: Operator) -> Selector {
    Selector::new([Requirement { key: key.into(), operator }])
}

fn values(list: &[&str]) -> BTreeSet<Arc<str>> {
    list.iter().map(|it| Arc::from(*it)).collect()
}

fn is(key: &str, value: &str) -> Selector {
    op(key, Operator::In(values(&[value])))
}

fn app(name: &str) -> Selector {
    is("app", name)
}

fn local(namespace: &str, pods: Selector) -> Peer {
    Peer::Pods { namespaces: NamespaceScope::Named(namespace.into()), pods }
}

fn across(namespaces: Selector, pods: Selector) -> Peer {
    Peer::Pods { namespaces: NamespaceScope::Matching(namespaces), pods }
}

fn cidr(cidr: &str, except: &[&str]) -> Peer {
    Peer::Block(Block {
        cidr: cidr.parse().unwrap(),
        except: except.iter().map(|it| it.parse().unwrap()).collect(),
    })
}

fn transport(text: &str) -> Transport {
    match text.split_once('/') {
        Some((name, port)) => {
            let protocol = Protocol::ALL.into_iter().find(|it| it.to_string() == name).unwrap();
            Transport::Port(protocol, port.parse().unwrap())
        }
        None => Transport::Portless(text.parse().unwrap()),
    }
}

/// `TCP/80`, `TCP/80-90`, `TCP` (all of its ports), `TCP:web`.
fn port(text: &str) -> Port {
    let protocol = |name: &str| Protocol::ALL.into_iter().find(|it| it.to_string() == name).unwrap();
    if let Some((name, named)) = text.split_once(':') {
        return Port::Named { protocol: protocol(name), name: named.into() };
    }
    let (name, first, last) = match text.split_once('/') {
        None => (text, 0, u16::MAX),
        Some((name, range)) => {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            (name, first.parse().unwrap(), last.parse().unwrap())
        }
    };
    Port::Range { protocol: protocol(name), first, last }
}

fn rule(peers: &[Peer], ports: &[&str]) -> Rule {
    Rule {
        peers: if peers.is_empty() { Peers::Any } else { Peers::Only(peers.to_vec()) },
        ports: if ports.is_empty() {
            Ports::Any
        } else {
            Ports::Only(ports.iter().map(|it| port(it)).collect())
        },
    }
}

fn policy(key: &str, subjects: Selector, ingress: Option<Vec<Rule>>, egress: Option<Vec<Rule>>) -> Policy {
    let (namespace, name) = split(key);
    Policy { key: PolicyKey::new(namespace, name), subjects, ingress, egress }
}

/// Ingress to pods with `app=b` in `default`.
fn into_b(rules: Vec<Rule>) -> Policy {
    policy("into-b", app("b"), Some(rules), None)
}

/// Egress from pods with `app=a` in `default`.
fn out_of_a(rules: Vec<Rule>) -> Policy {
    policy("out-of-a", app("a"), None, Some(rules))
}

/// The pods that most cases need: a, b, c in `default`, x/a in `x`.
fn four() -> Vec<Pod> {
    vec![
        pod("a", &["10.0.0.1", "fd00::1"], &[]),
        with_ports(pod("b", &["10.0.0.2", "fd00::2"], &[]), &["web:TCP/80", "dns:UDP/53", "dns:TCP/5353"]),
        pod("c", &["10.0.0.3", "fd00::3"], &[]),
        pod("x/a", &["10.0.1.1", "fd00::11"], &[]),
    ]
}

fn world(pods: Vec<Pod>, namespaces: &[(&str, &[(&str, &str)])], policies: &[Policy]) -> World {
    let mut world = World::default();
    for (name, pairs) in namespaces {
        world.apply(Change::Namespace((*name).into(), Some(Namespace::new(*name, labels(pairs)))));
    }
    for pod in pods {
        world.apply(Change::Pod(pod.key.clone(), Some(pod)));
    }
    for policy in policies {
        world.apply(Change::Policy(policy.key.clone(), Some(policy.clone())));
    }
    world
}

fn flow(text: &str) -> Flow {
    let words: Vec<&str> = text.split(' ').collect();
    let [source, ">", destination, carried] = words[..] else { panic!("{text}") };
    Flow {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        transport: transport(carried),
    }
}

/// Each flow is `10.0.0.1 > 10.0.0.2 TCP/80`; all of `allowed` pass, all of `denied` don't. Addresses are written
/// short: `.1` is 10.0.0.1, `:1` is fd00::1.
fn check(world: &World, allowed: &[&str], denied: &[&str]) {
    for (list, expected) in [(allowed, Decision::Allow), (denied, Decision::Deny)] {
        for text in list {
            let word = |word: &str| match (word.strip_prefix('.'), word.strip_prefix(':')) {
                (Some(rest), _) => format!("10.0.0.{rest}"),
                (None, Some(rest)) => format!("fd00::{rest}"),
                (None, None) => word.to_owned(),
            };
            let long: Vec<String> = text.split(' ').map(word).collect();
            let flow = flow(&long.join(" "));
            let verdict = oracle(world, &flow);
            assert_eq!(verdict.decision(), expected, "{text}: {}", verdict.explain(&flow));
        }
    }
}

/// [`check`] with the four pods and no namespace objects.
fn four_with(policies: &[Policy], allowed: &[&str], denied: &[&str]) {
    check(&world(four(), &[], policies), allowed, denied);
}

#[test]
fn rule_1_no_policy_no_isolation() {
    four_with(&[], &[".1 > .2 TCP/80", ".1 > 8.8.8.8 UDP/53", "8.8.8.8 > .1 SCTP/1", ".1 > .2 1"], &[]);
}

#[test]
fn rule_1_isolation_is_of_the_selected_pods_and_the_direction() {
    four_with(
        &[into_b(vec![])],
        &[".1 > .3 TCP/80", ".2 > .1 TCP/80", ".2 > 8.8.8.8 TCP/80"],
        &[".1 > .2 TCP/80", "8.8.8.8 > .2 TCP/80", ".1 > .2 1"],
    );
    four_with(
        &[out_of_a(vec![])],
        &[".2 > .1 TCP/80", ".2 > .3 TCP/80"],
        &[".1 > .2 TCP/80", ".1 > 8.8.8.8 UDP/53"],
    );
}

#[test]
fn rule_1_a_policy_reaches_no_other_namespace() {
    let deny = policy("x/all", Selector::everything(), Some(vec![]), Some(vec![]));
    four_with(&[deny], &[".1 > .2 TCP/80"], &[".1 > 10.0.1.1 TCP/80", "10.0.1.1 > .1 TCP/80"]);
}

#[test]
fn rule_2_policies_and_rules_add_up_without_mixing() {
    let one = into_b(vec![rule(&[local("default", app("a"))], &["TCP/80"])]);
    let mut two = into_b(vec![rule(&[local("default", app("c"))], &["TCP/81"]), rule(&[], &["TCP/82"])]);
    two.key = PolicyKey::new("default", "two");
    let mut none = into_b(vec![]);
    none.key = PolicyKey::new("default", "none");
    four_with(
        &[none, one, two],
        &[".1 > .2 TCP/80", ".3 > .2 TCP/81", ".1 > .2 TCP/82", ".3 > .2 TCP/82"],
        &[".1 > .2 TCP/81", ".3 > .2 TCP/80", ".1 > .2 TCP/83"],
    );
}

#[test]
fn rule_3_both_ends_must_allow() {
    let out = out_of_a(vec![rule(&[local("default", app("b"))], &["TCP/80-81"])]);
    let into = into_b(vec![rule(&[local("default", app("a"))], &["TCP/81-82"])]);
    four_with(&[out, into], &[".1 > .2 TCP/81"], &[".1 > .2 TCP/80", ".1 > .2 TCP/82"]);
}

#[test]
fn rule_6_an_empty_rule_allows_everything_and_no_rule_nothing() {
    four_with(&[into_b(vec![rule(&[], &[])])], &[".1 > .2 TCP/80", "8.8.8.8 > .2 UDP/1", ".1 > .2 1"], &[]);
    four_with(&[into_b(vec![])], &[], &[".1 > .2 TCP/80", "8.8.8.8 > .2 UDP/1", ".1 > .2 1"]);
    // Lists that were there and lost every entry to a mistake allow nothing.
    let nobody = Rule { peers: Peers::Only(vec![]), ports: Ports::Any };
    let nothing = Rule { peers: Peers::Any, ports: Ports::Only(vec![]) };
    four_with(&[into_b(vec![nobody, nothing])], &[], &[".1 > .2 TCP/80", "8.8.8.8 > .2 UDP/1", ".1 > .2 1"]);
}

#[test]
fn rule_6_no_peers_means_hosts_outside_too() {
    four_with(&[into_b(vec![rule(&[], &["TCP/80"])])], &["8.8.8.8 > .2 TCP/80"], &["8.8.8.8 > .2 TCP/81"]);
}

#[test]
fn rule_7_an_empty_subject_selector_is_every_pod_of_the_namespace() {
    let deny = policy("all", Selector::everything(), Some(vec![]), None);
    four_with(&[deny], &[".1 > 10.0.1.1 TCP/1"], &[".1 > .2 TCP/1", ".2 > .1 TCP/1", ".1 > .3 TCP/1"]);
}

#[test]
fn rule_8_a_pod_selector_alone_looks_in_its_own_namespace() {
    let from_a = into_b(vec![rule(&[local("default", app("a"))], &[])]);
    four_with(
        &[from_a],
        &[".1 > .2 TCP/80"],
        &["10.0.1.1 > .2 TCP/80", ".3 > .2 TCP/80", "8.8.8.8 > .2 TCP/80"],
    );
}

#[test]
fn rule_8_a_namespace_selector_alone_takes_all_pods_and_no_host() {
    let every = into_b(vec![rule(&[across(Selector::everything(), Selector::everything())], &[])]);
    four_with(&[every], &[".1 > .2 TCP/80", "10.0.1.1 > .2 TCP/80"], &["8.8.8.8 > .2 TCP/80"]);
    let prod = into_b(vec![rule(&[across(is("env", "prod"), Selector::everything())], &[])]);
    let world = world(four(), &[("x", &[("env", "prod")]), ("default", &[])], &[prod]);
    check(&world, &["10.0.1.1 > .2 TCP/80"], &[".1 > .2 TCP/80"]);
}

#[test]
fn rule_8_both_selectors_must_match_and_two_entries_need_one() {
    let pods = || {
        let mut pods = four();
        pods.push(pod("x/c", &["10.0.1.3"], &[]));
        pods
    };
    let namespaces: &[(&str, &[(&str, &str)])] = &[("x", &[("env", "prod")])];
    let both = into_b(vec![rule(&[across(is("env", "prod"), app("a"))], &[])]);
    check(
        &world(pods(), namespaces, &[both]),
        &["10.0.1.1 > .2 TCP/80"],
        &[".1 > .2 TCP/80", "10.0.1.3 > .2 TCP/80"],
    );
    let either = [across(is("env", "prod"), Selector::everything()), local("default", app("a"))];
    check(
        &world(pods(), namespaces, &[into_b(vec![rule(&either, &[])])]),
        &["10.0.1.1 > .2 TCP/80", "10.0.1.3 > .2 TCP/80", ".1 > .2 TCP/80"],
        &[".3 > .2 TCP/80"],
    );
}

#[test]
fn rule_9_operators() {
    let pods = || {
        vec![
            pod("b", &["10.0.0.2"], &[]),
            pod("empty", &["10.0.0.4"], &[("tier", "")]),
            pod("gold", &["10.0.0.5"], &[("tier", "gold")]),
            pod("none", &["10.0.0.6"], &[]),
        ]
    };
    let with = |operator: Operator, allowed: &[&str], denied: &[&str]| {
        let rules = vec![rule(&[local("default", op("tier", operator))], &[])];
        let spell =
            |list: &[&str]| -> Vec<String> { list.iter().map(|it| format!("{it} > .2 TCP/1")).collect() };
        let (allowed, denied) = (spell(allowed), spell(denied));
        let (allowed, denied): (Vec<&str>, Vec<&str>) =
            (allowed.iter().map(String::as_str).collect(), denied.iter().map(String::as_str).collect());
        check(&world(pods(), &[], &[into_b(rules)]), &allowed, &denied);
    };
    with(Operator::In(values(&["gold", "tin"])), &[".5"], &[".4", ".6", "8.8.8.8"]);
    with(Operator::In(values(&[""])), &[".4"], &[".5", ".6"]);
    with(Operator::NotIn(values(&["gold"])), &[".4", ".6"], &[".5", "8.8.8.8"]);
    with(Operator::NotIn(values(&[""])), &[".5", ".6"], &[".4"]);
    with(Operator::Exists, &[".4", ".5"], &[".6"]);
    with(Operator::DoesNotExist, &[".6"], &[".4", ".5", "8.8.8.8"]);
}

#[test]
fn rule_9_requirements_of_a_selector_are_anded() {
    let both = Selector::new([
        Requirement { key: "app".into(), operator: Operator::NotIn(values(&["c"])) },
        Requirement { key: "app".into(), operator: Operator::Exists },
        Requirement { key: "tier".into(), operator: Operator::DoesNotExist },
    ]);
    let mut pods = four();
    pods.push(pod("d", &["10.0.0.4"], &[("tier", "gold")]));
    let world = world(pods, &[], &[into_b(vec![rule(&[local("default", both)], &[])])]);
    check(&world, &[".1 > .2 TCP/1"], &[".3 > .2 TCP/1", ".4 > .2 TCP/1"]);
}

#[test]
fn rule_10_every_namespace_has_its_name_as_a_label() {
    let from = |namespace: &str| {
        into_b(vec![rule(
            &[across(is("kubernetes.io/metadata.name", namespace), Selector::everything())],
            &[],
        )])
    };
    // Neither namespace object has been seen.
    four_with(&[from("x")], &["10.0.1.1 > .2 TCP/1"], &[".1 > .2 TCP/1"]);
    // Seen, and lying.
    let lying = world(four(), &[("x", &[("kubernetes.io/metadata.name", "y")])], &[from("x")]);
    check(&lying, &["10.0.1.1 > .2 TCP/1"], &[".1 > .2 TCP/1"]);
    // A namespace that has not been seen has no other label.
    let unlabelled = across(op("env", Operator::DoesNotExist), Selector::everything());
    four_with(&[into_b(vec![rule(&[unlabelled], &[])])], &["10.0.1.1 > .2 TCP/1", ".1 > .2 TCP/1"], &[]);
}

#[test]
fn rule_11_an_except_cuts_its_own_block_only() {
    let cut = cidr("10.0.0.0/8", &["10.0.0.0/24", "10.0.1.0/32"]);
    let four_cut = |more: Vec<Peer>, allowed: &[&str], denied: &[&str]| {
        let mut peers = vec![cut.clone()];
        peers.extend(more);
        four_with(&[into_b(vec![rule(&peers, &[])])], allowed, denied);
    };
    four_cut(
        vec![],
        &["10.0.1.1 > .2 TCP/1", "10.255.255.255 > .2 TCP/1"],
        &[
            ".1 > .2 TCP/1",
            "10.0.0.255 > .2 TCP/1",
            "10.0.1.0 > .2 TCP/1",
            "11.0.0.0 > .2 TCP/1",
            "9.255.255.255 > .2 TCP/1",
        ],
    );
    four_cut(vec![cidr("10.0.0.1/32", &[])], &[".1 > .2 TCP/1"], &[".3 > .2 TCP/1"]);
    four_cut(vec![local("default", app("c"))], &[".3 > .2 TCP/1"], &[".1 > .2 TCP/1"]);
}

#[test]
fn rule_11_prefix_lengths_at_their_ends() {
    let to = |peer: Peer, allowed: &[&str], denied: &[&str]| {
        four_with(&[into_b(vec![rule(&[peer], &[])])], allowed, denied);
    };
    to(cidr("0.0.0.0/0", &[]), &["255.255.255.255 > .2 TCP/1", ".1 > .2 TCP/1"], &[":1 > :2 TCP/1"]);
    to(cidr("::/0", &[]), &[":1 > :2 TCP/1", "ffff::1 > :2 TCP/1"], &[".1 > .2 TCP/1"]);
    to(cidr("128.0.0.0/1", &[]), &["128.0.0.0 > .2 TCP/1"], &["127.255.255.255 > .2 TCP/1"]);
    to(cidr("10.0.0.1/32", &[]), &[".1 > .2 TCP/1"], &[".3 > .2 TCP/1"]);
    to(cidr("fd00::1/128", &[]), &[":1 > :2 TCP/1"], &[":3 > :2 TCP/1"]);
    to(cidr("fd00::/127", &[]), &[":1 > :2 TCP/1"], &[":3 > :2 TCP/1"]);
    to(
        cidr("0.0.0.0/0", &["0.0.0.0/1", "128.0.0.0/2"]),
        &["192.0.0.0 > .2 TCP/1"],
        &["191.255.255.255 > .2 TCP/1"],
    );
    // An IPv4 prefix is not the IPv6 prefix of the same bits.
    to(cidr("253.0.0.0/8", &[]), &["253.1.1.1 > .2 TCP/1"], &[":1 > :2 TCP/1"]);
}

#[test]
fn rule_12_blocks_match_pods_in_both_directions() {
    four_with(
        &[into_b(vec![rule(&[cidr("10.0.0.0/30", &[])], &[])])],
        &[".1 > .2 TCP/1"],
        &["10.0.1.1 > .2 TCP/1"],
    );
    four_with(
        &[out_of_a(vec![rule(&[cidr("10.0.0.2/32", &[])], &[])])],
        &[".1 > .2 TCP/1"],
        &[".1 > .3 TCP/1"],
    );
}

#[test]
fn rule_14_all_ports_of_one_protocol_only() {
    four_with(
        &[into_b(vec![rule(&[], &["TCP"])])],
        &[".1 > .2 TCP/1", ".1 > .2 TCP/65535", ".1 > .2 TCP/0"],
        &[".1 > .2 UDP/1", ".1 > .2 SCTP/1", ".1 > .2 1"],
    );
}

#[test]
fn rule_15_a_rule_of_one_protocol_isolates_from_the_others() {
    four_with(
        &[into_b(vec![rule(&[], &["SCTP/9"])])],
        &[".1 > .2 SCTP/9"],
        &[".1 > .2 TCP/9", ".1 > .2 UDP/9", ".1 > .2 SCTP/10"],
    );
}

#[test]
fn rule_16_ranges_are_inclusive() {
    four_with(
        &[into_b(vec![rule(&[], &["TCP/80-90", "UDP/53"])])],
        &[".1 > .2 TCP/80", ".1 > .2 TCP/85", ".1 > .2 TCP/90", ".1 > .2 UDP/53"],
        &[".1 > .2 TCP/79", ".1 > .2 TCP/91", ".1 > .2 UDP/80", ".1 > .2 TCP/53"],
    );
}

#[test]
fn rule_17_ingress_names_are_the_subjects() {
    let named = |peers: &[Peer]| into_b(vec![rule(peers, &["TCP:web", "UDP:dns"])]);
    let allowed = &[".1 > .2 TCP/80", ".1 > .2 UDP/53"];
    // 5353 is called dns too, but is TCP.
    let denied =
        &[".1 > .2 TCP/81", ".1 > .2 UDP/80", ".1 > .2 TCP/53", ".1 > .2 TCP/5353", ".1 > .2 UDP/5353"];
    for peers in [vec![], vec![local("default", app("a"))], vec![cidr("10.0.0.0/24", &[])]] {
        four_with(&[named(&peers)], allowed, denied);
    }
    four_with(&[named(&[])], &["8.8.8.8 > .2 TCP/80"], &["8.8.8.8 > .2 TCP/5353"]);
}

#[test]
fn rule_17_a_name_that_the_subject_lacks_opens_nothing() {
    // The source has a port of that name; it counts for nothing.
    let mut pods = four();
    pods.push(with_ports(pod("d", &["10.0.0.4"], &[]), &["metrics:TCP/9090"]));
    let world = world(pods, &[], &[into_b(vec![rule(&[], &["TCP:metrics"])])]);
    check(&world, &[], &[".4 > .2 TCP/9090", ".4 > .2 TCP/80", ".4 > .2 TCP/0"]);
}

#[test]
fn rule_17_egress_names_are_each_destinations() {
    let mut pods = four();
    pods.push(with_ports(pod("d", &["10.0.0.4"], &[]), &["web:TCP/8080"]));
    pods.push(with_ports(pod("x/d", &["10.0.1.4"], &[]), &["web:TCP/8081"]));
    let with = |peers: &[Peer]| world(pods.clone(), &[], &[out_of_a(vec![rule(peers, &["TCP:web"])])]);
    check(
        &with(&[local("default", Selector::everything())]),
        &[".1 > .2 TCP/80", ".1 > .4 TCP/8080"],
        &[".1 > .2 TCP/8080", ".1 > .4 TCP/80", ".1 > .3 TCP/80", ".1 > 10.0.1.4 TCP/8081"],
    );
    // Without `to`: any pod of any namespace, and no host outside.
    check(
        &with(&[]),
        &[".1 > .2 TCP/80", ".1 > .4 TCP/8080", ".1 > 10.0.1.4 TCP/8081"],
        &[".1 > .3 TCP/80", ".1 > 8.8.8.8 TCP/80", ".1 > 8.8.8.8 TCP/8080"],
    );
    // With a block: the pod in the block, if there is one.
    check(
        &with(&[cidr("0.0.0.0/0", &["10.0.0.4/32"])]),
        &[".1 > .2 TCP/80", ".1 > 10.0.1.4 TCP/8081"],
        &[".1 > .4 TCP/8080", ".1 > 8.8.8.8 TCP/80"],
    );
}

#[test]
fn rule_18_one_name_for_two_protocols_and_two_numbers() {
    let b = with_ports(pod("b", &["10.0.0.2"], &[]), &["p:TCP/1", "p:TCP/2", "p:UDP/3"]);
    let world = world(vec![pod("a", &["10.0.0.1"], &[]), b], &[], &[into_b(vec![rule(&[], &["TCP:p"])])]);
    check(&world, &[".1 > .2 TCP/1", ".1 > .2 TCP/2"], &[".1 > .2 UDP/3", ".1 > .2 TCP/3"]);
}

#[test]
fn rule_20_a_pod_reaches_itself() {
    let deny = policy("all", Selector::everything(), Some(vec![]), Some(vec![]));
    let world = world(vec![pod("a", &["10.0.0.1", "10.9.0.1", "fd00::1"], &[])], &[], &[deny]);
    check(
        &world,
        &[".1 > .1 TCP/1", ".1 > 10.9.0.1 TCP/1", "10.9.0.1 > .1 UDP/1", ":1 > :1 58"],
        &[".1 > 10.9.0.2 TCP/1"],
    );
    let verdict = oracle(&world, &flow("10.0.0.1 > 10.9.0.1 TCP/1"));
    assert_eq!(verdict, Verdict { ingress: Judgement::NotIsolated, egress: Judgement::NotIsolated });
    // An address outside that talks to itself is nobody's business.
    check(&world, &["8.8.8.8 > 8.8.8.8 TCP/1"], &[]);
}

fn host(mut pod: Pod) -> Pod {
    pod.network = PodNetwork::Host;
    pod
}

fn ended(mut pod: Pod) -> Pod {
    pod.phase = PodPhase::Ended;
    pod
}

#[test]
fn rule_21_host_network_pods_are_neither_subjects_nor_peers() {
    let node = host(with_ports(pod("h", &["192.168.0.1"], &[]), &["web:TCP/80"]));
    let pods = || vec![pod("a", &["10.0.0.1"], &[]), pod("b", &["10.0.0.2"], &[]), node.clone()];
    let deny = policy("deny", app("h"), Some(vec![]), Some(vec![]));
    check(
        &world(pods(), &[], &[deny]),
        &[".1 > 192.168.0.1 TCP/1", "192.168.0.1 > .1 TCP/1", "192.168.0.1 > 8.8.8.8 TCP/1"],
        &[],
    );
    let everyone = || vec![local("default", Selector::everything())];
    check(
        &world(pods(), &[], &[into_b(vec![rule(&everyone(), &[])])]),
        &[".1 > .2 TCP/1"],
        &["192.168.0.1 > .2 TCP/1"],
    );
    check(
        &world(pods(), &[], &[out_of_a(vec![rule(&everyone(), &[])])]),
        &[".1 > .2 TCP/1"],
        &[".1 > 192.168.0.1 TCP/1"],
    );
    // Its address is in blocks, and among "anybody"; its port names mean nothing.
    let block = [cidr("192.168.0.0/24", &[])];
    check(
        &world(pods(), &[], &[into_b(vec![rule(&block, &[])])]),
        &["192.168.0.1 > .2 TCP/1"],
        &[".1 > .2 TCP/1"],
    );
    check(&world(pods(), &[], &[into_b(vec![rule(&[], &["TCP/1"])])]), &["192.168.0.1 > .2 TCP/1"], &[]);
    for peers in [&block[..], &[]] {
        check(
            &world(pods(), &[], &[out_of_a(vec![rule(peers, &["TCP:web"])])]),
            &[],
            &[".1 > 192.168.0.1 TCP/80"],
        );
    }
}

#[test]
fn rule_22_ended_pods_are_neither_subjects_nor_peers() {
    let pods = || {
        vec![pod("a", &["10.0.0.1"], &[]), pod("b", &["10.0.0.2"], &[]), ended(pod("e", &["10.0.0.4"], &[]))]
    };
    let deny = policy("deny", app("e"), Some(vec![]), Some(vec![]));
    check(&world(pods(), &[], &[deny]), &[".1 > .4 TCP/1", ".4 > .1 TCP/1"], &[]);
    let everyone = vec![rule(&[local("default", Selector::everything())], &[])];
    check(&world(pods(), &[], &[into_b(everyone)]), &[".1 > .2 TCP/1"], &[".4 > .2 TCP/1"]);
}

#[test]
fn rule_22_an_address_used_again_is_the_new_pods() {
    let from_old = || into_b(vec![rule(&[local("default", app("old"))], &[])]);
    let old = || pod("old", &["10.0.0.4"], &[]);
    let mut new = pod("new", &["10.0.0.4"], &[]);
    let b = || pod("b", &["10.0.0.2"], &[]);
    check(&world(vec![b(), old()], &[], &[from_old()]), &[".4 > .2 TCP/1"], &[]);
    check(&world(vec![b(), ended(old()), new.clone()], &[], &[from_old()]), &[], &[".4 > .2 TCP/1"]);
    // Both active: the one created last; then the greatest key ("old" > "new").
    check(&world(vec![b(), old(), new.clone()], &[], &[from_old()]), &[".4 > .2 TCP/1"], &[]);
    new.created = 1;
    check(&world(vec![b(), old(), new.clone()], &[], &[from_old()]), &[], &[".4 > .2 TCP/1"]);
    // Whoever takes no part holds nothing, however new.
    for gone in [host(new.clone()), ended(new)] {
        check(&world(vec![b(), old(), gone], &[], &[from_old()]), &[".4 > .2 TCP/1"], &[]);
    }
}

#[test]
fn rule_22_the_holder_is_the_worlds_holder() {
    let mut pods = Vec::new();
    for (at, created) in [(0_u8, 3_i64), (1, 1), (2, 3), (3, -1), (4, 3), (5, 9)] {
        let mut pod = pod(&format!("n{}/p{at}", at % 2), &["10.0.0.1", "fd00::1"], &[]);
        pod.addresses.insert(IpAddr::from([10, 0, 1, at]));
        pod.created = created;
        pods.push(if at == 5 { ended(pod) } else { pod });
    }
    let world = world(pods, &[], &[]);
    for address in ["10.0.0.1", "fd00::1", "10.0.1.0", "10.0.1.3", "10.0.1.5", "10.0.1.6"] {
        let address = address.parse().unwrap();
        assert_eq!(holder(&world, address), world.holder(address).map(|pod| &**pod), "{address}");
    }
    assert_eq!(holder(&world, "10.0.0.1".parse().unwrap()).unwrap().key, PodKey::new("n0", "p4"));
}

#[test]
fn rule_26_protocols_without_ports_follow_rules_without_ports() {
    let rules =
        vec![rule(&[local("default", app("a"))], &[]), rule(&[local("default", app("c"))], &["TCP", "UDP"])];
    four_with(
        &[into_b(rules)],
        &[".1 > .2 1", ".1 > .2 47", ":1 > :2 58"],
        &[".3 > .2 1", ":3 > :2 58", ".3 > .2 47"],
    );
}

#[test]
fn rule_29_a_pods_addresses_of_both_families() {
    let policies = [
        into_b(vec![rule(&[local("default", app("a")), cidr("10.0.0.3/32", &[])], &[])]),
        policy("c", app("c"), None, Some(vec![rule(&[local("default", app("b"))], &[])])),
    ];
    four_with(
        &policies,
        &[".1 > .2 TCP/1", ":1 > :2 TCP/1", ".3 > .2 TCP/1"],
        &[":3 > :2 TCP/1", ".3 > .1 TCP/1", ":3 > :1 TCP/1"],
    );
}

#[test]
fn the_verdict_names_every_policy_that_decided() {
    let keys = |names: &[&str]| -> BTreeSet<PolicyKey> {
        names.iter().map(|name| PolicyKey::new("default", *name)).collect()
    };
    let policies = [
        policy("deny-all", Selector::everything(), Some(vec![]), Some(vec![])),
        policy("web", app("b"), Some(vec![rule(&[], &["TCP/80"])]), None),
        policy("wide", app("b"), Some(vec![rule(&[], &["TCP/80-81"])]), None),
        policy("else", app("c"), Some(vec![rule(&[], &[])]), Some(vec![rule(&[], &[])])),
    ];
    let world = world(four(), &[], &policies);
    let verdict = |text: &str| oracle(&world, &flow(text));
    assert_eq!(
        verdict("8.8.8.8 > 10.0.0.2 TCP/80").ingress,
        Judgement::Allowed { by: keys(&["web", "wide"]) }
    );
    assert_eq!(verdict("8.8.8.8 > 10.0.0.2 TCP/81").ingress, Judgement::Allowed { by: keys(&["wide"]) });
    let denied = verdict("10.0.0.1 > 10.0.0.2 TCP/443");
    assert_eq!(denied.ingress, Judgement::Denied { selected_by: keys(&["deny-all", "web", "wide"]) });
    assert_eq!(denied.egress, Judgement::Denied { selected_by: keys(&["deny-all"]) });
    assert_eq!(verdict("8.8.8.8 > 10.0.0.2 TCP/80").egress, Judgement::NotIsolated);
    assert_eq!(verdict("10.0.0.3 > 10.0.1.1 TCP/80").ingress, Judgement::NotIsolated);
    assert_eq!(verdict("10.0.0.3 > 10.0.1.1 TCP/80").egress, Judgement::Allowed { by: keys(&["else"]) });
}

#[test]
fn explanations() {
    let policies = [
        policy("deny-all", Selector::everything(), Some(vec![]), None),
        policy("web", app("b"), Some(vec![rule(&[], &["TCP/80"])]), None),
        policy("x/out", app("a"), None, Some(vec![])),
    ];
    let world = world(four(), &[], &policies);
    let explain = |source: &str, destination: &str, carried: &str, ends: [&str; 2]| {
        let flow = flow(&format!("{source} > {destination} {carried}"));
        oracle(&world, &flow).explain_as(&ends[0], &ends[1], flow.transport)
    };
    assert_eq!(
        explain("10.0.0.1", "10.0.0.2", "TCP/443", ["default/a", "default/b"]),
        "denied: ingress of default/b: selected by default/deny-all and default/web; none allows TCP/443 from default/a"
    );
    assert_eq!(
        explain("10.0.1.1", "10.0.0.1", "1", ["x/a", "default/a"]),
        "denied: egress of x/a: selected by x/out, which does not allow ICMP to default/a. ingress of default/a: \
         selected by default/deny-all, which does not allow ICMP from x/a"
    );
    assert_eq!(
        explain("10.0.0.1", "10.0.0.2", "TCP/80", ["default/a", "default/b"]),
        "allowed: egress of default/a: not isolated. ingress of default/b: TCP/80 from default/a is allowed by default/web"
    );
    let flow = flow("10.0.1.1 > 8.8.8.8 UDP/53");
    let verdict = oracle(&world, &flow);
    assert_eq!(
        verdict.explain(&flow),
        "denied: egress of 10.0.1.1: selected by x/out, which does not allow UDP/53 to 8.8.8.8"
    );
    assert_eq!(verdict.to_string(), "denied (egress denied: selected by x/out, ingress not isolated)");
}
