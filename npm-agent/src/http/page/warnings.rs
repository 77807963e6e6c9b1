//! Everything that somebody should look at, in one list.

use maud::{Markup, html};

use super::paging::{Part, filter};
use super::words::short;
use super::{Page, Seen, cell, table};
use crate::status::report::{DegradedStatus, ObjectProblem, Status};

/// One row: what kind, about what, and the text.
#[derive(Clone)]
struct Row<'a> {
    kind: &'static str,
    about: &'a str,
    text: &'a str,
}

fn rows(status: &Status) -> impl Iterator<Item = Row<'_>> + Clone {
    let cluster = status.warnings.iter().map(|text| Row { kind: "cluster", about: "", text });
    let objects = status.source.problems.iter().map(|ObjectProblem { origin: _, object, message }| Row {
        kind: "object",
        about: object,
        text: message,
    });
    let degraded = status.backends.iter().flat_map(|backend| &backend.degraded);
    let degraded = degraded.map(|DegradedStatus { policy, reason }| Row {
        kind: "allows less",
        about: policy,
        text: reason,
    });
    degraded.chain(objects).chain(cluster)
}

pub(super) fn list(seen: &Seen) -> Markup {
    let query = &seen.query;
    let wanted = rows(&seen.report.status).filter(|row| query.admits(row.about) || query.admits(row.text));
    let part = Part::of(query, wanted);
    let cells = part
        .rows()
        .iter()
        .map(|Row { kind, about, text }| vec![cell(kind), cell(short(about)), cell(short(text))]);
    html! {
        h1 { "Warnings" }
        p.lead {
            "Policies that allow less than they say, objects that were taken strictly or not at all, and what is odd about \
             the cluster's state. None of this opens a pod."
        }
        (filter(Page::Warnings, query, "Containing"))
        (table(&["Kind", "Object", "What"], cells))
        (part.navigation(Page::Warnings, query))
    }
}
