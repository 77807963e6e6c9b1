//! Running programs: the agent's binary, this test program again, and the tools that make a network namespace.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

const AGENT: &str = env!("CARGO_BIN_EXE_npm-agent");

/// What a program did.
pub(crate) struct Done {
    pub(crate) output: Output,
}

impl Done {
    pub(crate) fn code(&self) -> Option<i32> {
        self.output.status.code()
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8(self.output.stdout.clone()).unwrap()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8(self.output.stderr.clone()).unwrap()
    }
}

/// Runs the agent's binary with these arguments, without the environment's settings.
pub(crate) fn agent(arguments: &[&str]) -> Done {
    Done { output: command(AGENT.into()).args(arguments).output().unwrap() }
}

/// The same, with a text on standard input, which is a pipe.
pub(crate) fn agent_fed(arguments: &[&str], text: &str) -> Done {
    let mut command = command(AGENT.into());
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Dropped, and so closed, at the end of the statement.
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    Done { output: child.wait_with_output().unwrap() }
}

/// Runs one test of this program in a process of its own, with a variable set.
pub(crate) fn this_test(name: &str, variable: &str) -> Done {
    let mut command = command(std::env::current_exe().unwrap());
    Done { output: command.args(["--exact", name, "--nocapture"]).env(variable, "1").output().unwrap() }
}

/// A network namespace of its own; deleted when dropped.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// `None`, with the reason on standard error, where there is no privilege or no tool for it; under CI that is a
    /// failure.
    pub(crate) fn new(purpose: &str) -> Option<Self> {
        let name = format!("npmt-{purpose}-{}", std::process::id());
        let made = command("ip".into()).args(["netns", "add", &name]).output();
        let namespace = made.is_ok_and(|output| output.status.success()).then_some(Self { name });
        let works = namespace.filter(|namespace| namespace.run("ipset", &["list", "-n"]).code() == Some(0));
        if works.is_none() {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "no network namespaces or no ipset");
            eprintln!("SKIPPED: needs root, ip and ipset");
        }
        works
    }

    /// Runs a program in it.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Done {
        Done { output: self.command(program, arguments).output().unwrap() }
    }

    /// Runs the agent's binary in it.
    pub(crate) fn agent(&self, arguments: &[&str]) -> Done {
        self.run(AGENT, arguments)
    }

    /// Starts the agent's binary in it.
    pub(crate) fn start(&self, arguments: &[&str]) -> Child {
        self.command(AGENT, arguments).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        // Not `ip netns exec`, which hides mounts; nsenter becomes the program, so signals reach it.
        let mut command = command("nsenter".into());
        command.arg(format!("--net=/var/run/netns/{}", self.name)).arg(program).args(arguments);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // It stays behind then, with its name to tell what it is.
        let _ = command("ip".into()).args(["netns", "del", &self.name]).output();
    }
}

/// Sends SIGTERM.
pub(crate) fn terminate(child: &Child) {
    let pid = child.id().to_string();
    assert!(command("kill".into()).args(["-TERM", &pid]).output().unwrap().status.success());
}

fn command(program: PathBuf) -> Command {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that runs programs")]
    let mut command = Command::new(program);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NPM_")) {
        command.env_remove(name);
    }
    command
}
