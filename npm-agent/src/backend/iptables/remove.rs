//! Takes everything of ours out of the kernel, whichever version or variant put it there, and nothing else.

use std::time::Duration;

use npm_policy::goal::Family;

use super::super::{BackendError, Removed};
use super::layout;
use super::plan::{ForwardEdit, SetOp, Transaction};
use super::readback;
use super::state::State;
use super::variant::{self, Variant};
use super::write;
use crate::exec::Tools;

/// How often a set that is still in use is tried again, 20 ms apart.
const MAX_ATTEMPTS: u32 = 50;

/// Removes our jumps, then our chains, in one transaction. A chain that somebody else's rules lead to is emptied.
pub(super) fn transaction(rules: &State) -> Transaction {
    let delete: Vec<_> = rules.forward.iter().filter(|line| layout::is_our_jump(line)).cloned().collect();
    let fate = |name| if rules.claimed.contains(name) { Some(Default::default()) } else { None };
    Transaction {
        chains: rules.chains.keys().map(|name| (name.clone(), fate(name))).collect(),
        forward: (!delete.is_empty()).then_some(ForwardEdit { delete, insert: None }),
    }
}

/// Removes everything of ours from both variants and both families: jumps, chains, sets.
///
/// # Errors
/// Something of ours is still there: the tools refused, or somebody else's rules lead to it.
pub(super) fn everything(tools: &Tools, lock_wait: Duration) -> Result<Removed, BackendError> {
    let mut removed = Removed::default();
    let mut claimed = Vec::new();
    let sets = readback::sets(tools)?;
    for family in Family::BOTH {
        if family == Family::V6 && !variant::has_ipv6()? {
            continue;
        }
        for variant in Variant::BOTH {
            let Some(rules) = readback::leftovers(tools, variant, family, &sets)? else { continue };
            let transaction = transaction(&rules);
            write::rules(tools, variant, family, lock_wait, &transaction)?;
            removed.rules += transaction.forward.map_or(0, |edit| edit.delete.len());
            removed.chains += transaction.chains.values().filter(|chain| chain.is_none()).count();
            claimed.extend(
                rules.claimed.iter().map(|name| format!("chain {name} of {}", variant.command(family))),
            );
        }
    }
    removed.sets = destroy_sets(tools)?;
    if claimed.is_empty() {
        Ok(removed)
    } else {
        Err(BackendError::Refused {
            program: "cleanup".to_owned(),
            status: "incomplete".to_owned(),
            stderr: format!("rules that are not ours lead to {}; delete them first", claimed.join(", ")),
        })
    }
}

/// Destroys our sets, one by one: one that someone holds fast must not keep the others.
fn destroy_sets(tools: &Tools) -> Result<usize, BackendError> {
    let mut destroyed = 0;
    for attempt in 0.. {
        let mut sets: Vec<_> = readback::sets(tools)?
            .into_iter()
            .flat_map(|(family, sets)| {
                sets.into_iter().map(move |(name, set)| (!set.kind.is_list(), family, name))
            })
            .collect();
        sets.sort();
        if sets.is_empty() {
            break;
        }
        let ops: Vec<SetOp> = sets.iter().map(|(_, _, set)| SetOp::Destroy { set: set.clone() }).collect();
        if write::sets(tools, Family::V4, &ops).is_ok() {
            destroyed += ops.len();
            break;
        }
        let mut last = Ok(());
        for (op, (_, family, _)) in ops.iter().zip(&sets) {
            match write::sets(tools, *family, std::slice::from_ref(op)) {
                Ok(()) => destroyed += 1,
                Err(error) => last = Err(error),
            }
        }
        // The kernel lets go of sets some time after the rules that named them.
        if attempt >= MAX_ATTEMPTS {
            last?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(destroyed)
}
