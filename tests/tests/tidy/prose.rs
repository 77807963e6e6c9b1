//! What any file must and must not hold: openings, lengths, open ends, dead code, names of machines, dead links.

use crate::rust_source::{before_tests, split};

/// A Rust file opens with what it owns.
pub(crate) fn opening(name: &str, text: &str) -> Vec<String> {
    if text.starts_with("//! ") { Vec::new() } else { vec![format!("{name}: does not open with `//! `")] }
}

const MAX_LINES: usize = 800;
/// Of code proper: without tests, comments, and blank lines.
const MANY_LINES: usize = 400;

/// A Rust file has one concept. Past [`MANY_LINES`] of code it is only mentioned.
pub(crate) fn length(name: &str, text: &str) -> Vec<String> {
    let code = split(text).code;
    let lines = before_tests(&code).lines().filter(|line| !line.trim().is_empty()).count();
    if lines > MANY_LINES {
        eprintln!("{name}: {lines} lines of code: is there a second concept in it?");
    }
    match text.lines().count() {
        0..=MAX_LINES => Vec::new(),
        lines => vec![format!("{name}: {lines} lines: find the second concept's name")],
    }
}

/// Comments that are statements and not sentences.
pub(crate) fn commented_out(name: &str, text: &str) -> Vec<String> {
    let comments = split(text).comments;
    let dead = comments.iter().filter(|comment| is_code(comment.text));
    dead.map(|comment| format!("{name}:{}: commented-out code: {}", comment.line, comment.text)).collect()
}

fn is_code(comment: &str) -> bool {
    const STARTS: &[&str] = &[
        "let ", "use ", "pub ", "fn ", "return ", "if ", "for ", "while ", "match ", "impl ", "struct ",
        "enum ", "mod ", "} else", "#[",
    ];
    let comment = comment.trim();
    let is_word = |c: char| c.is_alphanumeric() || "_.:&*!".contains(c);
    let behind_word = comment.trim_start_matches(is_word);
    let has_word = behind_word.len() < comment.len();
    match comment.chars().last() {
        // `name(..);`, `name!(..);`, `a.b = c;` and statements that begin with a keyword.
        Some(';') => {
            STARTS.iter().any(|start| comment.starts_with(start))
                || has_word && (behind_word.starts_with('(') || behind_word.starts_with(" = "))
        }
        Some('{') => STARTS.iter().any(|start| comment.starts_with(start)),
        Some('}') => comment == "}",
        Some(']') => comment.starts_with("#["),
        Some(_) | None => false,
    }
}

/// Words for work that is left, anywhere, without the number of an issue beside them.
pub(crate) fn open_ends(name: &str, text: &str) -> Vec<String> {
    // Written in two parts, or this file would hold them.
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];
    let mut complaints = Vec::new();
    for (index, line) in text.lines().enumerate() {
        // In quotation marks it is the word that is meant: a check for it, like this one.
        let open =
            words.into_iter().fold(line.to_owned(), |line, word| line.replace(&format!("\"{word}\""), ""));
        let mut parts = open.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        let names_issue = line.split('#').skip(1).any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        if let Some(word) = parts.find(|part| words.contains(part))
            && !names_issue
        {
            complaints.push(format!("{name}:{}: {word} without an issue", index + 1));
        }
    }
    complaints
}

/// Directories of one machine, and hosts of package registries: both differ where the tree is used.
pub(crate) fn foreign_names(name: &str, text: &str) -> Vec<String> {
    let directories =
        [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/wo", "rk/"), concat!("/Us", "ers/")];
    let hosts = [
        concat!("crates", ".io"),
        concat!("debian", ".org"),
        concat!("pypi", ".org"),
        concat!("pythonhosted", ".org"),
        concat!("npmjs", ".org"),
        concat!("npmjs", ".com"),
        concat!("golang", ".org"),
        concat!("rust-lang", ".org/dist"),
        concat!("ubuntu", ".com"),
    ];
    let mut complaints = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for directory in directories {
            // Part of a longer path or address is fine: `https://example.com/work/`, `target/root/`.
            let alone = line
                .match_indices(directory)
                .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_-.}/*".contains(c)));
            if alone {
                complaints.push(format!("{name}:{}: a directory of one machine: {directory}", index + 1));
            }
        }
        for host in hosts {
            if line.contains(host) {
                complaints.push(format!("{name}:{}: a registry's host: {host}", index + 1));
            }
        }
    }
    complaints
}

/// Links of a Markdown file that lead to files of the tree.
pub(crate) fn links(name: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
    let mut complaints = Vec::new();
    let mut in_code = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for link in line.split("](").skip(1) {
            let target = link.split(')').next().unwrap_or(link);
            let file = target.split('#').next().unwrap_or(target);
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            let path = if directory.is_empty() { file.to_owned() } else { format!("{directory}/{file}") };
            if !exists(&path) {
                complaints.push(format!("{name}:{}: nothing at {file}", index + 1));
            }
        }
    }
    complaints
}

/// The changelog's newest section is the one for what is not released, and says something.
pub(crate) fn changelog(text: &str) -> Vec<String> {
    let mut sections = text.split("\n## ").skip(1);
    match sections.next() {
        Some(newest) if newest.starts_with("Unreleased\n") => {
            if newest.lines().any(|line| line.starts_with("- ")) {
                Vec::new()
            } else {
                vec!["CHANGELOG.md: nothing under Unreleased".to_owned()]
            }
        }
        Some(_) | None => vec!["CHANGELOG.md: the first section is not Unreleased".to_owned()],
    }
}

#[test]
fn a_file_that_does_not_open_well_is_seen() {
    assert!(opening("a.rs", "//! Owns a.\n").is_empty());
    assert_eq!(opening("a.rs", "use b;\n").len(), 1);
    assert_eq!(opening("a.rs", "").len(), 1);
}

#[test]
fn a_long_file_is_seen() {
    assert!(length("a.rs", &"a\n".repeat(MAX_LINES)).is_empty());
    assert_eq!(length("a.rs", &"a\n".repeat(MAX_LINES + 1)).len(), 1);
}

#[test]
fn dead_code_is_told_from_prose() {
    for dead in [
        "// let a = 1;",
        "//foo(bar);",
        "    // self.members.clear();",
        "// println!(\"{a}\");",
        "// a.b = c;",
        "// if a {",
        "// }",
        "// #[test]",
        "// return Err(a);",
    ] {
        assert_eq!(commented_out("a.rs", dead).len(), 1, "{dead}");
    }
    for prose in [
        "// If it fails, the next apply tries again;",
        "/// let a = 1;",
        "//! use b;",
        "let a = \"// let b = 1;\";",
        "// A set of {a, b}.",
        "// SAFETY: the pointer is valid (checked above).",
    ] {
        assert!(commented_out("a.rs", prose).is_empty(), "{prose}");
    }
}

#[test]
fn an_open_end_without_an_issue_is_seen() {
    let word = concat!("TO", "DO");
    assert_eq!(open_ends("a", &format!("x\n# {word}: later")).len(), 1);
    assert_eq!(open_ends("a", &format!("// {word}(# later)")).len(), 1);
    assert!(open_ends("a", &format!("// {word}(#12): later")).is_empty());
    assert!(open_ends("a", &format!("{word}S and mas{word}n")).is_empty());
    assert!(open_ends("a", &format!("assert!(!help.contains(\"{word}\"));")).is_empty());
}

#[test]
fn names_of_machines_and_registries_are_seen() {
    let directory = concat!("/ho", "me/");
    assert_eq!(foreign_names("a", &format!("path = \"{directory}someone/x\"")).len(), 1);
    assert!(
        foreign_names("a", &format!("https://example.com{directory}x and target{directory}x")).is_empty()
    );
    assert_eq!(foreign_names("a", concat!("from deb.debian", ".org, say")).len(), 1);
}

#[test]
fn a_dead_link_is_seen() {
    let exists = |name: &str| name == "docs/a.md";
    let text = "[a](a.md#part) [b](b.md) [c](https://example.com/c) [d](#d)\n```\n[e](e.md)\n```\n";
    assert_eq!(links("docs/x.md", text, exists), ["docs/x.md:1: nothing at b.md"]);
}

#[test]
fn a_changelog_without_news_is_seen() {
    assert!(changelog("# Changelog\n\n## Unreleased\n\n- a\n\n## 0.1.0\n").is_empty());
    assert_eq!(changelog("# Changelog\n\n## Unreleased\n\n## 0.1.0\n\n- a\n").len(), 1);
    assert_eq!(changelog("# Changelog\n\n## 0.1.0\n\n- a\n").len(), 1);
}
