//! What `deploy/` ships is understood by this agent: the config file whole and without a warning, the unit's command,
//! the image's.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use npm_agent::cli::Cli;
use npm_agent::config::file::File;
use npm_agent::config::keys::{KEYS, Meaning};
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
    let place = npm_agent::config::DEFAULT_FILES[0];
    ensure!(dockerfile.contains(&format!("COPY {CONFIG} {place}\n")), "{place}");
    Ok(())
}
