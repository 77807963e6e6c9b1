//! What someone else has changed: the differences between what is there and what we left, in lines for people.

use std::collections::BTreeMap;

use super::layout::Placement;
use super::plan;
use super::state::{Line, Name, Rule, State};
use super::text;

/// More differences than this in one set or chain are counted instead of listed.
const MAX_LISTED: usize = 20;

/// Lists what differs. `people` gives sets' names for people by their kernel names.
pub fn differences(
    actual: &State,
    expected: &State,
    placement: Placement,
    people: &BTreeMap<Name, Name>,
) -> Vec<String> {
    let mut found = Vec::new();
    sets(actual, expected, people, &mut found);
    chains(actual, expected, &mut found);
    forward(&actual.forward, &expected.jump(), placement, &mut found);
    let family = match expected.family {
        npm_policy::goal::Family::V4 => "IPv4",
        npm_policy::goal::Family::V6 => "IPv6",
    };
    found.into_iter().map(|line| format!("{family}: {line}")).collect()
}

fn sets(actual: &State, expected: &State, people: &BTreeMap<Name, Name>, found: &mut Vec<String>) {
    let named = |name: &Name| match people.get(name) {
        Some(words) => format!("set {name} ({words})"),
        None => format!("set {name}"),
    };
    for (name, wanted) in &expected.sets {
        let Some(set) = actual.sets.get(name) else {
            found.push(format!("{} was gone", named(name)));
            continue;
        };
        if set.kind != wanted.kind {
            let family = expected.family;
            found.push(format!("{} was {}", named(name), text::kind_text(family, &set.kind)));
            continue;
        }
        let missing = wanted.members.iter().filter(|member| !set.members.contains(*member));
        list(found, missing, |member| format!("{}: {} was missing", named(name), text::member_text(member)));
        let extra = set.members.iter().filter(|member| !wanted.members.contains(*member));
        list(found, extra, |member| format!("{}: {} was added", named(name), text::member_text(member)));
    }
    let extra = actual.sets.keys().filter(|name| !expected.sets.contains_key(*name));
    found.extend(extra.map(|name| format!("{} was added", named(name))));
}

fn chains(actual: &State, expected: &State, found: &mut Vec<String>) {
    for (name, wanted) in &expected.chains {
        let Some(chain) = actual.chains.get(name) else {
            found.push(format!("chain {name} was gone"));
            continue;
        };
        if chain == wanted {
            continue;
        }
        let before = found.len();
        let missing = wanted.iter().filter(|line| !chain.contains(line));
        list(found, missing, |line| format!("chain {name}: missing {}", text::line_text(line)));
        let extra = chain.iter().filter(|line| !wanted.contains(line));
        list(found, extra, |line| format!("chain {name}: added {}", text::line_text(line)));
        if found.len() == before {
            found.push(format!("chain {name}: rules in another order or number"));
        }
    }
    let extra = actual.chains.iter().filter(|(name, chain)| {
        // One that someone leads to stays, empty.
        !expected.chains.contains_key(*name) && (!actual.claimed.contains(*name) || !chain.is_empty())
    });
    found.extend(extra.map(|(name, _)| format!("chain {name} was added")));
}

fn forward(actual: &[Line], jump: &Rule, placement: Placement, found: &mut Vec<String>) {
    let Some(edit) = plan::forward_edit(actual, jump, placement) else { return };
    found.push(match edit.delete.as_slice() {
        [] => "the jump in FORWARD was gone".to_owned(),
        [line] if *line == Line::Rule(jump.clone()) => {
            "the jump in FORWARD was not in its place: something stood before it".to_owned()
        }
        [line] => format!("the jump in FORWARD was {}", text::line_text(line)),
        lines => format!("{} jumps to us stood in FORWARD", lines.len()),
    });
}

/// A line for each item, or one for all of them if they are many.
fn list<T>(found: &mut Vec<String>, items: impl Iterator<Item = T>, line: impl Fn(T) -> String) {
    let mut rest = 0;
    for (index, item) in items.enumerate() {
        if index < MAX_LISTED {
            found.push(line(item));
        } else {
            rest += 1;
        }
    }
    if rest > 0 {
        found.push(format!("and {rest} more of the like"));
    }
}
