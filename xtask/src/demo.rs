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
    let bench = ["build", "--locked", "--package", "npm-tests", "--bin", "bench"];
    let profile = if arguments.first().is_some_and(|first| first == "control") {
        // What is measured is the agent, as it is shipped.
        let processes = ["--bin", "apiserver", "--package", "npm-agent", "--bin", "npm-agent", "--release"];
        tree.cargo().args(bench).args(processes).run(&Sink::Terminal)?;
        "release"
    } else {
        // What is measured is the kernel's time: the dev profile serves, and is built already for the tests.
        tree.cargo().args(bench).run(&Sink::Terminal)?;
        "debug"
    };
    let program = tree.target.join(profile).join("bench");
    let status = Program::new(program).current_dir(&tree.root).args(arguments).status(&Sink::Terminal)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
