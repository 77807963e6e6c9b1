//! What `cargo xtask bench` is made of. `datapath`: the world it measures, packets of new flows through a node, runs of the
//! program. `control`: a large cluster, the agent between an API server and the kernel. It measures; what is printed, and
//! what is too much, is its callers' business.

pub mod cluster;
pub mod control;
pub mod established;
pub mod lane;
pub mod runs;
pub mod world;
