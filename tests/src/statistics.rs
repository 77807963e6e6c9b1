//! Whether this machine's kernel times eBPF programs: `kernel.bpf_stats_enabled`, one setting for all namespaces.

use std::fs::File;
use std::io::{Read, Seek, Write};

use anyhow::{Context, Result};
use npm_agent::backend::meter::Timekeeping;

const PATH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// The setting, for one test of the machine at a time. Dropped, it is as it was before.
///
/// A test that is killed leaves it as it has set it.
#[derive(Debug)]
pub struct Statistics {
    file: File,
    before: String,
}

impl Statistics {
    /// Waits until no other test of the machine, of whatever process, has it.
    ///
    /// # Errors
    /// The caller is not root, or the kernel has no such setting (before 5.1).
    pub fn hold() -> Result<Self> {
        let file = File::options().read(true).write(true).open(PATH);
        let mut file = file.with_context(|| format!("opening {PATH}"))?;
        // The lock is the setting's own file, so that it is the same for whoever looks for it.
        file.lock().with_context(|| format!("locking {PATH}"))?;
        let mut before = String::new();
        file.read_to_string(&mut before).with_context(|| format!("reading {PATH}"))?;
        Ok(Self { file, before })
    }

    /// From here on programs are timed, or not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set(&mut self, timekeeping: Timekeeping) -> Result<()> {
        self.write(match timekeeping {
            Timekeeping::Off => "0\n",
            Timekeeping::On => "1\n",
        })
    }

    fn write(&mut self, text: &str) -> Result<()> {
        self.file.rewind().with_context(|| format!("rewinding {PATH}"))?;
        self.file.write_all(text.as_bytes()).with_context(|| format!("writing {PATH}"))
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        let before = std::mem::take(&mut self.before);
        if let Err(error) = self.write(&before) {
            eprintln!("whether programs are timed is not as it was: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::require_root;

    #[test]
    fn it_is_as_it_was_also_after_a_panic() -> Result<()> {
        if !require_root() {
            return Ok(());
        }
        let before = Statistics::hold()?.before.clone();
        let panicked = std::thread::spawn(|| {
            let mut statistics = Statistics::hold().unwrap();
            let other = if statistics.before == "0\n" { Timekeeping::On } else { Timekeeping::Off };
            statistics.set(other).unwrap();
            assert_eq!(std::fs::read_to_string(PATH).unwrap(), statistics.before, "planted");
        });
        assert!(panicked.join().is_err(), "it was not set");
        assert_eq!(Statistics::hold()?.before, before);
        Ok(())
    }
}
