//! Waiting until every program that runs now has ended.
//!
//! An update of a map of maps by the system call returns only then: kernel/bpf/syscall.c, maybe_wait_bpf_programs, waits
//! for an RCU grace period, and programs run within RCU's read side. It takes a few milliseconds, so it is begun as soon
//! as it is known that it will be needed, on a thread of its own.
#![expect(unsafe_code, reason = "a descriptor that the kernel has just given")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

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
    fn wait(&self) -> io::Result<()> {
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

/// The means to wait.
pub(super) struct Grace {
    pair: Arc<Pair>,
    begun: Option<JoinHandle<io::Result<()>>>,
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
        // Without a thread the wait is done when it is needed.
        self.begun = std::thread::Builder::new().name("bpf-grace".to_owned()).spawn(move || pair.wait()).ok();
    }

    /// Waits, from when it was begun, or from now.
    ///
    /// # Errors
    /// It could not be waited.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self.begun.take().map(JoinHandle::join) {
            Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(_)) | Err(_)) | None => self.pair.wait(),
        }
    }
}
