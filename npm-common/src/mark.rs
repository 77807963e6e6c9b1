//! The bits of the packet mark that are ours while a packet is judged (Azure NPM's values; kube-proxy uses
//! 0x4000 and 0x8000), and the bit of the connection mark that is the proof of an allowed connection.

/// The direction being judged allows the packet.
pub const ALLOWED: u32 = 0x200;
/// A policy isolates the destination for ingress.
pub const INGRESS_ISOLATED: u32 = 0x400;
/// A policy isolates the source for egress.
pub const EGRESS_ISOLATED: u32 = 0x800;
/// All bits of ours: clear when a packet enters our chains' judgement and when it leaves.
pub const MASK: u32 = ALLOWED | INGRESS_ISOLATED | EGRESS_ISOLATED;

const _: () = assert!(MASK == 0xe00);

/// kube-proxy's bits of the packet mark: to be masqueraded, to be dropped (its `--iptables-masquerade-bit` moves the
/// first).
pub const KUBE_PROXY: u32 = 0xc000;

/// The bit of the *connection* mark that says: this connection was judged, and allowed when it was judged last. Nobody
/// who is known to write connection marks writes this one: docs/configuration.md, "The proof bit".
pub const PROOF: u32 = 0x0100_0000;

/// A bit of the connection mark that may be the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProofBit(u32);

impl ProofBit {
    /// [`PROOF`].
    pub const DEFAULT: Self = Self(PROOF);

    /// The bit that is set in `mask`. `None` if it is not exactly one, or if it or [`ProofBit::cut_mask`] means something in
    /// packet marks: rules that copy connection marks to packet marks are common.
    pub const fn new(mask: u32) -> Option<Self> {
        let both = mask | mask.rotate_left(1);
        if mask.count_ones() == 1 && both & (MASK | KUBE_PROXY) == 0 { Some(Self(mask)) } else { None }
    }

    /// The bit as a mask.
    pub const fn mask(self) -> u32 {
        self.0
    }

    /// The next higher bit, which says: this connection is cut, because policies deny it by now. Only where denied
    /// connections are cut does anybody set it or ask for it.
    pub const fn cut_mask(self) -> u32 {
        self.0.rotate_left(1)
    }
}

impl Default for ProofBit {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const _: () = assert!(ProofBit::new(PROOF).is_some());
