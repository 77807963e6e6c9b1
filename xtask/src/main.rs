//! The project's own commands, run as `cargo xtask <command>`. Knows nothing of how they do it.
#![forbid(unsafe_code)]

mod bpf_linker;
mod bpf_object;
mod chaos;
mod check;
mod clean_lab;
mod cli;
mod dashboards;
mod debian;
mod demo;
mod ebpf;
mod exec;
mod manifests;
mod packages;
mod prometheus;
mod real_apiserver;
mod rust_src;
mod sink;
mod summary;
mod tree;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
