//! The npm-agent binary.
#![forbid(unsafe_code)]
fn main() {}
