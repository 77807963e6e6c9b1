//! What `cargo xtask bench datapath` is made of: the world it measures, packets of new flows through a node, runs of
//! the program. It measures; what is printed, and what is too much, is its callers' business.

pub mod established;
pub mod lane;
pub mod runs;
pub mod world;
