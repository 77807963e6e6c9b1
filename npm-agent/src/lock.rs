//! A lock file: at most one process holds it, and the kernel lets go of it when the process dies.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::RUN_DIRECTORY;

/// A held lock. Dropping it removes the file and lets go.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: File,
}

/// Why a lock is not held.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("{} is locked: another npm-agent runs", path.display())]
    Held {
        /// The lock file.
        path: PathBuf,
    },
    /// The file can't be made or locked.
    #[error("cannot lock {}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Takes the lock of this network namespace: two agents in one would undo each other's rules, whatever their names
/// and sockets are. Namespaces are told apart by inode (namespaces(7)).
///
/// # Errors
/// See [`LockError`]; nothing is held then.
pub fn take_network_namespace() -> Result<Lock, LockError> {
    let namespace = Path::new("/proc/self/ns/net");
    let inode = std::fs::metadata(namespace)
        .map_err(|source| LockError::Io { path: namespace.to_owned(), source })?
        .ino();
    Lock::take_patiently(Path::new(RUN_DIRECTORY).join(format!("netns-{inode}.lock")))
}

/// Removes lock files of network namespaces that nobody holds: a killed agent leaves its own behind, and its namespace
/// may never come back.
pub fn sweep() {
    sweep_in(Path::new(RUN_DIRECTORY));
}

fn sweep_in(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let inode = name.strip_prefix("netns-").and_then(|rest| rest.strip_suffix(".lock"));
        if inode.is_some_and(|inode| inode.parse::<u64>().is_ok()) {
            // Who holds it keeps it; who wants it in this moment waits longer than this takes.
            drop(Lock::take(&path));
        }
    }
}

/// How long an agent that starts waits for a lock. The holder may have been killed while it started a program: the
/// program's process holds what it inherited until it has become that program.
const PATIENCE: Duration = Duration::from_secs(3);

impl Lock {
    /// As [`Lock::take`], but waits a few seconds for whoever holds it.
    ///
    /// # Errors
    /// See [`LockError`]; nothing is held then.
    pub fn take_patiently(path: impl Into<PathBuf>) -> Result<Self, LockError> {
        let path = path.into();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::take(&path) {
                Err(LockError::Held { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                outcome => return outcome,
            }
        }
    }

    /// Takes the lock without waiting, and makes its directory if it is not there.
    ///
    /// # Errors
    /// See [`LockError`]; nothing is held then.
    pub fn take(path: impl Into<PathBuf>) -> Result<Self, LockError> {
        let path = path.into();
        loop {
            let attempt = Self::open(&path).and_then(|file| match file.try_lock() {
                // A holder that ends removes the file before it lets go: what we opened may have no name any more,
                // and the next process would lock another file of that name.
                Ok(()) => Ok(Attempt::Locked { named: is_at(&file, &path)?, file }),
                Err(TryLockError::WouldBlock) => Ok(Attempt::Held),
                Err(TryLockError::Error(error)) => Err(error),
            });
            match attempt {
                Ok(Attempt::Locked { named: true, file }) => return Ok(Self { path, _file: file }),
                Ok(Attempt::Locked { named: false, .. }) => {}
                Ok(Attempt::Held) => return Err(LockError::Held { path }),
                Err(source) => return Err(LockError::Io { path, source }),
            }
        }
    }

    fn open(path: &Path) -> io::Result<File> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A file that stays behind is found, locked and used by the next process: nothing is wrong with it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What trying once gave.
enum Attempt {
    Locked { named: bool, file: File },
    Held,
}

/// Whether `path` names the file that is open.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_a_stale_file_does_not_matter() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/for/it.lock");
        let lock = Lock::take(&path).unwrap();
        assert!(matches!(Lock::take(&path), Err(LockError::Held { .. })));
        drop(lock);
        assert!(!path.exists());
        std::fs::write(&path, "left behind by a killed process").unwrap();
        drop(Lock::take(&path).unwrap());
    }

    #[test]
    fn what_nobody_holds_is_swept() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let held = Lock::take(path("netns-1.lock")).unwrap();
        for file in ["netns-2.lock", "netns-x.lock", "netns-.lock", "default.sock"] {
            std::fs::write(path(file), "").unwrap();
        }
        sweep_in(directory.path());
        let mut left: Vec<_> =
            std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["default.sock", "netns-.lock", "netns-1.lock", "netns-x.lock"]);
        assert!(matches!(Lock::take(path("netns-1.lock")), Err(LockError::Held { .. })));
        drop(held);
        sweep_in(&path("none"));
    }

    #[test]
    fn a_lock_that_is_let_go_soon_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("soon.lock");
        let lock = Lock::take(&path).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| Lock::take_patiently(&path).map(drop));
            std::thread::sleep(Duration::from_millis(100));
            drop(lock);
            waiter.join().unwrap().unwrap();
        });
    }

    #[test]
    fn never_two_holders_while_many_come_and_go() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("contended.lock");
        let (holders, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        if let Ok(lock) = Lock::take(&path) {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                            taken.fetch_add(1, Ordering::SeqCst);
                            holders.fetch_sub(1, Ordering::SeqCst);
                            drop(lock);
                        }
                    }
                });
            }
        });
        assert!(taken.load(Ordering::SeqCst) > 0);
    }
}
