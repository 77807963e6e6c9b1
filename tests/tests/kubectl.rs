//! kubectl against the test API server: what `deploy/` ships is applied, is the same when applied again, and goes away;
//! and the verbs of everyday work.
//!
//! kubectl is where `cargo xtask test` has installed it (`NPM_MANIFEST_TOOLS`).
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use npm_tests::apiserver::{Options, Server};
use npm_tests::exec::run;

/// kubectl and the server it talks to.
struct Kubectl {
    program: PathBuf,
    directory: tempfile::TempDir,
    _server: Server,
}

impl Kubectl {
    /// `None`, said aloud: there is no kubectl.
    fn start() -> Result<Option<Self>> {
        let program = match std::env::var_os("NPM_MANIFEST_TOOLS") {
            Some(tools) => Path::new(&tools).join("kubectl"),
            None if std::env::var("CI").as_deref() == Ok("true") => bail!("NPM_MANIFEST_TOOLS is not set"),
            None => {
                eprintln!(
                    "SKIPPED, NOT TESTED: kubectl. `cargo xtask test` installs it and sets NPM_MANIFEST_TOOLS"
                );
                return Ok(None);
            }
        };
        let server = Server::start(TcpListener::bind(("127.0.0.1", 0))?, &Options::default())?;
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("config"), server.kubeconfig(None))?;
        Ok(Some(Self { program, directory, _server: server }))
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let path = |name: &str| self.directory.path().join(name).to_string_lossy().into_owned();
        let (config, cache) = (path("config"), path("cache"));
        let mut all = vec!["--kubeconfig", &config, "--cache-dir", &cache];
        all.extend(args);
        run(&self.program.to_string_lossy(), &all)
    }
}

/// What follows the name in each line of an answer, such as `created`.
fn outcomes(answer: &str) -> BTreeSet<&str> {
    answer.lines().filter_map(|line| line.split_once(' ').map(|(_, outcome)| outcome)).collect()
}

/// `deploy/` and everything below it that can be applied.
fn kustomizations() -> Result<Vec<PathBuf>> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let mut found = vec![deploy.clone(), deploy.join("base")];
    for entry in std::fs::read_dir(deploy.join("overlays")).context("reading the overlays")? {
        found.push(entry?.path());
    }
    found.sort();
    Ok(found)
}

#[test]
fn what_is_shipped_is_applied_and_taken_away() -> Result<()> {
    let Some(kubectl) = Kubectl::start()? else { return Ok(()) };
    let all = kustomizations()?;
    ensure!(all.len() >= 10, "{all:?}");
    for directory in all {
        let directory = directory.to_string_lossy().into_owned();
        let applied = kubectl.run(&["apply", "-k", &directory])?;
        ensure!(outcomes(&applied) == BTreeSet::from(["created"]), "{directory}: {applied}");
        let again = kubectl.run(&["apply", "-k", &directory])?;
        ensure!(outcomes(&again) == BTreeSet::from(["unchanged"]), "{directory}, again: {again}");
        let sets = kubectl.run(&["get", "daemonsets", "--all-namespaces", "--output", "name"])?;
        ensure!(sets.lines().count() == 1, "{directory}: {sets}");
        kubectl.run(&["delete", "-k", &directory, "--wait=false"])?;
        let left =
            kubectl.run(&["get", "daemonsets,clusterroles", "--all-namespaces", "--output", "name"])?;
        ensure!(left.is_empty(), "{directory}: {left} is left");
    }
    Ok(())
}

#[test]
fn everyday_verbs_work() -> Result<()> {
    let Some(kubectl) = Kubectl::start()? else { return Ok(()) };
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/demo");
    kubectl.run(&["apply", "--filename", &demo.to_string_lossy()])?;
    let pods = kubectl.run(&["get", "pods", "--all-namespaces", "--output", "name"])?;
    ensure!(pods.lines().count() > 2, "{pods}");
    let namespaces = kubectl.run(&[
        "get",
        "pods",
        "--all-namespaces",
        "--output",
        "jsonpath={.items[0].metadata.namespace}",
    ])?;
    let pod = kubectl.run(&[
        "--namespace",
        &namespaces,
        "get",
        "pods",
        "--output",
        "jsonpath={.items[0].metadata.name}",
    ])?;
    kubectl.run(&["--namespace", &namespaces, "label", "pod", &pod, "npm=tested"])?;
    let tested =
        kubectl.run(&["get", "pods", "--all-namespaces", "--selector", "npm=tested", "--output", "name"])?;
    ensure!(tested.trim() == format!("pod/{pod}"), "{tested}");
    kubectl.run(&["--namespace", &namespaces, "label", "pod", &pod, "npm-"])?;
    let policies = kubectl.run(&["get", "networkpolicies", "--all-namespaces", "--output", "name"])?;
    ensure!(!policies.is_empty(), "no policies");
    kubectl.run(&["delete", "networkpolicies", "--all", "--all-namespaces", "--wait=false"])?;
    let left = kubectl.run(&["get", "networkpolicies", "--all-namespaces", "--output", "name"])?;
    ensure!(left.is_empty(), "{left} is left");
    let tested =
        kubectl.run(&["get", "pods", "--all-namespaces", "--selector", "npm=tested", "--output", "name"])?;
    ensure!(tested.is_empty(), "{tested}");
    Ok(())
}
