//! The first page: how the node stands.

use std::time::{Duration, SystemTime};

use maud::{Markup, html};

use super::paging::{Query, link};
use super::words::{ago, count, short, span};
use super::{Page, Seen, cell, number, policies, table, verdict};
use crate::escape::Effect;
use crate::status::report::{BackendStatus, EscapeStatus, SourceStatus, Status, WatchStatus, WorldStatus};

/// How many reasons, warnings and the like are on the first page; the rest is counted.
const MOST_SHOWN: usize = 10;

pub(super) fn body(seen: &Seen) -> Markup {
    let now = SystemTime::now();
    let status = &seen.report.status;
    html! {
        h1 { "Node " (short(&status.node)) }
        (readiness(seen))
        (figures(seen))
        section {
            h2 { "Is it allowed?" }
            (verdict::form(seen, &Query::default()))
        }
        section {
            h2 { "Backends" }
            @for backend in &status.backends { (self::backend(backend, status.generation, now)) }
        }
        section {
            h2 { "Traffic that escapes judgement" }
            (escapes(&status.escapes))
        }
        section {
            h2 { "Source" }
            (source(&status.source, status.started, now))
        }
        section {
            h2 { "Warnings" }
            (warnings(status))
        }
    }
}

fn readiness(seen: &Seen) -> Markup {
    html! {
        @if seen.report.ready {
            p.banner.good { strong { "Ready." } " Everything that was seen is enforced." }
        } @else {
            div.banner.bad {
                strong { "Not ready." }
                (list(seen.report.reasons.iter().map(String::as_str)))
            }
        }
    }
}

/// The first few of some texts.
fn list<'a>(texts: impl ExactSizeIterator<Item = &'a str>) -> Markup {
    let left = texts.len().saturating_sub(MOST_SHOWN);
    html! {
        ul {
            @for text in texts.take(MOST_SHOWN) { li { (short(text)) } }
            @if left > 0 { li { "and " (count(left)) " more" } }
        }
    }
}

fn figures(seen: &Seen) -> Markup {
    let WorldStatus { pods, namespaces, policies, local_subjects } = seen.report.status.world;
    let goal = &seen.view.goal;
    let figure = |to: Option<String>, value: usize, what: &str| {
        html! {
            div.figure {
                span.value { (count(value)) }
                @match to {
                    Some(to) => a href=(to) { (what) },
                    None => span { (what) },
                }
            }
        }
    };
    let to = |page: Page| Some(link(page, &[]));
    let here = Some(link(Page::Policies, &[("show", policies::HERE)]));
    html! {
        div.figures {
            (figure(to(Page::Policies), policies, "policies in the cluster"))
            (figure(here, goal.programs.len(), "of them apply here"))
            (figure(to(Page::Pods), local_subjects, "isolated pods here"))
            (figure(to(Page::Sets), goal.sets.len(), "sets"))
            (figure(None, pods, "pods in the cluster"))
            (figure(None, namespaces, "namespaces"))
        }
    }
}

fn backend(backend: &BackendStatus, wanted: u64, now: SystemTime) -> Markup {
    let BackendStatus {
        name,
        generation,
        inherited,
        applies,
        last_apply,
        verifies,
        last_verify,
        unverified_ms,
        attempt_ms,
        stale_after_ms: _,
        failures,
        consecutive_failures,
        last_error,
        drift_repairs,
        degraded,
        size,
    } = backend;
    let state = match (last_error, inherited, *generation >= wanted.max(1)) {
        (Some(_), _, _) => html! { span.state.bad { "failing" } },
        (None, true, _) => html! { span.state.warn { "what an earlier agent left" } },
        (None, false, false) => html! { span.state.warn { "behind" } },
        (None, false, true) => html! { span.state.good { "in force" } },
    };
    html! {
        div.card {
            h3 { (short(name)) " " (state) }
            dl.wide {
                div { dt { "Goal" } dd { (generation) " of " (wanted) } }
                div { dt { "Programmed" } dd {
                    (count(size.sets)) " sets with " (count(size.members)) " members, "
                    (count(size.policies)) " policies with " (count(size.rules)) " rules"
                } }
                div { dt { "Last apply" } dd {
                    @match last_apply {
                        Some(last) => {
                            (ago(last.at, now)) ", took " (count(last.duration_ms)) " ms: "
                            (count(last.set_writes)) " set writes, " (count(last.rule_writes)) " chain writes"
                        }
                        None => "none yet",
                    }
                } }
                div { dt { "Applies" } dd { (count(*applies)) } }
                div { dt { "Last read-back" } dd {
                    @match last_verify { Some(at) => { (ago(*at, now)) ", " (count(*verifies)) " in all" }, None => "none yet" }
                } }
                div { dt { "Known to be right" } dd { (span(Duration::from_millis(*unverified_ms))) " ago" } }
                div { dt { "Repaired after others" } dd { (count(*drift_repairs)) } }
                div { dt { "Failures" } dd {
                    (count(*failures))
                    @if *consecutive_failures > 0 { ", the last " (count(*consecutive_failures)) " in a row" }
                } }
                @if let Some(attempt) = attempt_ms {
                    div { dt { "At work for" } dd { (span(Duration::from_millis(*attempt))) } }
                }
            }
            @if let Some(error) = last_error { p.banner.bad { (short(error)) } }
            @if !degraded.is_empty() {
                p.banner.warn {
                    a href=(Page::Warnings.path()) { (count(degraded.len())) " policies" }
                    " allow less than they say."
                }
            }
        }
    }
}

fn escapes(escapes: &[EscapeStatus]) -> Markup {
    if escapes.is_empty() {
        return html! { p.quiet { "Nothing known." } };
    }
    let rows = escapes.iter().take(MOST_SHOWN).map(|EscapeStatus { name: _, effect, what, remedy }| {
        let class = match effect {
            Effect::Unjudged => "state bad",
            Effect::Unknown | Effect::Stricter => "state warn",
            Effect::None => "state",
        };
        vec![html! { span class=(class) { (effect) } }, cell(short(what)), cell(short(remedy))]
    });
    html! {
        (table(&["Effect", "What", "What to do"], rows))
        @if escapes.len() > MOST_SHOWN { p.quiet { "and " (count(escapes.len() - MOST_SHOWN)) " more: npm-agent status" } }
    }
}

fn source(source: &SourceStatus, started: SystemTime, now: SystemTime) -> Markup {
    let SourceStatus { in_sync, unread, problems: _, watches } = source;
    let rows = watches.iter().map(|watch| {
        let WatchStatus { name, following, unwatched_ms, failures, lists, last_error } = watch;
        let state = match following {
            true => html! { span.state.good { "following" } },
            false => html! { span.state.bad { "not for " (span(Duration::from_millis(*unwatched_ms))) } },
        };
        let error = last_error.as_deref().unwrap_or_default();
        vec![cell(short(name)), state, number(*lists), number(*failures), cell(short(error))]
    });
    html! {
        p {
            @if *in_sync { span.state.good { "in sync" } } @else { span.state.bad { "not in sync" } }
            " The agent started " (ago(started, now)) "."
        }
        @if !unread.is_empty() { p { "Not readable since the start:" } (list(unread.iter().map(String::as_str))) }
        @if !watches.is_empty() { (table(&["Watch", "State", "Lists", "Failures", "Last error"], rows)) }
    }
}

fn warnings(status: &Status) -> Markup {
    let degraded: usize = status.backends.iter().map(|backend| backend.degraded.len()).sum();
    let total = status.warnings.len() + status.source.problems.len() + degraded;
    html! {
        @if total == 0 && status.known_differences.is_empty() { p.quiet { "None." } }
        @if !status.known_differences.is_empty() { (list(status.known_differences.iter().map(String::as_str))) }
        @if total > 0 {
            p {
                a href=(link(Page::Warnings, &[])) { (count(total)) " to look at" }
                ": " (count(status.warnings.len())) " of the cluster's state, "
                (count(status.source.problems.len())) " objects taken strictly or not at all, "
                (count(degraded)) " policies that allow less than they say."
            }
        }
    }
}
