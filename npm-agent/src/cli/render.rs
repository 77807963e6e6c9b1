//! `npm-agent render`: what would be programmed, as text.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ValueEnum;
use npm_common::layout::WIDE_WORDS;
use npm_policy::compile::compile;
use npm_policy::goal::{Family, Goal};
use npm_policy::world::World;

use super::matrix::FamilyArg;
use crate::backend::ebpf::{lower, words};
use crate::backend::iptables::render::Rendered;
use crate::backend::iptables::text;
use crate::config::value;
use crate::source::manifests;

/// What would program the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// Input of ipset and iptables-restore
    Iptables,
    /// The contents of the eBPF maps, with the names of sets for the numbers of bits
    Ebpf,
}

/// Print what would be programmed on a node, offline
///
/// Reads manifests and prints the sets as input of `ipset restore` and the chains as input of `iptables-restore
/// --noflush` and `ip6tables-restore --noflush`. Nothing is programmed and no privilege is needed. The text is the
/// same for iptables-nft and iptables-legacy. With `--backend ebpf` it prints what the eBPF maps would hold, in words.
///
/// What is wrong with the manifests is printed on standard error; what is right is rendered all the same, as the
/// agent would enforce it.
///
/// Example: npm-agent render --node node-1 -f deploy/demo
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What would program the kernel
    #[arg(long, value_enum, value_name = "BACKEND", default_value = "iptables", ignore_case = true)]
    backend: Form,

    /// File or directory with Kubernetes YAML or JSON; may be given several times
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR", required = true)]
    files: Vec<PathBuf>,

    /// The node, as in the pods' spec.nodeName
    #[arg(long, env = "NPM_NODE", value_name = "NAME", value_parser = value::parse_node)]
    node: String,

    /// Only IPv4 (4) or only IPv6 (6)
    #[arg(long, value_enum)]
    family: Option<FamilyArg>,
}

/// Prints what would be programmed.
///
/// # Errors
/// A file is not there, the goal does not fit into the eBPF maps, or standard output can't be written.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    for file in &args.files {
        std::fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    let reading = manifests::read(&args.files);
    for problem in &reading.problems {
        eprintln!("npm-agent: {}: {}", problem.object, problem.message);
    }
    if let Some(path) = reading.unread.first() {
        bail!("cannot read {}", path.display());
    }
    let mut world = World::default();
    for change in reading.changes {
        world.apply(change);
    }
    let (goal, warnings) = compile(&world, &args.node);
    for warning in warnings {
        eprintln!("npm-agent: {warning}");
    }
    let families = args.family.map_or(Family::BOTH.to_vec(), |family| vec![family.into()]);
    match args.backend {
        Form::Iptables => super::print(&iptables_text(&args.node, &goal, &families))?,
        Form::Ebpf => super::print(&ebpf_text(&args.node, &goal, &families)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn heading(node: &str, goal: &Goal) -> String {
    let (programs, subjects) = (goal.programs.len(), goal.subjects.len());
    format!("# node {node}: {programs} policies select {subjects} of its pods\n\n")
}

fn ebpf_text(node: &str, goal: &Goal, families: &[Family]) -> anyhow::Result<String> {
    let lowered = lower::lower::<WIDE_WORDS>(goal).context("filling the eBPF maps")?;
    Ok(heading(node, goal) + &words::text(goal, &lowered, families))
}

/// The rendered goal with comments for people. Both restore programs pass over lines that begin with `#`.
fn iptables_text(node: &str, goal: &Goal, families: &[Family]) -> String {
    let rendered = Rendered::of(goal);
    let mut out = heading(node, goal);
    out.push_str("# ipset restore\n");
    for &family in families {
        let names: BTreeMap<_, _> =
            rendered.names.values().map(|names| (names.kernel(family), &names.name)).collect();
        for (kernel_name, set) in &rendered.family(family).sets {
            if let Some(name) = names.get(kernel_name) {
                // A name comes from a manifest: it must not end the comment.
                let _ = writeln!(out, "# {}", name.escape_debug());
            }
            let one = BTreeMap::from([(kernel_name.clone(), set.clone())]);
            out.push_str(&text::sets_text(family, &one));
        }
    }
    for &family in families {
        let program = match family {
            Family::V4 => "iptables-restore",
            Family::V6 => "ip6tables-restore",
        };
        let _ = writeln!(out, "\n# {program} --noflush");
        out.push_str(&rendered.filter_text(family));
    }
    out
}
