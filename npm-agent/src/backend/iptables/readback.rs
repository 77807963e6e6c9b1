//! What is in the kernel: our sets and chains, read through `ipset save` and `iptables-save`.

use std::collections::{BTreeMap, BTreeSet};

use npm_policy::goal::Family;

use super::BackendError;
use super::meter::Counts;
use super::state::{Name, Set, State};
use super::text::{self, Unreadable};
use super::variant::Variant;
use crate::exec::Tools;

/// Our sets of each family.
pub type Sets = BTreeMap<Family, BTreeMap<Name, Set>>;

/// Reads our sets.
///
/// # Errors
/// `ipset` could not be run, or printed what it is not known to print.
pub fn sets(tools: &Tools) -> Result<Sets, BackendError> {
    let saved = tools.run("ipset", &["save"], "")?;
    text::parse_sets(&saved).map_err(|error| unreadable("ipset save", &error))
}

/// The sets, of whomever, that rules or other sets name. Members are not read: it takes milliseconds whatever they are.
///
/// # Errors
/// As [`sets`].
pub fn held_sets(tools: &Tools) -> Result<BTreeSet<Name>, BackendError> {
    let listed = tools.run("ipset", &["list", "-terse"], "")?;
    let mut held = BTreeSet::new();
    let mut set = None;
    for line in listed.lines() {
        if let Some(name) = line.strip_prefix("Name: ") {
            set = Some(name);
        } else if let Some(count) = line.strip_prefix("References: ")
            && count != "0"
        {
            held.extend(set.map(Name::from));
        }
    }
    Ok(held)
}

/// Reads one family's state in one variant.
///
/// # Errors
/// The tool could not be run, or printed what it is not known to print.
pub fn state(tools: &Tools, variant: Variant, family: Family, sets: &Sets) -> Result<State, BackendError> {
    Ok(state_and_counts(tools, variant, family, sets)?.0)
}

/// Reads one family's state in one variant, and how often its rules were met.
///
/// # Errors
/// As [`state`].
pub fn state_and_counts(
    tools: &Tools,
    variant: Variant,
    family: Family,
    sets: &Sets,
) -> Result<(State, Counts), BackendError> {
    let program = variant.save(family);
    let saved = tools.run(&program, &["-c", "-t", "filter"], "")?;
    // Exit status 0, and not one rule: somebody wrote rules with nft that iptables can't express.
    if let Some(line) = saved.lines().find(|line| line.starts_with("# Table `filter' is incompatible")) {
        return Err(BackendError::Unreadable { program, detail: line.to_owned() });
    }
    let filter = text::parse_filter(family, &saved).map_err(|error| unreadable(&program, &error))?;
    let counts = Counts::of(&filter);
    let state = State {
        family,
        sets: sets.get(&family).cloned().unwrap_or_default(),
        chains: filter.chains,
        forward: filter.forward,
        claimed: filter.claimed,
    };
    Ok((state, counts))
}

/// Reads what a variant that the node does not use holds of ours. A variant that is not installed holds nothing.
///
/// # Errors
/// As [`state`].
pub fn leftovers(
    tools: &Tools,
    variant: Variant,
    family: Family,
    sets: &Sets,
) -> Result<Option<State>, BackendError> {
    if !variant.has_table(family, "filter") {
        return Ok(None);
    }
    match state(tools, variant, family, sets) {
        Ok(state) => {
            let rules = State { sets: BTreeMap::new(), ..state };
            Ok((!rules.is_clear()).then_some(rules))
        }
        Err(BackendError::Spawn { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn unreadable(program: &str, error: &Unreadable) -> BackendError {
    BackendError::Unreadable { program: program.to_owned(), detail: error.to_string() }
}
