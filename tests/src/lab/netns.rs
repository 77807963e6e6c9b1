//! Network namespaces: named, entered by fresh threads, and gone when dropped.
//!
//! Names are `npmt-<pid>-<lab>-<what>`: one that a dead process left behind can be told by its pid.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use crate::exec;

/// Where `ip netns` keeps the names (ip-netns(8)).
const NAMES: &str = "/run/netns";

/// Where agents keep their maps (npm_agent::backend::ebpf::pins).
const PINS: &str = "/sys/fs/bpf/npm-agent";

/// The labs of this process, counted for their names.
static LABS: AtomicU32 = AtomicU32::new(0);

/// A network namespace that exists as long as the [`Namespaces`] it came from.
#[derive(Clone, Debug)]
pub struct Netns {
    name: Arc<str>,
    file: Arc<File>,
}

impl Netns {
    /// The name that `ip netns` knows it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a fresh thread inside this namespace. Sockets that it makes stay in the namespace, programs
    /// that it starts run in it.
    ///
    /// # Errors
    /// The namespace can't be entered; or `work`'s own error.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_fresh_thread(|| {
            self.enter()?;
            work()
        })
    }

    /// Moves the calling thread into the namespace, for good. Call it on threads made for the purpose only.
    ///
    /// # Errors
    /// The caller is not root, or the thread may not move.
    pub fn enter(&self) -> Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering the namespace {}", self.name))
    }

    /// Runs a program inside the namespace.
    ///
    /// # Errors
    /// As [`exec::run`].
    pub fn exec(&self, program: &str, args: &[&str]) -> Result<String> {
        self.run(|| exec::run(program, args))
    }

    /// Runs a program with input inside the namespace.
    ///
    /// # Errors
    /// As [`exec::run`].
    pub fn exec_with_input(&self, program: &str, args: &[&str], input: &str) -> Result<String> {
        self.run(|| exec::run_with_input(program, args, input))
    }
}

/// Runs `work` on a thread of its own, which may change namespaces as it likes.
///
/// # Errors
/// `work`'s own.
pub fn on_fresh_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// A group of namespaces, deleted together when dropped.
#[derive(Debug)]
pub struct Namespaces {
    prefix: String,
    members: Vec<Netns>,
}

impl Namespaces {
    /// Makes one namespace for each of `labels`, in order.
    ///
    /// # Errors
    /// The caller is not root, or `ip` is missing.
    pub fn create<'a>(labels: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        remove_stale()?;
        let prefix = format!("npmt-{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let names: Vec<String> = labels.into_iter().map(|label| format!("{prefix}-{label}")).collect();
        let mut group = Self { prefix, members: Vec::new() };
        let batch: String = names.iter().map(|name| format!("netns add {name}\n")).collect();
        exec::run_with_input("ip", &["-batch", "-"], &batch)?;
        for name in names {
            let path = Path::new(NAMES).join(&name);
            let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            group.members.push(Netns { name: name.into(), file: Arc::new(file) });
        }
        Ok(group)
    }

    /// The namespaces, in the order of the labels they were made for.
    pub fn members(&self) -> &[Netns] {
        &self.members
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        let removed = named(|name| name.starts_with(&format!("{}-", self.prefix))).and_then(remove);
        if let Err(error) = removed {
            eprintln!("namespaces {}-* are left behind: {error:#}", self.prefix);
        }
        remove_pins(|name| name.starts_with(&format!("{}-", self.prefix)));
    }
}

/// Removes what agents that were killed have pinned: their instances are called as their namespaces are.
fn remove_pins(wanted: impl Fn(&str) -> bool) {
    for instance in std::fs::read_dir(PINS).into_iter().flatten().flatten() {
        if instance.file_name().to_str().is_some_and(&wanted) {
            // Whatever holds it is somebody else's, or goes with the next test.
            let _ = std::fs::remove_dir_all(instance.path());
        }
    }
}

/// Removes the namespaces that dead processes left behind.
fn remove_stale() -> Result<()> {
    let is_stale = |name: &str| {
        let pid = name.strip_prefix("npmt-").and_then(|rest| rest.split('-').next());
        let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
        pid.is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists())
    };
    remove_pins(is_stale);
    let stale = named(is_stale)?;
    // Another process may be removing the same ones.
    if let Err(error) = remove(stale)
        && !named(|name| name.starts_with("npmt-"))?.is_empty()
    {
        eprintln!("removing stale namespaces: {error:#}");
    }
    Ok(())
}

fn named(wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(NAMES) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("listing {NAMES}")),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.with_context(|| format!("listing {NAMES}"))?.file_name();
        names.extend(name.to_str().filter(|name| wanted(name)).map(str::to_owned));
    }
    Ok(names)
}

fn remove(names: Vec<String>) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let batch: String = names.iter().map(|name| format!("netns del {name}\n")).collect();
    exec::run_with_input("ip", &["-force", "-batch", "-"], &batch).map(drop)
}
