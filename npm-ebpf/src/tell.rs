//! Tells user space of packets that are dropped, if it is to be told.
//!
//! Nobody is woken: a reader looks now and then. A flood fills the ring, and what finds no room is counted; so it costs its
//! packets little and others nothing.

use aya_ebpf::Global;
use aya_ebpf::bindings::{__sk_buff, BPF_RB_NO_WAKEUP};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{PerCpuArray, RingBuf};
use npm_common::conntrack::Tuples;
use npm_common::event::{Dropped, Outcome, RING_BYTES};
use npm_common::packet::Headers;

use crate::enforce::Way;

#[map]
static DROPPED: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);

/// Dropped packets for which the ring had no room.
#[map]
static UNTOLD: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Whether user space is to be told: 0 no. The verifier knows the number and leaves out what it switches off.
#[unsafe(no_mangle)]
static TELL: Global<u32> = Global::new(0);

/// Tells of a packet of a connection, by the direction that it goes.
#[inline(always)]
pub(crate) fn connection(skb: *mut __sk_buff, tuples: &Tuples, way: Way, outcome: Outcome) {
    if TELL.load() != 0 {
        tell_connection(skb, tuples, (way == Way::Returning).into(), outcome.slot());
    }
}

/// Tells of a packet by its headers.
#[inline(always)]
pub(crate) fn headers(skb: *mut __sk_buff, headers: &Headers, outcome: Outcome) {
    if TELL.load() != 0 {
        tell_headers(skb, headers, outcome.slot());
    }
}

/// A function of its own, as the next: the event is not on the caller's stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tell_connection(
    skb: *mut __sk_buff,
    tuples: *const Tuples,
    returning: u32,
    outcome: u32,
) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(tuples) = (unsafe { tuples.as_ref() }) else { return 0 };
    let Some(family) = tuples.family() else { return 0 };
    let ends = if returning == 1 { tuples.returning() } else { tuples.opening() };
    tell(skb, Headers::of_ends(family, ends, tuples.original.protocol), outcome);
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tell_headers(skb: *mut __sk_buff, headers: *const Headers, outcome: u32) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(headers) = (unsafe { headers.as_ref() }) else { return 0 };
    tell(skb, *headers, outcome);
    1
}

#[inline(always)]
fn tell(skb: *mut __sk_buff, headers: Headers, outcome: u32) {
    // SAFETY: the kernel gave the pointer, and keeps what it is to until the program has ended.
    let interface = unsafe { (*skb).ifindex };
    let event = Dropped { headers, outcome, interface };
    if DROPPED.output::<Dropped>(&event, u64::from(BPF_RB_NO_WAKEUP)).is_err()
        && let Some(count) = UNTOLD.get_ptr_mut(0)
    {
        // SAFETY: the kernel gave the pointer to this CPU's value, and no other program of this CPU runs meanwhile.
        unsafe { *count += 1 };
    }
}
