//! Runs programs: the only place that does.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::backend::BackendError;

/// Where the programs are.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Tools {
    /// The directory that holds them; `None`: they are looked up in `PATH`.
    pub directory: Option<PathBuf>,
}

impl Tools {
    /// Runs a program to its end, in the calling thread's network namespace, and gives what it wrote to its standard
    /// output. Messages are in English whatever the locale.
    ///
    /// # Errors
    /// It could not be started, or ended otherwise than with status 0.
    pub fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String, BackendError> {
        let path = match &self.directory {
            Some(directory) => directory.join(program).into_os_string(),
            None => OsString::from(program),
        };
        let spawn = |source| BackendError::Spawn { program: program.to_owned(), source };
        #[expect(clippy::disallowed_methods, reason = "this is the one place that runs programs")]
        let mut child = Command::new(path)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(spawn)?;
        let stdin = child.stdin.take();
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                // A program that ends early closes the pipe; its status tells why.
                stdin.map(|mut stdin| stdin.write_all(input.as_bytes()))
            });
            child.wait_with_output()
        })
        .map_err(spawn)?;
        if !output.status.success() {
            return Err(BackendError::Refused {
                program: std::iter::once(program)
                    .chain(arguments.iter().copied())
                    .collect::<Vec<_>>()
                    .join(" "),
                status: output.status.to_string(),
                stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
        String::from_utf8(output.stdout).map_err(|error| BackendError::Unreadable {
            program: program.to_owned(),
            detail: format!("byte {} is not UTF-8", error.utf8_error().valid_up_to()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_inputs_and_outputs_do_not_block() {
        let input = "x".repeat(4 << 20);
        assert_eq!(Tools::default().run("cat", &[], &input).unwrap().len(), input.len());
    }

    #[test]
    fn what_fails_says_what() {
        let error = Tools::default().run("ls", &["/nonexistent"], "").unwrap_err();
        assert!(
            matches!(&error, BackendError::Refused { program, .. } if program == "ls /nonexistent"),
            "{error}"
        );
        let nowhere = Tools { directory: Some("/nonexistent".into()) };
        assert!(matches!(nowhere.run("ls", &[], ""), Err(BackendError::Spawn { .. })));
        // A program that reads nothing of a large input still succeeds.
        assert_eq!(Tools::default().run("true", &[], &"x".repeat(1 << 20)).unwrap(), "");
    }
}
