//! The TC program `observe`: counts what would reach judgement, and judges nothing.
//!
//! It reads every packet that passes with the parser that user space tests (npm_common::packet) and counts it by
//! family, protocol and how far it could be read. Whatever it sees, the packet goes on to whatever program is next.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the classifier macro makes a public function of its own")]

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::bpf_skb_load_bytes;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use npm_common::packet::{Bytes, parse_ethernet};
use npm_common::tally::{Class, Count, SLOTS};

/// One count for each [`Class`], at its slot.
#[map]
static TALLY: PerCpuArray<Count> = PerCpuArray::with_max_entries(SLOTS, 0);

/// Offsets past this are never read: no chain of headers that the parser follows is longer, and the verifier wants a
/// bound.
const MAX_OFFSET: usize = 0x7fff;

/// The packet's bytes, checked against what the kernel says is there.
struct SkbBytes<'a> {
    context: &'a TcContext,
}

impl Bytes for SkbBytes<'_> {
    #[inline(always)]
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        let start = self.context.data() + offset;
        if start + N <= self.context.data_end() {
            // SAFETY: the comparison above shows that N bytes from `start` on are in the packet; an array of bytes
            // has no alignment.
            return Some(unsafe { *(start as *const [u8; N]) });
        }
        // Not in the linear part: the kernel copies it from wherever it is, or says that it does not exist.
        let mut bytes = [0; N];
        // SAFETY: the pointer is to N writable bytes, and N is the length.
        let outcome = unsafe {
            bpf_skb_load_bytes(
                self.context.skb.skb.cast(),
                offset as u32,
                bytes.as_mut_ptr().cast(),
                N as u32,
            )
        };
        (outcome == 0).then_some(bytes)
    }
}

/// Counts the packet and lets the next program decide.
#[classifier]
pub fn observe(context: TcContext) -> i32 {
    let class = Class::of(&parse_ethernet(&SkbBytes { context: &context }));
    if let Some(count) = TALLY.get_ptr_mut(class.slot()) {
        // SAFETY: the kernel gave the pointer to this CPU's value, and no other program of this CPU runs meanwhile.
        let count = unsafe { &mut *count };
        count.packets += 1;
        count.bytes += u64::from(context.len());
    }
    TC_ACT_UNSPEC
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program in which this can be reached.
    loop {}
}

/// The licence as the kernel reads it: helpers for the GPL only are allowed.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
