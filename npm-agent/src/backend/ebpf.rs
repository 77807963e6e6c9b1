//! The eBPF engine: the same verdicts, from maps that the kernel looks up.
//!
//! ```text
//! Goal ── lower ──► what maps must hold ── plan ──► single writes ── maps ──► BPF maps ─► programs that look them up
//!                                          ▲                           │                     │
//!                                        Held ◄──── read back ─────────┘                     ▼
//!                                          └── decide, in user space ──────── npm_common::decide, one function
//! ```
//!
//! It judges and does not enforce: nothing is attached or pinned, and the maps are gone with the process.

pub mod any_maps;
pub mod attach;
pub mod btf;
pub mod choice;
mod connections;
mod datapath;
pub mod denials;
mod ended;
pub mod enforcer;
mod grace;
pub mod held;
pub mod kernel;
pub mod lower;
pub mod lowering;
pub mod maps;
mod meter;
mod outlook;
mod packet;
pub mod pins;
pub mod plan;
pub mod rule;
pub mod shed;
mod syscall;
pub mod trace;
mod watch;
pub mod width;
pub mod words;
