//! A packet's bytes, wherever the kernel keeps them.

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{bpf_skb_load_bytes, bpf_skb_load_bytes_relative};
use aya_ebpf::programs::TcContext;
use npm_common::packet::Bytes;

/// Offsets past this are never read: no chain of headers that the parser follows is longer, and the verifier wants a
/// bound.
const MAX_OFFSET: usize = 0x7fff;

/// The packet's bytes, checked against what the kernel says is there.
pub(crate) struct SkbBytes<'a> {
    pub(crate) context: &'a TcContext,
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

/// The packet's bytes from its IP header on, wherever the link layer's header ends: devices without one have the same.
pub(crate) struct NetworkBytes<'a> {
    pub(crate) context: &'a TcContext,
}

impl Bytes for NetworkBytes<'_> {
    #[inline(always)]
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        let mut bytes = [0; N];
        // SAFETY: the pointer is to N writable bytes, and N is the length.
        let outcome = unsafe {
            bpf_skb_load_bytes_relative(
                self.context.skb.skb.cast(),
                offset as u32,
                bytes.as_mut_ptr().cast(),
                N as u32,
                BPF_HDR_START_NET,
            )
        };
        (outcome == 0).then_some(bytes)
    }
}
