//! The TC programs.
//!
//! - `observe` counts what would reach judgement, and judges nothing: it reads every packet that passes with the parser
//!   that user space tests (npm_common::packet) and counts it by family, protocol and how far it could be read.
//!   Whatever it sees, the packet goes on to whatever program is next.
//! - `nothing` is what others' times are compared with.
//! - `read_ethernet` and `read_network` say what was read of a packet's headers: tests run them.
//! - `verdict` says what the maps say of a packet's headers. It is run by BPF_PROG_TEST_RUN and never attached: what it
//!   returns is a code of npm_common::decide and no action.
//! - `npm_trace` says of each packet what it is and what the maps say of it, as text, and lets it pass.
//! - `enforce_*` and `mark_*` drop what policies deny, at TC egress: one program for each way to read the kernel's
//!   connections and each place of proofs, of which one is loaded.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(missing_docs, reason = "the classifier macro makes a public function of its own")]

mod conntrack;
mod enforce;
mod entry;
mod maps;
mod proof;
mod skb;
mod tell;
mod trace;

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use npm_common::decide::{Own, Verdict, unread};
use npm_common::packet::{Headers, code};
use npm_common::tally::{Class, Count, SLOTS};

use skb::{Start, read_into};

/// One count for each [`Class`], at its slot.
#[map]
static TALLY: PerCpuArray<Count> = PerCpuArray::with_max_entries(SLOTS, 0);

/// Counts the packet and lets the next program decide.
#[classifier]
pub fn observe(context: TcContext) -> i32 {
    let mut headers = Headers::default();
    let outcome = read_into(&context, Start::Ethernet, &mut headers);
    let class = Class::of(outcome.as_ref().map(|()| &headers));
    if let Some(count) = TALLY.get_ptr_mut(class.slot()) {
        // SAFETY: the kernel gave the pointer to this CPU's value, and no other program of this CPU runs meanwhile.
        let count = unsafe { &mut *count };
        count.packets += 1;
        count.bytes += u64::from(context.len());
    }
    TC_ACT_UNSPEC
}

/// Does nothing: what a run costs without a program in it.
#[classifier]
pub fn nothing(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// What is read from the packet's first byte on, as a number: tests compare it with what user space reads.
#[classifier]
pub fn read_ethernet(context: TcContext) -> i32 {
    digest(&context, Start::Ethernet)
}

/// What is read from the packet's network header on, as a number.
#[classifier]
pub fn read_network(context: TcContext) -> i32 {
    digest(&context, Start::Network)
}

#[inline(always)]
fn digest(context: &TcContext, start: Start) -> i32 {
    let mut headers = Headers::default();
    let code = code(read_into(context, start, &mut headers));
    headers.digest().wrapping_add(code) as i32
}

/// The code of what the maps say of the packet, taken for the first of a connection.
#[classifier]
pub fn verdict(context: TcContext) -> i32 {
    let mut headers = Headers::default();
    let code = match read_into(&context, Start::Ethernet, &mut headers) {
        // No policy judges it.
        Ok(()) if headers.is_neighbour_discovery() => Verdict::FREE.code(),
        Ok(()) => enforce::judge_ends(headers.family(), headers.ends(), Own::Free),
        Err(error) => unread(error),
    };
    code as i32
}

/// Tells of the packet, and lets the next program decide.
#[classifier]
pub fn npm_trace(context: TcContext) -> i32 {
    trace::trace(&context);
    TC_ACT_UNSPEC
}

/// Judges what leaves the node, reading the kernel's connections with bpf_probe_read_kernel; proofs are in a map.
#[classifier]
pub fn enforce_probe(context: TcContext) -> i32 {
    enforce::enforce::<conntrack::ByProbe, proof::InMaps>(&context)
}

/// As [`enforce_probe`], reading them with casts.
#[classifier]
pub fn enforce_cast(context: TcContext) -> i32 {
    enforce::enforce::<conntrack::ByCast, proof::InMaps>(&context)
}

/// As [`enforce_probe`]; proofs are in the connections' marks.
#[classifier]
pub fn mark_probe(context: TcContext) -> i32 {
    enforce::enforce::<conntrack::ByProbe, proof::InMarks>(&context)
}

/// As [`mark_probe`], reading connections with casts.
#[classifier]
pub fn mark_cast(context: TcContext) -> i32 {
    enforce::enforce::<conntrack::ByCast, proof::InMarks>(&context)
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
