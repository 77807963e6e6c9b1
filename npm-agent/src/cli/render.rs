//! `npm-agent render`: what would be programmed, as text.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use npm_policy::compile::compile;
use npm_policy::goal::{Family, Goal};
use npm_policy::world::World;

use super::matrix::FamilyArg;
use crate::backend::iptables::render::Rendered;
use crate::backend::iptables::text;
use crate::config::value::{self, BackendKind};
use crate::source::manifests;

/// Print what would be programmed on a node, offline
///
/// Reads manifests and prints the sets as input of `ipset restore` and the chains as input of `iptables-restore
/// --noflush` and `ip6tables-restore --noflush`. Nothing is programmed and no privilege is needed. The text is the
/// same for iptables-nft and iptables-legacy.
///
/// What is wrong with the manifests is printed on standard error; what is right is rendered all the same, as the
/// agent would enforce it.
///
/// Example: npm-agent render --node node-1 -f deploy/demo
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What would program the kernel: iptables
    #[arg(long, value_name = "BACKEND", default_value_t = BackendKind::Iptables)]
    backend: BackendKind,

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
/// A file is not there, or standard output can't be written.
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
        BackendKind::Iptables => super::print(&iptables_text(&args.node, &goal, &families))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The rendered goal with comments for people. Both restore programs pass over lines that begin with `#`.
fn iptables_text(node: &str, goal: &Goal, families: &[Family]) -> String {
    let rendered = Rendered::of(goal);
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "# node {node}: {} policies select {} of its pods\n",
        goal.programs.len(),
        goal.subjects.len()
    );
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
