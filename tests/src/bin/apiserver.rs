//! The test API server as a process of its own, with memory of its own: for measurements, and to try `kubectl` on.
//!
//! It serves until its standard input ends or it is killed. With `--bench`, lines of input are commands
//! ([`npm_tests::bench::control`] sends them), each answered with a line.
#![forbid(unsafe_code)]

use std::io::{BufRead, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use npm_policy::model::PodKey;
use npm_policy::world::Change;
use npm_tests::apiserver::faults::Disturbance;
use npm_tests::apiserver::{Options, Server};
use npm_tests::bench::cluster::Cluster;
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
    /// Hold so many namespaces of the benchmark's cluster, and take commands
    #[arg(long, conflicts_with_all = ["namespaces", "pods", "policies"])]
    bench: Option<u32>,
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
    let mut put = |object: Value| {
        objects += 1;
        server.store().put(object);
    };
    match arguments.bench {
        Some(namespaces) => Cluster { namespaces }.objects().for_each(&mut put),
        None => {
            let Arguments { namespaces, pods, policies, node, .. } = &arguments;
            let changes = random::cluster(*namespaces, *pods, *policies, node);
            changes.into_iter().filter_map(object).for_each(&mut put);
        }
    }
    server.store().prepare();
    server.store().compact();
    if let Some(path) = arguments.kubeconfig {
        std::fs::write(&path, server.kubeconfig(None))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    println!("{} objects at http://{}", objects, server.address());
    let server = Arc::new(server);
    let churn = Churn::default();
    for line in std::io::stdin().lock().lines() {
        let line = line.context("reading a command")?;
        let Some(namespaces) = arguments.bench else { continue };
        let answer = command(&line, Cluster { namespaces }, &server, &churn)?;
        println!("{answer}");
        std::io::stdout().flush().context("answering")?;
    }
    Ok(())
}

/// The object that a change makes.
fn object(change: Change) -> Option<Value> {
    match change {
        Change::Namespace(name, _) => Some(json!({"kind": "Namespace", "metadata": {"name": *name}})),
        Change::Pod(_, pod) => pod.map(|pod| kubernetes::pod(&pod)),
        Change::Policy(_, policy) => policy.map(|policy| kubernetes::policy(&policy)),
    }
}

/// Pods that are replaced one after the other.
#[derive(Default)]
struct Churn {
    /// Counts up to end the thread of before.
    runs: Arc<AtomicU32>,
    /// How many have been.
    turns: Arc<AtomicU32>,
}

fn command(line: &str, cluster: Cluster, server: &Arc<Server>, churn: &Churn) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match *words.as_slice() {
        // Whoever watches has to list.
        ["expire"] => {
            server.store().compact();
            server.faults().disturb(None, Disturbance::Error(410));
            Ok("done".to_owned())
        }
        // So many pods a second.
        ["churn", rate] => {
            let rate: u32 = rate.parse().context("a rate")?;
            let run = churn.runs.fetch_add(1, Ordering::Relaxed) + 1;
            if rate > 0 {
                let (server, churn) = (
                    Arc::clone(server),
                    Churn { runs: Arc::clone(&churn.runs), turns: Arc::clone(&churn.turns) },
                );
                std::thread::spawn(move || replace(&server, cluster, &churn, run, rate));
            }
            Ok("done".to_owned())
        }
        ["probe", number] => {
            let probe = cluster.probe(number.parse().context("a number")?);
            let version = change(server, &probe.key, probe.sent()).context("the pod was gone already")?;
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                if let Some(when) = server.sent().when(version) {
                    return Ok(format!("sent {}", when.as_nanos()));
                }
                if Instant::now() > deadline {
                    bail!("nobody watches");
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        ["totals"] => {
            let totals = server.sent().totals();
            Ok(format!("{} {} {}", totals.events, totals.bytes, churn.turns.load(Ordering::Relaxed)))
        }
        _ => bail!("no such command: {line}"),
    }
}

/// Makes, changes or deletes a pod; gives the version. `None`: there was nothing to delete.
fn change(server: &Server, key: &PodKey, pod: Option<Value>) -> Option<u64> {
    match pod {
        Some(pod) => Some(server.store().put(pod)),
        None => server.store().remove("pods", &key.namespace, &key.name),
    }
}

/// Replaces pods until another run begins; the events of one are spread evenly until the next one's.
fn replace(server: &Server, cluster: Cluster, churn: &Churn, run: u32, rate: u32) {
    let mut next = Instant::now();
    while churn.runs.load(Ordering::Relaxed) == run {
        let events = cluster.replacement(churn.turns.fetch_add(1, Ordering::Relaxed));
        let pause = Duration::from_secs(1) / rate / events.len() as u32;
        for (key, pod) in events {
            change(server, &key, pod);
            next += pause;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
}
