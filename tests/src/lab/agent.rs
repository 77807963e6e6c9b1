//! The agent as a process inside a node's namespace.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::netns::Netns;
use crate::exec;

/// How long `status --wait` may take.
const SETTLED: Duration = Duration::from_secs(30);

/// How to start the agent.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The backend: `iptables`.
    pub backend: String,
    /// The node's name in the manifests.
    pub node: String,
    /// Where the manifests are; empty: `more` names another source.
    pub manifests: PathBuf,
    /// A directory for the socket and the log, which outlives the agent.
    pub directory: PathBuf,
    /// More arguments of `run`.
    pub more: Vec<String>,
}

/// A running agent, killed when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    netns: Netns,
    settings: Settings,
    /// A program and its arguments that start the agent; none: it is started by itself.
    under: Vec<String>,
}

/// Where the agent's program is: `NPM_AGENT_BIN`, or beside the running test.
///
/// # Errors
/// There is no such file: it has to be built first.
pub fn binary() -> Result<PathBuf> {
    let path = match std::env::var_os("NPM_AGENT_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            // target/debug/deps/test-hash or target/debug/program.
            let own = std::env::current_exe().context("finding the running program")?;
            let beside = own.ancestors().skip(1).take(2).map(|directory| directory.join("npm-agent"));
            beside.clone().find(|path| path.is_file()).or(beside.last()).context("a path of a program")?
        }
    };
    if !path.is_file() {
        bail!(
            "{} does not exist: build it with `cargo build -p npm-agent`, or set NPM_AGENT_BIN",
            path.display()
        );
    }
    Ok(path)
}

/// What an agent's HTTP server answers within its node: code and body. It listens shortly after the start: until then it is
/// asked again.
///
/// # Errors
/// It does not listen, or its answer is none.
pub fn get(node: &Netns, address: &str, path: &str) -> Result<(u16, String)> {
    node.run(|| {
        let deadline = Instant::now() + SETTLED;
        let mut stream = loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error).context("reaching the agent"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(SETTLED))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("a head and a body")?;
        Ok((head.split(' ').nth(1).context("a code")?.parse()?, body.to_owned()))
    })
}

impl Agent {
    /// Starts the agent. It has programmed nothing yet: see [`Agent::wait`].
    ///
    /// # Errors
    /// The program is missing or can't be started.
    pub fn start(netns: &Netns, settings: Settings) -> Result<Self> {
        Self::start_under(netns, settings, Vec::new())
    }

    /// Starts the agent by another program, which gets the agent's program and arguments after its own and becomes it.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_under(netns: &Netns, settings: Settings, under: Vec<String>) -> Result<Self> {
        let child = Self::spawn(netns, &settings, &under)?;
        Ok(Self { child, netns: netns.clone(), settings, under })
    }

    fn spawn(netns: &Netns, settings: &Settings, under: &[String]) -> Result<Child> {
        let program = binary()?;
        let path = settings.directory.join("log");
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("opening {}", path.display()))?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut args: Vec<String> = under.to_vec();
        args.extend([text(&program), "run".into(), "--backend".into(), settings.backend.clone()]);
        if !settings.manifests.as_os_str().is_empty() {
            let manifests = text(&settings.manifests);
            args.extend(["--source".into(), "manifests".into(), "--manifests".into(), manifests]);
        }
        args.extend(["--node".into(), settings.node.clone()]);
        args.extend(["--socket".into(), text(&socket(settings))]);
        args.extend(settings.more.iter().cloned());
        netns.run(|| exec::start(&args[0], &args[1..], &log))
    }

    /// Waits until everything that the manifests say now is programmed.
    ///
    /// # Errors
    /// It has not come to that in time, or the agent has died: the error ends with its log.
    pub fn wait(&mut self) -> Result<()> {
        let program = binary()?;
        let socket = socket(&self.settings);
        let deadline = Instant::now() + SETTLED;
        // The socket appears shortly after the start.
        while !socket.exists() {
            if let Some(status) = self.child.try_wait().context("asking for the agent's status")? {
                bail!("the agent ended with {status}: {}", self.log());
            }
            if Instant::now() > deadline {
                bail!("the agent opened no socket: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let (socket, patience) = (socket.to_string_lossy(), format!("{}s", SETTLED.as_secs()));
        let args = ["status", "--wait", "--timeout", &patience, "--socket", &*socket];
        exec::run(&program.to_string_lossy(), &args).map(drop).with_context(|| self.log())
    }

    /// Whether everything that its source says now is programmed within a time.
    ///
    /// # Errors
    /// The program is missing.
    pub fn settles_within(&self, time: Duration) -> Result<bool> {
        let (program, socket) = (binary()?, socket(&self.settings));
        let patience = format!("{}ms", time.as_millis());
        let args = ["status", "--wait", "--timeout", &patience, "--socket", &*socket.to_string_lossy()];
        Ok(exec::run(&program.to_string_lossy(), &args).is_ok())
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended.
    ///
    /// # Errors
    /// The system does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("asking for the agent's status")?.is_none())
    }

    /// The namespace it runs in.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// What it says of itself, as JSON: see docs/configuration.md.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self) -> Result<serde_json::Value> {
        // The exit code says whether it is ready, which is in the answer too: so a shell that does not care.
        let (program, socket) = (binary()?, socket(&self.settings));
        let script = r#""$0" status --output json --socket "$1" || true"#;
        let args = ["-c", script, &program.to_string_lossy(), &socket.to_string_lossy()];
        let text = exec::run("sh", &args)?;
        serde_json::from_str(&text).with_context(|| format!("reading a status {text:?}"))
    }

    /// Asks it to end and waits for that.
    ///
    /// # Errors
    /// It does not end, or not well.
    pub fn terminate(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + SETTLED;
        loop {
            match self.child.try_wait().context("waiting for the agent")? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("the agent ended with {status}: {}", self.log()),
                None if Instant::now() > deadline => bail!("the agent does not end: {}", self.log()),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Kills it on the spot and starts another in its place.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.kill()?;
        self.child = Self::spawn(&self.netns, &self.settings, &self.under)?;
        Ok(())
    }

    /// Kills it on the spot (SIGKILL); what it has programmed stays.
    ///
    /// # Errors
    /// The system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("killing the agent")?;
        self.child.wait().context("waiting for the agent").map(drop)
    }

    /// Everything it has said so far, of earlier starts in the same directory too.
    pub fn log(&self) -> String {
        let path = self.settings.directory.join("log");
        std::fs::read_to_string(&path).unwrap_or_else(|error| format!("no log {}: {error}", path.display()))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("a process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("sending {signal} to the agent"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill.
        if matches!(self.child.try_wait(), Ok(None))
            && let Err(error) = self.kill()
        {
            eprintln!("{error:#}");
        }
    }
}

fn socket(settings: &Settings) -> PathBuf {
    settings.directory.join("socket")
}
