//! Finds the standard library's sources of exactly the pinned rustc, which `-Z build-std` compiles for the BPF
//! target. Another version does not compile: its lang items are not this compiler's.
//!
//! Three ways, in this order: the toolchain has them; rustup adds them; Debian's package `rust-src` of the same
//! version, read from the mirror that this machine's apt uses, without any change to the system's apt.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::exec::Program;
use crate::packages::{find_program, is_root};
use crate::sink::Sink;
use crate::tree::Tree;

/// The suite of Debian that has the pinned version.
const DEBIAN_SUITE: &str = "trixie-backports";
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

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
    for program in ["apt-get", "dpkg-deb", "tar"] {
        if find_program(program).is_none() {
            bail!("{program} is not there");
        }
    }
    if !Path::new(DEBIAN_KEYRING).is_file() {
        bail!("{DEBIAN_KEYRING} is not there (package debian-archive-keyring)");
    }
    let mirrors = debian_mirrors()?;
    if mirrors.is_empty() {
        bail!("this machine's apt knows no mirror of Debian");
    }

    let work = own.with_extension("apt");
    for directory in ["lists/partial", "cache/archives/partial", "unpacked"] {
        fs::create_dir_all(work.join(directory)).context("making apt's private directories")?;
    }
    let sources = work.join("sources.list");
    let lines: String = mirrors
        .iter()
        .map(|mirror| format!("deb [signed-by={DEBIAN_KEYRING}] {mirror} {DEBIAN_SUITE} main\n"))
        .collect();
    fs::write(&sources, lines).context("writing apt's private sources list")?;

    sink.say(&format!("downloading Debian's rust-src {version} (the sources that the eBPF build compiles)"))?;
    let apt_get = || {
        let mut program = Program::new("apt-get")
            .current_dir(&work)
            .args(["-q", "-o", "Dir::Etc::sourceparts=-"])
            .args(["-o", &format!("Dir::Etc::sourcelist={}", sources.display())])
            .args(["-o", &format!("Dir::State::lists={}", work.join("lists").display())])
            .args(["-o", &format!("Dir::Cache={}", work.join("cache").display())]);
        if is_root().unwrap_or(false) {
            // apt's own user may not enter the work tree.
            program = program.args(["-o", "APT::Sandbox::User=root"]);
        }
        program
    };
    apt_get().arg("update").run(sink)?;
    apt_get().arg("download").arg(format!("rust-src={version}*")).run(sink)?;

    let package = fs::read_dir(&work)
        .context("looking for the package")?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get download left no package")?;
    // In two steps, so that only the part we need is ever unpacked.
    let archive = work.join("data.tar");
    let tar = fs::File::create(&archive).context("making the archive")?;
    Program::new("dpkg-deb").arg("--fsys-tarfile").arg(&package).write_to(tar)?;
    let inside = format!("./usr/src/rustc-{version}/library");
    let unpacked = work.join("unpacked");
    Program::new("tar")
        .args(["-x", "--strip-components=4", "-f"])
        .arg(&archive)
        .arg("-C")
        .arg(&unpacked)
        .arg(&inside)
        .run(sink)?;

    // Moved into place whole: a directory of that name is always complete.
    fs::create_dir_all(own).context("making the directory of the sources")?;
    fs::rename(unpacked.join("library"), own.join("library")).context("moving the sources into place")?;
    fs::remove_dir_all(&work).context("removing apt's private directories")
}

/// The mirrors of Debian's main archive in this machine's apt configuration.
fn debian_mirrors() -> Result<Vec<String>> {
    // Without release information it lists what is configured, downloaded or not.
    let text = Program::new("apt-get")
        .args(["indextargets", "--no-release-info", "--format", "$(SITE)"])
        .output()?;
    Ok(main_archives(&text))
}

fn main_archives(sites: &str) -> Vec<String> {
    let mut mirrors: Vec<String> = sites
        .lines()
        .map(|site| site.trim_end_matches('/'))
        .filter(|site| site.ends_with("/debian"))
        .map(str::to_owned)
        .collect();
    mirrors.sort_unstable();
    mirrors.dedup();
    mirrors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_main_archive_counts_as_a_mirror() {
        let sites = "http://a.example/debian\nhttp://a.example/debian-security\nhttps://b.example/node\n\
                     http://a.example/debian\nhttp://c.example/debian/\n";
        assert_eq!(main_archives(sites), ["http://a.example/debian", "http://c.example/debian"]);
    }

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
