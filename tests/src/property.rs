//! Properties of random values: the seed is printed, `NPM_SEED=<number>` repeats a run and `NPM_CASES=<n>` scales it.
//! Counterexamples are kept in `tests/regressions` and run first.

use std::fmt::Debug;

use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, RngAlgorithm, TestError, TestRng, TestRunner};

use crate::random::SplitMix;

/// How long a smaller counterexample is looked for. Where a case takes seconds, thousands of them would take a day.
pub const SHRINK_MILLISECONDS: u32 = 60_000;

/// Where a test file's counterexamples are kept.
#[macro_export]
macro_rules! regressions {
    ($name:literal) => {
        concat!(env!("CARGO_MANIFEST_DIR"), "/regressions/", $name)
    };
}

/// Runs `property` on `cases` values of `strategy`, and prints the seed.
pub fn check<S: Strategy>(
    regressions: &'static str,
    name: &'static str,
    cases: u32,
    strategy: S,
    property: impl Fn(S::Value) -> Result<(), TestCaseError>,
) where
    S::Value: Debug,
{
    let seed = match std::env::var("NPM_SEED") {
        Ok(text) => text.parse().expect("NPM_SEED is a number"),
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_nanos() & u128::from(u64::MAX)).unwrap_or(0)),
    };
    let scale: u32 =
        std::env::var("NPM_CASES").map_or(1, |text| text.parse().expect("NPM_CASES is a number"));
    assert!(scale > 0, "NPM_CASES=0 would test nothing");
    println!("{name}: NPM_SEED={seed}, {} cases", cases * scale);
    let mut numbers = SplitMix(seed);
    let bytes: Vec<u8> = (0..4).flat_map(|_| numbers.next().to_le_bytes()).collect();
    let config = Config {
        cases: cases * scale,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(regressions))),
        max_shrink_iters: crate::random::shrink_iterations(20_000),
        max_shrink_time: SHRINK_MILLISECONDS,
        source_file: Some(file!()),
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    match runner.run(&strategy, property) {
        Ok(()) => {}
        Err(TestError::Fail(reason, value)) => {
            panic!("{name}: {reason}\nsmallest world: {value:#?}\nNPM_SEED={seed}")
        }
        Err(TestError::Abort(reason)) => panic!("{name}: {reason}\nNPM_SEED={seed}"),
    }
}
