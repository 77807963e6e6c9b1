//! Tables of who can talk to whom, in the row format of `npm-agent matrix -o json`.

use std::collections::BTreeMap;
use std::fmt;

use npm_policy::flow::{Decision, Transport};
use serde::{Deserialize, Serialize};

use crate::lab::probe::Outcome;

/// Who can talk to whom: one string a source, one character a destination, both in the order of `endpoints`; `.` a
/// new connection is allowed, `X` denied, `#` itself, `-` not asked, `?` observed to arrive without an answer
/// coming back.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Table {
    /// The names, in order.
    pub endpoints: Vec<String>,
    /// The rows of each probe, by its name (`TCP/80`, `ICMP`).
    pub rows: BTreeMap<String, Vec<String>>,
}

impl Table {
    /// A table of these endpoints in which nothing has been asked.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self { endpoints, rows: BTreeMap::new() }
    }

    /// Writes what became of a probe. Where a flow may start its answers must come back, so an arrival without an
    /// answer is neither allowed nor denied.
    pub fn observe(&mut self, transport: Transport, from: usize, to: usize, outcome: Outcome) {
        let cell = match outcome {
            Outcome::Blocked => "X",
            Outcome::Arrived => "?",
            Outcome::Answered => ".",
        };
        self.write(transport, from, to, cell);
    }

    /// Writes one cell.
    pub fn set(&mut self, transport: Transport, from: usize, to: usize, decision: Decision) {
        let cell = match decision {
            Decision::Allow => ".",
            Decision::Deny => "X",
        };
        self.write(transport, from, to, cell);
    }

    fn write(&mut self, transport: Transport, from: usize, to: usize, cell: &str) {
        let count = self.endpoints.len();
        let empty = || {
            let row = |own: usize| (0..count).map(|to| if to == own { '#' } else { '-' }).collect();
            (0..count).map(row).collect::<Vec<String>>()
        };
        let rows = self.rows.entry(transport.to_string()).or_insert_with(empty);
        if let Some(row) = rows.get_mut(from) {
            row.replace_range(to..=to, cell);
        }
    }

    /// How many cells say `decision`.
    pub fn count(&self, decision: Decision) -> usize {
        let cell = match decision {
            Decision::Allow => '.',
            Decision::Deny => 'X',
        };
        self.rows.values().flatten().flat_map(|row| row.chars()).filter(|found| *found == cell).count()
    }

    /// The cells in which `self`, what was observed, differs from `expected`: one line for people each. Both are of
    /// the same endpoints.
    pub fn differences(&self, expected: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.endpoints != expected.endpoints {
            lines.push("the endpoints differ".to_owned());
        }
        for probe in self.rows.keys().chain(expected.rows.keys().filter(|key| !self.rows.contains_key(*key)))
        {
            for (from, source) in self.endpoints.iter().enumerate() {
                for (to, destination) in self.endpoints.iter().enumerate() {
                    let (observed, wanted) = (self.cell(probe, from, to), expected.cell(probe, from, to));
                    if observed != wanted {
                        lines.push(format!(
                            "{source} -> {destination} {probe}: observed {observed}, expected {wanted}"
                        ));
                    }
                }
            }
        }
        lines
    }

    fn cell(&self, probe: &str, from: usize, to: usize) -> char {
        let row = self.rows.get(probe).and_then(|rows| rows.get(from));
        row.and_then(|row| row.chars().nth(to)).unwrap_or('-')
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.endpoints.iter().map(String::len).max().unwrap_or(0);
        for (probe, rows) in &self.rows {
            writeln!(f, "{probe}")?;
            for (endpoint, row) in self.endpoints.iter().zip(rows) {
                writeln!(f, "  {endpoint:width$} {row}")?;
            }
        }
        Ok(())
    }
}
