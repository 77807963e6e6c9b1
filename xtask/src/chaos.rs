//! `cargo xtask chaos`: the long form of the tests that change a cluster and disturb its API server at random.

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::packages;
use crate::sink::Sink;
use crate::tree::Tree;

/// Builds the agent and the test, and lets it make so many changes.
///
/// # Errors
/// When something can't be installed or built, or the test can't be started. That it failed is the exit code.
pub(crate) fn run(tree: &Tree, changes: u32, seed: Option<u64>) -> Result<ExitCode> {
    packages::install_missing(&Sink::Terminal)?;
    if !packages::is_root()? {
        bail!(
            "the lab makes network namespaces and needs root: sudo -E env PATH=\"$PATH\" cargo xtask chaos"
        );
    }
    tree.cargo()
        .args(["build", "--locked", "--package", "npm-agent", "--package", "npm-tests", "--bin", "npm-agent"])
        .run(&Sink::Terminal)?;
    let test = [
        "test",
        "--locked",
        "--package",
        "npm-agent",
        "--package",
        "npm-tests",
        "--test",
        "kube",
        "--",
        "--nocapture",
        "random",
    ];
    let mut program = tree.cargo().args(test).env("NPM_CHANGES", changes.to_string());
    if let Some(seed) = seed {
        program = program.env("NPM_SEED", seed.to_string());
    }
    let status = program.status(&Sink::Terminal)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
