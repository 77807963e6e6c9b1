//! The pure core of npm-agent: what a cluster's NetworkPolicies mean, and what a node must program for them.
//!
//! ```text
//! Change ─► World ─► compile ─► Goal          what a backend programs
//!             │                  └─► Goal::verdict   the compiled rules, interpreted
//!             └─► verdict::oracle                    the API text, read literally and slowly
//! ```
//!
//! The crate does no I/O, reads no clock, draws no random number, logs nothing and starts no thread: its
//! `Cargo.toml` names no crate that could. `compile` and `verdict` share the data types of [`model`] and
//! [`world`], and no matching code: each is the other's check.
#![forbid(unsafe_code)]

pub mod compile;
mod few;
pub mod flow;
pub mod goal;
mod judge;
pub mod model;
pub mod names;
pub mod shared;
pub mod verdict;
pub mod world;
