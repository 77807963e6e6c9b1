//! `cargo xtask dashboards`: checks what is shipped for Grafana and Azure Monitor, and draws the dashboards.
//!
//! ```text
//! deploy/grafana, deploy/azure-monitor ─► check.mjs: Grafana's types, Microsoft's KQL parser
//! two agents in the lab ─► Prometheus ─► figures.json ─► draw.mjs: Grafana's components in Chromium ─► pictures
//! ```
//!
//! The tools come from the npm registry, into the target directory, at the versions that the lock files of `tests/grafana`
//! pin. No script of a package is run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::exec::Program;
use crate::packages;
use crate::sink::Sink;
use crate::tree::Tree;

/// What is installed for a part of the work.
struct Tools {
    /// Its directory below `tests/grafana`.
    name: &'static str,
    /// For whoever waits for it.
    what: &'static str,
}

const CHECK: Tools =
    Tools { name: "check", what: "TypeScript, @grafana/schema and Microsoft's KQL parser (57 MB)" };
const DRAW: Tools = Tools { name: "draw", what: "@grafana/ui with what it needs (430 MB)" };

/// Checks types, KQL and names; gives a line that says how much was checked.
///
/// # Errors
/// Node or the packages can't be had, or something is wrong.
pub(crate) fn check(tree: &Tree, sink: &Sink) -> Result<String> {
    let home = install(tree, &CHECK, sink)?;
    let deploy = tree.root.join("deploy");
    let node = Program::new("node").arg(home.join("check.mjs")).arg(&deploy);
    // What is wrong is part of the error.
    Ok(node.output().context("checking the dashboards")?.trim().to_owned())
}

/// Runs two agents for `seconds`, and draws what the dashboards show of them.
///
/// # Errors
/// A tool is missing, an agent fails, or a panel can't be drawn.
pub(crate) fn draw(tree: &Tree, seconds: u32, sink: &Sink) -> Result<PathBuf> {
    if !packages::is_root()? {
        bail!(
            "two agents run in network namespaces, which needs root: sudo -E env PATH=\"$PATH\" cargo xtask dashboards"
        );
    }
    let chromium =
        packages::find_program("chromium").context("drawing needs chromium (Debian package chromium)")?;
    let home = install(tree, &DRAW, sink)?;
    let both =
        ["--package", "npm-agent", "--bin", "npm-agent", "--package", "npm-tests", "--bin", "dashboards"];
    tree.cargo().args(["build", "--locked"]).args(both).run(sink)?;
    let output = tree.own().join("dashboards");
    fs::create_dir_all(&output).context("making the directory of the pictures")?;
    let figures = output.join("figures.json");
    let program = Program::new(tree.target.join("debug/dashboards")).arg(tree.root.join("deploy/grafana"));
    program
        .arg(&figures)
        .args(["--seconds", &seconds.to_string()])
        .run(sink)
        .context("running two agents")?;
    let node = Program::new("node").env("CHROMIUM", chromium).arg(home.join("draw.mjs"));
    node.arg(tree.root.join("deploy")).arg(&figures).arg(&output).run(sink).context("drawing")?;
    Ok(output)
}

/// Makes a directory with the packages and our scripts beside them, and gives it.
fn install(tree: &Tree, tools: &Tools, sink: &Sink) -> Result<PathBuf> {
    let source = tree.root.join("tests/grafana").join(tools.name);
    let lock = fs::read(source.join("package-lock.json")).context("reading the lock file")?;
    let hash: String = Sha256::digest(&lock).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let home = tree.own().join(format!("grafana-{}-{hash}", tools.name));
    let done = home.join("complete");
    if !done.is_file() {
        sink.say(&format!("installing from the npm registry (once): {}", tools.what))?;
        if home.exists() {
            fs::remove_dir_all(&home).context("removing half an installation")?;
        }
    }
    copy(&source, &home)?;
    if !done.is_file() {
        // Several packages of Grafana's name older React versions as their peers.
        let npm =
            Program::new("npm").current_dir(&home).args(["ci", "--ignore-scripts", "--legacy-peer-deps"]);
        npm.args(["--no-audit", "--no-fund", "--silent"])
            .run(sink)
            .context("installing from the npm registry")?;
        fs::write(&done, "").context("noting that the installation is complete")?;
    }
    Ok(home)
}

/// Scripts find packages beside themselves, and the tree is no place for packages.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
        let path = entry.context("listing the scripts")?.path();
        let name = path.file_name().context("a file has a name")?;
        if path.is_file() {
            fs::copy(&path, to.join(name)).with_context(|| format!("copying {}", path.display()))?;
        }
    }
    Ok(())
}
