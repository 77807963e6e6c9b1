//! Goals one after another: the kernel holds the last, whatever came before it, and in whatever form it came.

use npm_agent::backend::Backend;
use npm_policy::compile::Compiler;
use npm_policy::goal::Goal;
use npm_tests::random::{NODES, sequence, world};
use npm_tests::sequence::forms;

use super::{assert_holds, backend, in_namespace, random, random_goal};

#[test]
fn random_goals_one_after_another() {
    in_namespace(|variant| {
        let mut backend = backend(variant);
        let there = 0..25;
        let and_back = (0..25).rev().step_by(3);
        for seed in there.chain(and_back) {
            let goal = random_goal(seed);
            let applied = backend.apply(&goal).unwrap();
            assert_eq!((applied.drift, applied.degraded), (vec![], vec![]));
            assert_holds(&backend, &goal);
        }
        // With empties between.
        for seed in 0..5 {
            for goal in [random_goal(seed), Goal::default()] {
                backend.apply(&goal).unwrap();
                assert_holds(&backend, &goal);
            }
        }
    });
}

/// Small changes, the likes of which a cluster makes, in every form that they may come in.
#[test]
fn changes_in_every_form_end_alike() {
    in_namespace(|variant| {
        let start = random(&world(), 7);
        let changes = random(&sequence(14..15), 8);
        let mut backend = backend(variant);
        let mut end = None;
        for (name, batches) in forms(&changes) {
            let mut compiler = Compiler::new(NODES[0]);
            compiler.apply(start.clone());
            backend.apply(&compiler.goal()).unwrap();
            for batch in batches {
                compiler.apply(batch);
                let goal = compiler.goal();
                backend.apply(&goal).unwrap();
                assert_holds(&backend, &goal);
            }
            let state = backend.read().unwrap();
            assert_eq!(end.get_or_insert_with(|| state.clone()), &state, "{name}");
        }
    });
}
