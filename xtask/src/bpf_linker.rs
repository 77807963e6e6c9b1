//! Makes bpf-linker ready: built from source against the LLVM that rustc itself carries, so that it reads the
//! bitcode that this rustc writes, and so that nothing but rustc decides the object's bytes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::sink::Sink;
use crate::tree::Tree;

const VERSION: &str = "0.13.0";

/// Gives the directory that holds the program `bpf-linker`.
///
/// # Errors
/// When it is not there and can't be built.
pub(crate) fn directory(tree: &Tree, sink: &Sink) -> Result<PathBuf> {
    // It carries the path of rustc's library: another rustc needs another build.
    let release = tree.rustc_field("release")?;
    let home = tree.own().join(format!("bpf-linker-{VERSION}-rust-{release}"));
    let bin = home.join("bin");
    if bin.join("bpf-linker").is_file() {
        return Ok(bin);
    }

    let sysroot_lib = tree.sysroot()?.join("lib");
    let llvm_version = tree.rustc_field("LLVM version")?;
    let (major, _) = llvm_version.split_once('.').context("reading rustc's LLVM version")?;
    let library = llvm_library(&sysroot_lib, major)?;
    // llvm-sys looks for a library of the plain name below a prefix.
    let prefix = home.join("llvm");
    fs::create_dir_all(prefix.join("lib")).context("making the directory of LLVM")?;
    let link = prefix.join("lib/libLLVM.so");
    if link.symlink_metadata().is_ok() {
        fs::remove_file(&link).context("removing an old link to LLVM")?;
    }
    std::os::unix::fs::symlink(&library, &link).context("linking rustc's LLVM")?;

    sink.say(&format!(
        "building bpf-linker {VERSION} against rustc's LLVM {major} (once; about two minutes)"
    ))?;
    tree.cargo()
        // Outside the work tree's own build directory and configuration.
        .env("CARGO_TARGET_DIR", home.join("build"))
        .env("LLVM_PREFIX", &prefix)
        .env("RUSTFLAGS", format!("-C link-arg=-Wl,-rpath,{}", sysroot_lib.display()))
        .without_env("CARGO_ENCODED_RUSTFLAGS")
        .args(["install", "bpf-linker", "--version", VERSION, "--locked", "--no-default-features"])
        .args(["--features", &format!("llvm-{major}"), "--config", "profile.release.debug=0", "--root"])
        .arg(&home)
        .run(sink)
        .context("building bpf-linker")?;
    fs::remove_dir_all(home.join("build")).context("removing what bpf-linker's build left")?;
    Ok(bin)
}

/// rustc's own LLVM: `libLLVM.so.22.1-rust-1.95.0-stable` or a name like it.
fn llvm_library(directory: &Path, major: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(directory)
        .with_context(|| format!("reading {}", directory.display()))?
        .flatten()
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.starts_with(&format!("libLLVM.so.{major}")) || name.starts_with(&format!("libLLVM-{major}"))
        })
        .map(|entry| entry.path())
        .collect();
    found.sort_unstable();
    match found.pop() {
        Some(library) => Ok(library),
        None => bail!("rustc's own libLLVM {major} is not in {}", directory.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_library_of_the_right_version() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("libLLVM.so.21.1-rust-1.94.0-stable"), "").unwrap();
        assert!(llvm_library(directory.path(), "22").is_err());
        fs::write(directory.path().join("libLLVM-22-rust-1.95.0-stable.so"), "").unwrap();
        fs::write(directory.path().join("libLLVM.so.22.1-rust-1.95.0-stable"), "").unwrap();
        let found = llvm_library(directory.path(), "22").unwrap();
        assert_eq!(found.file_name().unwrap(), "libLLVM.so.22.1-rust-1.95.0-stable");
    }
}
