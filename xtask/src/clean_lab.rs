//! `cargo xtask clean-lab`: deletes the lab's network namespaces whose process is gone, and what agents in them have pinned.
//!
//! The lab deletes its own at the end; what remains is of a process that was killed, or of a test that forgot it. A name is
//! `npmt-<pid>-...` with the process that made it, in decimal; instances of agents are called as their namespace.

use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result, bail};

use crate::exec::Program;
use crate::packages;

/// Deletes them and says which.
///
/// # Errors
/// When `ip` fails; namespaces before the failing one are gone.
pub(crate) fn run() -> Result<()> {
    if !packages::is_root()? {
        bail!("deleting network namespaces needs root: sudo -E env PATH=\"$PATH\" cargo xtask clean-lab");
    }
    let Some(ip) = packages::find_program("ip") else { return Ok(()) };
    for name in namespaces(&ip)? {
        Program::new(&ip).args(["netns", "delete", &name]).output()?;
        println!("deleted {name}");
    }
    for name in pins()? {
        fs::remove_dir_all(Path::new(PINS).join(&name))
            .with_context(|| format!("deleting what {name} pinned"))?;
        println!("deleted what {name} had pinned");
    }
    Ok(())
}

/// Fails if a process that has ended has left something behind.
///
/// # Errors
/// It has, or it can't be seen.
pub(crate) fn check() -> Result<()> {
    let Some(ip) = packages::find_program("ip") else { return Ok(()) };
    let left: Vec<String> = namespaces(&ip)?.into_iter().chain(pins()?).collect();
    if !left.is_empty() {
        bail!(
            "namespaces or pins are left behind (`cargo xtask clean-lab` deletes them): {}",
            left.join(", ")
        );
    }
    Ok(())
}

/// Where agents pin, by instance.
const PINS: &str = "/sys/fs/bpf/npm-agent";

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn namespaces(ip: &Path) -> Result<Vec<String>> {
    let list = Program::new(ip).args(["netns", "list"]).output()?;
    Ok(leftovers(&list, is_alive).into_iter().map(str::to_owned).collect())
}

fn pins() -> Result<Vec<String>> {
    let entries = match fs::read_dir(PINS) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("listing what is pinned"),
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<io::Result<_>>().context("listing what is pinned")?;
    Ok(leftovers(&names.join("\n"), is_alive).into_iter().map(str::to_owned).collect())
}

/// The names in `ip netns list`'s output that are the lab's and whose process is not alive.
fn leftovers(list: &str, alive: impl Fn(u32) -> bool) -> Vec<&str> {
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| owner(name).is_some_and(|pid| !alive(pid)))
        .collect()
}

/// The process that a lab namespace's name carries; `None` for names that are not the lab's.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("npmt-")?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_labs_and_only_dead_ones() {
        let list = "npmt-10-node (id: 0)\nnpmt-11-pod-7\nother-10\nnpmt-node\nnpmt-a-13\ncni-12\n";
        assert_eq!(leftovers(list, |pid| pid == 11), ["npmt-10-node"]);
    }
}
