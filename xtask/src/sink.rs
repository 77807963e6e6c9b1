//! Where a task's messages and its programs' output go: the terminal, or a log file that is shown on failure.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

/// The place for progress messages and for the output of the programs that a task runs.
pub(crate) enum Sink {
    /// A person is watching.
    Terminal,
    /// Appended to this file.
    Log(PathBuf),
}

impl Sink {
    /// Writes one line.
    ///
    /// # Errors
    /// When the log can't be written.
    pub(crate) fn say(&self, line: &str) -> io::Result<()> {
        match self {
            Self::Terminal => writeln!(io::stderr(), "{line}"),
            Self::Log(_) => match self.file()? {
                Some(mut file) => writeln!(file, "{line}"),
                None => Ok(()),
            },
        }
    }

    /// The log file, opened for appending; `None` for the terminal.
    ///
    /// # Errors
    /// When the file can't be opened.
    pub(crate) fn file(&self) -> io::Result<Option<File>> {
        match self {
            Self::Terminal => Ok(None),
            Self::Log(path) => OpenOptions::new().create(true).append(true).open(path).map(Some),
        }
    }
}
