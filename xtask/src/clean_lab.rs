//! `cargo xtask clean-lab`: deletes the lab's network namespaces whose process is gone.
//!
//! The lab deletes its own at the end; what remains is of a process that was killed. A name is `npmt-<pid>-...` with
//! the process that made it, in decimal.

use std::path::Path;

use anyhow::{Result, bail};

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
    let list = Program::new(&ip).args(["netns", "list"]).output()?;
    for name in leftovers(&list, |pid| Path::new(&format!("/proc/{pid}")).exists()) {
        Program::new(&ip).args(["netns", "delete", name]).output()?;
        println!("deleted {name}");
    }
    Ok(())
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
