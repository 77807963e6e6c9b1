//! A headless Chromium in a namespace, driven by WebDriver (W3C, "WebDriver") through Debian's `chromedriver`.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::exec;
use crate::lab::netns::Netns;

/// How long the browser may take to start, and to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// `chromedriver`'s port: the namespace is the browser's own.
const PORT: u16 = 9515;

/// Whether Debian's `chromium` and `chromium-driver` are there. Says loudly when not; in CI their absence is a failure.
///
/// # Panics
/// They are missing and this is CI.
pub fn is_installed() -> bool {
    let there = ["chromium", "chromedriver"].iter().all(|program| exec::run(program, &["--version"]).is_ok());
    if !there {
        let ci = std::env::var("CI").as_deref() == Ok("true");
        assert!(!ci, "chromium is not installed: cargo xtask setup");
        eprintln!("SKIPPED, NOT TESTED: chromium is not installed (cargo xtask setup)");
    }
    there
}

/// The colours that the browser's user prefers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Dark on light.
    Light,
    /// Light on dark.
    Dark,
}

impl Scheme {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Light, Self::Dark];

    /// Its name in style sheets.
    pub fn name(self) -> &'static str {
        match self {
            Self::Light => "light",
            Self::Dark => "dark",
        }
    }
}

/// A running browser with one window, ended when dropped.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    netns: Netns,
    /// The path of the session; empty before there is one.
    session: String,
    /// Its profile and the driver's log.
    directory: TempDir,
}

impl Browser {
    /// Starts it with an empty profile.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(netns: &Netns) -> Result<Self> {
        let directory = tempfile::tempdir().context("making a directory for the browser")?;
        let log = File::create(directory.path().join("log")).context("making the driver's log")?;
        let driver = netns.run(|| exec::start("chromedriver", &[format!("--port={PORT}")], &log))?;
        let mut browser = Self { driver, netns: netns.clone(), session: String::new(), directory };
        let deadline = Instant::now() + PATIENCE;
        while browser.ask("GET", "/status", &Value::Null).is_err() {
            if Instant::now() > deadline {
                bail!("chromedriver does not listen: {}", browser.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let profile = format!("--user-data-dir={}", browser.directory.path().join("profile").display());
        let args = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            &profile,
        ];
        // An element that a click brings is waited for.
        let implicit = u64::try_from(PATIENCE.as_millis() / 2).context("a wait in milliseconds")?;
        let always = json!({"goog:chromeOptions": {"args": args}, "timeouts": {"implicit": implicit}});
        let wanted = json!({"capabilities": {"alwaysMatch": always}});
        let session = browser.ask("POST", "/session", &wanted).with_context(|| browser.log())?;
        let id = session["sessionId"].as_str().context("a session without a name")?;
        browser.session = format!("/session/{id}");
        Ok(browser)
    }

    /// Makes the window as wide and high as this, in pixels, with these colours.
    ///
    /// # Errors
    /// The browser does not do it.
    pub fn resize(&self, width: u32, height: u32, scheme: Scheme) -> Result<()> {
        let feature = json!({"name": "prefers-color-scheme", "value": scheme.name()});
        self.command("Emulation.setEmulatedMedia", &json!({"features": [feature]}))?;
        // Without `mobile`, a scroll bar takes some of the width.
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": true});
        self.command("Emulation.setDeviceMetricsOverride", &metrics).map(drop)
    }

    /// Opens a page and waits until it is there.
    ///
    /// # Errors
    /// Nothing answers there.
    pub fn open(&self, url: &str) -> Result<()> {
        self.of_session("POST", "/url", &json!({"url": url})).map(drop)
    }

    /// Where the window is.
    ///
    /// # Errors
    /// The browser does not say.
    pub fn url(&self) -> Result<String> {
        let url = self.of_session("GET", "/url", &Value::Null)?;
        Ok(url.as_str().context("no address")?.to_owned())
    }

    /// Types into the element that a CSS selector finds.
    ///
    /// # Errors
    /// There is none, or it takes no text.
    pub fn fill(&self, css: &str, text: &str) -> Result<()> {
        self.of_element(css, "POST", "value", &json!({"text": text})).map(drop)
    }

    /// Clicks on an element, as a user does: it must be in sight.
    ///
    /// # Errors
    /// There is none, or something else is in front of it.
    pub fn click(&self, css: &str) -> Result<()> {
        self.of_element(css, "POST", "click", &json!({})).map(drop)
    }

    /// What an element shows.
    ///
    /// # Errors
    /// There is none.
    pub fn text(&self, css: &str) -> Result<String> {
        let text = self.of_element(css, "GET", "text", &Value::Null)?;
        Ok(text.as_str().context("no text")?.to_owned())
    }

    /// What a script within the page returns.
    ///
    /// # Errors
    /// It fails.
    pub fn script(&self, script: &str) -> Result<Value> {
        self.of_session("POST", "/execute/sync", &json!({"script": script, "args": []}))
    }

    /// The whole page as a PNG.
    ///
    /// # Errors
    /// The browser does not make one.
    pub fn screenshot(&self) -> Result<Vec<u8>> {
        let wanted = json!({"format": "png", "captureBeyondViewport": true});
        let shot = self.command("Page.captureScreenshot", &wanted)?;
        decode(shot["data"].as_str().context("no picture")?)
    }

    /// A command of the DevTools protocol.
    fn command(&self, command: &str, params: &Value) -> Result<Value> {
        self.of_session("POST", "/goog/cdp/execute", &json!({"cmd": command, "params": params}))
    }

    fn of_session(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        self.ask(method, &format!("{}{path}", self.session), body)
    }

    fn of_element(&self, css: &str, method: &str, what: &str, body: &Value) -> Result<Value> {
        let found = self.of_session("POST", "/element", &json!({"using": "css selector", "value": css}))?;
        let found = found.as_object().and_then(|found| found.values().next()).and_then(Value::as_str);
        let id = found.with_context(|| format!("no element {css}"))?;
        self.of_session(method, &format!("/element/{id}/{what}"), body).with_context(|| css.to_owned())
    }

    /// One request to the driver, and the value of its answer.
    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (code, body) = self.netns.run(|| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).context("reaching the driver")?;
            stream.set_read_timeout(Some(PATIENCE)).context("setting a timeout")?;
            let length = body.len();
            write!(
                stream,
                "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\n\r\n{body}"
            )
            .context("asking the driver")?;
            answer(&mut BufReader::new(stream))
        })?;
        let value: Value = serde_json::from_str(&body).with_context(|| format!("reading {body}"))?;
        ensure!(code == "200", "{path}: {}", value["value"]["message"]);
        Ok(value["value"].clone())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends the browser with its session, not with itself.
        if !self.session.is_empty()
            && let Err(error) = self.of_session("DELETE", "", &Value::Null)
        {
            eprintln!("the browser does not end: {error:#}");
        }
        // It may have ended already; then there is nothing to kill.
        if matches!(self.driver.try_wait(), Ok(None)) {
            let _ = self.driver.kill();
            let _ = self.driver.wait();
        }
    }
}

/// The code and the body of an answer. The driver keeps the connection open: the head says how long the body is.
fn answer(stream: &mut impl BufRead) -> Result<(String, String)> {
    let mut line = String::new();
    stream.read_line(&mut line).context("reading the driver's answer")?;
    let code = line.split(' ').nth(1).context("an answer without a code")?.to_owned();
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line).context("reading the driver's answer")?;
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse()?
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).context("reading the driver's answer")?;
    Ok((code, String::from_utf8(body).context("an answer that is no text")?))
}

/// Decodes base64 (RFC 4648, section 4).
fn decode(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for digit in text.trim_end_matches('=').bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => bail!("{digit} is no digit of base64"),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read() {
        for (text, bytes) in
            [("", &b""[..]), ("Zg==", b"f"), ("Zm8=", b"fo"), ("Zm9v", b"foo"), ("+/8A", &[0xfb, 0xff, 0])]
        {
            assert_eq!(decode(text).unwrap(), bytes, "{text}");
        }
        assert!(decode("Z g=").is_err());
    }
}
