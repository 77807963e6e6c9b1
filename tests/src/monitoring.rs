//! A real Prometheus, and something for it to scrape.

pub mod agent;
pub mod panels;
pub mod relay;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use npm_agent::metrics::{CONTENT_TYPE, Metrics, Scope};
use serde_json::Value;
use tempfile::TempDir;

use crate::exec;

/// How long Prometheus may take to start, and for what it is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether Debian's `prometheus` is there. Says loudly when it is not; in CI its absence is a failure.
///
/// # Panics
/// It is missing and this is CI.
pub fn is_installed() -> bool {
    let there = ["promtool", "prometheus"].iter().all(|program| exec::run(program, &["--version"]).is_ok());
    if !there {
        let ci = std::env::var("CI").as_deref() == Ok("true");
        assert!(!ci, "prometheus is not installed: cargo xtask setup");
        eprintln!("SKIPPED, NOT TESTED: prometheus is not installed (cargo xtask setup)");
    }
    there
}

/// Serves metrics at the agent's paths on a port of loopback, until the process ends.
///
/// # Errors
/// There is no port.
pub fn export(metrics: Arc<Metrics>) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on loopback")?;
    let address = listener.local_addr().context("asking for the port")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Whoever goes away early gets no answer.
            let _ = answer(stream, &metrics);
        }
    });
    Ok(address)
}

fn answer(mut stream: TcpStream, metrics: &Metrics) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let path = request.split(' ').nth(1).unwrap_or_default();
    let (code, body) = match Scope::ALL.into_iter().find(|scope| scope.path() == path) {
        Some(scope) => ("200 OK", metrics.render(scope)),
        None => ("404 Not Found", String::new()),
    };
    let head = format!("HTTP/1.1 {code}\r\nContent-Type: {CONTENT_TYPE}\r\nConnection: close\r\n");
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// A running Prometheus, killed when dropped.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    address: SocketAddr,
    /// Its configuration, its data and its log.
    directory: TempDir,
}

impl Prometheus {
    /// Starts it on a port of loopback, with this configuration and these files beside it (name, content).
    ///
    /// # Errors
    /// It does not start, or does not take the configuration.
    pub fn start(config: &str, files: &[(&str, String)]) -> Result<Self> {
        let directory = files_of(config, files)?;
        exec::run("promtool", &["check", "config", &text(&directory.path().join("prometheus.yml"))])?;
        Self::run(&["prometheus".to_owned()], directory)
    }

    /// The same, by these words, which become a Prometheus with the arguments that follow; not necessarily the one that
    /// `promtool` belongs to.
    ///
    /// # Errors
    /// As [`Prometheus::start`].
    pub fn start_as(words: &[String], config: &str, files: &[(&str, String)]) -> Result<Self> {
        Self::run(words, files_of(config, files)?)
    }

    fn run(words: &[String], directory: TempDir) -> Result<Self> {
        let path = |name: &str| text(&directory.path().join(name));
        // Somebody may take the port before Prometheus does; then it ends, and the test says so.
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("finding a port")?;
        let address = free.local_addr().context("asking for the port")?;
        drop(free);
        let log = File::create(path("log")).context("making Prometheus' log")?;
        let args = [
            format!("--config.file={}", path("prometheus.yml")),
            format!("--storage.tsdb.path={}", path("data")),
            format!("--web.listen-address={address}"),
        ];
        let (program, own) = words.split_first().context("no program")?;
        let child = exec::start(program, &[own, &args].concat(), &log)?;
        let mut prometheus = Self { child, address, directory };
        let deadline = Instant::now() + PATIENCE;
        while prometheus.get("/-/ready").is_err() {
            if let Some(status) = prometheus.child.try_wait().context("asking for Prometheus")? {
                bail!("prometheus ended with {status}: {}", prometheus.log());
            }
            if Instant::now() > deadline {
                bail!("prometheus is not ready: {}", prometheus.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(prometheus)
    }

    /// The samples that a query gives now.
    ///
    /// # Errors
    /// Prometheus does not take the query.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let data = self.api(&format!("query?query={}", encoded(expression)))?;
        let result = data["result"].as_array().cloned();
        result.with_context(|| format!("{expression}: no list of samples: {data}"))
    }

    /// The samples that a query gives from `start` to `end`, in seconds since 1970, every `step` seconds.
    ///
    /// # Errors
    /// Prometheus does not take the query.
    pub fn range(&self, expression: &str, start: f64, end: f64, step: u32) -> Result<Vec<Value>> {
        let query = encoded(expression);
        let data = self.api(&format!("query_range?query={query}&start={start}&end={end}&step={step}"))?;
        let result = data["result"].as_array().cloned();
        result.with_context(|| format!("{expression}: no list of series: {data}"))
    }

    /// The value of a query that gives one sample; `None`: it gives none.
    ///
    /// # Errors
    /// Prometheus does not take the query, or it gives more than one sample.
    pub fn value(&self, expression: &str) -> Result<Option<f64>> {
        let result = self.query(expression)?;
        match result.as_slice() {
            [] => Ok(None),
            [one] => {
                let text = one["value"][1].as_str().context("a sample without a value")?;
                Ok(Some(text.parse().with_context(|| format!("{expression}: {text}"))?))
            }
            more => bail!("{expression}: {} samples", more.len()),
        }
    }

    /// Waits until a query gives a sample that `wanted` takes.
    ///
    /// # Errors
    /// It never does.
    pub fn wait(&self, expression: &str, wanted: impl Fn(f64) -> bool) -> Result<f64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.value(expression)?;
            if let Some(value) = value.filter(|value| wanted(*value)) {
                return Ok(value);
            }
            if Instant::now() > deadline {
                bail!("{expression} stays {value:?}: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The alerts that are pending or firing, as `rule file: alert`, and the rules that were not evaluated, sorted.
    ///
    /// # Errors
    /// Prometheus does not answer.
    pub fn alerts(&self) -> Result<Vec<String>> {
        let data = self.api("rules?type=alert")?;
        let mut alerts = Vec::new();
        for group in data["groups"].as_array().context("no groups of rules")? {
            let file = group["file"].as_str().unwrap_or_default();
            let file = file.rsplit_once('/').map_or(file, |(_, name)| name);
            for rule in group["rules"].as_array().context("a group without rules")? {
                if rule["health"] == "err" {
                    // Beside the alerts, for the caller to wait: on a busy machine an evaluation can be refused once.
                    alerts.push(format!("{file}: {} was not evaluated: {}", rule["name"], rule["lastError"]));
                }
                if rule["alerts"].as_array().is_some_and(|alerts| !alerts.is_empty()) {
                    alerts.push(format!("{file}: {}", rule["name"].as_str().unwrap_or_default()));
                }
            }
        }
        alerts.sort();
        Ok(alerts)
    }

    /// What an address of the HTTP API gives, below `/api/v1/`.
    ///
    /// # Errors
    /// It gives no data.
    pub fn api(&self, path: &str) -> Result<Value> {
        let body = self.get(&format!("/api/v1/{path}"))?;
        let answer: Value = serde_json::from_str(&body).with_context(|| format!("reading {body}"))?;
        if answer["status"] != "success" {
            bail!("{path}: {answer}");
        }
        Ok(answer["data"].clone())
    }

    /// Everything it has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(self.address).context("reaching Prometheus")?;
        stream.set_read_timeout(Some(PATIENCE)).context("setting a timeout")?;
        // Of version 1.0, so that the answer comes in one piece and the connection ends with it.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.address).context("asking")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("reading Prometheus' answer")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
        let code = head.split(' ').nth(1).unwrap_or_default();
        // 400 and 422 come with a body that says what is wrong with a query.
        match code {
            "200" | "400" | "422" => Ok(body.to_owned()),
            _ => bail!("{path}: {code} {body}"),
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A directory with a configuration and the files beside it.
fn files_of(config: &str, files: &[(&str, String)]) -> Result<TempDir> {
    let directory = tempfile::tempdir().context("making a directory for Prometheus")?;
    for (name, content) in files.iter().map(|(name, content)| (*name, content.as_str())) {
        std::fs::write(directory.path().join(name), content).context("writing Prometheus' files")?;
    }
    std::fs::write(directory.path().join("prometheus.yml"), config)
        .context("writing Prometheus' configuration")?;
    Ok(directory)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Percent-encoded, for a query string.
fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(byte).collect()
}
