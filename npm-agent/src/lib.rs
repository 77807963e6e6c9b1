//! npm-agent as a library: sources, backends, reconcile loop, and the command line over them.
#![forbid(unsafe_code)]

pub mod backend;
pub mod cli;
pub mod config;
pub mod escape;
pub mod exec;
pub mod interfaces;
pub mod lock;
pub mod logging;
pub mod matrix;
mod netlink;
pub mod reconcile;
pub mod run;
pub mod source;
pub mod status;
