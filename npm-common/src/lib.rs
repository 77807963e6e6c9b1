//! What the two sides of the kernel boundary must agree on: mark bits, protocol numbers, header layouts, counters.
#![no_std]
#![forbid(unsafe_code)]

pub mod mark;
pub mod packet;
pub mod tally;
