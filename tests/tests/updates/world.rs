//! A small world whose pods keep three addresses among them, and the ways in which clusters change.

use std::collections::BTreeSet;
use std::sync::Arc;

use npm_policy::model::{
    Block, Labels, Namespace, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork, PodPhase,
    Policy, PolicyKey, Port, Ports, Protocol, Requirement, Rule, Selector,
};
use npm_policy::world::{Change, World};
use npm_tests::random::SplitMix;

use super::{NODE, PORT};

const NAMESPACES: [&str; 2] = ["x", "y"];
const VALUES: [&str; 3] = ["web", "db", ""];
/// The pods' addresses: streams go between the first two.
pub(super) const ADDRESSES: [(&str, &str); 3] =
    [("10.241.0.2", "fd00:241::2"), ("10.241.0.3", "fd00:241::3"), ("10.241.0.4", "fd00:241::4")];

fn first_world() -> World {
    let mut world = World::default();
    for name in NAMESPACES {
        let labels = Labels::from([("env".into(), "web".into())]);
        world.apply(Change::Namespace(name.into(), Some(Namespace::new(name, labels))));
    }
    for index in 0..ADDRESSES.len() {
        let pod = pod(index, "x", &format!("pod{index}"), "web");
        world.apply(Change::Pod(pod.key.clone(), Some(pod)));
    }
    world
}

fn pod(index: usize, namespace: &str, name: &str, app: &str) -> Pod {
    let (v4, v6) = ADDRESSES[index];
    Pod {
        key: PodKey::new(namespace, name),
        node: Some(NODE.into()),
        labels: Labels::from([("app".into(), app.into())]),
        addresses: BTreeSet::from([v4.parse().expect("an address"), v6.parse().expect("an address")]),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [].into(),
        created: 1,
    }
}

/// How many steps a walk looks at before it takes one that leads nowhere in particular.
const LOOKS: usize = 30;

/// A walk through worlds, forth and back.
#[derive(Clone, Debug)]
pub(super) struct Walk {
    world: World,
    past: Vec<World>,
}

impl Walk {
    pub(super) fn start() -> Self {
        Self { world: first_world(), past: Vec::new() }
    }

    pub(super) fn world(&self) -> &World {
        &self.world
    }

    /// A [`Walk::step`] to a world as wanted, if a few looks find one.
    pub(super) fn step_to(&mut self, wanted: impl Fn(&World) -> bool, numbers: &mut SplitMix) -> String {
        for _ in 0..LOOKS {
            let mut next = self.clone();
            let said = next.step(numbers);
            if wanted(&next.world) {
                *self = next;
                return said;
            }
        }
        self.step(numbers)
    }

    /// Changes the world, or undoes changes one by one or many at once, or takes everything away for one step; says
    /// which.
    pub(super) fn step(&mut self, numbers: &mut SplitMix) -> String {
        let is_empty = self.world.pods().next().is_none();
        match (numbers.next() % 10, self.past.len()) {
            (_, 1..) if is_empty => {
                self.back(1);
                "everything is there again".into()
            }
            (0, 1..) => {
                self.back(1);
                "the last update is undone".into()
            }
            (1, len @ 2..) => {
                let steps = usize::try_from(numbers.next()).unwrap_or(0) % usize::min(len, 6) + 1;
                self.back(steps);
                format!("the last {steps} updates are undone at once")
            }
            (2, _) => {
                self.past.push(std::mem::take(&mut self.world));
                "everything is gone".into()
            }
            (_, _) => {
                self.past.push(self.world.clone());
                update(&mut self.world, numbers)
            }
        }
    }

    fn back(&mut self, steps: usize) {
        for _ in 0..steps {
            self.world = self.past.pop().unwrap_or_default();
        }
    }
}

/// Changes the world in one of the ways that clusters change, or in several at once; says how.
fn update(world: &mut World, numbers: &mut SplitMix) -> String {
    let count = if numbers.next().is_multiple_of(4) { 3 } else { 1 };
    let said: Vec<String> = (0..count).map(|_| single_update(world, numbers)).collect();
    said.join(" and ")
}

fn single_update(world: &mut World, numbers: &mut SplitMix) -> String {
    let policies: Vec<Arc<Policy>> = world.policies().cloned().collect();
    match numbers.next() % 8 {
        0 | 1 => {
            let pods: Vec<Arc<Pod>> = world.pods().cloned().collect();
            let mut pod = (*pods[usize::try_from(numbers.next()).unwrap_or(0) % pods.len()]).clone();
            pod.labels.insert("app".into(), numbers.pick(&VALUES).into());
            let said = format!("pod {} is relabelled {:?}", pod.key, pod.labels);
            world.apply(Change::Pod(pod.key.clone(), Some(pod)));
            said
        }
        2 => {
            let name: Arc<str> = numbers.pick(&NAMESPACES).into();
            let labels = Labels::from([("env".into(), numbers.pick(&VALUES).into())]);
            let said = format!("namespace {name} is relabelled {labels:?}");
            world.apply(Change::Namespace(Arc::clone(&name), Some(Namespace::new(name, labels))));
            said
        }
        3 => reuse_address(world, numbers),
        4 if !policies.is_empty() => {
            // Half of the rules each: together they allow what the one allowed.
            let whole = &policies[usize::try_from(numbers.next()).unwrap_or(0) % policies.len()];
            let (mut one, mut other) = ((**whole).clone(), (**whole).clone());
            other.key = PolicyKey::new(Arc::clone(&whole.key.namespace), format!("{}-half", whole.key.name));
            for (left, right) in
                [(&mut one.ingress, &mut other.ingress), (&mut one.egress, &mut other.egress)]
            {
                if let (Some(left), Some(right)) = (left, right) {
                    right.drain(..right.len() / 2);
                    left.truncate(left.len() / 2);
                }
            }
            let said = format!("policy {} is split", whole.key);
            world.apply(Change::Policy(one.key.clone(), Some(one)));
            world.apply(Change::Policy(other.key.clone(), Some(other)));
            said
        }
        5 if policies.len() > 1 => {
            let (one, other) = (&policies[0], &policies[1]);
            let mut merged = (**one).clone();
            for (into, from) in [(&mut merged.ingress, &other.ingress), (&mut merged.egress, &other.egress)] {
                if let (Some(into), Some(from)) = (into, from) {
                    into.extend(from.iter().cloned());
                }
            }
            world.apply(Change::Policy(other.key.clone(), None));
            world.apply(Change::Policy(merged.key.clone(), Some(merged)));
            format!("policy {} goes into {}", other.key, one.key)
        }
        6 if policies.len() > 3 => {
            let key = policies[usize::try_from(numbers.next()).unwrap_or(0) % policies.len()].key.clone();
            world.apply(Change::Policy(key.clone(), None));
            format!("policy {key} is deleted")
        }
        _ => {
            let policy = random_policy(numbers);
            let said = format!("policy {} is replaced", policy.key);
            world.apply(Change::Policy(policy.key.clone(), Some(policy)));
            said
        }
    }
}

/// The pod behind an address goes, and another takes the address in the same update.
fn reuse_address(world: &mut World, numbers: &mut SplitMix) -> String {
    let index = usize::try_from(numbers.next()).unwrap_or(0) % ADDRESSES.len();
    let address = ADDRESSES[index].0.parse().expect("an address");
    let old = world.holder(address).expect("every address is held").key.clone();
    let new = pod(
        index,
        numbers.pick(&NAMESPACES),
        &format!("pod{index}-{}", numbers.next() % 1000),
        numbers.pick(&VALUES),
    );
    let said = format!("pod {old} goes and {} takes its address", new.key);
    world.apply(Change::Pod(old, None));
    world.apply(Change::Pod(new.key.clone(), Some(new)));
    said
}

fn random_policy(numbers: &mut SplitMix) -> Policy {
    let direction = |numbers: &mut SplitMix| match numbers.next() % 3 {
        0 => None,
        _ => Some((0..numbers.next() % 4).map(|_| random_rule(numbers)).collect()),
    };
    let (ingress, egress) = (direction(numbers), direction(numbers));
    Policy {
        key: PolicyKey::new(numbers.pick(&NAMESPACES), numbers.pick(&["p", "q", "r"])),
        subjects: random_selector("app", numbers),
        // A policy is of one type at least.
        ingress: if egress.is_none() { Some(ingress.unwrap_or_default()) } else { ingress },
        egress,
    }
}

fn random_selector(key: &str, numbers: &mut SplitMix) -> Selector {
    let values = BTreeSet::from([numbers.pick(&VALUES).into()]);
    match numbers.next() % 4 {
        0 | 1 => Selector::everything(),
        2 => Selector::new([Requirement { key: key.into(), operator: Operator::In(values) }]),
        _ => Selector::new([Requirement { key: key.into(), operator: Operator::NotIn(values) }]),
    }
}

fn random_rule(numbers: &mut SplitMix) -> Rule {
    let peers = match numbers.next() % 6 {
        0 => Peers::Any,
        1 => {
            let (v4, v6) = numbers.pick(&ADDRESSES);
            let block = |text: String| {
                Peer::Block(Block { cidr: text.parse().expect("a CIDR"), except: BTreeSet::new() })
            };
            Peers::Only(vec![block(format!("{v4}/32")), block(format!("{v6}/128"))])
        }
        _ => Peers::Only(vec![Peer::Pods {
            namespaces: NamespaceScope::Matching(random_selector("env", numbers)),
            pods: random_selector("app", numbers),
        }]),
    };
    let ports = match numbers.next() % 4 {
        0 => Ports::Any,
        1 => Ports::Only(vec![Port::Range { protocol: Protocol::Tcp, first: 443, last: 443 }]),
        _ => Ports::Only(vec![
            Port::Range { protocol: Protocol::Tcp, first: 1, last: PORT },
            Port::Range { protocol: Protocol::Udp, first: PORT, last: PORT },
        ]),
    };
    Rule { peers, ports }
}
