//! Where things are: the work tree, cargo's target directory, and our own directory under it.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::exec::Program;

/// The paths that tasks work with, all absolute.
pub(crate) struct Tree {
    /// The top of the work tree.
    pub(crate) root: PathBuf,
    /// Cargo's target directory of the workspace.
    pub(crate) target: PathBuf,
}

impl Tree {
    /// Finds the tree that this xtask belongs to.
    ///
    /// # Errors
    /// When the current directory is gone.
    pub(crate) fn find() -> Result<Self> {
        // Cargo sets the variable when it runs us; the compiled-in value serves a binary that is run by hand.
        let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest).parent().context("finding the directory above xtask")?.to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(directory) => std::path::absolute(directory).context("resolving CARGO_TARGET_DIR")?,
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// Our own directory: tools, sources of the standard library, logs.
    pub(crate) fn own(&self) -> PathBuf {
        self.target.join("xtask")
    }

    /// The cargo that runs us, in the top directory.
    pub(crate) fn cargo(&self) -> Program {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        Program::new(cargo).current_dir(&self.root)
    }

    /// The rustc that the tree pins.
    pub(crate) fn rustc(&self) -> Program {
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        Program::new(rustc).current_dir(&self.root)
    }

    /// The directory of the pinned toolchain.
    ///
    /// # Errors
    /// When rustc can't be run.
    pub(crate) fn sysroot(&self) -> Result<PathBuf> {
        Ok(PathBuf::from(self.rustc().args(["--print", "sysroot"]).output()?.trim()))
    }

    /// One field of `rustc -vV`, e.g. `release` or `LLVM version`.
    ///
    /// # Errors
    /// When rustc can't be run or does not print the field.
    pub(crate) fn rustc_field(&self, name: &str) -> Result<String> {
        let text = self.rustc().arg("-vV").output()?;
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .map(str::to_owned)
            .with_context(|| format!("finding {name:?} in what rustc -vV prints"))
    }
}
