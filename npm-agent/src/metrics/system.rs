//! The process and the machine, as /proc tells at the moment of a scrape. What can't be read is left out.
//!
//! The prometheus crate's own collector would bring two more libraries along for these few numbers.

use std::fs;

use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

use super::catalogue::{self, Declared, Registries, Scope};
use super::pulled::Pulled;

/// Adds the process's and the machine's metrics.
pub(super) fn register(registries: &Registries) {
    let add = |declared: Declared, read: fn() -> Option<f64>| {
        registries.add(Scope::Node, Pulled::single(declared, read));
    };
    add(catalogue::CPU_SECONDS, || Process::now().map(|process| process.cpu_seconds));
    add(catalogue::RESIDENT_BYTES, || Process::now().map(|process| process.resident_bytes));
    add(catalogue::VIRTUAL_BYTES, || Process::now().map(|process| process.virtual_bytes));
    add(catalogue::THREADS, || Process::now().map(|process| process.threads));
    add(catalogue::START_TIME, || Some(boot_time()? + Process::now()?.started_after_boot));
    add(catalogue::OPEN_FILES, || Some(fs::read_dir("/proc/self/fd").ok()?.count() as f64));
    // No limit is shown as Prometheus' clients show it: as infinity.
    add(catalogue::MAX_FILES, || {
        Some(getrlimit(Resource::Nofile).current.map_or(f64::INFINITY, |most| most as f64))
    });
    add(catalogue::CONNTRACK_ENTRIES, || number("/proc/sys/net/netfilter/nf_conntrack_count"));
    add(catalogue::CONNTRACK_LIMIT, || number("/proc/sys/net/netfilter/nf_conntrack_max"));
}

/// From `/proc/self/stat` (proc_pid_stat(5)).
#[derive(Debug, PartialEq)]
struct Process {
    cpu_seconds: f64,
    threads: f64,
    started_after_boot: f64,
    virtual_bytes: f64,
    resident_bytes: f64,
}

impl Process {
    fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/stat").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The program's name is in parentheses and may hold anything, blanks and parentheses too.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // The manual counts from 1, and the third field is the first one here.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let ticks = clock_ticks_per_second() as f64;
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) / ticks,
            threads: field(20)?,
            started_after_boot: field(22)? / ticks,
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * page_size() as f64,
        })
    }
}

/// When the machine started, in seconds since 1970.
fn boot_time() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn number(path: &str) -> Option<f64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_anything_in_it_is_read() {
        let fields: Vec<String> = (4..=52).map(|number| number.to_string()).collect();
        let process = Process::parse(&format!("1 (a) b (c) S {}", fields.join(" "))).unwrap();
        let ticks = clock_ticks_per_second() as f64;
        assert_eq!(process.cpu_seconds, 29.0 / ticks);
        assert_eq!(process.threads, 20.0);
        assert_eq!(process.started_after_boot, 22.0 / ticks);
        assert_eq!(process.virtual_bytes, 23.0);
        assert_eq!(process.resident_bytes, 24.0 * page_size() as f64);
        assert_eq!(Process::parse("1 (a) S 2 3"), None);
    }

    #[test]
    fn this_process_has_started_and_uses_memory() {
        let process = Process::now().unwrap();
        assert!(process.resident_bytes > 100_000.0 && process.virtual_bytes >= process.resident_bytes);
        assert!(process.threads >= 1.0);
        assert!(boot_time().unwrap() + process.started_after_boot > 1.0e9, "seconds since 1970");
    }
}
