//! `npm-agent cleanup`.

use std::process::ExitCode;

use anyhow::Context;

use crate::backend::hold;
use crate::exec::Tools;
use crate::{lock, run};

/// Remove everything that npm-agent (or Azure NPM) has programmed on this node, and nothing else
///
/// Looks in iptables-nft and iptables-legacy, and among pinned eBPF objects. The node is open afterwards: no policy is enforced. Needs root. Refuses while an agent runs, because that would
/// program everything again.
///
/// Exit codes: 0 nothing of ours is left; 1 something is, see the message; 2 bad flags; 3 an agent runs.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Also while an agent runs, which will program everything again
    #[arg(long)]
    force: bool,
}

/// Removes what is ours.
///
/// # Errors
/// An agent runs, or something of ours is still there.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let _lock = if args.force { None } else { Some(lock::take_network_namespace()?) };
    let mut backend = run::backend_for_cleanup()?;
    // First: while the programs enforce, the rule that they need is among what iptables has of ours.
    let pinned = run::remove_pinned().context("removing eBPF programs and maps")?;
    let mut removed = backend.remove().context("removing what npm-agent has programmed")?;
    // Last: who is held until then meets no rule afterwards.
    let held = hold::release(&Tools::default()).context("removing what holds pods back")?;
    (removed.sets, removed.chains) = (removed.sets + held.sets, removed.chains + held.chains);
    super::print(&format!(
        "removed {} sets, {} chains, {} rules in chains of others, {pinned} eBPF objects\n",
        removed.sets, removed.chains, removed.rules
    ))?;
    Ok(ExitCode::SUCCESS)
}
