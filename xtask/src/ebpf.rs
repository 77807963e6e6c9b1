//! Builds npm-ebpf, writes the object that is committed, and checks that the committed one is what the sources give.
//!
//! ```text
//! npm-ebpf/src ─► cargo, -Z build-std=core ─► bpf-linker ─► strip ─► npm-ebpf/npm-ebpf.o
//!      └───────────────────── SHA-256 ─────────────────────────────► npm-ebpf/npm-ebpf.sha256
//! ```
//!
//! The object is committed so that building the agent needs no eBPF toolchain. Its bytes depend on the sources and on
//! the pinned rustc only, wherever the tree lies. The hashes serve where the toolchain can't be had.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::sink::Sink;
use crate::tree::Tree;
use crate::{bpf_linker, bpf_object, rust_src};

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "npm-ebpf/npm-ebpf.o";
const HASHES: &str = "npm-ebpf/npm-ebpf.sha256";
/// What the object is made from, files and directories, relative to the top of the tree.
const INPUTS: &[&str] = &[
    "npm-common/Cargo.toml",
    "npm-common/src",
    "npm-ebpf/Cargo.lock",
    "npm-ebpf/Cargo.toml",
    "npm-ebpf/src",
    "rust-toolchain.toml",
];

/// What is needed beyond rustc and cargo.
pub(crate) struct Toolchain {
    library: PathBuf,
    linker_directory: PathBuf,
}

/// Makes the eBPF toolchain ready.
///
/// # Errors
/// When the standard library's sources or bpf-linker can't be had; the message says what to do.
pub(crate) fn prepare(tree: &Tree, sink: &Sink) -> Result<Toolchain> {
    fs::create_dir_all(tree.own()).context("making xtask's directory")?;
    let library = rust_src::library(tree, sink)?;
    let linker_directory = bpf_linker::directory(tree, sink)?;
    Ok(Toolchain { library, linker_directory })
}

/// Builds the object, writes it and its hashes, and gives a line that says so.
///
/// # Errors
/// When it can't be built or written. The committed files are then as before, or both must be written again.
pub(crate) fn write(tree: &Tree, sink: &Sink) -> Result<String> {
    let object = build(tree, &prepare(tree, sink)?, sink)?;
    fs::write(tree.root.join(OBJECT), &object).with_context(|| format!("writing {OBJECT}"))?;
    fs::write(tree.root.join(HASHES), hashes(tree, &object)?).with_context(|| format!("writing {HASHES}"))?;
    Ok(format!("{OBJECT}: {} bytes", object.len()))
}

/// Compares the committed object with what the sources give; gives a line that says how they were compared.
///
/// # Errors
/// When they differ, or the object can't be built though its toolchain is there.
pub(crate) fn check(tree: &Tree, sink: &Sink) -> Result<String> {
    let committed = fs::read(tree.root.join(OBJECT)).with_context(|| format!("reading {OBJECT}"))?;
    let recorded = fs::read_to_string(tree.root.join(HASHES)).with_context(|| format!("reading {HASHES}"))?;
    if recorded != hashes(tree, &committed)? {
        bail!("{HASHES} does not belong to {OBJECT} and its sources: run `cargo xtask ebpf` and commit both");
    }
    match prepare(tree, sink) {
        Ok(toolchain) => {
            if build(tree, &toolchain, sink)? != committed {
                bail!("{OBJECT} is not what its sources give: run `cargo xtask ebpf` and commit it");
            }
            Ok(format!("{OBJECT} rebuilt: the same {} bytes", committed.len()))
        }
        Err(error) => Ok(format!(
            "WARNING: {OBJECT} WAS NOT REBUILT, because the eBPF toolchain can't be had here. Only the hashes of the \
             object and of its sources were compared; they match {HASHES}.\n{error:#}"
        )),
    }
}

/// Runs clippy on npm-ebpf; gives a line when it could not be run.
///
/// # Errors
/// When clippy complains.
pub(crate) fn lint(tree: &Tree, sink: &Sink) -> Result<Option<String>> {
    match prepare(tree, sink) {
        Ok(toolchain) => {
            cargo(tree, &toolchain, "clippy", &["--", "-D", "warnings"], sink)?;
            Ok(None)
        }
        Err(error) => Ok(Some(format!("WARNING: npm-ebpf WAS NOT LINTED: {error:#}"))),
    }
}

/// Runs cargo for the BPF target with `task` (`build`, `clippy`), and with `more` behind its own arguments.
fn cargo(tree: &Tree, toolchain: &Toolchain, task: &str, more: &[&str], sink: &Sink) -> Result<()> {
    let mut path = toolchain.linker_directory.clone().into_os_string();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    tree.cargo()
        .current_dir(&tree.root.join("npm-ebpf"))
        .env("PATH", path)
        // -Z options on a stable compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        // Where cargo takes the standard library's sources from: a variable made for cargo's own tests, safe to
        // rely on because the toolchain is pinned.
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &toolchain.library)
        .env("CARGO_TARGET_DIR", build_directory(tree))
        .env("CARGO_ENCODED_RUSTFLAGS", flags(tree, toolchain)?.join("\u{1f}"))
        .without_env("RUSTFLAGS")
        .arg(task)
        .args(["--locked", "--release", "--target", TARGET, "-Z", "build-std=core"])
        .args(more)
        .run(sink)
}

fn build_directory(tree: &Tree) -> PathBuf {
    tree.root.join("npm-ebpf/target")
}

/// Builds, links and strips; gives the object's bytes.
fn build(tree: &Tree, toolchain: &Toolchain, sink: &Sink) -> Result<Vec<u8>> {
    cargo(tree, toolchain, "build", &[], sink).context("building npm-ebpf")?;
    let linked = build_directory(tree).join(TARGET).join("release/npm-ebpf");
    let linked = fs::read(&linked).with_context(|| format!("reading {}", linked.display()))?;
    bpf_object::strip(&linked)
}

/// rustc's flags: BTF, and no path of this machine in the object.
fn flags(tree: &Tree, toolchain: &Toolchain) -> Result<Vec<String>> {
    let mut flags: Vec<String> = [
        "-C",
        "debuginfo=2",
        "-C",
        "link-arg=--btf",
        // Else LLVM's BPF target calls memset, a loop over bytes, even to clear a word.
        "-C",
        "link-arg=--disable-expand-memcpy-in-order",
    ]
    .iter()
    .map(|&flag| flag.to_owned())
    .collect();
    let mut remap =
        |from: &Path, to: &str| flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    remap(&tree.root, "npm-agent");
    remap(&toolchain.library, "library");
    // The directory's name depends on the registry's address.
    for sources in registry_sources()? {
        remap(&sources, "registry");
    }
    Ok(flags)
}

fn registry_sources() -> Result<Vec<PathBuf>> {
    let home = match env::var_os("CARGO_HOME") {
        Some(home) => std::path::absolute(home).context("resolving CARGO_HOME")?,
        None => PathBuf::from(env::var_os("HOME").context("finding cargo's home: HOME is not set")?)
            .join(".cargo"),
    };
    let sources = home.join("registry/src");
    if !sources.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(&sources).with_context(|| format!("reading {}", sources.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// The text of the hashes' file: in the form that `sha256sum` prints.
fn hashes(tree: &Tree, object: &[u8]) -> Result<String> {
    let mut files = Vec::new();
    for input in INPUTS {
        collect(&tree.root, &tree.root.join(input), &mut files)?;
    }
    files.sort_unstable();
    let mut text = format!("{}  {OBJECT}\n", hex(object));
    for file in files {
        let bytes = fs::read(tree.root.join(&file)).with_context(|| format!("reading {file}"))?;
        writeln!(text, "{}  {file}", hex(&bytes)).context("writing to a string")?;
    }
    Ok(text)
}

/// Adds the files at or below `path`, as names relative to `root`.
fn collect(root: &Path, path: &Path, files: &mut Vec<String>) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
            collect(root, &entry.context("reading a directory's entry")?.path(), files)?;
        }
    } else {
        let name = path.strip_prefix(root).context("naming a source file")?;
        files.push(name.to_str().context("naming a source file: not UTF-8")?.to_owned());
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_sha256() {
        assert_eq!(hex(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn a_changed_source_changes_the_hashes() {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree { root: directory.path().to_owned(), target: directory.path().join("target") };
        for input in INPUTS {
            let file = tree.root.join(if input.ends_with("src") {
                format!("{input}/lib.rs")
            } else {
                (*input).into()
            });
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, input).unwrap();
        }
        let before = hashes(&tree, b"object").unwrap();
        assert_eq!(before.lines().count(), 1 + INPUTS.len());
        assert_eq!(before, hashes(&tree, b"object").unwrap());
        assert_ne!(before, hashes(&tree, b"another").unwrap());
        fs::write(tree.root.join("npm-common/src/new.rs"), "").unwrap();
        assert_ne!(before, hashes(&tree, b"object").unwrap());
    }
}
