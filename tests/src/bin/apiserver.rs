//! The test API server as a process of its own, with memory of its own: for measurements, and to try `kubectl` on.
//!
//! It serves until its standard input ends or it is killed.
#![forbid(unsafe_code)]

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use npm_policy::world::Change;
use npm_tests::apiserver::{Options, Server};
use npm_tests::{kubernetes, random};
use serde_json::{Value, json};

/// A Kubernetes API server that keeps objects in memory and validates nothing
#[derive(Parser)]
struct Arguments {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:8001")]
    listen: SocketAddr,
    /// Where to write a kubeconfig
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Answer streaming lists with 422, as older servers do
    #[arg(long)]
    no_streaming_lists: bool,
    /// How many namespaces to begin with
    #[arg(long, default_value_t = 0)]
    namespaces: u32,
    /// How many pods in each
    #[arg(long, default_value_t = 0)]
    pods: u32,
    /// How many policies in each
    #[arg(long, default_value_t = 0)]
    policies: u32,
    /// The node of some of the pods
    #[arg(long, default_value = "n1")]
    node: String,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let listener = TcpListener::bind(arguments.listen).context("listening")?;
    let options = Options { streaming_lists: !arguments.no_streaming_lists, ..Options::default() };
    let server = Server::start(listener, &options)?;
    let mut objects = 0;
    for change in random::cluster(arguments.namespaces, arguments.pods, arguments.policies, &arguments.node) {
        objects += 1;
        match change {
            Change::Namespace(name, _) => {
                server.store().put(json!({"kind": "Namespace", "metadata": {"name": *name}}));
            }
            Change::Pod(_, Some(pod)) => {
                server.store().put(padded(kubernetes::pod(&pod)));
            }
            Change::Policy(_, Some(policy)) => {
                server.store().put(kubernetes::policy(&policy));
            }
            Change::Pod(_, None) | Change::Policy(_, None) => {}
        }
    }
    if let Some(path) = arguments.kubeconfig {
        std::fs::write(&path, server.kubeconfig(None))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    println!("{} objects at http://{}", objects, server.address());
    std::io::stdin().read_to_end(&mut Vec::new()).context("waiting for the end of the input")?;
    Ok(())
}

/// A pod with as much in it as a cluster's pods have, none of which decides anything.
fn padded(mut pod: Value) -> Value {
    let field = |name: usize| (format!("f:field{name}"), json!({".": {}, "f:value": {}}));
    let fields: serde_json::Map<_, _> = (0..60).map(field).collect();
    pod["metadata"]["managedFields"] = json!([{
        "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": fields, "manager": "kubelet", "operation": "Update",
    }]);
    let variable = |number: usize| json!({"name": format!("VARIABLE_{number}"), "value": "x".repeat(24)});
    pod["spec"]["containers"][0]["env"] = (0..20).map(variable).collect();
    let condition = |name: &str| json!({"type": name, "status": "True", "lastProbeTime": null, "lastTransitionTime": "2026-01-01T00:00:00Z"});
    pod["status"]["conditions"] =
        ["Initialized", "Ready", "ContainersReady", "PodScheduled"].into_iter().map(condition).collect();
    pod
}
