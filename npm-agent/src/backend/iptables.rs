//! The iptables/ipset backend: Azure NPM's chains and sets, converged from whatever is in the kernel.

pub mod interpret;
pub mod layout;
pub mod plan;
pub mod render;
pub mod state;
pub mod text;
