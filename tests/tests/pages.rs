//! The status page and the debug API of a running agent: over HTTP, and in a browser.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_tests::browser::{self, Browser, Scheme};
use npm_tests::lab::agent::{Agent, Settings};
use npm_tests::lab::netns::{Namespaces, Netns};
use npm_tests::lab::require_root;
use serde_json::Value;
use tempfile::TempDir;

const NODE: &str = "demo";

/// The port of the HTTP server.
const PORT: u16 = 10091;

/// An address of the node that is not loopback's: who asks from there is not on loopback.
const OUTSIDE: &str = "192.0.2.7";

/// How long the server may take to listen, and to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The demo's objects, and some with names as long as names may be.
fn manifests(directory: &Path) -> Result<()> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/demo");
    for entry in std::fs::read_dir(&demo).context("reading the demo's objects")? {
        let path = entry?.path();
        std::fs::copy(&path, directory.join(path.file_name().context("a file name")?))?;
    }
    let (namespace, name, value) = ("n".repeat(63), "p".repeat(253), "v".repeat(63));
    let long = format!(
        r#"
{{apiVersion: v1, kind: Namespace, metadata: {{name: {namespace}}}}}
---
{{apiVersion: v1, kind: Pod, metadata: {{namespace: {namespace}, name: {name}, labels: {{app: {value}}}}}, spec: {{nodeName: {NODE}}}, status: {{phase: Running, podIPs: [{{ip: 10.244.9.9}}]}}}}
---
{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{namespace: {namespace}, name: {name}}}, spec: {{podSelector: {{matchLabels: {{app: {value}}}}}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {value}}}}}}}]}}]}}}}
"#
    );
    std::fs::write(directory.join("long.yaml"), long).context("writing long names")
}

/// An agent on a node with two addresses.
struct Node {
    // The agent ends before its namespace.
    agent: Agent,
    netns: Netns,
    _group: Namespaces,
    directory: TempDir,
}

impl Node {
    fn start(more: &[&str]) -> Result<Self> {
        let group = Namespaces::create([NODE])?;
        let netns = group.members()[0].clone();
        netns.exec("ip", &["link", "set", "lo", "up"])?;
        netns.exec("ip", &["address", "add", &format!("{OUTSIDE}/32"), "dev", "lo"])?;
        let directory = tempfile::tempdir()?;
        std::fs::create_dir(directory.path().join("manifests"))?;
        manifests(&directory.path().join("manifests"))?;
        let mut agent = Agent::start(&netns, settings(&directory, more))?;
        agent.wait()?;
        Ok(Self { agent, netns, _group: group, directory })
    }

    /// Ends the agent and starts it with other flags.
    fn restart(self, more: &[&str]) -> Result<Self> {
        let Self { agent, netns, _group, directory } = self;
        agent.terminate()?;
        let mut agent = Agent::start(&netns, settings(&directory, more))?;
        agent.wait()?;
        Ok(Self { agent, netns, _group, directory })
    }

    /// Code and body. The server listens shortly after the start: until then it is asked again.
    fn get(&self, address: &str, path: &str) -> Result<(u16, String)> {
        self.netns.run(|| {
            let deadline = Instant::now() + PATIENCE;
            let mut stream = loop {
                match TcpStream::connect((address, PORT)) {
                    Ok(stream) => break stream,
                    Err(error) if Instant::now() > deadline => {
                        return Err(error).context("reaching the agent");
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            };
            stream.set_read_timeout(Some(PATIENCE))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (head, body) = answer.split_once("\r\n\r\n").context("a head and a body")?;
            Ok((head.split(' ').nth(1).context("a code")?.parse()?, body.to_owned()))
        })
    }
}

fn settings(directory: &TempDir, more: &[&str]) -> Settings {
    Settings {
        backend: "iptables".to_owned(),
        node: NODE.to_owned(),
        manifests: directory.path().join("manifests"),
        directory: directory.path().to_owned(),
        more: more.iter().map(ToString::to_string).collect(),
    }
}

/// Pages and documents, with something that only those who may see them are to see.
const SHOWN: &[(&str, &str)] = &[
    ("/policies", "shop/payments-to-bank"),
    ("/policy?name=shop%2Fpayments-to-bank", "pods app=payments"),
    ("/pods", "10.244.0.13"),
    ("/sets?filter=10.244.0.13", "local-ns-shop"),
    ("/verdict?from=shop/cart&to=shop/payments&protocol=TCP&port=grpc", "<strong>Allowed</strong>"),
    ("/verdict?from=shop/frontend&to=shop/db&protocol=TCP&port=5432", "<strong>Denied</strong>"),
    ("/debug/world", r#""name":"payments-to-bank""#),
    ("/debug/goal", r#""shop/payments-to-bank":{"#),
    ("/debug/sets", "10.244.0.13"),
    ("/npm/v1/debug/manager", r#""PodIP":"10.244.0.13""#),
];

#[test]
fn a_running_agent_shows_what_it_enforces_to_its_own_node() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let node = Node::start(&[])?;
    for (path, shown) in SHOWN {
        let (code, body) = node.get("127.0.0.1", path)?;
        ensure!(code == 200 && body.contains(shown), "{path}: {code}, without {shown}: {body}");
        let (code, body) = node.get(OUTSIDE, path)?;
        ensure!(code == 403 && !body.contains(shown), "{path} from outside: {code} {body}");
    }
    let (code, page) = node.get("127.0.0.1", "/")?;
    ensure!(code == 200 && page.contains("Everything that was seen is enforced"), "{page}");
    let (code, page) = node.get(OUTSIDE, "/")?;
    ensure!(code == 200 && page.contains("ready: everything") && !page.contains("Node demo"), "{page}");

    // What the manager says is in the kernel's sets is there, under that name.
    let manager: Value = serde_json::from_str(&node.get("127.0.0.1", "/npm/v1/debug/manager")?.1)?;
    ensure!(manager["NodeName"] == NODE, "{manager}");
    let sets = node.netns.exec("ipset", &["list", "-n"])?;
    let listed = manager["SetMap"].as_object().context("no SetMap")?;
    ensure!(
        !listed.is_empty() && listed.keys().all(|set| sets.lines().any(|line| line == set)),
        "{listed:?}: {sets}"
    );

    let node = node.restart(&["--debug-access", "anyone"])?;
    for (path, shown) in SHOWN {
        let (code, body) = node.get(OUTSIDE, path)?;
        ensure!(code == 200 && body.contains(shown), "{path} for anyone: {code}, without {shown}");
    }
    let node = node.restart(&["--debug-access", "nobody"])?;
    for (path, _) in SHOWN {
        ensure!(node.get("127.0.0.1", path)?.0 == 404, "{path} for nobody");
    }
    ensure!(node.get("127.0.0.1", "/readyz")? == (200, "ok\n".to_owned()));
    node.agent.terminate()
}

/// The pages that are looked at, with the names of their pictures.
fn looked_at() -> Vec<(&'static str, String)> {
    let long = format!("{}%2F{}", "n".repeat(63), "p".repeat(253));
    let verdict = "/verdict?from=shop/frontend&to=shop/db&protocol=TCP&port=5432";
    vec![
        ("overview", "/".to_owned()),
        ("policies", "/policies".to_owned()),
        ("policy", "/policy?name=shop%2Fbackend".to_owned()),
        ("policy-long", format!("/policy?name={long}")),
        ("pods", "/pods?show=all".to_owned()),
        ("sets", "/sets".to_owned()),
        ("set", "/set?name=local-ns-shop".to_owned()),
        ("verdict", verdict.to_owned()),
        ("verdict-long", format!("/verdict?from={long}&to=10.244.9.9&protocol=ICMP")),
        ("warnings", "/warnings".to_owned()),
    ]
}

/// What sticks out of the window, or out of what it is in. Fields scroll by themselves.
const STICKING_OUT: &str = r#"
    const out = [];
    const root = document.documentElement;
    if (root.scrollWidth > root.clientWidth) out.push(`the page: ${root.scrollWidth} > ${root.clientWidth}`);
    for (const element of document.querySelectorAll("body *")) {
        if (["INPUT", "SELECT", "OPTION", "DATALIST"].includes(element.tagName)) continue;
        const box = element.getBoundingClientRect();
        const inner = getComputedStyle(element).display == "inline" ? 0 : element.scrollWidth - element.clientWidth;
        if (box.right > root.clientWidth + 1 || box.left < -1 || inner > 1)
            out.push(`${element.tagName} ${element.className} ${element.textContent.slice(0, 60)}`);
    }
    return out;
"#;

/// Texts whose contrast with what is behind them is below what WCAG 2.2 (1.4.3, level AA) asks for.
const FAINT: &str = r#"
    const channels = color => color.match(/[\d.]+/g).map(Number);
    const luminance = color => {
        const [r, g, b] = channels(color).slice(0, 3).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = element => {
        for (let at = element; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if ((channels(color)[3] ?? 1) > 0) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const faint = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some(node => node.nodeType == Node.TEXT_NODE && node.textContent.trim());
        if (!own || element.tagName == "OPTION" || !element.getClientRects().length) continue;
        const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((a, b) => b - a);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) faint.push(`${element.tagName} ${element.className}: ${ratio.toFixed(2)}`);
    }
    return faint;
"#;

#[test]
fn a_browser_shows_the_pages_whole_and_the_form_judges() -> Result<()> {
    if !require_root() || !browser::is_installed() {
        return Ok(());
    }
    let node = Node::start(&[])?;
    node.get("127.0.0.1", "/healthz")?;
    let browser = Browser::start(&node.netns)?;
    let base = format!("http://localhost:{PORT}");
    // For people: what it looks like.
    let pictures = std::env::var_os("NPM_SCREENSHOTS");

    // Colours do not change what has room, nor widths what can be read: pictures are of all four.
    let crossed = [(Scheme::Light, vec![360]), (Scheme::Dark, vec![1400])];
    let all = Scheme::BOTH.map(|scheme| (scheme, vec![360, 1400]));
    let mut grounds = Vec::new();
    for (scheme, widths) in if pictures.is_some() { all } else { crossed } {
        for width in widths {
            browser.resize(width, 800, scheme)?;
            for (name, path) in looked_at() {
                browser.open(&format!("{base}{path}"))?;
                let at = format!("{name}, {width} pixels, {}", scheme.name());
                if let Some(directory) = &pictures {
                    let file = format!("{name}-{width}-{}.png", scheme.name());
                    std::fs::write(Path::new(directory).join(file), browser.screenshot()?)?;
                }
                let out = browser.script(STICKING_OUT)?;
                ensure!(out.as_array().is_some_and(Vec::is_empty), "{at}: sticking out: {out}");
                let faint = browser.script(FAINT)?;
                ensure!(faint.as_array().is_some_and(Vec::is_empty), "{at}: too faint: {faint}");
            }
        }
        grounds.push(browser.script("return getComputedStyle(document.body).backgroundColor")?);
    }
    ensure!(grounds[0] != grounds[1], "light and dark are the same: {grounds:?}");

    for (from, to, protocol, port, verdict) in [
        ("shop/frontend", "shop/cart", "TCP", "grpc", "Allowed: shop/frontend → shop/cart TCP/9090"),
        ("shop/frontend", "shop/db", "TCP", "5432", "Denied: shop/frontend → shop/db TCP/5432"),
        ("shop/cart", "10.244.0.14", "TCP", "5432", "Allowed: shop/cart → 10.244.0.14 TCP/5432"),
        ("192.0.2.200", "shop/frontend", "TCP", "8080", "Denied: 192.0.2.200 → shop/frontend TCP/8080"),
        ("192.0.2.1", "shop/frontend", "TCP", "8080", "Allowed: 192.0.2.1 → shop/frontend TCP/8080"),
        ("shop/frontend", "shop/cart", "UDP", "9090", "Denied: shop/frontend → shop/cart UDP/9090"),
    ] {
        browser.open(&base)?;
        browser.fill("input[name=from]", from)?;
        browser.fill("input[name=to]", to)?;
        browser.fill("select[name=protocol]", protocol)?;
        browser.fill("input[name=port]", port)?;
        browser.click("form.verdict button")?;
        let shown = browser.text("#verdict")?;
        ensure!(shown == verdict, "{from} -> {to} {protocol}/{port}: {shown}");
        let url = browser.url()?;
        ensure!(url.starts_with(&format!("{base}/verdict?from=")), "the form leads to {url}");
    }
    drop(browser);
    node.agent.terminate()
}
