//! Finds the standard library's sources of exactly the pinned rustc, which `-Z build-std` compiles for the BPF
//! target. Another version does not compile: its lang items are not this compiler's.
//!
//! Three ways, in this order: the toolchain has them; rustup adds them; Debian's package `rust-src` of the same
//! version.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::debian::{self, Package};
use crate::exec::Program;
use crate::packages::find_program;
use crate::sink::Sink;
use crate::tree::Tree;

/// The suite of Debian that has the pinned version.
const DEBIAN_SUITE: &str = "trixie-backports";

/// Gives the `library` directory of the standard library's sources.
///
/// # Errors
/// When none of the ways works: the message says why for each.
pub(crate) fn library(tree: &Tree, sink: &Sink) -> Result<PathBuf> {
    let version = tree.rustc_field("release")?;
    let own = tree.own().join(format!("rust-src-{version}"));
    let in_sysroot = tree.sysroot()?.join("lib/rustlib/src/rust/library");
    for known in [&in_sysroot, &own.join("library")] {
        if is_library(known) {
            return Ok(known.clone());
        }
    }

    let rustup = match from_rustup(tree, sink) {
        Ok(()) if is_library(&in_sysroot) => return Ok(in_sysroot),
        Ok(()) => "it says that they are there, but they are not".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    match from_debian(&version, &own, sink) {
        Ok(()) => Ok(own.join("library")),
        Err(debian) => bail!(
            "no standard library sources of Rust {version}:\n  toolchain: none in {}\n  rustup: {rustup}\n  \
             Debian: {debian:#}\nto do by hand: rustup component add rust-src",
            in_sysroot.display()
        ),
    }
}

fn is_library(directory: &Path) -> bool {
    directory.join("core/Cargo.toml").is_file() && directory.join("Cargo.lock").is_file()
}

fn from_rustup(tree: &Tree, sink: &Sink) -> Result<()> {
    if find_program("rustup").is_none() {
        bail!("not installed");
    }
    sink.say("adding rust-src with rustup (the sources that the eBPF build compiles)")?;
    Program::new("rustup").current_dir(&tree.root).args(["component", "add", "rust-src"]).run(sink)
}

/// Downloads and unpacks Debian's package into `own`; 45 MB to download, 68 MB afterwards.
fn from_debian(version: &str, own: &Path, sink: &Sink) -> Result<()> {
    sink.say(&format!("downloading Debian's rust-src {version} (the sources that the eBPF build compiles)"))?;
    let (name, inside) = (format!("rust-src={version}*"), format!("./usr/src/rustc-{version}/library"));
    debian::fetch(&Package { suite: DEBIAN_SUITE, name: &name, inside: &inside }, own, sink)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn half_a_library_is_none() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("core")).unwrap();
        fs::write(directory.path().join("core/Cargo.toml"), "").unwrap();
        assert!(!is_library(directory.path()));
        fs::write(directory.path().join("Cargo.lock"), "").unwrap();
        assert!(is_library(directory.path()));
    }
}
