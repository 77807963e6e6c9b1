//! The eBPF engine: the same verdicts, from maps that the kernel looks up.
//!
//! ```text
//! Goal ── lower ──► maps as data ── kernel ──► BPF maps ─► the program `verdict`, run by BPF_PROG_TEST_RUN
//!                        │                                        ▲
//!                        └── decide, in user space ───────────────┴── npm_common::decide, one function
//! ```
//!
//! It judges and does not enforce: nothing is attached or pinned, and the maps are gone with the process.

pub mod attach;
pub mod btf;
pub mod choice;
mod datapath;
pub mod enforcer;
pub mod kernel;
pub mod lower;
mod maps;
mod packet;
pub mod pins;
pub mod ports;
pub mod rule;
pub mod words;
