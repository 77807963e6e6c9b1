//! Policies: all of the cluster's, and one of them.

use std::sync::Arc;

use maud::{Markup, html};
use npm_policy::goal::{PeerMatch, PortMatch, Program, SetKey};
use npm_policy::model::{Policy, PolicyKey, Rule};

use super::paging::{PER_PAGE, Part, filter, link};
use super::words::{self, count, short};
use super::{Page, Seen, cell, number, table};
use crate::http::view::View;

/// The word of the query for policies that select pods of this node.
pub(super) const HERE: &str = "here";

/// How many rules of a direction are put into words.
const MOST_RULES: usize = 50;

/// A link to a policy.
pub(super) fn to(policy: &PolicyKey) -> Markup {
    let name = policy.to_string();
    html! { a href=(link(Page::Policy, &[("name", &name)])) { (short(&name)) } }
}

/// The first few of some policies, as links.
pub(super) fn first<'a>(policies: impl ExactSizeIterator<Item = &'a PolicyKey>) -> Markup {
    const MOST: usize = 5;
    let left = policies.len().saturating_sub(MOST);
    html! {
        @for (place, policy) in policies.take(MOST).enumerate() { @if place > 0 { ", " } (to(policy)) }
        @if left > 0 { " and " (count(left)) " more" }
    }
}

pub(super) fn list(seen: &Seen) -> Markup {
    let (view, query) = (&*seen.view, &seen.query);
    let only_here = query.show == HERE;
    let wanted = view.world.policies().filter(|policy| {
        let here = !only_here || view.goal.programs.contains_key(&policy.key);
        here && query.admits(&policy.key.to_string())
    });
    let part = Part::of(query, wanted);
    let rows = part.rows().iter().map(|policy| row(view, policy));
    html! {
        h1 { "Policies" }
        (filter(Page::Policies, query, "Namespace or name"))
        p.choice {
            (choice(seen, "", "all of the cluster")) " "
            (choice(seen, HERE, "those that select pods of this node"))
        }
        (table(&["Policy", "Selects", "Isolates", "Rules", "Pods here"], rows))
        (part.navigation(Page::Policies, query))
    }
}

fn choice(seen: &Seen, word: &str, text: &str) -> Markup {
    let to = link(Page::Policies, &[("filter", &seen.query.filter), ("show", word)]);
    html! { a href=(to) aria-current=[(seen.query.show == word).then_some("true")] { (text) } }
}

fn row(view: &View, policy: &Policy) -> Vec<Markup> {
    let rules = |rules: &Option<Vec<Rule>>| rules.as_ref().map_or(0, Vec::len);
    let here = view.goal.programs.get(&policy.key);
    let here = here.map_or(0, |program| view.subjects(&policy.key, program).count());
    vec![
        to(&policy.key),
        cell(short(&words::pods(&policy.subjects))),
        isolates(policy),
        number(rules(&policy.ingress) + rules(&policy.egress)),
        number(here),
    ]
}

fn isolates(policy: &Policy) -> Markup {
    cell(match (&policy.ingress, &policy.egress) {
        (Some(_), Some(_)) => "ingress, egress",
        (Some(_), None) => "ingress",
        (None, Some(_)) => "egress",
        (None, None) => "nothing",
    })
}

pub(super) fn one(seen: &Seen) -> Markup {
    let (view, name) = (&*seen.view, &seen.query.name);
    let found = name
        .split_once('/')
        .and_then(|(namespace, name)| view.world.policy(&PolicyKey::new(namespace, name)));
    let Some(policy) = found else {
        return html! {
            h1 { "Policy" }
            p.banner.warn { "There is no policy " (short(name)) "." }
            p { a href=(Page::Policies.path()) { "All policies" } }
        };
    };
    let program = view.goal.programs.get(&policy.key);
    let degraded = seen.report.status.backends.iter().flat_map(|backend| &backend.degraded);
    let degraded = degraded.filter(|degraded| degraded.policy == *name);
    html! {
        h1 { "Policy " (short(name)) }
        @for reason in degraded.take(PER_PAGE) { p.banner.warn { "Allows less than it says: " (short(&reason.reason)) } }
        dl {
            div { dt { "Selects" } dd { (short(&words::pods(&policy.subjects))) " of namespace " (short(&policy.key.namespace)) } }
            div { dt { "Isolates" } dd { (isolates(policy)) } }
        }
        (direction("Ingress", "from", &policy.ingress))
        (direction("Egress", "to", &policy.egress))
        section {
            h2 { "On this node" }
            @match program {
                Some(program) => (here(seen, policy, program)),
                None => p.quiet { "It selects no pod of this node: nothing is programmed for it here." },
            }
        }
    }
}

/// `word` is the API's: from or to.
fn direction(title: &str, word: &str, rules: &Option<Vec<Rule>>) -> Markup {
    html! {
        section {
            h2 { (title) }
            @match rules {
                None => p.quiet { "Not isolated by this policy." },
                Some(rules) if rules.is_empty() => p { "Isolated; nothing is allowed by this policy." },
                Some(rules) => {
                    p { "Isolated; allowed is:" }
                    ul {
                        @for (peers, ports) in rules.iter().take(MOST_RULES).map(words::rule) {
                            li { (short(&ports)) " " strong { (word) } " " (short(&peers)) }
                        }
                        @if rules.len() > MOST_RULES { li { "and " (count(rules.len() - MOST_RULES)) " more rules" } }
                    }
                }
            }
        }
    }
}

fn here(seen: &Seen, policy: &Policy, program: &Arc<Program>) -> Markup {
    let (view, query) = (&*seen.view, &seen.query);
    let key = &policy.key;
    let part = Part::of(query, view.subjects(key, program));
    let mut sets: Vec<&SetKey> = named(program).collect();
    sets.sort_unstable();
    sets.dedup();
    html! {
        h3 { "Pods that it isolates" }
        (table(&["Pod"], part.rows().iter().map(|pod| vec![cell(short(&pod.to_string()))])))
        (part.navigation(Page::Policy, query))
        h3 { "Sets that it uses" }
        ul {
            @for set in sets.iter().take(PER_PAGE) { li { (super::sets::to(view.name(set))) } }
            @if sets.len() > PER_PAGE { li { "and " (count(sets.len() - PER_PAGE)) " more" } }
        }
    }
}

/// The sets that a program names; one may come several times.
pub(super) fn named(program: &Program) -> impl Iterator<Item = &SetKey> {
    let Program { subjects, ingress, egress } = program;
    let clauses = ingress.iter().chain(egress).flatten();
    let named = clauses.flat_map(|clause| {
        let peers = match &clause.peers {
            PeerMatch::Sets(sets) => Some(sets),
            PeerMatch::Any => None,
        };
        let ports = match &clause.ports {
            PortMatch::Only { ranges: _, named } => Some(named),
            PortMatch::Any => None,
        };
        peers.into_iter().flatten().chain(ports.into_iter().flatten().map(|named| &named.set))
    });
    std::iter::once(subjects).chain(named)
}
