//! The kernel's connection tracking, read from a program: where fields are, and the ways to read them.

use core::ffi::c_void;
use core::ptr::from_mut;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::programs::TcContext;
use npm_common::conntrack::Tuple;

/// Where `_nfct` is in `struct sk_buff`, in bytes.
#[unsafe(no_mangle)]
static NFCT_OFFSET: Global<u32> = Global::new(0);
/// Where the original's tuple is in `struct nf_conn`, in bytes.
#[unsafe(no_mangle)]
static ORIGINAL_OFFSET: Global<u32> = Global::new(0);
/// Where the reply's tuple is.
#[unsafe(no_mangle)]
static REPLY_OFFSET: Global<u32> = Global::new(0);

/// A way to read the kernel's structures.
pub(crate) trait Read {
    /// The packet's `_nfct`. `None`: the kernel would not show it.
    fn nfct(context: &TcContext) -> Option<u64>;

    /// Reads a tuple of the entry at this address. `None`: the kernel would not show it.
    fn tuple(entry: u64, which: Which, to: &mut Tuple) -> Option<()>;
}

/// One of an entry's tuples.
#[derive(Clone, Copy)]
pub(crate) enum Which {
    Original,
    Reply,
}

impl Which {
    #[inline(always)]
    fn offset(self) -> u64 {
        u64::from(match self {
            Self::Original => ORIGINAL_OFFSET.load(),
            Self::Reply => REPLY_OFFSET.load(),
        })
    }
}

/// By the helper bpf_probe_read_kernel: in every kernel, unless it is locked down for confidentiality.
pub(crate) struct ByProbe;

impl Read for ByProbe {
    #[inline(always)]
    fn nfct(context: &TcContext) -> Option<u64> {
        let field = (context.skb.skb as u64).wrapping_add(u64::from(NFCT_OFFSET.load()));
        let mut nfct: u64 = 0;
        // SAFETY: the helper reads no memory that may not be read; any address may be asked for. `nfct` is of the length.
        let outcome = unsafe { bpf_probe_read_kernel(from_mut(&mut nfct).cast(), 8, field as *const c_void) };
        (outcome == 0).then_some(nfct)
    }

    #[inline(always)]
    fn tuple(entry: u64, which: Which, to: &mut Tuple) -> Option<()> {
        let from = entry.wrapping_add(which.offset());
        // SAFETY: the helper reads no memory that may not be read; any address may be asked for. `to` is of the length.
        let outcome = unsafe {
            bpf_probe_read_kernel(from_mut(to).cast(), size_of::<Tuple>() as u32, from as *const c_void)
        };
        (outcome == 0).then_some(())
    }
}
