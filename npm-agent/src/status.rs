//! What a running agent says about itself, over a unix socket: one JSON request line, one JSON answer line.
//!
//! A unix socket's path belongs to the file system, so the answer is there from every network namespace.

pub mod client;
pub mod report;
pub mod server;

pub use client::Client;

/// The longest request line.
const MAX_REQUEST_BYTES: u64 = 4096;

#[cfg(test)]
mod tests;
