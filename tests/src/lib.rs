//! The lab and what the tests share.

pub mod features;
pub mod random;
