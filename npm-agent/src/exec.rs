//! Runs programs: the only place that does.
//!
//! Three things hold whatever kills whom:
//!
//! - A program has its whole input before it starts, as a file in memory. Fed through a pipe by an agent that is killed
//!   meanwhile it would carry out the line that was cut: `add x 10.0.0.0/1` of `10.0.0.0/16`.
//! - What changes the kernel holds a lock for as long as it lives, also when it outlives the agent that started it; and
//!   nothing else is started in that network namespace before. So the next agent plans from what stays. (A signal on
//!   the parent's death, `PR_SET_PDEATHSIG`, would not do: the parent may die before the child has asked for it.)
//! - No program runs longer than a deadline.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::backend::BackendError;

/// The network namespace of the calling thread, as a file: the lock is on it, so it needs no name anywhere and is the
/// same for whoever works in that namespace.
const NAMESPACE: &str = "/proc/thread-self/ns/net";

/// The pause between two looks at a lock that another program's run holds.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// How long a killed program may take to be gone. One that the kernel keeps is left behind, with its lock.
const DEATH: Duration = Duration::from_secs(1);

/// Where the programs are, and how long they may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    /// The directory that holds them; `None`: they are looked up in `PATH`.
    pub directory: Option<PathBuf>,
    /// How long one run may take, and how long it is waited for the end of one that an earlier agent has left.
    pub deadline: Duration,
}

impl Default for Tools {
    fn default() -> Self {
        Self { directory: None, deadline: Duration::from_secs(60) }
    }
}

impl Tools {
    /// Runs a program to its end, in the calling thread's network namespace, and gives what it wrote to its standard
    /// output. Messages are in English whatever the locale. It starts when no [`Tools::write`] runs in that namespace.
    ///
    /// # Errors
    /// It could not be started, took longer than the deadline, or ended otherwise than with status 0.
    pub fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String, BackendError> {
        drop(self.lock(program)?);
        let failed = |source| BackendError::Spawn { program: program.to_owned(), source };
        let mut output = in_memory("").map_err(failed)?;
        let stdout = output.try_clone().map_err(failed)?;
        self.finish(program, arguments, input, stdout)?;
        String::from_utf8(content(&mut output).map_err(failed)?).map_err(|error| BackendError::Unreadable {
            program: program.to_owned(),
            detail: format!("byte {} is not UTF-8", error.utf8_error().valid_up_to()),
        })
    }

    /// Runs a program that changes the kernel's state and prints nothing, otherwise as [`Tools::run`]. One at a time runs
    /// in a network namespace, also if the process that started it is dead.
    ///
    /// # Errors
    /// As [`Tools::run`].
    pub fn write(&self, program: &str, arguments: &[&str], input: &str) -> Result<(), BackendError> {
        let lock = self.lock(program)?;
        let failed = |source| BackendError::Spawn { program: program.to_owned(), source };
        // The child gets the lock as its standard output: that is the one way to leave it an open file without unsafe
        // code and without leaving it to every other child of this process too.
        let stdout = lock.try_clone().map_err(failed)?;
        let outcome = self.finish(program, arguments, input, stdout);
        // Not if it still runs: its lock is to hold off the next.
        if !matches!(outcome, Err(BackendError::TimedOut { .. })) {
            lock.unlock().map_err(failed)?;
        }
        outcome
    }

    /// Takes the lock of the calling thread's network namespace.
    fn lock(&self, program: &str) -> Result<File, BackendError> {
        let failed = |source| BackendError::Spawn { program: program.to_owned(), source };
        let file = File::open(NAMESPACE).map_err(failed)?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if start.elapsed() < self.deadline => {
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(BackendError::TimedOut {
                        program: format!("what an earlier run left, before {program}"),
                        after: self.deadline,
                    });
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }

    fn finish(
        &self,
        program: &str,
        arguments: &[&str],
        input: &str,
        stdout: File,
    ) -> Result<(), BackendError> {
        let command =
            || std::iter::once(program).chain(arguments.iter().copied()).collect::<Vec<_>>().join(" ");
        let path = match &self.directory {
            Some(directory) => directory.join(program).into_os_string(),
            None => OsString::from(program),
        };
        let failed = |source| BackendError::Spawn { program: program.to_owned(), source };
        let mut errors = in_memory("").map_err(failed)?;
        #[expect(clippy::disallowed_methods, reason = "this is the one place that runs programs")]
        let child = Command::new(path)
            .args(arguments)
            .env("LC_ALL", "C")
            // So that what it starts in its turn can be killed with it.
            .process_group(0)
            .stdin(in_memory(input).map_err(failed)?)
            .stdout(stdout)
            .stderr(Stdio::from(errors.try_clone().map_err(failed)?))
            .spawn()
            .map_err(failed)?;
        match wait(child, self.deadline).map_err(failed)? {
            None => Err(BackendError::TimedOut { program: command(), after: self.deadline }),
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(BackendError::Refused {
                program: command(),
                status: status.to_string(),
                stderr: String::from_utf8_lossy(&content(&mut errors).map_err(failed)?).trim().to_owned(),
            }),
        }
    }
}

/// A file that is nowhere but in memory, at its beginning.
fn in_memory(text: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create("npm-agent", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

/// What was written to a file in memory.
fn content(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Waits for a child's end, and kills it and its own children at the deadline: `None`.
fn wait(mut child: Child, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(&child);
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(error) => {
            // No program is left without somebody who waits for it.
            child.kill().and_then(|()| child.wait())?;
            return Err(error.into());
        }
    };
    let ended = |within: Duration| -> io::Result<bool> {
        let end = Instant::now() + within;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    };
    if ended(deadline)? {
        return child.wait().map(Some);
    }
    // Not reaped yet, so the number is still its own; that it has just ended by itself is no error.
    let _ = kill_process_group(pid, Signal::KILL);
    if ended(DEATH)? {
        child.wait()?;
    }
    Ok(None)
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
            matches!(&error, BackendError::Refused { program, stderr, .. }
                if program == "ls /nonexistent" && stderr.contains("No such file")),
            "{error}"
        );
        let nowhere = Tools { directory: Some("/nonexistent".into()), ..Tools::default() };
        assert!(matches!(nowhere.run("ls", &[], ""), Err(BackendError::Spawn { .. })));
        // A program that reads nothing of a large input still succeeds.
        assert_eq!(Tools::default().run("true", &[], &"x".repeat(1 << 20)).unwrap(), "");
    }

    /// Nothing that a hung program has started goes on either, and its lock is free.
    #[test]
    fn what_hangs_is_killed_and_what_is_left_is_waited_for() {
        let hurried = Tools { deadline: Duration::from_millis(200), ..Tools::default() };
        let directory = tempfile::tempdir().unwrap();
        let late = directory.path().join("late");
        let script = format!("(sleep 5; touch '{}') & sleep 100", late.display());
        let start = Instant::now();
        let error = hurried.write("bash", &["-c", &script], "").unwrap_err();
        assert!(
            matches!(&error, BackendError::TimedOut { after, .. } if *after == hurried.deadline),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(50), "{:?}", start.elapsed());
        let error = hurried.run("sleep", &["100"], "").unwrap_err();
        assert!(
            matches!(&error, BackendError::TimedOut { program, .. } if program == "sleep 100"),
            "{error}"
        );
        std::thread::sleep((start + Duration::from_secs(6)).saturating_duration_since(Instant::now()));
        assert!(!late.exists());
        // A writer that its agent has left behind is waited for. Here, because tests share a namespace and its lock.
        let tools = Tools::default();
        let lock = tools.lock("test").unwrap();
        let hurried = Tools { deadline: Duration::from_millis(50), ..Tools::default() };
        for error in [hurried.run("true", &[], "").unwrap_err(), hurried.write("true", &[], "").unwrap_err()]
        {
            assert!(matches!(error, BackendError::TimedOut { .. }), "{error}");
        }
        let waiter = std::thread::spawn(move || tools.run("echo", &["done"], ""));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waiter.is_finished());
        drop(lock);
        assert_eq!(waiter.join().unwrap().unwrap(), "done\n");
    }
}
