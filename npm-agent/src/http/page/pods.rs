//! The pods of this node: who is isolated, and by what.

use std::sync::Arc;

use maud::{Markup, html};
use npm_policy::model::{Pod, PodNetwork, PodPhase, PolicyKey};

use super::paging::{Part, filter, link};
use super::words::{self, count, short};
use super::{Page, Seen, cell, policies, table};
use crate::http::view::{Isolation, View};

/// How many addresses of a pod are shown.
const MOST_ADDRESSES: usize = 4;

/// The word of the query for all pods of the node.
const ALL: &str = "all";

pub(super) fn list(seen: &Seen) -> Markup {
    let (view, query) = (&*seen.view, &seen.query);
    let all = query.show == ALL;
    let wanted = view.world.pods().filter(|pod| {
        let here = pod.node.as_deref() == Some(&*view.node);
        let shown = all || view.goal.subjects.contains_key(&pod.key);
        here && shown && (query.filter.is_empty() || admits(seen, pod))
    });
    let part = Part::of(query, wanted);
    let rows = part.rows().iter().map(|pod| row(view, pod));
    html! {
        h1 { "Pods of this node" }
        (filter(Page::Pods, query, "Namespace, name, address or label"))
        p.choice {
            (choice(seen, "", "isolated ones")) " "
            (choice(seen, ALL, "all"))
        }
        (table(&["Pod", "Addresses", "Labels", "Ingress", "Egress", "Verdict"], rows))
        (part.navigation(Page::Pods, query))
        @if !all { p.quiet { "A pod that no policy selects for a direction is open in that direction." } }
    }
}

fn choice(seen: &Seen, word: &str, text: &str) -> Markup {
    let to = link(Page::Pods, &[("filter", &seen.query.filter), ("show", word)]);
    html! { a href=(to) aria-current=[(seen.query.show == word).then_some("true")] { (text) } }
}

fn admits(seen: &Seen, pod: &Pod) -> bool {
    let query = &seen.query;
    query.admits(&pod.key.to_string())
        || pod.addresses.iter().any(|address| address.to_string() == query.filter)
        || pod.labels.iter().any(|(key, value)| query.admits(&format!("{key}={value}")))
}

fn row(view: &View, pod: &Arc<Pod>) -> Vec<Markup> {
    let name = pod.key.to_string();
    let Isolation { ingress, egress } = view.isolation(&pod.key);
    let labels = pod.labels.iter().map(|(key, value)| format!("{key}={value}"));
    vec![
        cell(short(&name)),
        html! {
            @for address in pod.addresses.iter().take(MOST_ADDRESSES) { div { code { (address) } } }
            @if pod.addresses.len() > MOST_ADDRESSES { "and " (count(pod.addresses.len() - MOST_ADDRESSES)) " more" }
        },
        cell(short(&words::listed(labels))),
        direction(pod, &ingress),
        direction(pod, &egress),
        html! {
            a href=(link(Page::Verdict, &[("from", &name)])) { "from" } " "
            a href=(link(Page::Verdict, &[("to", &name)])) { "to" }
        },
    ]
}

fn direction(pod: &Pod, by: &[&PolicyKey]) -> Markup {
    match (pod.network, pod.phase, by.is_empty()) {
        (PodNetwork::Host, _, _) => html! { span.quiet { "the node's network" } },
        (PodNetwork::Own, PodPhase::Ended, _) => html! { span.quiet { "ended" } },
        (PodNetwork::Own, PodPhase::Pending | PodPhase::Active, true) => html! { span.state { "open" } },
        (PodNetwork::Own, PodPhase::Pending | PodPhase::Active, false) => {
            html! { span.state.isolated { "isolated" } " by " (policies::first(by.iter().copied())) }
        }
    }
}
