//! The kernel's entries, written by the kernel's own functions (5.18 and later; marks since 6.1): the proof is set, an entry
//! that nobody may use is ended.
//!
//! The functions find entries of TCP and UDP only, in the zone that everybody is in who names none. They are asked for the
//! original tuple, and what they find is written to only if it is the packet's own entry.

use core::arch::asm;
use core::mem::offset_of;
use core::ptr::from_ref;

use aya_ebpf::Global;
use aya_ebpf::bindings::__sk_buff;
use npm_common::conntrack::{FAMILY_V4, Tuple};
use npm_common::kfunc::{CHANGE_TIMEOUT, LOOK_UP, RELEASE};
use npm_common::mark::PROOF;

use crate::conntrack::MARK_OFFSET;

/// The bit of an entry's mark that is the proof.
#[unsafe(no_mangle)]
static PROOF_BIT: Global<u32> = Global::new(PROOF);

/// Whether a mark holds the proof.
#[inline(always)]
pub(crate) fn is_proof(mark: u32) -> bool {
    mark & PROOF_BIT.load() != 0
}

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// There is none, or none that the kernel would give.
    Nothing,
    /// The packet's own, or another, which stays as it is: then the packet's has left the table.
    Entry,
}

/// `struct bpf_ct_opts` (net/netfilter/nf_conntrack_bpf.c) as of 5.18; from 6.10 on it may be longer and need not.
#[repr(C)]
struct Wanted {
    /// `BPF_F_CURRENT_NETNS`: the packet's network namespace.
    netns: i32,
    error: i32,
    protocol: u8,
    direction: u8,
    reserved: [u8; 2],
}

const CURRENT_NETNS: i32 = -1;
const WANTED_LEN_BYTES: u64 = 12;
const _: () = assert!(size_of::<Wanted>() == WANTED_LEN_BYTES as usize);

/// `struct bpf_sock_tuple` (include/uapi/linux/bpf.h): addresses, then ports; IPv4's is the beginning only.
#[repr(C, align(8))]
struct Key([u32; 10]);

const V4_LEN_BYTES: u64 = 12;
const V6_LEN_BYTES: u64 = 36;

/// Words of a [`Tuple`] of 4 bytes: where addresses begin.
const SOURCE: usize = 0;
const DESTINATION: usize = 5;

impl Key {
    #[inline(always)]
    fn of(tuple: &Tuple) -> (Self, u64) {
        let Tuple { source_port, destination_port, family, .. } = tuple;
        let ports = u32::from(u16::from_ne_bytes(*source_port))
            | u32::from(u16::from_ne_bytes(*destination_port)) << 16;
        // By words: the compiler would read bytes one by one.
        // SAFETY: a tuple has 10 words.
        let word = |index: usize| unsafe { from_ref(tuple).cast::<u32>().add(index).read() };
        let (a, e) = (word(SOURCE), word(DESTINATION));
        if *family == FAMILY_V4 {
            return (Self([a, e, ports, 0, 0, 0, 0, 0, 0, 0]), V4_LEN_BYTES);
        }
        let [b, c, d] = [1, 2, 3].map(|next| word(SOURCE + next));
        let [f, g, h] = [1, 2, 3].map(|next| word(DESTINATION + next));
        (Self([a, b, c, d, e, f, g, h, ports, 0]), V6_LEN_BYTES)
    }
}

const _: () =
    assert!(offset_of!(Tuple, source) == SOURCE * 4 && offset_of!(Tuple, destination) == DESTINATION * 4);

/// Looks the entry up, does something to it if it is the packet's own, and lets go of it. In one piece: the compiler must
/// not take the address that it knows for the one that the kernel gave, which is the same number and no number to the
/// verifier. What is done finds the entry in r7, the mark's address in r1, the proof's bit in r8, and may change r0 to r5.
macro_rules! with_entry {
    ($skb:expr, $original:expr, $entry:expr, [$($what:literal),+ $(,)?] $(, $name:ident = $function:expr)?) => {{
        let (key, len_bytes) = Key::of($original);
        let mut wanted =
            Wanted { netns: CURRENT_NETNS, error: 0, protocol: $original.protocol, direction: 0, reserved: [0; 2] };
        let found: u64;
        // SAFETY: the calls are as the functions take their arguments, and change the registers that every call does; what
        // they are given lives on the stack. The verifier has checked that the entry's mark may be written.
        unsafe {
            asm!(
                "call {look_up}",
                "if r0 == 0 goto 4f",
                "r7 = r0",
                "if r0 != r6 goto 3f",
                "r1 = r0",
                "r1 += r9",
                $($what,)+
                "3:",
                "r1 = r7",
                "call {release}",
                "r0 = 1",
                "4:",
                look_up = const LOOK_UP,
                release = const RELEASE,
                $($name = const $function,)?
                inlateout("r1") $skb => _,
                inlateout("r2") &raw const key => _,
                inlateout("r3") len_bytes => _,
                inlateout("r4") &raw mut wanted => _,
                inlateout("r5") WANTED_LEN_BYTES => _,
                inlateout("r6") $entry => _,
                lateout("r7") _,
                inlateout("r8") u64::from(PROOF_BIT.load()) => _,
                inlateout("r9") u64::from(MARK_OFFSET.load()) => _,
                lateout("r0") found,
            );
        }
        if found == 0 { Found::Nothing } else { Found::Entry }
    }};
}

// The instruction `lock *(u32 *)(r1 + 0) |= r2`, or `&=`, is spelt out: the assembler has it for CPUs with registers of 32
// bits only, as which this target does not count (Documentation/bpf/standardization/instruction-set.rst, atomic operations).

/// Sets the proof.
#[inline(always)]
pub(crate) fn prove(skb: *mut __sk_buff, original: &Tuple, entry: u64) -> Found {
    with_entry!(skb, original, entry, ["r2 = r8", ".quad 0x40000021c3"])
}

/// Ends the entry unless it has got the proof meanwhile.
#[inline(always)]
pub(crate) fn end_unproven(skb: *mut __sk_buff, original: &Tuple, entry: u64) -> Found {
    with_entry!(
        skb,
        original,
        entry,
        [
            "r2 = *(u32 *)(r1 + 0)",
            "r2 &= r8",
            "if r2 != 0 goto 3f",
            "r1 = r7",
            "r2 = 0",
            "call {change_timeout}"
        ],
        change_timeout = CHANGE_TIMEOUT
    )
}

/// Takes the proof back, and ends the entry.
#[inline(always)]
pub(crate) fn end(skb: *mut __sk_buff, original: &Tuple, entry: u64) -> Found {
    with_entry!(
        skb,
        original,
        entry,
        ["r2 = r8", "r2 ^= -1", ".quad 0x50000021c3", "r1 = r7", "r2 = 0", "call {change_timeout}"],
        change_timeout = CHANGE_TIMEOUT
    )
}
