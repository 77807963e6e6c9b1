//! Who is in a set: what one pod contributes to one set.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::matching::{in_scope, selects};
use crate::goal::{Expression, Holders, Member, SetKey};
use crate::model::{Block, Labels, Pod};
use crate::world::World;

/// A pod with what the world says about it: all that membership depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) pod: Arc<Pod>,
    /// The addresses it holds.
    pub(super) held: BTreeSet<IpAddr>,
    /// Its namespace's labels.
    pub(super) namespace: Labels,
    /// Whether it is on the node that is compiled for.
    pub(super) local: bool,
}

impl View {
    pub(super) fn of(world: &World, node: &str, pod: &Arc<Pod>) -> Self {
        Self {
            pod: Arc::clone(pod),
            held: world.addresses_held(pod),
            namespace: world.namespace_labels(&pod.key.namespace),
            local: pod.node.as_deref() == Some(node),
        }
    }

    pub(super) fn matches(&self, expression: &Expression) -> bool {
        in_scope(&expression.namespaces, &self.pod.key.namespace, &self.namespace)
            && selects(&expression.pods, &self.pod.labels)
    }
}

/// The members of `key` that are there because of this pod. Distinct pods contribute distinct members: every member
/// carries an address, and an address has one holder.
pub(super) fn contribution(key: &SetKey, view: &View) -> Vec<Member> {
    let addresses = |wanted: bool| match wanted {
        true => view.held.iter().map(|address| Member::Address(*address)).collect(),
        false => Vec::new(),
    };
    match key {
        SetKey::Pods(expression) => addresses(view.matches(expression)),
        SetKey::Local(expression) => addresses(view.local && view.matches(expression)),
        SetKey::Ports { name, of } => named_ports(name, of, view),
        SetKey::Block(_) => Vec::new(),
    }
}

/// The members of `key` that are there whatever pods there are.
pub(super) fn fixed_members(key: &SetKey) -> Vec<Member> {
    match key {
        SetKey::Block(block) => {
            let excepts = block.except.iter().map(|net| Member::Except(*net));
            std::iter::once(Member::Include(block.cidr)).chain(excepts).collect()
        }
        SetKey::Pods(_) | SetKey::Local(_) | SetKey::Ports { .. } => Vec::new(),
    }
}

fn named_ports(name: &Arc<str>, of: &Holders, view: &View) -> Vec<Member> {
    let holds = |address: &&IpAddr| match of {
        Holders::Pods(expression) => view.matches(expression),
        Holders::Local(expression) => view.local && view.matches(expression),
        Holders::Block(block) => in_block(block, **address),
    };
    let ports = || view.pod.ports.iter().filter(|port| port.name == *name);
    view.held
        .iter()
        .filter(holds)
        .flat_map(|address| ports().map(|port| Member::Port(*address, port.protocol, port.port)))
        .collect()
}

/// Whether an address is in the block and in none of its excepts.
pub(crate) fn in_block(block: &Block, address: IpAddr) -> bool {
    block.cidr.contains(&address) && !block.except.iter().any(|except| except.contains(&address))
}
