//! The status page: what an operator wants to see of a node, as plain HTML.
//!
//! It needs no script and nothing from elsewhere, so it works offline, behind a forwarded port and in a text browser, and
//! its content policy forbids everything else. Every text that comes from the cluster is escaped: maud's `html!` escapes
//! what is spliced in, and nothing here marks a text as safe (a test plants markup in every name).
//!
//! No page grows with the cluster: lists come in parts of [`paging::PER_PAGE`] rows, rows show the first few of what they
//! have, texts are cut.

mod overview;
mod paging;
mod pods;
mod policies;
mod sets;
mod verdict;
mod warnings;
mod words;

use std::sync::Arc;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use maud::{DOCTYPE, Markup, Render, html};

use self::paging::Query;
use super::access::Refusal;
use super::debug::Document;
use super::view::View;
use super::{HEALTH_PATH, READY_PATH, Shared, mute, secure};
use crate::metrics::Scope;
use crate::status::report::{Report, Status};

/// Where the style sheet is.
pub(super) const STYLE_PATH: &str = "/style.css";

/// Our style sheet and our forms, and nothing else from anywhere.
pub(super) const CONTENT_POLICY: &str =
    "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

const STYLE: &str = include_str!("page/style.css");

/// A page, with its place in the navigation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    Overview,
    Policies,
    Policy,
    Pods,
    Sets,
    Set,
    Verdict,
    Warnings,
}

impl Page {
    const ALL: [Self; 8] = [
        Self::Overview,
        Self::Policies,
        Self::Policy,
        Self::Pods,
        Self::Sets,
        Self::Set,
        Self::Verdict,
        Self::Warnings,
    ];

    fn path(self) -> &'static str {
        match self {
            Self::Overview => "/",
            Self::Policies => "/policies",
            Self::Policy => "/policy",
            Self::Pods => "/pods",
            Self::Sets => "/sets",
            Self::Set => "/set",
            Self::Verdict => "/verdict",
            Self::Warnings => "/warnings",
        }
    }

    /// What the navigation calls it; `None`: other pages lead there.
    fn entry(self) -> Option<&'static str> {
        match self {
            Self::Overview => Some("Overview"),
            Self::Policies => Some("Policies"),
            Self::Pods => Some("Pods"),
            Self::Sets => Some("Sets"),
            Self::Verdict => Some("Verdict"),
            Self::Warnings => Some("Warnings"),
            Self::Policy | Self::Set => None,
        }
    }

    /// The entry of the navigation that it belongs to.
    fn section(self) -> Self {
        match self {
            Self::Policy => Self::Policies,
            Self::Set => Self::Sets,
            Self::Overview | Self::Policies | Self::Pods | Self::Sets | Self::Verdict | Self::Warnings => {
                self
            }
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Policy => "Policy",
            Self::Set => "Set",
            Self::Overview | Self::Policies | Self::Pods | Self::Sets | Self::Verdict | Self::Warnings => {
                self.entry().unwrap_or_default()
            }
        }
    }

    fn body(self, seen: &Seen) -> Markup {
        match self {
            Self::Overview => overview::body(seen),
            Self::Policies => policies::list(seen),
            Self::Policy => policies::one(seen),
            Self::Pods => pods::list(seen),
            Self::Sets => sets::list(seen),
            Self::Set => sets::one(seen),
            Self::Verdict => verdict::body(seen),
            Self::Warnings => warnings::list(seen),
        }
    }
}

/// What a page is made of.
pub(super) struct Seen {
    pub(super) report: Report,
    pub(super) view: Arc<View>,
    pub(super) query: Query,
}

/// The pages but the first, which everybody gets some form of.
pub(super) fn router() -> Router<Shared> {
    Page::ALL.into_iter().filter(|page| *page != Page::Overview).fold(Router::new(), |router, page| {
        let answer =
            move |State(shared): State<Shared>, RawQuery(query): RawQuery| answer(shared, page, query);
        router.route(page.path(), get(answer))
    })
}

/// The first page, for those who may see it.
pub(super) async fn overview(shared: Shared) -> Response {
    answer(shared, Page::Overview, None).await
}

/// A page, written on another thread than the one that answers probes, one at a time.
async fn answer(shared: Shared, page: Page, query: Option<String>) -> Response {
    let Some((status, view)) = shared.viewer.look().await else { return mute(&shared) };
    let Ok(place) = Arc::clone(&shared.pages).acquire_owned().await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let query = Query::parse(query.as_deref().unwrap_or_default());
    let written = tokio::task::spawn_blocking(move || {
        let text = render(page, &Seen { report: status.into(), view, query });
        drop(place);
        text
    });
    match written.await {
        Ok(text) => html_answer(text),
        // The process is ending.
        Err(_cancelled) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// What everybody gets where the status page is.
pub(super) fn outside(status: Option<Status>, refusal: Refusal) -> Response {
    let readiness = match status.map(Report::from) {
        None => html! { p.state.bad { "does not answer" } },
        Some(Report { ready: true, .. }) => {
            html! { p.state.good { "ready: everything that was seen is enforced" } }
        }
        Some(Report { ready: false, .. }) => html! { p.state.bad { "not ready" } },
    };
    let why = match refusal {
        Refusal::Off => "The status page is switched off (debug-access nobody).".to_owned(),
        Refusal::Remote | Refusal::Name | Refusal::Proxy => format!("The rest of this page is {refusal}."),
    };
    let body = html! {
        (DOCTYPE)
        html lang="en" {
            (head("npm-agent"))
            body { main.narrow {
                h1 { "npm-agent" }
                (readiness)
                p { (why) }
                p { a href=(HEALTH_PATH) { "health" } " · " a href=(READY_PATH) { "readiness" } }
            } }
        }
    };
    html_answer(body.into_string())
}

/// The style sheet.
pub(super) async fn style() -> Response {
    // It changes with the program only, but the same browser may see agents of several versions on one forwarded port.
    let headers = [(CONTENT_TYPE, "text/css; charset=utf-8"), (CACHE_CONTROL, "no-cache")];
    secure(headers, Bytes::from_static(STYLE.as_bytes()))
}

fn html_answer(text: String) -> Response {
    secure([(CONTENT_TYPE, "text/html; charset=utf-8"), (CACHE_CONTROL, "no-store")], text.into())
}

fn head(title: &str) -> Markup {
    html! {
        head {
            meta charset="utf-8";
            meta name="viewport" content="width=device-width, initial-scale=1";
            meta name="color-scheme" content="light dark";
            meta name="robots" content="noindex";
            title { (title) }
            link rel="stylesheet" href=(STYLE_PATH);
        }
    }
}

/// A whole page.
pub(super) fn render(page: Page, seen: &Seen) -> String {
    let Status { version, node, instance, .. } = &seen.report.status;
    let body = html! {
        (DOCTYPE)
        html lang="en" {
            (head(&format!("{} - {node} - npm-agent", page.title())))
            body {
                header {
                    div.brand {
                        a href=(Page::Overview.path()) { "npm-agent" }
                        span.node { (words::short(node)) }
                        @if seen.report.ready { span.state.good { "ready" } } @else { span.state.bad { "not ready" } }
                    }
                    nav {
                        @for entry in Page::ALL {
                            @if let Some(name) = entry.entry() {
                                a href=(entry.path()) aria-current=[(entry == page.section()).then_some("page")] { (name) }
                            }
                        }
                    }
                }
                main { (page.body(seen)) }
                footer {
                    p { "npm-agent " (version) ", instance " (words::short(instance)) ", goal " (seen.report.status.generation) }
                    p {
                        "JSON: "
                        @for document in Document::ALL { a href=(document.path()) { (document.path()) } " " }
                    }
                    p {
                        "Prometheus: "
                        @for scope in Scope::ALL { a href=(scope.path()) { (scope.path()) } " " }
                    }
                }
            }
        }
    };
    body.into_string()
}

/// A table that becomes a list of cards where the window is narrow: each cell carries its column's name.
fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<Markup>>) -> Markup {
    html! {
        table {
            thead { tr { @for column in columns { th scope="col" { (column) } } } }
            tbody {
                @for row in rows {
                    tr { @for (column, cell) in columns.iter().zip(row) { td data-label=(column) { div { (cell) } } } }
                }
            }
        }
    }
}

/// A cell.
fn cell(text: impl Render) -> Markup {
    html! { (text) }
}

/// A cell with a number.
fn number(value: impl TryInto<u64>) -> Markup {
    html! { span.number { (words::count(value)) } }
}

#[cfg(test)]
mod tests;
