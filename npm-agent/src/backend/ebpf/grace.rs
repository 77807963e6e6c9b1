//! Waiting until every program that runs now has ended.
//!
//! Packets meet programs with bottom halves disabled (net/core/dev.c, __dev_queue_xmit: rcu_read_lock_bh), and whoever runs so
//! is not preempted, unless the kernel is a real-time one. So once a thread has run on a CPU, whatever program ran there before
//! has ended; and a thread that has gone from CPU to CPU knows it of all. That takes some tens of microseconds for each.
//!
//! Where that is not so, can't be done, or takes too long, the kernel is asked. An update of a map of maps by the system call
//! returns only then: kernel/bpf/syscall.c, maybe_wait_bpf_programs, waits for an RCU grace period, and programs run within
//! RCU's read side. Either way takes a while, so it is begun as soon as it is known that it will be needed, on a thread of its
//! own.
#![expect(unsafe_code, reason = "a descriptor that the kernel has just given")]

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::fs::statfs;
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use super::syscall::bpf;

/// include/uapi/linux/bpf.h.
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;

/// The attributes of BPF_MAP_CREATE, as far as they are needed.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

/// The attributes of BPF_MAP_UPDATE_ELEM.
#[repr(C)]
struct Update {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn create(mut attributes: Create) -> io::Result<OwnedFd> {
    let fd = bpf(BPF_MAP_CREATE, &mut attributes)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given the descriptor to us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A map of maps with one entry, and what the entry is.
struct Pair {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl Pair {
    /// Leaves the calling thread on some CPU.
    fn wait(&self) -> io::Result<()> {
        if has_been_everywhere() { Ok(()) } else { self.ask_the_kernel() }
    }

    fn ask_the_kernel(&self) -> io::Result<()> {
        let key = 0_u32;
        let value = self.inner.as_raw_fd();
        bpf(
            BPF_MAP_UPDATE_ELEM,
            &mut Update {
                map_fd: self.outer.as_raw_fd().cast_unsigned(),
                pad: 0,
                // Both live until the call has ended.
                key: std::ptr::from_ref(&key) as u64,
                value: std::ptr::from_ref(&value) as u64,
                flags: 0,
            },
        )
        .map(drop)
    }
}

/// As long the thread may be on its way: a CPU that others keep busy lets it wait. To ask the kernel is right at any time.
const PATIENCE: Duration = Duration::from_millis(10);

/// On more CPUs the kernel is asked: it does not have to visit them one by one.
const MOST_CPUS: usize = 64;

/// `SYSFS_MAGIC` (include/uapi/linux/magic.h).
const SYSFS_MAGIC: i128 = 0x6265_6572;

/// The CPUs that programs may run on; `None`: not to be visited, or not known.
fn cpus() -> Option<BTreeSet<usize>> {
    const SYSTEM: &str = "/sys/devices/system/cpu";
    // A real-time kernel preempts programs. It says so in its version (init/Makefile, UTS_VERSION), some in a file too.
    let version = read_to_string("/proc/version").ok()?;
    if is_real_time(&version) || Path::new("/sys/kernel/realtime").exists() {
        return None;
    }
    // Who keeps CPUs to himself does not want visitors.
    let isolated = read_to_string(format!("{SYSTEM}/isolated")).unwrap_or_default();
    let path = format!("{SYSTEM}/online");
    // Mounted over it, a container may have a list of its own CPUs (lxcfs): programs run on all.
    if !statfs(&path).is_ok_and(|found| i128::from(found.f_type) == SYSFS_MAGIC) {
        return None;
    }
    let online = list(&read_to_string(path).ok()?)?;
    (isolated.trim().is_empty() && !online.is_empty() && online.len() <= MOST_CPUS).then_some(online)
}

fn is_real_time(version: &str) -> bool {
    version.contains("PREEMPT_RT") || version.contains("PREEMPT RT")
}

/// A list as `0-3,8` (Documentation/admin-guide/cputopology.rst).
fn list(text: &str) -> Option<BTreeSet<usize>> {
    let mut numbers = BTreeSet::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// Whether the calling thread has run on every CPU since it called.
fn has_been_everywhere() -> bool {
    let Some(before) = cpus() else { return false };
    // One that comes meanwhile runs nothing that began before.
    before.iter().all(|cpu| is_on(*cpu))
}

/// Whether the calling thread runs on this CPU now, where it may stay. It may not in a cpuset without it.
fn is_on(cpu: usize) -> bool {
    let mut there = CpuSet::new();
    if cpu >= CpuSet::MAX_CPU {
        return false;
    }
    there.set(cpu);
    sched_setaffinity(None, &there).is_ok() && sched_getcpu() == cpu
}

/// The means to wait.
pub(super) struct Grace {
    pair: Arc<Pair>,
    begun: Option<mpsc::Receiver<io::Result<()>>>,
}

impl Grace {
    /// # Errors
    /// The maps that it takes could not be made.
    pub(super) fn new() -> io::Result<Self> {
        let array = Create { key_size: 4, value_size: 4, max_entries: 1, ..Create::default() };
        let inner = create(Create { map_type: BPF_MAP_TYPE_ARRAY, ..array })?;
        let outer = create(Create {
            map_type: BPF_MAP_TYPE_ARRAY_OF_MAPS,
            inner_map_fd: inner.as_raw_fd().cast_unsigned(),
            ..array
        })?;
        Ok(Self { pair: Arc::new(Pair { outer, inner }), begun: None })
    }

    /// Begins to wait for all programs that run now; nothing that matters may be written before [`Grace::wait`].
    pub(super) fn begin(&mut self) {
        let pair = Arc::clone(&self.pair);
        let (say, hear) = mpsc::channel();
        let thread = std::thread::Builder::new().name("bpf-grace".to_owned());
        // Nobody may wait any more. Without a thread the wait is done when it is needed.
        let begun = thread.spawn(move || drop(say.send(pair.wait())));
        self.begun = begun.ok().map(|_| hear);
    }

    /// Waits, from when it was begun, or from now.
    ///
    /// # Errors
    /// It could not be waited.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self.begun.take().map(|begun| begun.recv_timeout(PATIENCE)) {
            Some(Ok(Ok(()))) => Ok(()),
            // The calling thread stays where it may run.
            Some(Ok(Err(_)) | Err(_)) | None => self.pair.ask_the_kernel(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read() {
        assert_eq!(list("0-3,8\n"), Some([0, 1, 2, 3, 8].into()));
        assert_eq!(list("5"), Some([5].into()));
        assert_eq!(list("\n"), Some([].into()));
        assert_eq!(list("0-x"), None);
    }

    #[test]
    fn real_time_kernels_are_told_from_others() {
        let version = |kind: &str| {
            format!("Linux version 6.12.0 (a@b) (gcc) #1 SMP {kind} Thu Jan  1 00:00:00 UTC 2026")
        };
        assert!(is_real_time(&version("PREEMPT_RT")) && is_real_time(&version("PREEMPT RT")));
        assert!(!is_real_time(&version("PREEMPT_DYNAMIC")) && !is_real_time(&version("")));
    }

    #[test]
    fn a_thread_visits_every_cpu() {
        let visited = std::thread::spawn(has_been_everywhere).join().unwrap();
        // Where the process may not run everywhere the kernel is asked.
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        assert_eq!(visited, cpus().is_some_and(|cpus| cpus.iter().all(|cpu| allowed.is_set(*cpu))));
    }
}
