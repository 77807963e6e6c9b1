//! Malformed and hostile manifests: each gives a clear message, is never a reason to allow more, and leaves its
//! neighbours in the same file and directory alone, in bounded time.
#![expect(clippy::unwrap_used, reason = "in tests, also outside of the test functions")]

use std::fs;
use std::time::{Duration, Instant};

use npm_agent::source::manifests::{Reading, read};
use npm_policy::model::Policy;
use npm_policy::world::Change;

#[path = "bad_input/fuzz.rs"]
mod fuzz;
#[path = "bad_input/hostile.rs"]
mod hostile;
#[path = "bad_input/kept.rs"]
mod kept;
#[path = "bad_input/table.rs"]
mod table;

/// What reading one case may take: far more than it does, far less than a bomb would.
const BOUND: Duration = Duration::from_secs(20);

/// Good objects that stand around a bad one.
const NEIGHBOURS: [&str; 3] = [
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: good, labels: {team: a}}\n",
    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: good, namespace: good}\n\
     spec: {podSelector: {}, ingress: [{ports: [{port: 80}]}]}\n",
    "apiVersion: v1\nkind: Pod\nmetadata: {name: good, namespace: good}\nstatus: {podIP: 10.9.9.9}\n",
];

/// Reads a text between good neighbours in one file, beside another good file; asserts that the neighbours are as if
/// they were alone, and gives what the text itself gave.
fn read_among_neighbours(name: &str, text: &str) -> Reading {
    let directory = tempfile::tempdir().unwrap();
    let [first, second, third] = NEIGHBOURS;
    let path = directory.path().join("file.yaml");
    fs::write(&path, format!("{first}---\n{text}\n---\n{second}")).unwrap();
    fs::write(directory.path().join("other.yml"), third).unwrap();
    let started = Instant::now();
    let mut reading = read(&[directory.path().to_owned()]);
    let took = started.elapsed();
    assert!(took < BOUND, "{name}: took {took:?}");

    let alone = tempfile::tempdir().unwrap();
    fs::write(alone.path().join("file.yaml"), NEIGHBOURS.join("---\n")).unwrap();
    let expected = read(&[alone.path().to_owned()]);
    assert_eq!((expected.changes.len(), expected.problems.len()), (3, 0));
    for change in &expected.changes {
        assert!(reading.changes.contains(change), "{name}: lost {change:?}");
    }
    reading.changes.retain(|change| !expected.changes.contains(change));
    let directory = format!("{}/", directory.path().display());
    for problem in &mut reading.problems {
        problem.object = problem.object.replace(&directory, "");
    }
    reading
}

/// What the text said, a line a problem.
fn said(reading: &Reading) -> String {
    reading.problems.iter().map(|problem| format!("{}: {}\n", problem.object, problem.message)).collect()
}

/// The policies among the changes.
fn policies(reading: &Reading) -> Vec<&Policy> {
    fn policy(change: &Change) -> Option<&Policy> {
        match change {
            Change::Policy(_, Some(policy)) => Some(policy),
            Change::Policy(_, None) | Change::Pod(..) | Change::Namespace(..) => None,
        }
    }
    reading.changes.iter().filter_map(policy).collect()
}

/// Whether a policy isolates and allows nothing.
fn is_strict(policy: &Policy) -> bool {
    let allowed = policy.ingress.iter().chain(&policy.egress).flatten().count();
    (policy.ingress.is_some() || policy.egress.is_some()) && allowed == 0
}
