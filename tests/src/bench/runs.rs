//! Runs of the eBPF program by BPF_PROG_TEST_RUN, and what its maps take.

use std::time::Duration;

use anyhow::{Context, Result};
use aya::programs::{TestRun, TestRunOptions};
use npm_agent::backend::ebpf::kernel::Kernel;
use npm_policy::flow::Flow;

use crate::programs;

/// How often a run is repeated within the kernel, which gives the mean in whole nanoseconds.
const REPEAT: u32 = 10_000;

/// How long `verdict` takes for each of the flows, above an empty program that runs in turn with it: of so many rounds
/// the best of each. In nanoseconds.
///
/// # Errors
/// A program can't be loaded or run.
pub fn verdict_times(kernel: &Kernel, flows: &[Flow], rounds: u32) -> Result<Vec<u64>> {
    let mut object = programs::object()?;
    let empty = programs::program(&mut object, "nothing")?;
    empty.load().context("loading the empty program")?;
    flows
        .iter()
        .map(|flow| {
            let (mut best, mut best_empty) = (Duration::MAX, Duration::MAX);
            for _ in 0..rounds {
                best = best.min(kernel.time(flow, REPEAT)?);
                let frame = [0; 60];
                let mut options = TestRunOptions::new();
                options.data_in = Some(&frame);
                options.repeat = REPEAT;
                best_empty = best_empty.min(empty.test_run(options)?.duration);
            }
            let above = best.saturating_sub(best_empty);
            u64::try_from(above.as_nanos()).context("a time of less than a century")
        })
        .collect()
}

/// A map of this process, as the kernel accounts for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapMemory {
    /// `map_type` (`enum bpf_map_type`).
    pub map_type: String,
    /// `key_size` and `value_size`, in bytes.
    pub sizes_bytes: (u64, u64),
    /// `max_entries`.
    pub max_entries: u64,
    /// `memlock`: what it takes, in bytes.
    pub memory_bytes: u64,
}

/// All maps that this process has open: what the kernel says of them in `fdinfo`.
///
/// # Errors
/// It can't be read.
pub fn maps() -> Result<Vec<MapMemory>> {
    let mut maps = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").context("listing the open files")? {
        // The directory itself is open while it is listed, and gone after.
        let Ok(text) = std::fs::read_to_string(entry?.path()) else { continue };
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
            line.map(str::to_owned)
        };
        let Some(map_type) = field("map_type") else { continue };
        let number = |name: &str| -> Result<u64> {
            field(name).with_context(|| format!("no {name}"))?.parse().with_context(|| format!("a {name}"))
        };
        let map = MapMemory {
            map_type,
            sizes_bytes: (number("key_size")?, number("value_size")?),
            max_entries: number("max_entries")?,
            memory_bytes: number("memlock")?,
        };
        // A map may be open more than once.
        maps.insert(number("map_id")?, map);
    }
    Ok(maps.into_values().collect())
}
