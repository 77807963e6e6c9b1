//! Every write of every plan, on a model of the kernel: between two states no flow that both deny passes and none that
//! both allow is lost; the model refuses what the kernel refuses; and a plan cut short is continued by the next.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;

use npm_agent::backend::iptables::interpret;
use npm_agent::backend::iptables::layout::{self, Placement};
use npm_agent::backend::iptables::plan::{Other, SetOp, Step, Transaction, plan};
use npm_agent::backend::iptables::render::Rendered;
use npm_agent::backend::iptables::state::{Line, Set, SetKind, State};
use npm_agent::backend::iptables::text;
use npm_policy::compile::Compiler;
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::{Family, Goal, Member};
use npm_policy::model::{
    Block, NamedPort, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork, PodPhase, Policy,
    PolicyKey, Port, Ports, Protocol, Requirement, Rule, Selector,
};
use npm_policy::world::Change;
use npm_tests::random::{NODES, SplitMix, flows, sequence, world};
use proptest::prelude::*;
use proptest::sample::select;

/// One write, as the kernel sees it.
enum Write {
    Set(SetOp),
    Rules(Transaction),
}

fn writes(steps: Vec<Step>) -> Vec<Write> {
    let mut writes = Vec::new();
    for step in steps {
        match step {
            Step::Sets(ops) => writes.extend(ops.into_iter().map(Write::Set)),
            Step::Rules(transaction) => writes.push(Write::Rules(transaction)),
            Step::Enforced => {}
        }
    }
    writes
}

/// What the kernel does with a write, or why it refuses.
fn write(kernel: &mut State, write: &Write) -> Result<(), String> {
    match write {
        Write::Set(op) => write_set(kernel, op),
        Write::Rules(transaction) => write_rules(kernel, transaction),
    }
}

fn write_set(kernel: &mut State, op: &SetOp) -> Result<(), String> {
    match op {
        SetOp::Create { set, kind } => {
            if matches!(kind, SetKind::Other(_)) || set.len() > 31 {
                return Err(format!("cannot create {set}"));
            }
            let new = Set { kind: kind.clone(), members: Default::default() };
            match kernel.sets.insert(Arc::clone(set), new) {
                Some(_) => Err(format!("{set} is there")),
                None => Ok(()),
            }
        }
        SetOp::Add { set, member } => {
            let found = kernel.sets.get_mut(set).ok_or_else(|| format!("no set {set}"))?;
            let fits = match (member, &found.kind) {
                (Member::Address(_) | Member::Except(_), SetKind::Net) => true,
                (Member::Include(net), SetKind::Net) => {
                    net.prefix_len() > 0 && net.prefix_len() < net.max_prefix_len()
                }
                (Member::Port(..), SetKind::IpPort) => true,
                _ => false,
            };
            // The kernel holds a network once, with or without nomatch.
            let twin = match member {
                Member::Include(net) => Some(Member::Except(*net)),
                Member::Except(net) => Some(Member::Include(*net)),
                Member::Address(address) => Some(Member::Except((*address).into())),
                Member::Port(..) => None,
            };
            let clash = twin.is_some_and(|twin| found.members.contains(&twin));
            if !fits || clash || member.family() != kernel.family || found.members.insert(*member).is_some() {
                return Err(format!("cannot add {member:?} to {set}"));
            }
            Ok(())
        }
        SetOp::Delete { set, member } => {
            let found = kernel.sets.get_mut(set).ok_or_else(|| format!("no set {set}"))?;
            found.members.remove(member).map(drop).ok_or_else(|| format!("no {member:?} in {set}"))
        }
        SetOp::Swap { one, other } => {
            let (first, second) = match (kernel.sets.get(one), kernel.sets.get(other)) {
                (Some(first), Some(second)) if first.kind == second.kind => (first.clone(), second.clone()),
                _ => return Err(format!("cannot swap {one} and {other}")),
            };
            kernel.sets.insert(Arc::clone(one), second);
            kernel.sets.insert(Arc::clone(other), first);
            Ok(())
        }
        SetOp::Destroy { set } => {
            if kernel.referenced_sets().contains(set) {
                return Err(format!("{set} is in use"));
            }
            kernel.sets.remove(set).map(drop).ok_or_else(|| format!("no set {set}"))
        }
    }
}

fn write_rules(kernel: &mut State, transaction: &Transaction) -> Result<(), String> {
    for (name, chain) in &transaction.chains {
        match chain {
            Some(chain) => drop(kernel.chains.insert(Arc::clone(name), Arc::clone(chain))),
            None => drop(kernel.chains.remove(name).ok_or_else(|| format!("no chain {name}"))?),
        }
    }
    if let Some(edit) = &transaction.forward {
        for line in &edit.delete {
            let index = kernel.forward.iter().position(|found| found == line);
            kernel.forward.remove(index.ok_or("no such rule in FORWARD")?);
        }
        if let Some((index, jump)) = &edit.insert {
            kernel.forward.insert(*index, Line::Rule(jump.clone()));
        }
    }
    if let Some(set) = kernel.referenced_sets().iter().find(|set| !kernel.sets.contains_key(*set)) {
        return Err(format!("a rule names the missing set {set}"));
    }
    let lines = kernel.chains.values().flat_map(|chain| chain.iter()).chain(&kernel.forward);
    let callees: BTreeSet<_> =
        lines.flat_map(Line::callees).filter(|name| layout::is_our_chain(name)).collect();
    match callees.iter().find(|name| !kernel.chains.contains_key(*name)) {
        Some(chain) => Err(format!("a rule leads to the missing chain {chain}")),
        None => Ok(()),
    }
}

fn decide(state: &State, flow: &Flow) -> Decision {
    interpret::decide(state, state, flow).expect("every state between can be followed")
}

/// The flows that decide: those of the world before and after, of one family.
fn probes(compilers: [&Compiler; 2], family: Family, seed: u64) -> Vec<Flow> {
    let mut probes: BTreeSet<Flow> = BTreeSet::new();
    for compiler in compilers {
        let all = flows(compiler.world(), 300, seed);
        probes.extend(all.into_iter().filter(|flow| Family::of(flow.source) == family));
    }
    probes.into_iter().collect()
}

fn kernel_of(rendered: &Rendered, family: Family) -> State {
    rendered.family(family).clone()
}

#[derive(Default)]
struct Seen {
    writes: Cell<u64>,
    checked: Cell<u64>,
    plans: Cell<u64>,
}

/// Takes the kernel from one state to another, and looks at every instant. Ends early after `cut` writes.
fn walk(
    kernel: &mut State,
    desired: &State,
    probes: &[Flow],
    cut: Option<usize>,
    seen: &Seen,
) -> Result<(), TestCaseError> {
    let before: Vec<Decision> = probes.iter().map(|flow| decide(kernel, flow)).collect();
    let after: Vec<Decision> = probes.iter().map(|flow| decide(desired, flow)).collect();
    let steps = plan(kernel, desired, Placement::First, &Other::Absent);
    let described = format!("{steps:#?}");
    seen.plans.set(seen.plans.get() + 1);
    for (index, step) in writes(steps).iter().enumerate() {
        if cut == Some(index) {
            return Ok(());
        }
        write(kernel, step).map_err(|refused| TestCaseError::fail(format!("{refused}\n{described}")))?;
        seen.writes.set(seen.writes.get() + 1);
        for ((flow, before), after) in probes.iter().zip(&before).zip(&after) {
            if before == after {
                let now = decide(kernel, flow);
                seen.checked.set(seen.checked.get() + 1);
                prop_assert_eq!(now, *before, "{} after write {} of {}", flow, index, &described);
            }
        }
    }
    let State { family: _, sets, chains, forward, claimed: _ } = desired;
    prop_assert_eq!(&kernel.sets, sets);
    prop_assert_eq!(&kernel.chains, chains);
    prop_assert_eq!(&kernel.forward, forward);
    prop_assert_eq!(plan(kernel, desired, Placement::First, &Other::Absent), vec![], "not settled");
    Ok(())
}

/// What changes while all policies stay: each slant is the case in which another short cut would be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slant {
    /// Anything.
    Plain,
    /// Policies select whole namespaces: labels change peers only, in both directions.
    Peers,
    /// Peers are whole namespaces, everybody or blocks: labels change subjects only.
    Subjects,
    /// The names of pods' ports change places.
    Ports,
    /// Peers and the names of ports change, both, of which rules ask both.
    Named,
    /// Pods come and go while policies with the peers of others come, go and move.
    Arrivals,
}

impl Slant {
    const ALL: [Self; 6] =
        [Self::Plain, Self::Peers, Self::Subjects, Self::Ports, Self::Named, Self::Arrivals];

    /// An object of the world at the start. Everybody is on one node: both ends of a flow are judged there.
    fn of_object(self, change: Change) -> Change {
        match change {
            Change::Pod(key, Some(pod)) => {
                let pod = Pod { node: Some(NODES[0].into()), network: PodNetwork::Own, ..pod };
                Change::Pod(key, Some(pod))
            }
            Change::Policy(key, Some(mut policy)) => {
                if matches!(self, Self::Peers | Self::Named) {
                    policy.subjects = Selector::everything();
                }
                for rule in policy.ingress.iter_mut().chain(&mut policy.egress).flatten() {
                    if let (Self::Subjects, Peers::Only(peers)) = (self, &mut rule.peers) {
                        for peer in peers {
                            if let Peer::Pods { pods, .. } = peer {
                                *pods = Selector::everything();
                            }
                        }
                    }
                    if matches!(self, Self::Ports | Self::Named) {
                        let named = |name: &str| Port::Named { protocol: Protocol::Tcp, name: name.into() };
                        let names = ["http", "dns", "peer"];
                        let number = key.name.bytes().map(usize::from).sum::<usize>() + rule_size(rule);
                        rule.ports = Ports::Only(vec![named(names[number % 3])]);
                    }
                }
                Change::Policy(key, Some(policy))
            }
            Change::Namespace(..) | Change::Pod(_, None) | Change::Policy(_, None) => change,
        }
    }

    /// A change that leaves a pod where it is, and every policy as it is.
    fn of_change(self, compiler: &Compiler, change: Change) -> Option<Change> {
        match change {
            Change::Pod(key, Some(new)) if self == Self::Arrivals => {
                let gone = compiler.world().pod(&key).is_some();
                Some(self.of_object(Change::Pod(key, (!gone).then_some(new))))
            }
            Change::Policy(key, Some(policy)) if self == Self::Arrivals => {
                let like = compiler.world().policies().find(|like| like.key.namespace == key.namespace)?;
                Some(Change::Policy(
                    key,
                    Some(Policy { key: policy.key, subjects: policy.subjects, ..(**like).clone() }),
                ))
            }
            Change::Pod(key, Some(new)) => {
                let old = compiler.world().pod(&key)?;
                let mut pod = Pod { labels: new.labels, ..(**old).clone() };
                if self == Self::Ports {
                    pod.labels = old.labels.clone();
                }
                if matches!(self, Self::Ports | Self::Named) {
                    let names: Vec<_> = old.ports.iter().map(|port| Arc::clone(&port.name)).collect();
                    let turned = names.iter().cycle().skip(1).zip(&old.ports);
                    let protocol = Protocol::Tcp;
                    pod.ports = turned
                        .map(|(name, port)| NamedPort { name: Arc::clone(name), protocol, port: port.port })
                        .collect();
                }
                Some(Change::Pod(key, Some(pod)))
            }
            Change::Namespace(..) | Change::Pod(_, None) => (self == Self::Plain).then_some(change),
            Change::Policy(..) => None,
        }
    }
}

fn rule_size(rule: &Rule) -> usize {
    match (&rule.peers, &rule.ports) {
        (Peers::Only(peers), Ports::Only(ports)) => peers.len() + ports.len(),
        (Peers::Only(list), Ports::Any) => list.len(),
        (Peers::Any, Ports::Only(list)) => list.len(),
        (Peers::Any, Ports::Any) => 0,
    }
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: npm_tests::random::shrink_iterations(3000),
        max_shrink_time: npm_tests::property::SHRINK_MILLISECONDS,
        ..ProptestConfig::default()
    }
}

fn compiler(changes: Vec<Change>) -> Compiler {
    let mut compiler = Compiler::new(NODES[0]);
    compiler.apply(changes);
    compiler
}

proptest! {
    #![proptest_config(config(250))]

    /// From one world to another through some changes at once, one by one, and cut short anywhere.
    #[test]
    fn no_instant_decides_otherwise(
        start in world(),
        changes in sequence(1..6),
        seed in any::<u64>(),
        at_once in 1usize..4,
    ) {
        let seen = Seen::default();
        let mut compiler = compiler(start);
        let mut numbers = SplitMix(seed);
        for changes in changes.chunks(at_once) {
            let before = compiler.clone();
            let old = Rendered::of(&before.goal());
            compiler.apply(changes.to_vec());
            let new = Rendered::of(&compiler.goal());
            for family in Family::BOTH {
                let probes = probes([&before, &compiler], family, seed);
                let mut kernel = kernel_of(&old, family);
                walk(&mut kernel, new.family(family), &probes, None, &seen)?;

                // Cut short, then on: to the new state, and back to the old one.
                let steps = plan(&kernel_of(&old, family), new.family(family), Placement::First, &Other::Absent);
                let count = writes(steps).len();
                if count > 0 {
                    let cut = usize::try_from(numbers.next() % count as u64).unwrap();
                    for third in [new.family(family), old.family(family), Rendered::of(&Goal::default()).family(family)] {
                        let mut kernel = kernel_of(&old, family);
                        walk(&mut kernel, new.family(family), &probes, Some(cut), &seen)?;
                        walk(&mut kernel, third, &probes, None, &seen)?;
                    }
                    // Cut twice.
                    let mut kernel = kernel_of(&old, family);
                    walk(&mut kernel, new.family(family), &probes, Some(cut), &seen)?;
                    let again = usize::try_from(numbers.next() % 12).unwrap();
                    walk(&mut kernel, old.family(family), &probes, Some(again), &seen)?;
                    walk(&mut kernel, new.family(family), &probes, None, &seen)?;
                }
            }
        }
    }

    /// Pods and namespaces get other labels and ports, several at once, and pods come and go; the policies stay, so that
    /// set writes alone could do it, were they safe.
    #[test]
    fn memberships_change_together(
        start in world(),
        changes in sequence(40..41),
        slant in select(&Slant::ALL[..]),
        at_once in 1usize..6,
        seed in any::<u64>(),
    ) {
        let seen = Seen::default();
        let start = start.into_iter().map(|change| slant.of_object(change)).collect();
        let mut compiler = compiler(start);
        for changes in changes.chunks(at_once) {
            let before = compiler.clone();
            let old = Rendered::of(&before.goal());
            let relabelled = |change: &Change| slant.of_change(&before, change.clone());
            compiler.apply(changes.iter().filter_map(relabelled).collect::<Vec<_>>());
            let new = Rendered::of(&compiler.goal());
            for family in Family::BOTH {
                let probes = probes([&before, &compiler], family, seed);
                let mut kernel = kernel_of(&old, family);
                walk(&mut kernel, new.family(family), &probes, None, &seen)?;
                walk(&mut kernel, old.family(family), &probes, None, &seen)?;
            }
        }
    }

    /// From nothing, and back to nothing.
    #[test]
    fn from_nothing_and_back(start in world(), seed in any::<u64>()) {
        let seen = Seen::default();
        let nothing = Rendered::of(&Goal::default());
        let full = compiler(start);
        let empty = compiler(Vec::new());
        let rendered = Rendered::of(&full.goal());
        for family in Family::BOTH {
            let probes = probes([&full, &empty], family, seed);
            let mut kernel = State::empty(family);
            walk(&mut kernel, rendered.family(family), &probes, None, &seen)?;
            walk(&mut kernel, nothing.family(family), &probes, None, &seen)?;
        }
    }
}

fn pod(name: &str, address: &str, labels: &[&str]) -> Change {
    let key = PodKey::new("x", name);
    let pod = Pod {
        key: key.clone(),
        node: Some(NODES[0].into()),
        labels: labels.iter().map(|label| ((*label).into(), "".into())).collect(),
        addresses: [address.parse().expect("an address")].into(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [].into(),
        created: 0,
    };
    Change::Pod(key, Some(pod))
}

fn labelled(label: &str) -> Selector {
    Selector::new([Requirement { key: label.into(), operator: Operator::Exists }])
}

fn from_pods(label: &str) -> Rule {
    let peer = Peer::Pods { namespaces: NamespaceScope::Named("x".into()), pods: labelled(label) };
    Rule { peers: Peers::Only(vec![peer]), ports: Ports::Any }
}

fn policy(name: &str, subjects: Selector, ingress: Vec<Rule>, egress: Option<Vec<Rule>>) -> Change {
    let key = PolicyKey::new("x", name);
    Change::Policy(key.clone(), Some(Policy { key, subjects, ingress: Some(ingress), egress }))
}

/// From one world to the other and back, through all flows between their pods.
fn there_and_back(before: &[Change], after: &[Change]) {
    let seen = Seen::default();
    let compilers = [before, after].map(|changes| compiler(changes.to_vec()));
    let [old, new] = [0, 1].map(|index: usize| Rendered::of(&compilers[index].goal()).v4);
    let probes = probes([&compilers[0], &compilers[1]], Family::V4, 1);
    let mut kernel = old.clone();
    walk(&mut kernel, &new, &probes, None, &seen).expect("there");
    walk(&mut kernel, &old, &probes, None, &seen).expect("back");
    assert!(seen.checked.get() > 0);
}

/// One policy forbids all, another allows whom it selects: one pod leaves it as the next comes. With both in for a
/// moment they would reach each other.
#[test]
fn subjects_that_change_places_never_meet() {
    let any = || vec![Rule { peers: Peers::Any, ports: Ports::Any }];
    let policies = [
        policy("none", Selector::everything(), vec![], Some(vec![])),
        policy("open", labelled("open"), any(), Some(any())),
    ];
    let keeper = pod("c", "10.0.0.3", &["open"]);
    let first = [pod("a", "10.0.0.1", &["open"]), pod("b", "10.0.0.2", &[]), keeper.clone()];
    let then = [pod("a", "10.0.0.1", &[]), pod("b", "10.0.0.2", &["open"]), keeper];
    there_and_back(&[&first[..], &policies].concat(), &[&then[..], &policies].concat());
}

/// A pod's second address becomes another pod's: what passed as its own packets passes by a policy from then on.
#[test]
fn a_second_address_becomes_a_peer() {
    let mut both = pod("b", "10.0.0.1", &[]);
    let Change::Pod(_, Some(first)) = &mut both else { panic!("a pod is a pod") };
    first.addresses.insert("10.0.0.6".parse().expect("an address"));
    let mut taker = pod("a", "10.0.0.6", &["peer"]);
    let Change::Pod(_, Some(second)) = &mut taker else { panic!("a pod is a pod") };
    second.created = first.created + 1;
    let base = [
        both,
        policy("q", Selector::everything(), vec![from_pods("peer")], None),
        policy("p", labelled("peer"), vec![from_pods("peer")], None),
    ];
    there_and_back(&base, &[&base[..], &[taker]].concat());
}

/// A pod comes as a peer just when a policy that allows it comes to somebody else.
#[test]
fn a_policy_and_its_peer_come_together() {
    let base = [
        pod("y", "10.0.0.4", &["y"]),
        pod("z", "10.0.0.5", &["z"]),
        policy("y", labelled("y"), vec![from_pods("peer")], None),
    ];
    let more = [pod("a", "10.0.0.1", &["peer"]), policy("z", labelled("z"), vec![from_pods("peer")], None)];
    there_and_back(&base, &[&base[..], &more].concat());
}

/// A pod comes as a peer just when the policy that allowed its address allows its label instead.
#[test]
fn a_policy_changes_as_its_peer_comes() {
    let block = Block { cidr: "10.0.0.1/32".parse().expect("a block"), except: BTreeSet::new() };
    let by_block = Rule { peers: Peers::Only(vec![Peer::Block(block)]), ports: Ports::Any };
    let base = [
        pod("y", "10.0.0.4", &["y"]),
        pod("z", "10.0.0.5", &["z"]),
        policy("y", labelled("y"), vec![from_pods("peer")], None),
        policy("z", labelled("z"), vec![by_block], None),
    ];
    let more = [pod("a", "10.0.0.1", &["peer"]), policy("z", labelled("z"), vec![from_pods("peer")], None)];
    // The address is probed before it is a pod's, too: a host's, outside the namespace's labels.
    there_and_back(&base, &[&base[..], &more].concat());
}

/// Azure NPM's own state, as `iptables-save` and `ipset save` print it.
const AZURE_FILTER: &str = "*filter
:AZURE-NPM - [0:0]
:AZURE-NPM-ACCEPT - [0:0]
:AZURE-NPM-INGRESS - [0:0]
:AZURE-NPM-INGRESS-3486147191 - [0:0]
-A FORWARD -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j AZURE-NPM
-A FORWARD -j AZURE-NPM
-A AZURE-NPM -j AZURE-NPM-INGRESS
-A AZURE-NPM -j AZURE-NPM-ACCEPT
-A AZURE-NPM-ACCEPT -j ACCEPT
-A AZURE-NPM-INGRESS -m set --match-set azure-npm-gcmk2hdba149zrugxkm4 dst -j AZURE-NPM-INGRESS-3486147191
-A AZURE-NPM-INGRESS -m mark --mark 0x400/0x400 -j DROP
-A AZURE-NPM-INGRESS-3486147191 -m hashlimit --hashlimit-name x -j MARK --set-xmark 0x400/0x400
COMMIT
";
const AZURE_SETS: &str =
    "create azure-npm-4rdsa7069uaa0csdhoe2 hash:net family inet hashsize 1024 maxelem 65536
add azure-npm-4rdsa7069uaa0csdhoe2 10.0.0.1
create azure-npm-gcmk2hdba149zrugxkm4 list:set size 8
add azure-npm-gcmk2hdba149zrugxkm4 azure-npm-4rdsa7069uaa0csdhoe2
";

/// Azure NPM's rules and sets stay whole until one transaction puts all of ours, filled, in their place.
#[test]
fn a_take_over_is_one_transaction() {
    for present in [false, true] {
        for number in 0..5 {
            let mut changes = npm_tests::random::cluster(2, 20, 2, NODES[0]);
            changes.truncate(changes.len() - number);
            let compiler = compiler(changes);
            let desired = Rendered::of(&compiler.goal()).v4;
            // One of the sets that we need is there as a list.
            let clash = desired.sets.keys().next_back().expect("a policy applies");
            let named = |text: &str| text.replace("azure-npm-gcmk2hdba149zrugxkm4", clash);
            let filter = text::parse_filter(Family::V4, &named(AZURE_FILTER)).expect("as printed");
            let sets = text::parse_sets(&named(AZURE_SETS)).expect("as printed");
            let mut kernel = State {
                sets: sets[&Family::V4].clone(),
                chains: filter.chains,
                forward: filter.forward,
                ..State::empty(Family::V4)
            };
            let held = kernel.referenced_sets();
            assert!(held.contains(clash));
            let mut other = Other::Absent;
            if present {
                other = Other::Present(held.clone());
                kernel = State { chains: Default::default(), forward: Vec::new(), ..kernel };
            }
            let mut enforcing = false;
            let mut transactions = 0;
            for step in plan(&kernel, &desired, Placement::First, &other) {
                for write_now in writes(vec![step.clone()]) {
                    let touched = match &write_now {
                        Write::Rules(_) => None,
                        Write::Set(
                            SetOp::Create { set, .. }
                            | SetOp::Destroy { set }
                            | SetOp::Add { set, .. }
                            | SetOp::Delete { set, .. },
                        ) => Some(set),
                        Write::Set(SetOp::Swap { one, .. }) => Some(one),
                    };
                    assert!(enforcing || touched.is_none_or(|set| !held.contains(set)), "{touched:?}");
                    transactions += usize::from(touched.is_none());
                    write(&mut kernel, &write_now).expect("the kernel takes it");
                    if transactions > 0 {
                        for flow in flows(compiler.world(), 60, 1) {
                            assert_eq!(decide(&kernel, &flow), decide(&desired, &flow), "{flow}");
                        }
                    }
                }
                enforcing |= transactions > 0 && (!present || step == Step::Enforced);
            }
            assert!(enforcing);
            assert_eq!((&kernel.sets, &kernel.chains), (&desired.sets, &desired.chains));
            assert_eq!(plan(&kernel, &desired, Placement::First, &Other::Absent), vec![]);
        }
    }
}

/// The common changes cost what they change, not what there is.
#[test]
fn one_pod_costs_little() {
    let changes = npm_tests::random::cluster(20, 100, 10, NODES[0]);
    let mut compiler = compiler(changes);
    let all: Vec<_> = compiler.world().pods().cloned().collect();
    let mut kernel = Rendered::of(&compiler.goal()).v4;
    let seen = Seen::default();
    for (pod, most) in [(&all[0], 120), (&all[1], 40), (&all[777], 40)] {
        for change in [None, Some((**pod).clone())] {
            let before = compiler.clone();
            compiler.apply([Change::Pod(pod.key.clone(), change)]);
            let desired = Rendered::of(&compiler.goal()).v4;
            let steps = plan(&kernel, &desired, Placement::First, &Other::Absent);
            let count = writes(steps).len();
            println!("{}: {count} writes", pod.key);
            assert!(count <= most, "{count} writes for {}", pod.key);
            let probes = probes([&before, &compiler], Family::V4, 1);
            walk(&mut kernel, &desired, &probes, None, &seen).unwrap();
        }
    }
}
