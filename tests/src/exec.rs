//! Runs programs: the only file of this crate that does.
//!
//! A child inherits the network namespace of the thread that starts it, so what runs inside
//! [`crate::lab::netns::Netns::run`] runs in that namespace.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::signal::SigSet;

/// Runs a program to its end and gives what it printed.
///
/// # Errors
/// It could not be started, or it failed: the error holds what it said.
pub fn run<A: AsRef<OsStr>>(program: &str, args: &[A]) -> Result<String> {
    run_with_input(program, args, "")
}

/// Runs a program to its end with this standard input and gives what it printed.
///
/// # Errors
/// As [`run`].
pub fn run_with_input<A: AsRef<OsStr>>(program: &str, args: &[A], input: &str) -> Result<String> {
    let mut child = command(program, args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut stdin = child.stdin.take().expect("standard input is piped");
    let written = std::thread::scope(|scope| {
        // A program that prints while it reads must not block on a full pipe.
        let writer = scope.spawn(move || stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output();
        (writer.join().expect("the writer does not panic"), output)
    });
    let output = written.1.with_context(|| format!("waiting for {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let args: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
        bail!("{program} {} failed with {}: {}", args.join(" "), output.status, said.trim());
    }
    match written.0 {
        // It succeeded without reading all of it.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).with_context(|| format!("writing to {program}"))?
        }
        Ok(()) | Err(_) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
    }
}

/// Starts a program that lives on; both of its outputs go to `log`. It gets every signal, also those that the calling
/// thread has blocked for itself.
///
/// # Errors
/// It could not be started.
pub fn start<A: AsRef<OsStr>>(program: &str, args: &[A], log: &File) -> Result<Child> {
    let mut command = command(program, args);
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("sharing the log file")?)
        .stderr(log.try_clone().context("sharing the log file")?);
    // A child inherits the mask.
    let blocked = SigSet::thread_get_mask().context("asking for the signal mask")?;
    SigSet::empty().thread_set_mask().context("unblocking signals")?;
    let child = command.spawn();
    blocked.thread_set_mask().context("blocking signals again")?;
    child.with_context(|| format!("starting {program}"))
}

/// Starts a program that lives on, takes lines of input and answers them; what it says of errors is thrown away.
///
/// # Errors
/// It could not be started.
pub fn start_interactive<A: AsRef<OsStr>>(program: &str, args: &[A]) -> Result<Child> {
    let mut command = command(program, args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().with_context(|| format!("starting {program}"))
}

/// Lets the calling thread run before all ordinary ones (SCHED_FIFO): one that must be on time on a busy machine. What
/// it starts from now on inherits that.
///
/// # Errors
/// The caller may not, or `chrt` is missing.
pub fn run_first() -> Result<()> {
    run("chrt", &["--fifo", "--pid", "50", &nix::unistd::gettid().to_string()]).map(drop)
}

#[expect(clippy::disallowed_methods, reason = "this is the one place that runs programs")]
fn command<A: AsRef<OsStr>>(program: &str, args: &[A]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}
