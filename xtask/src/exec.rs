//! Runs programs: the only file of this crate that starts a process.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

use crate::sink::Sink;

/// A program with its arguments, not started yet.
pub(crate) struct Program {
    command: Command,
}

impl Program {
    /// `name` is looked up in PATH, unless it is a path.
    pub(crate) fn new(name: impl AsRef<OsStr>) -> Self {
        #[expect(clippy::disallowed_methods, reason = "the one file that runs programs")]
        let mut command = Command::new(name);
        command.stdin(Stdio::null());
        Self { command }
    }

    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub(crate) fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, arguments: I) -> Self {
        self.command.args(arguments);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn without_env(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    pub(crate) fn current_dir(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// The command as a person would type it, near enough to try it again.
    pub(crate) fn shown(&self) -> String {
        let mut words = vec![self.command.get_program().to_string_lossy().into_owned()];
        words.extend(self.command.get_args().map(|word| word.to_string_lossy().into_owned()));
        words.join(" ")
    }

    /// Runs it to its end with its output going to `sink`.
    ///
    /// # Errors
    /// When it can't be started or ends with anything but success.
    pub(crate) fn run(self, sink: &Sink) -> Result<()> {
        let shown = self.shown();
        let status = self.status(sink)?;
        if !status.success() {
            bail!("`{shown}` failed: {status}");
        }
        Ok(())
    }

    /// Runs it to its end with its output going to `sink`, and gives its exit status.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn status(mut self, sink: &Sink) -> Result<ExitStatus> {
        let shown = self.shown();
        if let Some(log) = sink.file().context("opening the log")? {
            sink.say(&format!("$ {shown}"))?;
            self.command.stdout(log.try_clone().context("sharing the log")?).stderr(log);
        }
        self.command.status().with_context(|| format!("running `{shown}`"))
    }

    /// Runs it to its end with its standard output written to `file`.
    ///
    /// # Errors
    /// When it can't be started or fails; the file is then incomplete.
    pub(crate) fn write_to(mut self, file: File) -> Result<()> {
        let shown = self.shown();
        let status = self.command.stdout(file).status().with_context(|| format!("running `{shown}`"))?;
        if !status.success() {
            bail!("`{shown}` failed: {status}");
        }
        Ok(())
    }

    /// Runs it to its end and gives what it printed on standard output.
    ///
    /// # Errors
    /// When it can't be started, fails (its standard error is part of the message) or prints anything but UTF-8.
    pub(crate) fn output(mut self) -> Result<String> {
        let shown = self.shown();
        let output = self.command.output().with_context(|| format!("running `{shown}`"))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("`{shown}` failed: {}: {}", output.status, stderr.trim());
        }
        String::from_utf8(output.stdout).with_context(|| format!("reading the output of `{shown}`"))
    }
}
