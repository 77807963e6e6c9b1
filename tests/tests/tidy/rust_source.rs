//! Rust source as the checks need it: code without comments and strings, comments without code, the paths named.
//!
//! Not a parser: enough of the lexer to tell code from what only looks like it.

/// A `//` comment that is no documentation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Comment<'a> {
    /// From 1.
    pub(crate) line: usize,
    /// Without the slashes and the space behind them.
    pub(crate) text: &'a str,
}

/// A source text, split.
pub(crate) struct Split<'a> {
    /// The text with comments and the insides of strings and characters replaced by spaces; lines stay.
    pub(crate) code: String,
    pub(crate) comments: Vec<Comment<'a>>,
}

/// Tells code, comments and strings apart.
pub(crate) fn split(text: &str) -> Split<'_> {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut comments = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let end = if rest.starts_with(b"//") {
            let end = rest.iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |len| at + len);
            let body = &text[at + 2..end];
            if !body.starts_with(['/', '!']) {
                let line = 1 + text[..at].matches('\n').count();
                comments.push(Comment { line, text: body.strip_prefix(' ').unwrap_or(body).trim_end() });
            }
            end
        } else if rest.starts_with(b"/*") {
            block_comment(bytes, at)
        } else if let Some(end) = raw_string(bytes, at) {
            end
        } else if rest[0] == b'"' {
            quoted(bytes, at, b'"')
        } else if rest[0] == b'\'' && is_char(rest) {
            quoted(bytes, at, b'\'')
        } else {
            at += 1;
            continue;
        };
        for byte in &mut code[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    Split { code: String::from_utf8(code).expect("only whole characters were replaced"), comments }
}

fn block_comment(bytes: &[u8], start: usize) -> usize {
    let mut depth = 0;
    let mut at = start;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// The end of `r"..."`, `r#"..."#`, `br"..."` that begins at `start`, if one does.
fn raw_string(bytes: &[u8], start: usize) -> Option<usize> {
    if start > 0 && is_word(bytes[start - 1]) && bytes[start - 1] != b'b' {
        return None;
    }
    let hashes = bytes[start..].strip_prefix(b"r")?;
    let count = hashes.iter().take_while(|&&byte| byte == b'#').count();
    let body = hashes[count..].strip_prefix(b"\"")?;
    let mut closing = vec![b'"'];
    closing.resize(count + 1, b'#');
    let len = body.windows(closing.len()).position(|window| window == closing)?;
    Some(start + 1 + count + 1 + len + closing.len())
}

fn quoted(bytes: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// `'a'` and `'\n'`, but not the lifetime `'a`.
fn is_char(rest: &[u8]) -> bool {
    match rest.get(1) {
        Some(b'\\') => true,
        Some(first) if first.is_ascii() => rest.get(2) == Some(&b'\''),
        Some(_) => true,
        None => false,
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The code before the unit tests at a file's end.
pub(crate) fn before_tests(code: &str) -> &str {
    code.split("#[cfg(test)]\nmod ").next().unwrap_or(code)
}

/// A path that the code names, its `use` groups expanded: `a::b` for both of `use a::{b, c}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedPath {
    /// From 1.
    pub(crate) line: usize,
    pub(crate) segments: Vec<String>,
}

/// Every path of two segments or more, and every single name that a `use` brings in.
pub(crate) fn paths(code: &str) -> Vec<NamedPath> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at].1 == "use" {
            at = use_tree(&tokens, at + 1, &[], &mut found);
            continue;
        }
        let (end, segments) = plain_path(&tokens, at);
        if segments.len() > 1 {
            found.push(NamedPath { line: tokens[at].0, segments });
        }
        at = end.max(at + 1);
    }
    found
}

type Token<'a> = (usize, &'a str);

fn tokens(code: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let mut rest = line;
        while let Some(first) = rest.chars().next() {
            let len = if first.is_alphanumeric() || first == '_' {
                rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            if !first.is_whitespace() {
                tokens.push((index + 1, &rest[..len]));
            }
            rest = &rest[len..];
        }
    }
    tokens
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

fn plain_path(tokens: &[Token<'_>], start: usize) -> (usize, Vec<String>) {
    let mut segments = Vec::new();
    let mut at = start;
    while at < tokens.len() && is_name(tokens[at].1) {
        segments.push(tokens[at].1.to_owned());
        at += 1;
        if at + 1 < tokens.len() && tokens[at].1 == "::" && is_name(tokens[at + 1].1) {
            at += 1;
        } else {
            break;
        }
    }
    (at, segments)
}

/// Reads one tree of a `use` from `at`; gives where it ends.
fn use_tree(tokens: &[Token<'_>], mut at: usize, prefix: &[String], found: &mut Vec<NamedPath>) -> usize {
    if tokens.get(at).is_some_and(|token| token.1 == "::") {
        at += 1;
    }
    let line = tokens.get(at).map_or(0, |token| token.0);
    let (mut end, segments) = plain_path(tokens, at);
    let path = [prefix, &segments].concat();
    if tokens.get(end).is_some_and(|token| token.1 == "::") {
        end += 1;
    }
    match tokens.get(end).map(|token| token.1) {
        Some("{") => {
            end += 1;
            while end < tokens.len() && tokens[end].1 != "}" {
                end = use_tree(tokens, end, &path, found);
                if tokens.get(end).is_some_and(|token| token.1 == ",") {
                    end += 1;
                }
            }
            end + 1
        }
        Some("*") => {
            found.push(NamedPath { line, segments: path });
            end + 1
        }
        Some("as") => {
            found.push(NamedPath { line, segments: path });
            end + 2
        }
        Some(_) | None => {
            found.push(NamedPath { line, segments: path });
            // Always forward, whatever stands there: this is no parser.
            end.max(at + usize::from(segments.is_empty()))
        }
    }
}

#[test]
fn comments_and_strings_are_no_code() {
    let text = "let a = \"std::fs // no\"; // why: it is so\n/* std::env /* nested */ */ let b = 'c';\n\
                let c = r#\"std::net \"quoted\" \"#; /// doc\nfn d<'a>(e: &'a str) -> char { '\\'' }\n";
    let split = split(text);
    for gone in ["std", "why", "nested", "quoted", "doc", "'c'"] {
        assert!(!split.code.contains(gone), "{gone} in {}", split.code);
    }
    for kept in ["let a = ", "let b = ", "let c = ", "fn d<'a>(e: &'a str) -> char {"] {
        assert!(split.code.contains(kept), "{kept} not in {}", split.code);
    }
    assert_eq!(split.code.len(), text.len());
    assert_eq!(split.comments, [Comment { line: 1, text: "why: it is so" }]);
}

#[test]
fn paths_are_found_wherever_they_are_named() {
    let code = "use std::{fs, net::{IpAddr, TcpStream as Stream}};\npub use a::*;\nuse b;\n\
                fn f() { c::d::e(); let x: g::H<i::J> = k; }";
    let found: Vec<String> = paths(code).into_iter().map(|path| path.segments.join("::")).collect();
    let expected =
        ["std::fs", "std::net::IpAddr", "std::net::TcpStream", "a", "b", "c::d::e", "g::H", "i::J"];
    assert_eq!(found, expected);
    assert_eq!(paths(code).last().unwrap().line, 4);
}
