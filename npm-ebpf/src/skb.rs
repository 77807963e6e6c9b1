//! A packet's bytes, wherever the kernel keeps them, and its headers, read from them.
//!
//! The functions that parse are global ones (BPF_FUNC_GLOBAL): the verifier checks each by itself, for whatever it may
//! be called with, and a program that calls it goes on from one state.

use core::arch::asm;
use core::ptr::NonNull;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{bpf_skb_load_bytes, bpf_skb_load_bytes_relative};
use aya_ebpf::programs::TcContext;
use npm_common::packet::{
    Bytes, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, Headers, MAX_OFFSET, Network, ParseError, behind_ethernet,
    code, outcome, read,
};

/// Where a packet is read from.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    /// The Ethernet header that the packet begins with, as every packet of a test run does, and of devices of
    /// ARPHRD_ETHER and ARPHRD_LOOPBACK. Fast.
    Ethernet,
    /// The network header, where the kernel says that it is; for devices of every kind, those whose packets begin with
    /// the IP header (tun, ipip, WireGuard) included. A call of the kernel for each header.
    Network,
}

/// Reads a packet's headers into `headers`; on an error they hold what was read until there.
///
/// # Errors
/// What can't be read.
#[inline(always)]
pub(crate) fn read_into(context: &TcContext, start: Start, headers: &mut Headers) -> Result<(), ParseError> {
    let skb = context.skb.skb;
    // SAFETY: the kernel gave the pointer for as long as the program runs.
    let protocol = u16::from_be(unsafe { (*skb).protocol } as u16);
    match (start, protocol) {
        // What begins with a VLAN tag for the kernel is on a device that has Ethernet headers.
        (Start::Network, ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN) | (Start::Ethernet, _) => {
            let Network { ethertype, offset } = behind_ethernet(&FromStart { skb })?;
            outcome(read_from_start(skb, ethertype.into(), offset as u64, headers))
        }
        (Start::Network, ethertype) => outcome(read_from_network(skb, ethertype.into(), headers)),
    }
}

/// [`read`] as a function that the verifier checks by itself: with arguments that it takes, and the result as a
/// [`code`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_from_start(
    skb: *mut __sk_buff,
    ethertype: u64,
    offset: u64,
    headers: *mut Headers,
) -> u32 {
    let Some(mut headers) = NonNull::new(headers) else { return code(Err(ParseError::Truncated)) };
    // SAFETY: it is not null, and each caller's is to a value of its own.
    let headers = unsafe { headers.as_mut() };
    code(read(&FromStart { skb }, Network { ethertype: ethertype as u16, offset: offset as usize }, headers))
}

/// As [`read_from_start`], of a packet whose IP header is where the kernel says that the network header is.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_from_network(skb: *mut __sk_buff, ethertype: u64, headers: *mut Headers) -> u32 {
    let Some(mut headers) = NonNull::new(headers) else { return code(Err(ParseError::Truncated)) };
    // SAFETY: it is not null, and each caller's is to a value of its own.
    let headers = unsafe { headers.as_mut() };
    code(read(&FromNetwork { skb }, Network { ethertype: ethertype as u16, offset: 0 }, headers))
}

/// The first next-header field of a packet of IPv6. `None`: it can't be read.
#[inline(always)]
pub(crate) fn next_header(skb: *mut __sk_buff) -> Option<u8> {
    let mut next = [0; 1];
    FromNetwork { skb }.copy(6, &mut next)?;
    Some(next[0])
}

/// The packet's bytes from its network header on.
struct FromNetwork {
    skb: *mut __sk_buff,
}

impl Bytes for FromNetwork {
    #[inline(always)]
    fn copy<const N: usize>(&self, offset: usize, to: &mut [u8; N]) -> Option<()> {
        if offset > MAX_OFFSET {
            return None;
        }
        // SAFETY: the pointer is to N writable bytes, and N is the length.
        let outcome = unsafe {
            bpf_skb_load_bytes_relative(
                self.skb.cast(),
                offset as u32,
                to.as_mut_ptr().cast(),
                N as u32,
                BPF_HDR_START_NET,
            )
        };
        (outcome == 0).then_some(())
    }
}

/// Moves 8, 4, 2 or 1 bytes by one load and one store, wherever they lie: rustc would move them one by one, because for
/// it the target can't load from an address that is no multiple of the size. The kernel's verifier allows it where the
/// CPU can.
macro_rules! move_bytes {
    ($size:literal, $from:expr, $to:expr) => {
        asm!(
            concat!("{value} = *(", $size, " *)({from} + 0)"),
            concat!("*(", $size, " *)({to} + 0) = {value}"),
            from = in(reg) $from,
            to = in(reg) $to,
            value = out(reg) _,
            options(nostack),
        )
    };
}

/// The packet's bytes from its first one on, checked against what the kernel says is there.
struct FromStart {
    skb: *mut __sk_buff,
}

impl Bytes for FromStart {
    #[inline(always)]
    fn copy<const N: usize>(&self, offset: usize, to: &mut [u8; N]) -> Option<()> {
        if offset > MAX_OFFSET {
            return None;
        }
        // SAFETY: the kernel gave the pointer for as long as the program runs.
        let (data, end) = unsafe { ((*self.skb).data as usize, (*self.skb).data_end as usize) };
        let start = data + offset;
        if start + N <= end {
            let to = to.as_mut_ptr();
            let mut done = 0;
            while done + 8 <= N {
                // SAFETY: the comparison above shows that N bytes from `start` on are in the packet; `to` has N.
                unsafe { move_bytes!("u64", start + done, to.add(done)) };
                done += 8;
            }
            if done + 4 <= N {
                // SAFETY: as above.
                unsafe { move_bytes!("u32", start + done, to.add(done)) };
                done += 4;
            }
            if done + 2 <= N {
                // SAFETY: as above.
                unsafe { move_bytes!("u16", start + done, to.add(done)) };
                done += 2;
            }
            if done < N {
                // SAFETY: as above.
                unsafe { move_bytes!("u8", start + done, to.add(done)) };
            }
            return Some(());
        }
        // Not in the linear part: the kernel copies it from wherever it is, or says that it does not exist.
        // SAFETY: the pointer is to N writable bytes, and N is the length.
        let outcome =
            unsafe { bpf_skb_load_bytes(self.skb.cast(), offset as u32, to.as_mut_ptr().cast(), N as u32) };
        (outcome == 0).then_some(())
    }
}
