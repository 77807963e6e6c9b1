//! The command line: which commands there are, and which function does each.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::sink::Sink;
use crate::tree::Tree;
use crate::{chaos, check, clean_lab, dashboards, demo, ebpf, manifests, packages, real_apiserver};

/// Project tasks of npm-agent.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run everything CI runs: format, lints, docs, eBPF object, build, tests
    Test {
        /// Instead, the test with a real kube-apiserver, built from Debian's source package (ten minutes, once; needs root)
        #[arg(long)]
        real_apiserver: bool,
    },
    /// Run the agent on an example application in a lab of network namespaces (needs root)
    Demo {
        /// Arguments of the demo itself, e.g. --keep
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Install the programs and libraries that are missing (quiet when none is)
    Setup {
        /// Also make the eBPF toolchain ready: rust-src and bpf-linker
        #[arg(long)]
        ebpf: bool,
    },
    /// Build npm-ebpf and write the committed objects npm-ebpf/npm-ebpf.o and npm-ebpf-wide.o
    Ebpf {
        /// Rebuild and compare with the committed object instead of writing it
        #[arg(long)]
        check: bool,
    },
    /// Put typical bugs into a copy of the tree, one by one: each must turn a test red (about half an hour)
    Mutants {
        /// Arguments of the program itself: --sample N, --first N, --only TEXT
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure what a new flow costs, or what following a large cluster does (needs root; docs/benchmarks.md)
    Bench {
        /// Arguments of the program itself: datapath --policies N... --rounds N --skip-packets; control --backend B...
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Let the agent follow an API server that changes and fails at random, for long (needs root)
    Chaos {
        /// How many changes
        #[arg(long, default_value_t = 10_000)]
        changes: u32,
        /// Repeat the run with this seed
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Build every kustomization of deploy/ and check it against the Kubernetes schemas
    Manifests,
    /// Check the dashboards, the workbook and KQL; run two agents and draw what the dashboards show (needs root)
    Dashboards {
        /// Only check: no agents, no drawing, small downloads
        #[arg(long)]
        check: bool,
        /// How long the agents run
        #[arg(long, default_value_t = 300)]
        seconds: u32,
    },
    /// Delete lab network namespaces whose process is gone
    CleanLab,
}

/// Parses the arguments and runs the task.
///
/// # Errors
/// Whatever stopped the task; what it had done until then stays done.
pub(crate) fn run() -> Result<ExitCode> {
    let tree = Tree::find()?;
    match Cli::parse().command {
        Task::Test { real_apiserver: false } => check::run(&tree),
        Task::Test { real_apiserver: true } => real_apiserver::run(&tree),
        Task::Demo { arguments } => demo::run(&tree, &arguments),
        Task::Mutants { arguments } => demo::mutants(&tree, &arguments),
        Task::Bench { arguments } => demo::bench(&tree, &arguments),
        Task::Chaos { changes, seed } => chaos::run(&tree, changes, seed),
        Task::Setup { ebpf } => {
            packages::install_missing(&Sink::Terminal)?;
            if ebpf {
                ebpf::prepare(&tree, &Sink::Terminal)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Task::Ebpf { check } => {
            packages::install_missing(&Sink::Terminal)?;
            if check {
                println!("{}", ebpf::check(&tree, &Sink::Terminal)?);
            } else {
                println!("{}", ebpf::write(&tree, &Sink::Terminal)?);
            }
            Ok(ExitCode::SUCCESS)
        }
        Task::Manifests => {
            packages::install_missing(&Sink::Terminal)?;
            println!("{}", manifests::check(&tree, &Sink::Terminal)?);
            Ok(ExitCode::SUCCESS)
        }
        Task::Dashboards { check, seconds } => {
            packages::install_missing(&Sink::Terminal)?;
            println!("{}", dashboards::check(&tree, &Sink::Terminal)?);
            if !check {
                println!("{}", dashboards::draw(&tree, seconds, &Sink::Terminal)?.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Task::CleanLab => {
            clean_lab::run()?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
