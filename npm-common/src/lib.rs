//! What the two sides of the kernel boundary must agree on: mark bits, protocol numbers, header layouts, counters, the
//! maps and the decision that is made on them.
#![no_std]
#![forbid(unsafe_code)]

pub mod conntrack;
pub mod decide;
pub mod event;
pub mod layout;
pub mod mark;
pub mod packet;
pub mod tally;
