//! npm-agent as a library: sources, backends, reconcile loop, and the command line over them.
#![deny(unsafe_code)]

pub mod backend;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod conntrack;
pub mod denied;
pub mod disturbance;
pub mod escape;
pub mod exec;
pub mod http;
pub mod interfaces;
pub mod lock;
pub mod logging;
pub mod matrix;
mod memory;
pub mod metrics;
mod netlink;
pub mod reconcile;
pub mod run;
pub mod source;
pub mod status;
