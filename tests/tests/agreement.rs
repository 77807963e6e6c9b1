//! Oracle = compiled Goal = rendered iptables, on random worlds; the incremental compiler = the full one, after every
//! change; and the Goal depends on the world only, never on the way to it.
//!
//! `NPM_SEED=<number>` repeats a run; `NPM_CASES=<n>` scales it. Counterexamples are kept in
//! `tests/regressions/agreement.txt` and run first.

use std::collections::BTreeMap;

use npm_agent::backend::iptables::render::Rendered;
use npm_policy::compile::{Census, Compiler, census, compile};
use npm_policy::flow::{Decision, Judgement};
use npm_policy::goal::Goal;
use npm_policy::model::{Pod, PodKey};
use npm_policy::verdict::oracle;
use npm_policy::world::{Change, World};
use npm_tests::features::FEATURES;
use npm_tests::opinions::{compiled, everybody_has_a_node, goals, rendered};
use npm_tests::random::{NODES, crowd, flows, sequence, world, world_of};
use npm_tests::sequence::{forms, gone};
use npm_tests::{property, regressions};
use proptest::prelude::*;

const FLOWS_PER_WORLD: usize = 150;

fn check<S: Strategy>(
    name: &'static str,
    cases: u32,
    strategy: S,
    property: impl Fn(S::Value) -> Result<(), TestCaseError>,
) where
    S::Value: std::fmt::Debug,
{
    property::check(regressions!("agreement.txt"), name, cases, strategy, property);
}

#[test]
fn oracle_goal_and_rendered_iptables_agree() {
    use std::cell::Cell;
    let (pairs, isolated, denied) = (Cell::new(0u32), Cell::new(0u32), Cell::new(0u32));
    check(
        "oracle = goal = iptables",
        1000,
        (world().prop_map(everybody_has_a_node), any::<u64>()),
        |(changes, seed)| {
            let world = world_of(changes);
            let goals = goals(&world);
            let nodes = goals.iter().map(|(node, goal)| (*node, Rendered::of(goal))).collect();
            for flow in flows(&world, FLOWS_PER_WORLD, seed) {
                let expected = oracle(&world, &flow);
                let iptables = rendered(&world, &nodes, &flow)?;
                prop_assert_eq!(expected.decision(), iptables, "iptables on {}", flow);
                let (ingress, egress) = compiled(&world, &goals, &flow);
                prop_assert_eq!(&expected.ingress, &ingress, "ingress of {}", flow);
                prop_assert_eq!(&expected.egress, &egress, "egress of {}", flow);
                pairs.set(pairs.get() + 1);
                if (&expected.ingress, &expected.egress) != (&Judgement::NotIsolated, &Judgement::NotIsolated)
                {
                    isolated.set(isolated.get() + 1);
                    denied.set(denied.get() + u32::from(expected.decision() == Decision::Deny));
                }
            }
            Ok(())
        },
    );
    let (pairs, isolated, denied) = (pairs.get(), isolated.get(), denied.get());
    println!("{pairs} pairs, {isolated} with an isolated end, {denied} of these denied");
    assert!(pairs >= 100_000, "{pairs} pairs");
    assert!(denied * 100 >= isolated * 30, "{denied} of {isolated} are denied: less than 30 %");
    assert!(
        (isolated - denied) * 100 >= isolated * 30,
        "{denied} of {isolated} are denied: less than 30 % allowed"
    );
}

#[test]
fn all_agree_on_a_crowd() {
    check("crowds", 8, (crowd().prop_map(everybody_has_a_node), any::<u64>()), |(changes, seed)| {
        let world = world_of(changes);
        let goals = goals(&world);
        let nodes: BTreeMap<&'static str, Rendered> =
            goals.iter().map(|(node, goal)| (*node, Rendered::of(goal))).collect();
        let shared =
            |rendered: &Rendered| rendered.v4.chains.keys().filter(|name| name.contains("-PORTS-")).count();
        prop_assert!(
            nodes.values().any(|rendered| shared(rendered) > 0),
            "no list of ports has its own chain"
        );
        let mut decisions = [0; 2];
        for flow in flows(&world, 1000, seed) {
            let expected = oracle(&world, &flow);
            let (ingress, egress) = compiled(&world, &goals, &flow);
            prop_assert_eq!(&expected.ingress, &ingress, "ingress of {}", flow);
            prop_assert_eq!(&expected.egress, &egress, "egress of {}", flow);
            prop_assert_eq!(expected.decision(), rendered(&world, &nodes, &flow)?, "iptables on {}", flow);
            decisions[usize::from(expected.decision() == Decision::Allow)] += 1;
        }
        prop_assert!(decisions.iter().all(|count| *count > 0), "denied, allowed: {:?}", decisions);
        Ok(())
    });
}

#[test]
fn every_feature_decides_its_share() {
    use std::cell::RefCell;
    let counts = RefCell::new((0u32, vec![0u32; FEATURES.len()], 0u32));
    check("features", 3000, (world().prop_map(everybody_has_a_node), any::<u64>()), |(changes, seed)| {
        let world = world_of(changes);
        let without: Vec<World> = FEATURES.iter().map(|feature| feature.knocked_out(&world)).collect();
        for flow in flows(&world, 60, seed) {
            let verdict = oracle(&world, &flow);
            if (&verdict.ingress, &verdict.egress) == (&Judgement::NotIsolated, &Judgement::NotIsolated) {
                // A feature that takes isolation away altogether shows here too, but the bar is on judged flows.
                continue;
            }
            let mut counts = counts.borrow_mut();
            counts.0 += 1;
            counts.2 += u32::from(flow.source.is_ipv6());
            for (feature, without) in without.iter().enumerate() {
                let changed = oracle(without, &flow).decision() != verdict.decision();
                counts.1[feature] += u32::from(changed);
            }
        }
        Ok(())
    });
    let (total, decided, v6) = counts.into_inner();
    let mut rare = Vec::new();
    for (feature, count) in FEATURES.iter().zip(&decided) {
        println!("{:>6.2} % {}", f64::from(*count) * 100.0 / f64::from(total), feature.name);
        if count * 100 < total {
            rare.push(feature.name);
        }
    }
    println!("{total} judged flows, {v6} of them IPv6");
    assert!(rare.is_empty(), "decide less than 1 % of {total} flows: {rare:?}");
    assert!(v6 * 5 >= total, "less than a fifth of the flows is IPv6");
}

/// The incremental compiler against the full one.
fn assert_equal(compiler: &Compiler, node: &str, step: usize) -> Result<(), TestCaseError> {
    let (goal, warnings) = compile(compiler.world(), node);
    prop_assert_eq!(&compiler.goal(), &goal, "after change {}", step);
    prop_assert_eq!(compiler.warnings(), warnings, "warnings after change {}", step);
    // A wrong count stays wrong while its set exists: every few changes is often enough, and half as slow.
    if step % 4 == 3 {
        prop_assert_eq!(compiler.census(), census(compiler.world()), "census after change {}", step);
    }
    Ok(())
}

#[test]
fn incremental_equals_full_after_every_change() {
    check("incremental = full, with the node's addresses", 500, sequence(1..60), |changes| {
        let mut compiler = Compiler::new(NODES[0]).with_locals();
        for (step, change) in changes.into_iter().enumerate() {
            let (goal, writes) = (compiler.goal(), compiler.writes());
            compiler.apply([change]);
            let locals = compiler.world().local_addresses(NODES[0]);
            prop_assert_eq!(&compiler.goal().locals, &Some(locals), "change {}", step);
            prop_assert!(goal == compiler.goal() || writes < compiler.writes(), "unnoticed: change {}", step);
        }
        Ok(())
    });
    check("incremental = full", 1500, sequence(1..60), |changes| {
        let mut compiler = Compiler::new(NODES[0]);
        for (step, change) in changes.into_iter().enumerate() {
            let (goal, writes) = (compiler.goal(), compiler.writes());
            compiler.apply([change]);
            assert_equal(&compiler, NODES[0], step)?;
            prop_assert!(goal == compiler.goal() || writes < compiler.writes(), "unnoticed: change {}", step);
        }
        Ok(())
    });
}

#[test]
fn the_census_is_what_a_node_with_every_pod_would_program() {
    check("census", 300, world(), |changes| {
        let compilers = NODES.map(|node| {
            let mut compiler = Compiler::new(node);
            compiler.apply(changes.clone());
            compiler
        });
        let counted = compilers[0].census();
        prop_assert_eq!(&counted, &compilers[1].census(), "two nodes count differently");
        let gathered = changes.into_iter().map(|change| match change {
            Change::Pod(key, Some(pod)) => Change::Pod(key, Some(Pod { node: Some(NODES[0].into()), ..pod })),
            Change::Pod(_, None) | Change::Namespace(..) | Change::Policy(..) => change,
        });
        let world = world_of(gathered);
        prop_assert_eq!(&counted, &census(&world), "where pods run counts");
        let (goal, _) = compile(&world, NODES[0]);
        for (key, set) in &goal.sets {
            let count = &counted.sets[key];
            prop_assert_eq!((count.v4, count.v6), (set.v4.len(), set.v6.len()), "{}", count.names.name);
        }
        let entries: usize = counted.sets.values().map(|count| count.v4 + count.v6).sum();
        prop_assert_eq!(counted.entries, entries);
        Ok(())
    });
}

#[test]
fn the_goal_depends_on_the_world_only() {
    check("path independence", 400, sequence(1..50), |changes| {
        let mut emptied = Compiler::new(NODES[0]);
        emptied.apply(changes.clone());
        emptied.apply(changes.iter().map(gone));
        prop_assert_eq!(&emptied.goal(), &Goal::default(), "an emptied world leaves something");
        prop_assert_eq!(emptied.census(), Census::default(), "an emptied world leaves something counted");
        let mut ends = forms(&changes).into_iter().map(|(name, batches)| {
            let mut compiler = Compiler::new(NODES[0]);
            batches.into_iter().for_each(|batch| compiler.apply(batch));
            (name, compiler)
        });
        let (_, direct) = ends.next().expect("the sequence itself");
        for (name, other) in ends {
            prop_assert_eq!(&direct.goal(), &other.goal(), "{}", name);
            prop_assert_eq!(direct.warnings(), other.warnings(), "{}", name);
            prop_assert_eq!(direct.census(), other.census(), "{}", name);
        }
        Ok(())
    });
}

#[test]
fn one_pod_among_many_touches_what_it_affects() {
    // 200 namespaces, 10 policies each, 100 pods each: 20,000 pods, 2,000 policies.
    let changes = npm_tests::random::cluster(200, 100, 10, NODES[0]);
    let mut compiler = Compiler::new(NODES[0]);
    compiler.apply(changes);
    let goal = compiler.goal();
    assert!(goal.programs.len() >= 5, "{} policies on the node", goal.programs.len());
    let pods: Vec<PodKey> = compiler.world().pods().map(|pod| pod.key.clone()).step_by(997).collect();
    let mut most = 0;
    for key in pods {
        let mut pod = (**compiler.world().pod(&key).expect("it is there")).clone();
        let before = compiler.operations();
        pod.labels.insert("app".into(), "moved".into());
        compiler.apply([Change::Pod(key.clone(), Some(pod))]);
        compiler.apply([Change::Pod(key, None)]);
        most = most.max(compiler.operations() - before);
    }
    println!("{} sets; a pod's relabelling and deletion test at most {most} of them", goal.sets.len());
    assert!(most <= 60, "a pod's change tested {most} sets");
    assert_eq!(compiler.goal(), compile(compiler.world(), NODES[0]).0);
}
