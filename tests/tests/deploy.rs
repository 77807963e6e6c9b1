//! What `deploy/` ships is understood by this agent: the config files whole and without a warning, the unit's command,
//! the image's, the DaemonSet's; probes and metrics are where the DaemonSet says.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use npm_agent::cli::Cli;
use npm_agent::config::file::File;
use npm_agent::config::keys::{KEYS, Meaning};
use npm_agent::config::value::SourceKind;
use npm_agent::config::{DEFAULT_FILES, DEFAULT_LISTENING_PORT};
use npm_agent::http::{HEALTH_PATH, READY_PATH};
use serde_json::Value;

const CONFIG: &str = "deploy/config/azure-npm.json";

fn shipped(name: &str) -> Result<(PathBuf, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok((path, text))
}

#[test]
fn the_config_file_is_understood_without_a_warning() -> Result<()> {
    let (path, text) = shipped(CONFIG)?;
    let file = File::parse(&text, &path)?;
    ensure!(file.notices.is_empty(), "{:?}", file.notices);
    ensure!(file.manifests.as_deref() == Some(Path::new("/etc/npm-agent/manifests")), "{:?}", file.manifests);
    Ok(())
}

#[test]
fn the_config_file_shows_every_setting_that_nodes_can_share() -> Result<()> {
    // These two are a node's own: their defaults are right on every node, a shared value on none.
    const OWN: [&str; 2] = ["Node", "Socket"];
    let (_, text) = shipped(CONFIG)?;
    let json: Value = serde_json::from_str(&text)?;
    for key in KEYS {
        let pointer = format!("/{}", key.name.replace('.', "/"));
        let shown = json.pointer(&pointer).is_some();
        let wanted = matches!(key.meaning, Meaning::Setting(_)) && !OWN.contains(&key.name);
        ensure!(shown == wanted, "{}: shown: {shown}, wanted: {wanted}", key.name);
    }
    Ok(())
}

fn manifest(name: &str) -> Result<Value> {
    let (path, text) = shipped(name)?;
    serde_saphyr::from_str(&text).with_context(|| format!("reading {}", path.display()))
}

#[test]
fn the_config_map_is_understood_without_a_warning() -> Result<()> {
    let map = manifest("deploy/base/configmap.yaml")?;
    let text = map["data"]["azure-npm.json"].as_str().context("no azure-npm.json in the ConfigMap")?;
    let file = File::parse(text, Path::new("deploy/base/configmap.yaml"))?;
    ensure!(file.notices.is_empty(), "{:?}", file.notices);
    ensure!(file.source == Some(SourceKind::Kube), "{:?}", file.source);
    // Probes and scrapes ask the default port.
    ensure!(file.listening_port.is_none() && file.listening_address.is_none() && file.scraping.is_none());
    Ok(())
}

#[test]
fn the_daemon_set_starts_probes_and_mounts_what_the_agent_has() -> Result<()> {
    let set = manifest("deploy/base/daemonset.yaml")?;
    let pod = &set["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    for (probe, path) in
        [("startupProbe", HEALTH_PATH), ("livenessProbe", HEALTH_PATH), ("readinessProbe", READY_PATH)]
    {
        let get = &container[probe]["httpGet"];
        ensure!(get["path"] == path && get["port"] == DEFAULT_LISTENING_PORT, "{probe}: {get}");
    }
    ensure!(container["ports"][0]["containerPort"] == DEFAULT_LISTENING_PORT, "{container}");
    let service = manifest("deploy/base/service.yaml")?;
    ensure!(service["spec"]["ports"][0]["targetPort"] == DEFAULT_LISTENING_PORT, "{service}");

    let environment = container["env"].as_array().context("no environment")?;
    let value = |name: &str| {
        let variable = environment.iter().find(|variable| variable["name"] == name);
        variable.and_then(|variable| variable["value"].as_str())
    };
    ensure!(value("NPM_CONFIG") == Some(DEFAULT_FILES[0]), "{environment:?}");
    ensure!(value("NPM_SOURCE").context("no source")?.parse() == Ok(SourceKind::Kube));
    let mounts = container["volumeMounts"].as_array().context("no mounts")?;
    let is_mounted = |path: &str| mounts.iter().any(|mount| mount["mountPath"] == path);
    let directory = Path::new(DEFAULT_FILES[0]).parent().context("a directory")?;
    ensure!(is_mounted(&directory.to_string_lossy()), "{mounts:?}");
    ensure!(is_mounted(npm_agent::config::RUN_DIRECTORY), "{mounts:?}");

    let component = manifest("deploy/components/ebpf/kustomization.yaml")?;
    let patch = component["patches"][0]["patch"].as_str().context("no patch")?;
    let patch: Value = serde_saphyr::from_str(patch).context("reading the patch")?;
    ensure!(patch[0]["path"] == "/spec/template/spec/containers/0/args", "{patch}");
    for args in [&container["args"], &patch[0]["value"]] {
        let args: Vec<String> = serde_json::from_value(args.clone())?;
        let words = std::iter::once("npm-agent".to_owned()).chain(args);
        Cli::try_parse_from(words.clone())
            .with_context(|| format!("parsing {:?}", words.collect::<Vec<_>>()))?;
    }
    Ok(())
}

#[test]
fn the_units_command_is_one_of_the_agents() -> Result<()> {
    let (_, unit) = shipped("deploy/systemd/npm-agent.service")?;
    let command =
        unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).context("finding ExecStart")?;
    let words: Vec<&str> = command.split_whitespace().collect();
    Cli::try_parse_from(&words).with_context(|| format!("parsing {command}"))?;
    ensure!(words[1] == "run" && words[2..] == ["--config", "/etc/azure-npm/azure-npm.json"], "{words:?}");
    ensure!(Cli::try_parse_from(["npm-agent", "run", "--no-such-flag"]).is_err());
    Ok(())
}

#[test]
fn the_drop_in_adds_the_capabilities_of_the_ebpf_backend() -> Result<()> {
    let (_, unit) = shipped("deploy/systemd/npm-agent.service")?;
    let (_, drop_in) = shipped("deploy/systemd/ebpf.conf")?;
    let capabilities = |text: &str| -> Result<BTreeSet<String>> {
        let line = text.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
        Ok(line.context("no capabilities")?.split_whitespace().map(str::to_owned).collect())
    };
    let cleanup = manifest("deploy/overlays/cleanup/daemonset.yaml")?;
    let container = &cleanup["spec"]["template"]["spec"]["containers"][0];
    let granted: BTreeSet<String> =
        serde_json::from_value(container["securityContext"]["capabilities"]["add"].clone())?;
    let granted: BTreeSet<String> = granted.iter().map(|name| format!("CAP_{name}")).collect();
    let all: BTreeSet<String> = capabilities(&unit)?.union(&capabilities(&drop_in)?).cloned().collect();
    ensure!(all == granted, "{all:?}, {granted:?}");

    let commands: Vec<&str> = drop_in.lines().filter_map(|line| line.strip_prefix("ExecStart=")).collect();
    let ["", command] = commands[..] else { anyhow::bail!("{commands:?}") };
    Cli::try_parse_from(command.split_whitespace()).with_context(|| format!("parsing {command}"))?;
    let plain = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).context("finding ExecStart")?;
    ensure!(command.replace(" --backend ebpf", "") == plain, "{command}");
    Ok(())
}

#[test]
fn the_images_command_is_one_of_the_agents() -> Result<()> {
    let (_, dockerfile) = shipped("deploy/Dockerfile")?;
    let mut words = Vec::new();
    for instruction in ["ENTRYPOINT ", "CMD "] {
        let json = dockerfile.lines().find_map(|line| line.strip_prefix(instruction)).context(instruction)?;
        words.extend(serde_json::from_str::<Vec<String>>(json)?);
    }
    Cli::try_parse_from(&words).with_context(|| format!("parsing {words:?}"))?;
    ensure!(words == ["/usr/local/bin/npm-agent", "run"], "{words:?}");
    // The file's place in the image is where the agent looks for it.
    let place = DEFAULT_FILES[0];
    ensure!(dockerfile.contains(&format!("COPY {CONFIG} {place}\n")), "{place}");
    Ok(())
}
