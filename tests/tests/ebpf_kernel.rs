//! The eBPF engine in this kernel, by BPF_PROG_TEST_RUN: oracle = Goal = rendered iptables = the program, on random
//! worlds.
//!
//! `NPM_SEED=<number>` repeats a run; `NPM_CASES=<n>` scales it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use npm_agent::backend::ebpf::kernel::Kernel;
use npm_agent::backend::ebpf::lower::{Lowered, decision, lower};
use npm_agent::backend::ebpf::width::Width;
use npm_agent::backend::iptables::render::Rendered;
use npm_policy::flow::Decision;
use npm_policy::verdict::oracle;
use npm_policy::world::Change;
use npm_tests::opinions::{everybody_has_a_node, goals, plain, rendered};
use npm_tests::property::check;
use npm_tests::random::{crowd, flows, world, world_of};
use npm_tests::regressions;
use proptest::prelude::*;

const REGRESSIONS: &str = regressions!("ebpf_kernel.txt");

/// The program's verdicts that a run must compare at least.
const LEAST_VERDICTS: u32 = 1_000_000;

#[test]
fn oracle_goal_iptables_and_the_kernel_agree() {
    if !npm_tests::lab::require_root() {
        return;
    }
    let kernels = Width::BOTH.map(|width| RefCell::new(Kernel::load(width).expect("the program loads")));
    let (verdicts, denied) = (Cell::new(0u32), Cell::new(0u32));
    let (filling, asking) = (Cell::new(Duration::ZERO), Cell::new(Duration::ZERO));
    let strategy = (world().prop_map(everybody_has_a_node), any::<u64>());
    check(REGRESSIONS, "oracle = goal = iptables = eBPF", 1000, strategy, |(changes, seed)| {
        let world = world_of(changes);
        let goals = goals(&world);
        let nodes: BTreeMap<_, _> = goals.iter().map(|(node, goal)| (*node, Rendered::of(goal))).collect();
        let flows = flows(&world, 520, seed);
        let mut by_kernel = vec![Decision::Allow; flows.len()];
        for (node, goal) in &goals {
            // A part of the worlds by the object with wide rows.
            let mut kernel = kernels[usize::from(seed % 8 == 0)].borrow_mut();
            let began = Instant::now();
            kernel.fill(goal).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
            filling.set(filling.get() + began.elapsed());
            let began = Instant::now();
            let answers: Result<Vec<_>, _> = flows.iter().map(|flow| kernel.verdict(flow)).collect();
            asking.set(asking.get() + began.elapsed());
            let answers = answers.map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
            for ((flow, answer), whole) in flows.iter().zip(answers).zip(&mut by_kernel) {
                prop_assert_eq!(plain(&goal.verdict(flow)), answer, "{} on {}", flow, node);
                if decision(answer) == Decision::Deny {
                    *whole = Decision::Deny;
                }
                verdicts.set(verdicts.get() + 1);
            }
        }
        for (flow, by_kernel) in flows.iter().zip(by_kernel) {
            let expected = oracle(&world, flow);
            prop_assert_eq!(expected.decision(), by_kernel, "eBPF on {}: {}", flow, expected);
            let iptables = rendered(&world, &nodes, flow)?;
            prop_assert_eq!(expected.decision(), iptables, "iptables on {}: {}", flow, expected);
            denied.set(denied.get() + u32::from(by_kernel == Decision::Deny));
        }
        Ok(())
    });
    let (verdicts, denied) = (verdicts.get(), denied.get());
    println!(
        "{verdicts} verdicts of the kernel in {:?} ({:.0} a second), {:?} for filling maps; {denied} flows denied",
        asking.get(),
        f64::from(verdicts) / asking.get().as_secs_f64(),
        filling.get(),
    );
    assert!(verdicts >= LEAST_VERDICTS, "{verdicts} verdicts");
}

#[test]
fn long_lists_are_judged_whole() {
    if !npm_tests::lab::require_root() {
        return;
    }
    let kernel = RefCell::new(Kernel::load(Width::Narrow).expect("the program loads"));
    let most = Cell::new((0, 0));
    check(REGRESSIONS, "crowds in the kernel", 4, (crowd(), any::<u64>()), |(changes, seed)| {
        let mut world = world_of(changes);
        // As many policies as the program's rows have bits for.
        let mut policies: Vec<_> = world.policies().map(|policy| policy.key.clone()).collect();
        while goals(&world).values().any(|goal| !matches!(Width::needed(goal), Ok(Width::Narrow))) {
            let last = policies.pop().expect("no policies need no bits");
            world.apply(Change::Policy(last, None));
        }
        let mut kernel = kernel.borrow_mut();
        for (node, goal) in goals(&world) {
            let lowered: Lowered = lower(&goal).map_err(|error| TestCaseError::fail(error.to_string()))?;
            let (bits, segments) = (lowered.bits.len(), lowered.segments.len());
            most.set((most.get().0.max(bits), most.get().1.max(segments)));
            let writes = kernel.fill(&goal).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
            println!("{node}: {bits} bits, {segments} segments, {writes:?}");
            for flow in flows(&world, 2000, seed) {
                let answer =
                    kernel.verdict(&flow).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
                prop_assert_eq!(plain(&goal.verdict(&flow)), answer, "{} on {}", flow, node);
            }
        }
        Ok(())
    });
    let (bits, segments) = most.get();
    assert!(bits > 64 && segments > 100, "{bits} bits, {segments} segments: the lists are short");
}
