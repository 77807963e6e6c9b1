//! `npm-agent version`.

use std::process::ExitCode;

/// Print the version
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Prints the version.
///
/// # Errors
/// Standard output can't be written.
pub fn run(Args {}: Args) -> anyhow::Result<ExitCode> {
    super::print(concat!("npm-agent ", env!("CARGO_PKG_VERSION"), "\n"))?;
    Ok(ExitCode::SUCCESS)
}
