//! The eBPF engine's maps against the Goal that they are lowered from, on random worlds, judged in user space by the
//! function that the kernel runs: direction by direction. `ebpf_kernel.rs` asks the kernel.
//!
//! `NPM_SEED=<number>` repeats a run; `NPM_CASES=<n>` scales it.

use std::cell::Cell;
use std::collections::BTreeSet;

use npm_agent::backend::ebpf::held::{Held, Limits};
use npm_agent::backend::ebpf::lower::{LowerError, Lowered, lower};
use npm_agent::backend::ebpf::lowering::Unfit;
use npm_agent::backend::ebpf::plan::{Full, MapName, filled};
use npm_agent::backend::ebpf::shed::Shed;
use npm_common::decide::Judgement;
use npm_common::layout::NARROW_WORDS;
use npm_policy::flow::Judgement::{Allowed, Denied, NotIsolated};
use npm_policy::goal::Goal;
use npm_policy::model::PolicyKey;
use npm_tests::opinions::{goals, plain};
use npm_tests::property::check;
use npm_tests::random::{crowd, flows, world, world_of};
use npm_tests::regressions;
use proptest::prelude::*;

const REGRESSIONS: &str = regressions!("ebpf_agreement.txt");

/// The maps that were empty, filled with what the goal says.
fn maps(goal: &Goal) -> Result<Held<NARROW_WORDS>, TestCaseError> {
    let lowered = lower(goal).map_err(|error| TestCaseError::fail(error.to_string()))?;
    filled(&lowered, &Limits::OBJECT).map_err(|full| TestCaseError::fail(full.to_string()))
}

#[test]
fn the_lowered_maps_say_what_the_goal_says() {
    let (isolated, denied) = (Cell::new(0u32), Cell::new(0u32));
    check(REGRESSIONS, "lowered = goal", 1500, (world(), any::<u64>()), |(changes, seed)| {
        let world = world_of(changes);
        for (node, goal) in goals(&world) {
            let maps = maps(&goal)?;
            for flow in flows(&world, 100, seed) {
                let expected = plain(&goal.verdict(&flow));
                prop_assert_eq!(expected, maps.decide(&flow), "{} on {}", flow, node);
                let free = Judgement::NotIsolated;
                isolated.set(isolated.get() + u32::from((expected.ingress, expected.egress) != (free, free)));
                denied.set(denied.get() + u32::from(!expected.allows()));
            }
        }
        Ok(())
    });
    let (isolated, denied) = (isolated.get(), denied.get());
    println!("{isolated} verdicts with an isolated end, {denied} of these denied");
    assert!(isolated >= 40_000, "{isolated} verdicts with an isolated end");
    assert!(denied * 100 >= isolated * 30 && denied * 100 <= isolated * 75, "{denied} of {isolated} denied");
}

#[test]
fn long_lists_are_lowered_whole() {
    check(REGRESSIONS, "lowered crowds = goal", 4, (crowd(), any::<u64>()), |(changes, seed)| {
        let world = world_of(changes);
        for (node, goal) in goals(&world) {
            // Wide rows: the lists name more peers than 1,023.
            let lowered: Lowered<64> =
                lower(&goal).map_err(|error| TestCaseError::fail(error.to_string()))?;
            let wider = lowered.bits.len() > 64 * NARROW_WORDS;
            match lower::<NARROW_WORDS>(&goal) {
                Ok(_) => prop_assert!(!wider, "{} bits in {} words", lowered.bits.len(), NARROW_WORDS),
                Err(error) => prop_assert!(wider && matches!(error, LowerError::Peers { .. }), "{}", error),
            }
            println!(
                "{node}: {} bits, {} rows, {} policies, {} segments",
                lowered.bits.len(),
                lowered.rows.len(),
                lowered.policies.len(),
                lowered.segments.len()
            );
            let maps =
                filled(&lowered, &Limits::OBJECT).map_err(|full| TestCaseError::fail(full.to_string()))?;
            for flow in flows(&world, 1000, seed) {
                prop_assert_eq!(plain(&goal.verdict(&flow)), maps.decide(&flow), "{} on {}", flow, node);
            }
        }
        Ok(())
    });
}

/// As the maps would complain of a goal.
fn complaint(number: u64) -> Unfit {
    let names = [
        MapName::Networks,
        MapName::Pairs,
        MapName::Policies,
        MapName::Records,
        MapName::Rows,
        MapName::Segments,
    ];
    match names.get((number % 7) as usize) {
        Some(map) => Full { map: *map, wanted: 5, in_use: 4, limit: 4 }.into(),
        None => LowerError::Peers { needed: 5, available: 4 }.into(),
    }
}

/// What does not fit is left out: whoever was isolated is, and is allowed what other policies allow, and nothing else.
#[test]
fn what_is_left_out_is_denied() {
    let (same, fewer) = (Cell::new(0u32), Cell::new(0u32));
    check(REGRESSIONS, "left out = denied", 300, (world(), any::<u64>()), |(changes, seed)| {
        let world = world_of(changes);
        for (node, goal) in goals(&world) {
            let mut shed = Shed::default();
            for round in 0..8 {
                let reduced = shed.reduce(&goal).into_owned();
                let out: BTreeSet<PolicyKey> = shed.degraded().into_iter().map(|it| it.policy).collect();
                prop_assert!(reduced.programs.keys().eq(goal.programs.keys()));
                prop_assert!(lower::<NARROW_WORDS>(&reduced).is_ok());
                for flow in flows(&world, 40, seed) {
                    let (meant, found) = (goal.verdict(&flow), plain(&reduced.verdict(&flow)));
                    let mut expected = plain(&meant);
                    for (meant, expected) in
                        [(&meant.ingress, &mut expected.ingress), (&meant.egress, &mut expected.egress)]
                    {
                        let is_left = |by: &BTreeSet<PolicyKey>| by.iter().all(|policy| out.contains(policy));
                        let count = match meant {
                            Allowed { by } if is_left(by) => {
                                *expected = Judgement::Denied;
                                &fewer
                            }
                            Allowed { .. } | Denied { .. } | NotIsolated => &same,
                        };
                        count.set(count.get() + 1);
                    }
                    prop_assert_eq!(expected, found, "{} on {} without {:?}", flow, node, out);
                }
                let before = out.len();
                let is_less = shed.more(&goal, &complaint(seed.rotate_left(round * 8)), round);
                prop_assert_eq!(is_less, shed.degraded().len() > before, "round {}", round);
            }
        }
        Ok(())
    });
    let (same, fewer) = (same.get(), fewer.get());
    println!("{same} judgements as meant, {fewer} denied for what is left out");
    assert!(fewer > 1000 && same > 10 * 1000, "{same} {fewer}");
}
