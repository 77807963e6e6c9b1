//! The bits of the packet mark that are ours while a packet is judged (Azure NPM's values; kube-proxy uses
//! 0x4000 and 0x8000).

/// The direction being judged allows the packet.
pub const ALLOWED: u32 = 0x200;
/// A policy isolates the destination for ingress.
pub const INGRESS_ISOLATED: u32 = 0x400;
/// A policy isolates the source for egress.
pub const EGRESS_ISOLATED: u32 = 0x800;
/// All bits of ours: clear when a packet enters our chains' judgement and when it leaves.
pub const MASK: u32 = ALLOWED | INGRESS_ISOLATED | EGRESS_ISOLATED;

const _: () = assert!(MASK == 0xe00);
