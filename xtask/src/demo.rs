//! `cargo xtask demo`, `mutants` and `bench`: build programs of the tests crate, and run them.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::exec::Program;
use crate::packages;
use crate::sink::Sink;
use crate::tree::Tree;

/// Builds both in the dev profile (a third of the release profile's time, and the demo is not a benchmark), then runs
/// the demo with `arguments`.
///
/// # Errors
/// When something can't be installed or built, or the demo can't be started. That it failed is the exit code.
pub(crate) fn run(tree: &Tree, arguments: &[OsString]) -> Result<ExitCode> {
    packages::install_missing(&Sink::Terminal)?;
    if !packages::is_root()? {
        bail!(
            "the demo makes network namespaces and needs root: sudo -E env PATH=\"$PATH\" cargo xtask demo"
        );
    }
    // One command for both: built apart, their dependencies' features would differ and be built twice.
    let both = ["--package", "npm-agent", "--bin", "npm-agent", "--package", "npm-tests", "--bin", "demo"];
    tree.cargo().args(["build", "--locked"]).args(both).run(&Sink::Terminal)?;
    let demo = tree.target.join("debug/demo");
    let status = Program::new(demo).current_dir(&tree.root).args(arguments).status(&Sink::Terminal)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds the program that puts bugs into a copy of the tree, and runs it with `arguments`.
///
/// # Errors
/// When something can't be installed or built, or it can't be started. That a bug was not caught is the exit code.
pub(crate) fn mutants(tree: &Tree, arguments: &[OsString]) -> Result<ExitCode> {
    packages::install_missing(&Sink::Terminal)?;
    tree.cargo()
        .args(["build", "--locked", "--package", "npm-tests", "--bin", "mutants"])
        .run(&Sink::Terminal)?;
    let program = tree.target.join("debug/mutants");
    let status = Program::new(program).current_dir(&tree.root).args(arguments).status(&Sink::Terminal)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds the benchmark and runs it with `arguments`.
///
/// # Errors
/// When something can't be installed or built, or it can't be started. That it failed is the exit code.
pub(crate) fn bench(tree: &Tree, arguments: &[OsString]) -> Result<ExitCode> {
    packages::install_missing(&Sink::Terminal)?;
    if !packages::is_root()? {
        bail!(
            "the benchmark makes network namespaces and needs root: sudo -E env PATH=\"$PATH\" cargo xtask bench"
        );
    }
    // In the release profile, both: what sends packets is in their time, a little.
    let release = ["build", "--locked", "--release"];
    let (bench, server) =
        (["--package", "npm-tests", "--bin", "bench"], ["--package", "npm-tests", "--bin", "apiserver"]);
    tree.cargo().args(release).args(bench).run(&Sink::Terminal)?;
    if arguments.first().is_some_and(|first| first == "control") {
        tree.cargo().args(release).args(server).run(&Sink::Terminal)?;
        // What is measured is the agent as it is shipped: built for itself, without what tests want of its dependencies.
        tree.cargo().args(release).args(["--package", "npm-agent"]).run(&Sink::Terminal)?;
    }
    let program = tree.target.join("release/bench");
    let status = Program::new(program).current_dir(&tree.root).args(arguments).status(&Sink::Terminal)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
