//! A Prometheus that finds its targets through Kubernetes' API, for the test of the shipped scrape configurations. Debian 12
//! builds its own without that; Debian 13's does it, and runs on both.

use std::path::PathBuf;

use anyhow::Result;

use crate::debian::{self, Package};
use crate::sink::Sink;
use crate::tree::Tree;

/// Names the program to tests.
pub(crate) const PROGRAM: &str = "NPM_PROMETHEUS";

const PACKAGE: Package<'_> = Package { suite: "trixie", name: "prometheus", inside: "./usr/bin/prometheus" };

/// Makes the program ready and gives its path; 17 MB to download, 90 MB afterwards.
///
/// # Errors
/// Debian's package can't be had.
pub(crate) fn program(tree: &Tree, sink: &Sink) -> Result<PathBuf> {
    let home = tree.own().join("prometheus-trixie");
    let program = home.join("prometheus");
    if !program.is_file() {
        sink.say("downloading Debian 13's prometheus (once), which knows Kubernetes")?;
        debian::fetch(&PACKAGE, &home, sink)?;
    }
    Ok(program)
}
