//! What the process keeps of memory that it does not use: as little as the allocator allows.
//!
//! By itself glibc's allocator has heaps for each thread, of which none gets what another has left, and after the first
//! large piece it keeps large pieces in them as well (mallopt(3)). Of a large cluster that is a quarter of all that the
//! agent would have in memory.
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "mallopt and malloc_trim have no other form"))]

/// Pieces from here on are given back to the system when they are freed, in bytes: what the allocator begins with.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 << 10;

/// Has all threads share one heap, and large pieces given back. With another allocator it does nothing.
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, LARGE)] {
        // SAFETY: it takes two numbers, and refuses those that it does not like.
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            tracing::debug!(parameter, value, "the allocator keeps to its own ways");
        }
    }
}

/// Gives back to the system what is free in between: for when much was freed, or is about to be needed. It takes some
/// milliseconds for each 100 MB.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number of bytes that may stay, and moves nothing that is in use (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}
