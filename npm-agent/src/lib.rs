//! npm-agent as a library: sources, backends, reconcile loop, and the command line over them.
#![forbid(unsafe_code)]

pub mod backend;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod exec;
pub mod http;
pub mod lock;
pub mod logging;
pub mod matrix;
pub mod reconcile;
pub mod run;
pub mod source;
pub mod status;
