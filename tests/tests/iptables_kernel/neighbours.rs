//! Rules of others in the same hook: we drop what policies deny and accept nothing in their name.

use npm_policy::flow::{Decision, Transport};
use npm_policy::model::Protocol;
use npm_tests::lab::node::Layout;
use npm_tests::lab::probe::Probe;
use npm_tests::lab::{Host, Lab, Spec, require_root};

use super::*;

const FROM: &str = "10.241.0.2";
const TO: &str = "10.241.0.3";
const PORTS: [u16; 2] = [80, 81];

/// Azure NPM's defect A10: its ACCEPT for what policies allow kept all rules behind it from judging. Real packets: a
/// policy allows both ports, somebody else's rule behind our jump drops one of them.
#[test]
fn a10_what_policies_allow_others_may_still_deny() {
    if !require_root() {
        return;
    }
    for variant in Variant::BOTH {
        let host =
            |name: &str, address: &str| Host { name: name.into(), addresses: vec![address.parse().unwrap()] };
        let mut lab = Lab::build(&Spec {
            layout: Layout::Routed,
            nodes: vec![host("node", "10.240.0.4")],
            pods: vec![(0, host("from", FROM)), (0, host("to", TO))],
            externals: vec![],
        })
        .unwrap();
        let transports = PORTS.map(|port| Transport::Port(Protocol::Tcp, port));
        lab.listen(&transports).unwrap();
        let node = lab.netns("node").unwrap().clone();
        let command = variant.command(Family::V4);
        let drop_rule = format!("{command} -A FORWARD -p tcp --dport {} -j DROP", PORTS[1]);
        let allowing = goal(FROM);
        let denying = goal("10.241.0.99");
        let mut decisions = |goal: &Goal, before: &str| -> Vec<Decision> {
            node.run(|| {
                shell(before);
                backend(variant).apply(goal)?;
                Ok(())
            })
            .unwrap();
            let from = lab.find("from").unwrap();
            let probe = |transport| Probe {
                from,
                source: FROM.parse().unwrap(),
                destination: TO.parse().unwrap(),
                transport,
                expected: None,
            };
            let outcomes = lab.probe(&transports.map(probe)).unwrap();
            outcomes.into_iter().map(|outcome| outcome.decision()).collect()
        };
        let (allow, deny) = (Decision::Allow, Decision::Deny);
        assert_eq!(decisions(&allowing, "true"), [allow, allow], "{variant:?}: both are allowed");
        assert_eq!(
            decisions(&allowing, &drop_rule),
            [allow, deny],
            "{variant:?}: the rule behind is not asked"
        );
        assert_eq!(decisions(&denying, "true"), [deny, deny], "{variant:?}: the policy denies both");
    }
}

/// A goal in which the pod takes only what comes from this address.
fn goal(peer: &str) -> Goal {
    let mut goal = wide_goal(0..0);
    let (peer, local): (IpAddr, IpAddr) = (peer.parse().unwrap(), TO.parse().unwrap());
    for (key, set) in goal.sets.clone() {
        let address = match key {
            SetKey::Local(_) => local,
            SetKey::Pods(_) | SetKey::Block(_) | SetKey::Ports { .. } => peer,
        };
        goal.sets.insert(key, Set { v4: OrdSet::unit(Member::Address(address)), ..set });
    }
    goal.subjects = OrdMap::from_iter([(PodKey::new("x", "a"), BTreeSet::from([local]))]);
    goal
}
