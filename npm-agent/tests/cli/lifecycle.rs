//! An agent's life in a network namespace: start, take changes, refuse a second, stop, be taken over, be cleaned up.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use super::exec::{Namespace, terminate};

/// How long what must come may take: the machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(30);

const CLUSTER: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: x}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: x, labels: {app: a}}
spec: {nodeName: node-1, containers: []}
status: {phase: Running, podIP: 10.1.0.1}
";

const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: x}
spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress]}
";

/// Ends an agent that a failed test leaves running.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// The exit code after SIGTERM, and how long it took.
    fn stop(mut self) -> (Option<i32>, Duration) {
        let start = Instant::now();
        terminate(&self.0);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return (status.code(), start.elapsed());
            }
            assert!(start.elapsed() < PATIENCE, "SIGTERM does not end it");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The rules without what counts and dates them.
fn uncounted(rules: &str) -> Vec<String> {
    let lines = rules.lines().filter(|line| !line.starts_with(['#', ':']));
    lines.map(ToOwned::to_owned).collect()
}

#[test]
fn a_file_that_is_broken_while_no_agent_runs_opens_nothing() {
    let Some(namespace) = Namespace::new("broken") else { return };
    let directory = tempfile::tempdir().unwrap();
    let manifests = directory.path().join("manifests");
    let file = manifests.join("policy.yaml");
    fs::create_dir(&manifests).unwrap();
    fs::write(manifests.join("cluster.yaml"), CLUSTER).unwrap();
    fs::write(&file, POLICY).unwrap();
    let socket = directory.path().join("agent.sock");
    let run = [
        "run",
        "--node",
        "node-1",
        "--manifests",
        path(&manifests),
        "--socket",
        path(&socket),
        "--verify-interval",
        "500ms",
    ];
    let wait =
        |timeout| namespace.agent(&["status", "--socket", path(&socket), "--wait", "--timeout", timeout]);
    let rules = || uncounted(&namespace.run("iptables-save", &["-t", "filter"]).stdout());
    let sets = || namespace.run("ipset", &["save"]).stdout();

    let mut killed = Running(namespace.start(&run));
    assert_eq!(wait("30s").code(), Some(0));
    let before = (rules(), sets());
    assert!(before.0.iter().any(|rule| rule.contains("AZURE-NPM-INGRESS-")), "{before:?}");
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();

    fs::write(&file, "kind: [").unwrap();
    let next = Running(namespace.start(&run));
    let reason = format!(
        "not readable since the start: {}; what an earlier process programmed stays in force",
        path(&file)
    );
    let start = Instant::now();
    let status = loop {
        let status = wait("1s");
        assert_eq!(status.code(), Some(1), "{}", status.stdout());
        if status.stderr().contains(&reason) {
            break status;
        }
        assert!(start.elapsed() < PATIENCE, "{}", status.stderr());
    };
    assert!(
        status.stdout().contains("what an earlier process programmed is in force"),
        "{}",
        status.stdout()
    );
    assert_eq!((rules(), sets()), before, "what was enforced still is");

    // Someone takes the jump away: also what an earlier process left is looked after.
    assert_eq!(namespace.run("iptables", &["-F", "FORWARD"]).code(), Some(0));
    let start = Instant::now();
    while rules() != before.0 {
        assert!(start.elapsed() < PATIENCE, "{:?}", rules());
        std::thread::sleep(Duration::from_millis(50));
    }

    fs::write(&file, POLICY.replace("[Ingress]", "[Ingress, Egress]")).unwrap();
    let status = wait("30s");
    assert_eq!(status.code(), Some(0), "{}", status.stderr());
    assert!(rules().iter().any(|rule| rule.contains("AZURE-NPM-EGRESS-")), "{:?}", rules());
    drop(next);
}

#[test]
fn an_agent_starts_serves_stops_is_taken_over_and_cleaned_up() {
    let Some(namespace) = Namespace::new("life") else { return };
    let directory = tempfile::tempdir().unwrap();
    let manifests = directory.path().join("manifests");
    fs::create_dir(&manifests).unwrap();
    fs::write(manifests.join("cluster.yaml"), CLUSTER).unwrap();
    let socket = directory.path().join("agent.sock");
    let run = ["run", "--node", "node-1", "--manifests", path(&manifests), "--socket", path(&socket)];
    let wait = ["status", "--socket", path(&socket), "--wait", "--timeout", "30s"];
    let rules = || namespace.run("iptables-save", &["-t", "filter"]).stdout();
    let sets = || namespace.run("ipset", &["list", "-n"]).stdout().lines().count();

    let first = Running(namespace.start(&run));
    let status = namespace.agent(&wait);
    assert_eq!(status.code(), Some(0), "{}", status.stderr());
    assert_eq!(sets(), 0, "nothing selects a pod");

    fs::write(manifests.join("policy.yaml"), POLICY).unwrap();
    assert_eq!(namespace.agent(&wait).code(), Some(0));
    assert!(sets() > 0, "--wait has returned before the policy was there");
    assert!(rules().contains("AZURE-NPM-INGRESS-"), "{}", rules());

    let other = directory.path().join("other.sock");
    let second = ["run", "--node", "node-1", "--manifests", path(&manifests), "--socket", path(&other)];
    for refused in [&second[..], &run[..], &["cleanup"]] {
        let refused = namespace.agent(refused);
        assert_eq!(refused.code(), Some(3), "{}", refused.stderr());
    }
    assert!(rules().contains("AZURE-NPM-INGRESS-"), "who is refused changes nothing");

    let before = rules();
    let (code, took) = first.stop();
    assert_eq!(code, Some(0));
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(!socket.exists());
    assert_eq!(namespace.agent(&wait[..3]).code(), Some(1), "nobody answers");
    assert_eq!(uncounted(&rules()), uncounted(&before), "what is programmed stays");

    let mut killed = Running(namespace.start(&run));
    assert_eq!(namespace.agent(&wait).code(), Some(0));
    assert_eq!(uncounted(&rules()), uncounted(&before), "the next agent takes it over as it is");
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    assert!(socket.exists(), "a killed agent leaves its socket behind");
    let last = Running(namespace.start(&run));
    assert_eq!(namespace.agent(&wait).code(), Some(0));
    assert_eq!(last.stop().0, Some(0));

    let cleanup = namespace.agent(&["cleanup"]);
    assert_eq!(cleanup.code(), Some(0), "{}", cleanup.stderr());
    assert!(!rules().contains("AZURE-NPM"), "{}", rules());
    assert_eq!(sets(), 0);
}
