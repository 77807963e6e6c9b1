//! The binary from outside: what it prints, and its exit codes.

#![expect(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

mod exec;
mod lifecycle;
mod matrix;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Duration;

use npm_agent::backend::meter::Meter;
use npm_agent::backend::{Applied, Backend, BackendError, Removed, Write};
use npm_agent::config::value::{LogFormat, LogLevel};
use npm_agent::logging;
use npm_agent::reconcile::backoff::Backoff;
use npm_agent::reconcile::worker::{Target, Timing, Worker};
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::Goal;

use exec::{agent, this_test};

fn demo() -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/demo").display().to_string()
}

#[test]
fn every_command_has_help_and_the_version_is_the_crates() {
    let help = agent(&["--help"]);
    assert_eq!(help.code(), Some(0));
    for command in ["run", "status", "render", "matrix", "cleanup", "completions", "version"] {
        assert!(help.stdout().contains(&format!("\n  {command} ")), "{}", help.stdout());
        let own = agent(&[command, "--help"]);
        assert_eq!(own.code(), Some(0), "{command}");
        assert!(own.stdout().contains(&format!("Usage: npm-agent {command}")), "{}", own.stdout());
    }
    let version = format!("npm-agent {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(agent(&["version"]).stdout(), version);
    assert_eq!(agent(&["--version"]).stdout(), version);
    assert_eq!(agent(&[]).code(), Some(2), "no command is no success");
}

#[test]
fn bad_configuration_exits_with_2_and_names_the_key() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("npm.json");
    let path = file.to_str().unwrap();
    let missing = agent(&["run", "--config", path]);
    assert_eq!(missing.code(), Some(2), "{}", missing.stderr());
    assert!(missing.stderr().contains("cannot read config file"), "{}", missing.stderr());

    fs::write(&file, r#"{"Toggles": {"PlaceAzureChainFirst": "yes"}}"#).unwrap();
    let wrong = agent(&["run", "--config", path]);
    assert_eq!(wrong.code(), Some(2));
    assert!(
        wrong.stderr().contains("Toggles.PlaceAzureChainFirst must be true or false"),
        "{}",
        wrong.stderr()
    );

    fs::write(&file, "{}").unwrap();
    let incomplete = agent(&["run", "--config", path, "--node", "n"]);
    assert_eq!(incomplete.code(), Some(2));
    assert!(incomplete.stderr().contains("source manifests needs a directory"), "{}", incomplete.stderr());

    let matrix = agent(&["matrix", "-f", "/nonexistent.yaml"]);
    assert_eq!(matrix.code(), Some(2), "{}", matrix.stderr());
}

#[test]
fn status_without_an_agent_exits_with_1_and_names_the_socket() {
    let status = agent(&["status", "--socket", "/nonexistent/npm.sock"]);
    assert_eq!(status.code(), Some(1));
    assert!(status.stderr().contains("no agent answers at /nonexistent/npm.sock"), "{}", status.stderr());
    let waited = agent(&["status", "--socket", "/nonexistent/npm.sock", "--wait", "--timeout", "50ms"]);
    assert_eq!(waited.code(), Some(1));
    assert!(waited.stderr().contains("gave up after 50ms"), "{}", waited.stderr());
}

#[test]
fn render_prints_sets_with_their_names_and_chains_of_both_families() {
    let whole = agent(&["render", "--node", "demo", "-f", &demo()]);
    assert_eq!(whole.code(), Some(0), "{}", whole.stderr());
    let text = whole.stdout();
    for expected in [
        "# node demo: ",
        "# ipset restore\n",
        "create azure-npm-",
        " family inet ",
        " family inet6 ",
        "# iptables-restore --noflush\n*filter\n:AZURE-NPM - [0:0]\n",
        "# ip6tables-restore --noflush\n*filter\n",
        "-A FORWARD ",
        "COMMIT\n",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
    }
    let named = text
        .lines()
        .zip(text.lines().skip(1))
        .filter(|(comment, create)| comment.starts_with("# ") && create.starts_with("create "));
    assert_eq!(named.count(), text.lines().filter(|line| line.starts_with("create ")).count());

    let four = agent(&["render", "--node", "demo", "-f", &demo(), "--family", "4"]).stdout();
    assert!(four.contains("# iptables-restore") && !four.contains("inet6") && !four.contains("ip6tables"));
    let again = agent(&["render", "--node", "demo", "-f", &demo()]).stdout();
    assert_eq!(text, again, "the same manifests give the same text");
    let other = agent(&["render", "--node", "no-such-node", "-f", &demo()]).stdout();
    assert!(!other.contains("create "), "a node without pods needs no sets:\n{other}");
}

#[test]
fn render_says_in_words_what_the_ebpf_maps_would_hold() {
    let whole = agent(&["render", "--backend", "ebpf", "--node", "demo", "-f", &demo()]).stdout();
    for line in [
        "  TCP/5432: ns-shop-AND-podlabel-tier:backend, nslabel-team:data-AND-!podlabel-app:notebook",
        "10.244.0.14 (shop/db): ingress policy 7, egress policy 8",
        "192.0.2.128/25: nobody",
        "fd00:10:244::14 (shop/db): ingress policy 7, egress policy 8",
    ] {
        assert!(whole.lines().any(|it| it == line), "no line {line:?} in\n{whole}");
    }
    let four = ["render", "--backend", "ebpf", "--node", "demo", "-f", &demo(), "--family", "4"];
    let four = agent(&four).stdout();
    assert!(four.contains("# IPv4 pairs") && !four.contains("fd00:"), "{four}");
}

#[test]
fn render_reports_what_is_wrong_and_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("objects.yaml");
    let pod = |name: &str, address: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: x}}\n\
             spec: {{nodeName: node-1, containers: []}}\nstatus: {{phase: Running, podIP: {address}}}\n"
        )
    };
    let policy = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                  metadata: {name: all, namespace: x}\nspec: {podSelector: {}}\n";
    fs::write(&file, format!("{}{}{policy}", pod("good", "10.0.0.1"), pod("bad", "10.0.0.300"))).unwrap();
    let done = agent(&["render", "--node", "node-1", "-f", file.to_str().unwrap()]);
    assert_eq!(done.code(), Some(0));
    assert!(done.stderr().contains("x/bad"), "{}", done.stderr());
    assert!(done.stdout().contains(" 10.0.0.1\n"), "{}", done.stdout());
    assert_eq!(agent(&["render", "--node", "node-1", "-f", "/nonexistent.yaml"]).code(), Some(1));
}

#[test]
fn completions_are_scripts_that_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = agent(&["completions", shell]);
        assert_eq!(script.code(), Some(0), "{shell}");
        assert!(script.stdout().contains("cleanup"), "{shell}");
    }
}

/// A backend with a bug.
struct Panicking;

impl Backend for Panicking {
    fn name(&self) -> &'static str {
        "panicking"
    }

    fn inherits(&self) -> bool {
        false
    }

    fn apply(&mut self, _: &Goal) -> Result<Applied, BackendError> {
        panic!("planted")
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        panic!("planted")
    }

    fn writes(&mut self) -> Vec<Write> {
        Vec::new()
    }

    fn meter(&self) -> Option<Meter> {
        None
    }

    fn decide(&mut self, _: &Flow) -> Result<Decision, BackendError> {
        panic!("planted")
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        panic!("planted")
    }
}

fn run_panicking() {
    let timing = Timing { verify_interval: Duration::from_secs(30), backoff: Backoff::default() };
    let worker = Worker::start(Box::new(Panicking), timing, &npm_agent::metrics::Metrics::new()).unwrap();
    worker.publish(Target { generation: 1, goal: Goal::default() });
    let progress =
        worker.wait(Duration::from_secs(20), |status| status.generation > 0 || status.failures > 0);
    panic!("the process has survived: {progress:?}");
}

const SIGABRT: i32 = 6;

#[test]
fn a_panicking_backend_ends_the_process() {
    if std::env::var_os("NPM_TEST_PANIC").is_some() {
        run_panicking();
    }
    let done = this_test("a_panicking_backend_ends_the_process", "NPM_TEST_PANIC");
    assert_eq!(done.output.status.signal(), Some(SIGABRT), "{}", done.stderr());
}

#[test]
fn a_panic_is_in_the_log() {
    if std::env::var_os("NPM_TEST_PANIC_LOG").is_some() {
        logging::start(LogLevel::Info, LogFormat::Json).unwrap();
        logging::abort_on_panic();
        run_panicking();
    }
    let done = this_test("a_panic_is_in_the_log", "NPM_TEST_PANIC_LOG");
    assert_eq!(done.output.status.signal(), Some(SIGABRT), "{}", done.stderr());
    let text = done.stderr();
    let line =
        text.lines().find(|line| line.contains("\"level\":\"ERROR\"")).unwrap_or_else(|| panic!("{text}"));
    for expected in ["planted", "\"thread\":\"panicking\"", "the process aborts"] {
        assert!(line.contains(expected), "{expected}: {line}");
    }
}
