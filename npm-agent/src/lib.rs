//! npm-agent as a library: sources, backends, reconcile loop, and the command line over them.
#![forbid(unsafe_code)]

pub mod backend;
pub mod exec;
pub mod source;
