//! The kernel's connection tracking, read from a program: where fields are, and the ways to read them.

use core::arch::asm;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::from_mut;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::programs::TcContext;
use npm_common::conntrack::Tuple;
use npm_common::kfunc::{CAST, CAST_CONTEXT};

/// Where `_nfct` is in `struct sk_buff`, in bytes.
#[unsafe(no_mangle)]
static NFCT_OFFSET: Global<u32> = Global::new(0);
/// Where the original's tuple is in `struct nf_conn`, in bytes.
#[unsafe(no_mangle)]
static ORIGINAL_OFFSET: Global<u32> = Global::new(0);
/// Where the reply's tuple is.
#[unsafe(no_mangle)]
static REPLY_OFFSET: Global<u32> = Global::new(0);

/// Where `mark` is.
#[unsafe(no_mangle)]
pub(crate) static MARK_OFFSET: Global<u32> = Global::new(0);

/// The kernel's number for the type `struct nf_conn`; only the programs that cast read it.
#[unsafe(no_mangle)]
static ENTRY_TYPE: Global<u32> = Global::new(0);

/// A way to read the kernel's structures.
pub(crate) trait Read {
    /// The packet's `_nfct`. `None`: the kernel would not show it.
    fn nfct(context: &TcContext) -> Option<u64>;

    /// Reads a tuple of the entry at this address. `None`: the kernel would not show it.
    fn tuple(entry: u64, which: Which, to: &mut Tuple) -> Option<()>;

    /// The same by words, in registers as far as they go. `None`: the kernel would not show it.
    fn words(entry: u64, which: Which) -> Option<[u64; 5]>;

    /// The mark of the entry at this address. `None`: the kernel would not show it.
    fn mark(entry: u64) -> Option<u32>;
}

/// One of an entry's tuples.
#[derive(Clone, Copy)]
pub(crate) enum Which {
    Original,
    Reply,
}

impl Which {
    /// [`Tuple::direction`]: an entry's tuples say where they are.
    #[inline(always)]
    const fn direction(self) -> u8 {
        match self {
            Self::Original => 0,
            Self::Reply => 1,
        }
    }

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

    #[inline(always)]
    fn words(entry: u64, which: Which) -> Option<[u64; 5]> {
        let from = entry.wrapping_add(which.offset());
        let mut words = MaybeUninit::<[u64; 5]>::uninit();
        // SAFETY: as above; where the helper succeeds it has written all words.
        unsafe {
            let length = size_of::<Tuple>() as u32;
            let outcome = bpf_probe_read_kernel(words.as_mut_ptr().cast(), length, from as *const c_void);
            (outcome == 0).then(|| words.assume_init())
        }
    }

    #[inline(always)]
    fn mark(entry: u64) -> Option<u32> {
        let from = entry.wrapping_add(u64::from(MARK_OFFSET.load()));
        let mut mark: u32 = 0;
        // SAFETY: the helper reads no memory that may not be read; any address may be asked for. `mark` is of the length.
        let outcome = unsafe { bpf_probe_read_kernel(from_mut(&mut mark).cast(), 4, from as *const c_void) };
        (outcome == 0).then_some(mark)
    }
}

/// By the kernel's functions bpf_cast_to_kern_ctx and bpf_rdonly_cast (6.2 and later): the verifier puts plain loads in
/// their place. It is for kernels whose own types hold those of connection tracking.
pub(crate) struct ByCast;

impl Read for ByCast {
    #[inline(always)]
    fn nfct(context: &TcContext) -> Option<u64> {
        let buffer: u64;
        // SAFETY: the call is as bpf_cast_to_kern_ctx takes it, and changes the registers that every call does.
        unsafe {
            asm!(
                "call {function}",
                function = const CAST_CONTEXT,
                inlateout("r1") context.skb.skb => _,
                lateout("r0") buffer,
                lateout("r2") _,
                lateout("r3") _,
                lateout("r4") _,
                lateout("r5") _,
            );
        }
        let field = buffer.wrapping_add(u64::from(NFCT_OFFSET.load())) as *const u64;
        // SAFETY: the verifier has checked that the packet's structure holds a number there.
        Some(unsafe { field.read_volatile() })
    }

    #[inline(always)]
    fn tuple(entry: u64, which: Which, to: &mut Tuple) -> Option<()> {
        let from = cast(entry).wrapping_add(which.offset());
        let to = from_mut(to).cast::<u8>();
        // Each load within one member, as the verifier wants it; together they are the whole tuple.
        macro_rules! copy {
            ($($at:literal: $number:ty,)+) => {
                // SAFETY: the verifier has checked that the structure holds such a number there; a load from where no
                // memory is gives 0. `to` is of the same layout, and its members are aligned as these are.
                $(unsafe {
                    let number = (from.wrapping_add($at) as *const $number).read_volatile();
                    to.add($at).cast::<$number>().write(number);
                })+
            };
        }
        copy! {
            0: u64, 8: u64, 16: u16, 18: u16,
            20: u32, 24: u32, 28: u32, 32: u32, 36: u16, 38: u8, 39: u8,
        }
        Some(())
    }

    #[inline(always)]
    fn words(entry: u64, which: Which) -> Option<[u64; 5]> {
        let from = cast(entry).wrapping_add(which.offset());
        // As in `tuple`, with fewer loads: each takes a check of its address. Words that were put together in memory would be
        // read from there before they have arrived.
        macro_rules! load {
            ($at:literal: $number:ty) => {
                // SAFETY: as in `tuple`.
                unsafe { (from.wrapping_add($at) as *const $number).read_volatile() as u64 }
            };
        }
        Some([
            load!(0: u64),
            load!(8: u64),
            load!(16: u16) | load!(18: u16) << 16 | load!(20: u32) << 32,
            load!(24: u64),
            load!(32: u32) | load!(36: u16) << 32 | load!(38: u8) << 48 | (which.direction() as u64) << 56,
        ])
    }

    #[inline(always)]
    fn mark(entry: u64) -> Option<u32> {
        let field = cast(entry).wrapping_add(u64::from(MARK_OFFSET.load())) as *const u32;
        // SAFETY: the verifier has checked that the structure holds a number there; a load from where no memory is gives 0.
        Some(unsafe { field.read_volatile() })
    }
}

/// The address as that of a `struct nf_conn`, to be read only.
#[inline(always)]
fn cast(entry: u64) -> u64 {
    let known: u64;
    // SAFETY: the call is as bpf_rdonly_cast takes it, and changes the registers that every call does.
    unsafe {
        asm!(
            "call {function}",
            function = const CAST,
            inlateout("r1") entry => _,
            inlateout("r2") u64::from(ENTRY_TYPE.load()) => _,
            lateout("r0") known,
            lateout("r3") _,
            lateout("r4") _,
            lateout("r5") _,
        );
    }
    known
}
