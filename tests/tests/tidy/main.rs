//! Checks of the tree itself: who imports whom, what every file must and must not hold, what the manifests agree on.
//!
//! A check is a function from a file's name and text to complaints, so that each is also shown to fail on a bad
//! example.
#![forbid(unsafe_code)]

mod arrows;
mod manifests;
mod mutants;
mod prose;
mod rust_source;

use std::fs;
use std::path::{Path, PathBuf};

/// A text file of the tree.
struct TextFile {
    /// Relative to the top.
    name: String,
    text: String,
}

impl TextFile {
    fn is_rust(&self) -> bool {
        self.name.ends_with(".rs")
    }

    /// Lock files and licences are not ours to word.
    fn is_ours(&self) -> bool {
        !self.name.ends_with("Cargo.lock") && !self.name.starts_with("LICENSE")
    }
}

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the tree").to_path_buf()
}

/// Every text file that could be committed.
fn tree() -> Vec<TextFile> {
    let mut files = Vec::new();
    collect(&top(), &top(), &mut files);
    files.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    assert!(files.len() > 20, "the tree has more than {} files", files.len());
    files
}

fn collect(top: &Path, directory: &Path, files: &mut Vec<TextFile>) {
    for entry in fs::read_dir(directory).expect("the tree can be read") {
        let path = entry.expect("the tree can be read").path();
        let name = path
            .strip_prefix(top)
            .expect("it lies in the tree")
            .to_str()
            .expect("names are UTF-8")
            .to_owned();
        if path.ends_with(".git") || path.ends_with("target") {
            continue;
        }
        if path.is_dir() {
            collect(top, &path, files);
        } else if let Ok(text) = String::from_utf8(fs::read(&path).expect("the tree can be read")) {
            files.push(TextFile { name, text });
        }
    }
}

/// Fails with all complaints at once.
fn expect_none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

/// Runs a check on every file that it is for.
fn on_each(wanted: impl Fn(&TextFile) -> bool, check: impl Fn(&str, &str) -> Vec<String>) {
    let files: Vec<TextFile> = tree().into_iter().filter(wanted).collect();
    assert!(!files.is_empty(), "the check is for no file at all");
    expect_none(files.iter().flat_map(|file| check(&file.name, &file.text)).collect());
}

#[test]
fn imports_follow_the_arrows() {
    on_each(TextFile::is_rust, arrows::check);
}

#[test]
fn unsafe_stays_where_it_is_allowed() {
    on_each(TextFile::is_rust, arrows::unsafe_code);
}

#[test]
fn every_rust_file_says_what_it_is() {
    on_each(TextFile::is_rust, prose::opening);
}

#[test]
fn no_file_is_too_long() {
    on_each(TextFile::is_rust, prose::length);
}

#[test]
fn no_code_is_commented_out() {
    on_each(TextFile::is_rust, prose::commented_out);
}

#[test]
fn every_open_end_names_its_issue() {
    // Tables of verdicts have rows that look like one of the words.
    let wanted = |file: &TextFile| {
        file.is_ours() && !(file.name.starts_with("tests/") && file.name.ends_with(".yaml"))
    };
    on_each(wanted, prose::open_ends);
}

#[test]
fn no_file_names_this_machine_or_a_registry() {
    on_each(TextFile::is_ours, prose::foreign_names);
}

#[test]
fn links_lead_somewhere() {
    let exists = |name: &str| top().join(name).exists();
    on_each(|file| file.name.ends_with(".md"), |name, text| prose::links(name, text, exists));
}

#[test]
fn the_top_level_is_as_agreed() {
    let names = fs::read_dir(top()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    expect_none(manifests::top_level(names));
}

#[test]
fn the_two_lock_files_belong_together() {
    let read = |name: &str| fs::read_to_string(top().join(name)).unwrap();
    expect_none(manifests::locks(&read("Cargo.lock"), &read("npm-ebpf/Cargo.lock")));
}

#[test]
fn the_two_workspaces_agree() {
    let read = |name: &str| fs::read_to_string(top().join(name)).unwrap();
    expect_none(manifests::packages(&read("Cargo.toml"), &read("npm-ebpf/Cargo.toml")));
    expect_none(manifests::toolchain(&read("Cargo.toml"), &read("rust-toolchain.toml")));
}

#[test]
fn pure_crates_depend_on_pure_crates() {
    let read = |name: &str| fs::read_to_string(top().join(name)).unwrap();
    expect_none(manifests::dependencies("npm-agent/policy", &read("npm-agent/policy/Cargo.toml")));
    expect_none(manifests::dependencies("npm-common", &read("npm-common/Cargo.toml")));
}

#[test]
fn versions_stand_in_the_workspace_only() {
    let members = ["npm-agent", "npm-agent/policy", "npm-common", "xtask", "tests"];
    for member in members {
        let name = format!("{member}/Cargo.toml");
        expect_none(manifests::inherits(&name, &fs::read_to_string(top().join(&name)).unwrap()));
    }
}

#[test]
fn the_changelog_has_a_place_for_what_is_next() {
    expect_none(prose::changelog(&fs::read_to_string(top().join("CHANGELOG.md")).unwrap()));
}

#[test]
fn every_mutant_finds_its_place() {
    let read = |name: &str| fs::read_to_string(top().join(name));
    let list = read("tests/mutants.yaml").unwrap();
    expect_none(mutants::misplaced(&list, |name| read(name).ok()));
}
