//! The text of a manifest to objects: documents told apart first, so that a broken one takes no neighbour along.

use serde_saphyr::options::{AliasLimits, DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Budget, DefaultMessageFormatter, MessageFormatter, Options};

use crate::source::Problem;
use crate::source::convert::{Node, Object, document};

/// How deep maps and lists may be nested. A NetworkPolicy needs 10.
const MAX_DEPTH: usize = 64;

/// How many values one document may hold: what a list of all pods of a big cluster needs, and what fits into memory.
const MAX_NODES: usize = 4_000_000;

/// How many values the aliases of one document may stand for.
const MAX_ALIASED: usize = 100_000;

/// What a text holds.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    /// The objects, in order, each with what is wrong with it.
    pub(super) objects: Vec<Object>,
    /// What is wrong with the text, so that what was in it before may be meant. Each has an empty
    /// [`Problem::object`].
    pub(super) broken: Vec<Problem>,
    /// How many objects are of kinds that decide nothing.
    pub(super) ignored: usize,
}

/// Reads a text of YAML or JSON documents.
pub(super) fn parse(text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for Chunk { first_line, text } in chunks(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        match serde_saphyr::from_str_with_options::<Option<Node>>(&text, options()) {
            Ok(node) => {
                let converted = document(node.unwrap_or(Node::Leaf(serde_json::Value::Null)));
                parsed.ignored += converted.ignored;
                parsed.objects.extend(converted.objects);
                parsed.broken.extend(converted.broken);
            }
            Err(error) => {
                let place = error.location().map_or_else(
                    || format!("the document from line {first_line}"),
                    |at| format!("line {}, column {}", first_line as u64 + at.line() - 1, at.column()),
                );
                let reason = DefaultMessageFormatter.format_message(&error).into_owned();
                let message = format!("{place}: {}; the document is left out", brief(&reason));
                parsed.broken.push(Problem { object: String::new(), message });
            }
        }
    }
    parsed
}

fn options() -> Options {
    let mut budget = Budget::default();
    budget.max_depth = MAX_DEPTH;
    budget.flow_nesting_limit = MAX_DEPTH;
    budget.max_events = 2 * MAX_NODES;
    budget.max_nodes = MAX_NODES;
    let mut aliases = AliasLimits::default();
    aliases.max_total_replayed_events = MAX_ALIASED;
    serde_saphyr::options! {
        budget: Some(budget),
        alias_limits: aliases,
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        // As kubectl reads YAML: 0120 is 80.
        legacy_octal_numbers: true,
        // As YAML 1.2 reads it: a namespace may be called `y`. (kubectl refuses it unquoted, which no name deserves.)
        strict_booleans: true,
        with_snippet: false,
    }
}

/// A parser's message may show the text that it stumbled over: one line, and not all of it.
fn brief(reason: &str) -> String {
    const SHOWN: usize = 300;
    let one_line = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let shown: String = reason.chars().take(SHOWN).map(one_line).collect();
    if reason.chars().nth(SHOWN).is_some() { format!("{shown}...") } else { shown }
}

/// One document of a text.
struct Chunk {
    /// Where it begins, counted from 1.
    first_line: usize,
    text: String,
}

/// Cuts a text at its document markers. `---` and `...` at the beginning of a line are markers wherever they stand: no
/// scalar of any style may contain such a line (YAML 1.2.2, 9.1.2).
fn chunks(text: &str) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut current = Chunk { first_line: 1, text: String::new() };
    for (place, line) in text.split_inclusive('\n').enumerate() {
        let is_end = is_marker(line, "...");
        let only_directives =
            current.text.lines().all(|line| line.is_empty() || line.starts_with(['%', '#']));
        if is_end || (is_marker(line, "---") && !only_directives) {
            let next = Chunk { first_line: place + 1, text: String::new() };
            chunks.push(std::mem::replace(&mut current, next));
        }
        // An end marker becomes an empty line: the places in error messages stay right.
        current.text.push_str(if is_end { "\n" } else { line });
    }
    chunks.push(current);
    chunks.retain(|chunk| !chunk.text.trim().is_empty());
    chunks
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}
