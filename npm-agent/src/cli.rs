//! The command line: one file a subcommand, and what they share.

pub mod cleanup;
pub mod completions;
pub mod matrix;
pub mod render;
pub mod run;
pub mod status;
pub mod trace;
pub mod version;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::config::ConfigError;
use crate::lock::LockError;

/// The exit code of bad flags and bad configuration, as clap has it.
const USAGE: u8 = 2;

/// The exit code for a node (or an instance) on which an agent runs already.
const ALREADY_RUNNING: u8 = 3;

/// Enforces Kubernetes NetworkPolicies on one node
///
/// Exit codes: 0 success; 1 failure (status: not ready; matrix: not as expected); 2 bad flags or configuration;
/// 3 an agent runs already.
#[derive(Parser, Debug)]
#[command(name = "npm-agent", version, propagate_version = false, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Run(run::Args),
    Status(status::Args),
    Matrix(matrix::MatrixArgs),
    Render(render::Args),
    Trace(trace::Args),
    Cleanup(cleanup::Args),
    Completions(completions::Args),
    Version(version::Args),
}

/// Parses the command line, runs it, and prints why it failed.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => run::run(args),
        Command::Status(args) => status::run(args),
        Command::Matrix(args) => matrix::run(&args).map_err(|error| error.context(Usage)),
        Command::Render(args) => render::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Cleanup(args) => cleanup::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Version(args) => version::run(args),
    };
    outcome.unwrap_or_else(|error| {
        // With all causes, on one line.
        eprintln!("npm-agent: {error:#}");
        exit_code(&error)
    })
}

/// Marks an error as one of what was asked for.
#[derive(Debug, thiserror::Error)]
#[error("matrix")]
struct Usage;

fn exit_code(error: &anyhow::Error) -> ExitCode {
    let already_running = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref::<LockError>(), Some(LockError::Held { .. }))
    };
    if error.is::<ConfigError>() || error.is::<Usage>() {
        ExitCode::from(USAGE)
    } else if error.chain().any(already_running) {
        ExitCode::from(ALREADY_RUNNING)
    } else {
        ExitCode::FAILURE
    }
}

/// Writes to standard output. A reader that has read enough (`| head`) is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.context("writing to standard output"),
    }
}

#[cfg(test)]
mod tests;
