//! What escapes judgement, as numbers.

use std::collections::{BTreeMap, BTreeSet};

use super::pulled::Sample;
use crate::escape::{Board, Effect, Escape};

/// How many reasons of each name there are, by effect. Every name is there, so that what comes is seen to come.
pub(super) fn samples(board: &Board) -> Vec<Sample> {
    let mut counts: BTreeMap<(&str, Effect), u64> = BTreeMap::new();
    for (effect, escape) in board.current() {
        *counts.entry((escape.name(), effect)).or_default() += 1;
    }
    let found: BTreeSet<&str> = counts.keys().map(|(name, _)| *name).collect();
    let absent = Escape::NAMES.into_iter().filter(|name| !found.contains(name));
    counts.extend(absent.map(|name| ((name, Effect::None), 0)).collect::<Vec<_>>());
    counts
        .into_iter()
        .map(|((name, effect), count)| (vec![name.to_owned(), effect.to_string()], count as f64))
        .collect()
}
