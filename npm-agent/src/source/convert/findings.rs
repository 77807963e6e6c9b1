//! What is wrong with one object: collected with field paths, bounded, and told to people.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::source::Problem;

/// How many findings of one object are told one by one; the rest are counted.
const TOLD: usize = 8;

/// How much of a text from an object is shown, in characters.
const SHOWN: usize = 64;

/// What is wrong with one object.
#[derive(Debug, Default)]
pub(super) struct Findings {
    told: Vec<String>,
    more: usize,
    areas: BTreeSet<String>,
}

impl Findings {
    /// Notes that something is wrong at `path`.
    pub(super) fn note(&mut self, path: &str, what: &str) {
        let mut fields = path.split('.').map(|field| field.split('[').next().unwrap_or_default());
        let area = [fields.next(), fields.next()].into_iter().flatten().collect::<Vec<_>>().join(".");
        if !self.areas.contains(&area) && self.areas.len() < 64 {
            self.areas.insert(area);
        }
        if self.told.len() < TOLD {
            self.told.push(if path.is_empty() { what.to_owned() } else { format!("{path}: {what}") });
        } else {
            self.more += 1;
        }
    }

    /// Notes the reason, if there is one, why the text at `path` is refused.
    pub(super) fn check(&mut self, path: &str, text: &str, refusal: Option<&str>) {
        if let Some(reason) = refusal {
            self.note(path, &format!("{} {reason}", quoted(text)));
        }
    }

    /// Whether nothing is wrong.
    pub(super) fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// How many things are wrong.
    pub(super) fn count(&self) -> usize {
        self.told.len() + self.more
    }

    /// The first two fields of the paths at which something is wrong, as `spec.egress`.
    pub(super) fn areas(&self) -> impl Iterator<Item = &str> {
        self.areas.iter().map(String::as_str)
    }

    /// The findings as problems of `object`; `consequence` says what was done instead.
    pub(super) fn into_problems(self, object: &str, consequence: &str) -> Vec<Problem> {
        let Self { told, more, areas: _ } = self;
        let mut problems: Vec<_> = told
            .into_iter()
            .map(|what| Problem { object: object.to_owned(), message: format!("{what}; {consequence}") })
            .collect();
        if more > 0 {
            let message = format!("and {more} more of this object; {consequence}");
            problems.push(Problem { object: object.to_owned(), message });
        }
        problems
    }
}

/// A text from an object, quoted, escaped and cut to what people can read.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", brief(text))
}

/// As [`quoted`], without the quotes.
pub(super) fn brief(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars().take(SHOWN) {
        match c {
            '\'' => shown.push(c),
            _ => shown.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(SHOWN).is_some() {
        // Writing to a String cannot fail.
        let _ = write!(shown, "... ({} bytes)", text.len());
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_bounded() {
        let mut findings = Findings::default();
        for i in 0..100_000 {
            findings.note(&format!("spec.ingress[0].from[{i}]"), "must name a peer");
        }
        assert_eq!(findings.areas().collect::<Vec<_>>(), ["spec.ingress"]);
        let problems = findings.into_problems("NetworkPolicy a/b", "left out");
        assert_eq!(problems.len(), TOLD + 1);
        assert_eq!(problems[0].message, "spec.ingress[0].from[0]: must name a peer; left out");
        assert_eq!(problems[TOLD].message, "and 99992 more of this object; left out");
    }

    #[test]
    fn texts_are_cut_and_escaped() {
        assert_eq!(quoted("a\0\"\n"), r#""a\0\"\n""#);
        assert_eq!(quoted(&"ä".repeat(64)).chars().count(), 66);
        assert!(quoted(&"x".repeat(1 << 20)).ends_with("... (1048576 bytes)\""));
    }
}
