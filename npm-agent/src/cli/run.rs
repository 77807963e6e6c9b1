//! `npm-agent run`.

use std::process::ExitCode;

use crate::config::Flags;

/// Run the agent: watch objects, program this node
///
/// Runs in the foreground until SIGTERM or SIGINT. What is programmed stays in place when the agent ends, however it
/// ends: the next start takes it over without a gap. `npm-agent cleanup` removes it.
///
/// Every flag has an environment variable and a key in the config file: a flag wins over the variable, the variable
/// over the file, the file over the default. See docs/configuration.md.
///
/// Exit codes: 0 after SIGTERM or SIGINT; 1 failure; 2 bad flags or configuration; 3 an agent runs already on this
/// node, or with this socket.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Runs the agent until it is told to stop.
///
/// # Errors
/// It could not start, or its source has gone. What is programmed stays in place.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    crate::run::run(args.flags)?;
    Ok(ExitCode::SUCCESS)
}
