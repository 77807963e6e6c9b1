//! Random changes of a cluster and random faults of its API server, from a seed.

use std::time::Duration;

use npm_policy::model::{Peers, Policy, Ports, Rule};
use npm_policy::world::Change;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::json;

use crate::apiserver::Server;
use crate::apiserver::faults::{Disturbance, Fault, On};
use crate::{kubernetes, random};

/// The resources that are watched.
const PLURALS: [&str; 3] = ["namespaces", "networkpolicies", "pods"];

/// How many requests may be about to fail: with the agent's pauses (0.2 s, doubled up to 30 s) a watch that meets all is back
/// within half a minute.
const MOST_PLANTED: u32 = 4;

/// The seed of a run: `NPM_SEED`, or the time.
///
/// # Panics
/// `NPM_SEED` is no number.
pub fn seed() -> u64 {
    match std::env::var("NPM_SEED") {
        Ok(text) => text.parse().expect("NPM_SEED is a number"),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            now.as_nanos() as u64
        }
    }
}

/// How much was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Objects made, changed, deleted.
    pub changes: usize,
    /// Faults and disturbances.
    pub faults: usize,
}

/// A source of changes and faults.
#[derive(Debug)]
pub struct Chaos {
    runner: TestRunner,
    done: Done,
}

impl Chaos {
    /// Of this seed.
    pub fn new(seed: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let runner = TestRunner::new_with_rng(Config::default(), rng);
        Self { runner, done: Done::default() }
    }

    /// What was done so far.
    pub fn done(&self) -> Done {
        self.done
    }

    /// A number below this.
    pub fn below(&mut self, end: usize) -> usize {
        self.draw(0..end)
    }

    fn draw<S: Strategy>(&mut self, strategy: S) -> S::Value {
        strategy.new_tree(&mut self.runner).expect("the strategies reject nothing").current()
    }

    /// So many changes, with faults between them. No fault is left behind that would last for ever.
    pub fn round(&mut self, server: &Server, changes: usize) {
        server.faults().clear();
        for change in self.draw(random::sequence(changes)) {
            if self.below(4) == 0 {
                self.fault(server);
            }
            self.change(server, change);
            // Some changes come together, some apart.
            let pause = self.below(3) * self.below(15);
            std::thread::sleep(Duration::from_millis(pause as u64));
        }
    }

    fn change(&mut self, server: &Server, change: Change) {
        // Each takes along what is in it: often done, there would be nothing to change.
        if matches!(change, Change::Namespace(_, None)) && self.below(6) > 0 {
            return;
        }
        self.done.changes += 1;
        let store = server.store();
        match change {
            Change::Pod(_, Some(pod)) => {
                store.put(kubernetes::pod(&pod));
            }
            Change::Policy(_, Some(policy)) if can_be_written(&policy) => {
                store.put(kubernetes::policy(&policy));
            }
            Change::Namespace(name, Some(namespace)) => {
                let labels = namespace.labels.iter().map(|(key, value)| (key.to_string(), json!(**value)));
                let labels: serde_json::Map<_, _> = labels.collect();
                store.put(json!({"kind": "Namespace", "metadata": {"name": *name, "labels": labels}}));
            }
            Change::Pod(key, None) => {
                store.remove("pods", &key.namespace, &key.name);
            }
            Change::Policy(key, _) => {
                store.remove("networkpolicies", &key.namespace, &key.name);
            }
            Change::Namespace(name, None) => {
                store.remove("namespaces", "", &name);
            }
        }
    }

    fn fault(&mut self, server: &Server) {
        self.done.faults += 1;
        let plural = match self.below(PLURALS.len() + 1) {
            all if all == PLURALS.len() => None,
            one => Some(PLURALS[one]),
        };
        let disturbances = [
            Disturbance::Cut,
            Disturbance::Cut,
            Disturbance::End,
            Disturbance::CutLine,
            Disturbance::Error(410),
            Disturbance::Error(500),
            Disturbance::Garbage,
            Disturbance::Repeat(3),
            Disturbance::Swap,
            Disturbance::Mute,
        ];
        let faults = [
            Fault::Refuse { code: 500, retry_after: None },
            Fault::Refuse { code: 410, retry_after: None },
            Fault::Refuse { code: 422, retry_after: None },
            Fault::Refuse { code: 429, retry_after: Some(1) },
            Fault::Delay(Duration::from_millis(100)),
            Fault::Hang,
            Fault::Reset,
            Fault::Garbage,
            Fault::Truncate(500),
        ];
        match self.below(8) {
            0 => server.store().compact(),
            1 => server.refuse_streaming_lists(),
            2 => server.serve_streaming_lists(),
            3 | 4 => {
                let fault = faults[self.below(faults.len())].clone();
                let on = [On::Any, On::List, On::Watch, On::StreamingList][self.below(4)];
                let times = 1 + self.below(2) as u32;
                // One watch may meet all of them, and waits twice as long after each.
                if server.faults().planted() + times <= MOST_PLANTED {
                    server.faults().plant(on, plural, times, fault);
                }
                server.faults().disturb(plural, Disturbance::Cut);
            }
            _ => {
                let disturbance = disturbances[self.below(disturbances.len())].clone();
                server.faults().disturb(plural, disturbance);
            }
        }
    }
}

/// Whether the API has a way to say it: not of a policy that isolates nobody, nor of a list that is there and empty.
fn can_be_written(policy: &Policy) -> bool {
    let mut rules = policy.ingress.iter().chain(&policy.egress).flatten();
    let directions = policy.ingress.is_some() || policy.egress.is_some();
    directions
        && rules.all(|Rule { peers, ports }| {
            let some_peer = match peers {
                Peers::Any => true,
                Peers::Only(peers) => !peers.is_empty(),
            };
            let some_port = match ports {
                Ports::Any => true,
                Ports::Only(ports) => !ports.is_empty(),
            };
            some_peer && some_port
        })
}
