//! What the offline engines say of a flow between the nodes of a whole cluster.

use std::collections::{BTreeMap, BTreeSet};

use npm_agent::backend::iptables::render::Rendered;
use npm_common::decide;
use npm_policy::compile::compile;
use npm_policy::flow::{Decision, Flow, Judgement, Verdict};
use npm_policy::goal::Goal;
use npm_policy::world::{Change, World};
use proptest::test_runner::TestCaseError;

use crate::random::NODES;

/// Each node's Goal.
pub fn goals(world: &World) -> BTreeMap<&'static str, Goal> {
    NODES.iter().map(|node| (*node, compile(world, node).0)).collect()
}

/// What the compiled rules say: the destination's node of ingress, the source's of egress.
pub fn compiled(world: &World, goals: &BTreeMap<&'static str, Goal>, flow: &Flow) -> (Judgement, Judgement) {
    let at = |address| {
        let node = world.holder(address)?.node.as_deref()?;
        Some(goals.get(node)?.verdict(flow))
    };
    let ingress = at(flow.destination).map_or(Judgement::NotIsolated, |verdict| verdict.ingress);
    let egress = at(flow.source).map_or(Judgement::NotIsolated, |verdict| verdict.egress);
    (ingress, egress)
}

/// What the rendered rules and sets of the nodes at both ends do, written as text, read back and interpreted.
///
/// # Errors
/// They can't be interpreted.
pub fn rendered(
    world: &World,
    nodes: &BTreeMap<&'static str, Rendered>,
    flow: &Flow,
) -> Result<Decision, TestCaseError> {
    let ends = [flow.source, flow.destination].map(|address| world.holder(address)?.node.as_deref());
    // One node of both sees the flow once.
    let mut seen = BTreeSet::new();
    for node in ends.into_iter().flatten().filter(|node| seen.insert(*node)) {
        let Some(rendered) = nodes.get(node) else { continue };
        let decision = rendered.decide(flow).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
        if decision == Decision::Deny {
            return Ok(Decision::Deny);
        }
    }
    Ok(Decision::Allow)
}

/// A pod that no node runs is enforced nowhere; the oracle judges it all the same.
pub fn everybody_has_a_node(changes: Vec<Change>) -> Vec<Change> {
    let place = |change| match change {
        Change::Pod(key, Some(mut pod)) => {
            pod.node.get_or_insert_with(|| NODES[0].into());
            Change::Pod(key, Some(pod))
        }
        Change::Pod(_, None) | Change::Namespace(..) | Change::Policy(..) => change,
    };
    changes.into_iter().map(place).collect()
}

/// The Goal's verdict without its reasons.
pub fn plain(verdict: &Verdict) -> decide::Verdict {
    let plain = |judgement: &Judgement| match judgement {
        Judgement::Denied { .. } => decide::Judgement::Denied,
        Judgement::Allowed { .. } => decide::Judgement::Allowed,
        Judgement::NotIsolated => decide::Judgement::NotIsolated,
    };
    decide::Verdict { ingress: plain(&verdict.ingress), egress: plain(&verdict.egress) }
}
