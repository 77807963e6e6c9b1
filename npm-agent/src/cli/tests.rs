//! The command line against clap, and against docs/configuration.md.

use std::collections::BTreeSet;
use std::path::Path;

use clap::{CommandFactory, Parser};

use super::*;
use crate::config::keys::{KEYS, Meaning};
use crate::status::report::{BackendStatus, SourceStatus, Status, WorldStatus};

const DOCS: &str = include_str!("../../../docs/configuration.md");

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("npm-agent").chain(line.split_whitespace()))
}

/// The flags of a subcommand that are its own: name, environment variable.
fn flags(subcommand: &str) -> Vec<(String, Option<String>)> {
    let command = Cli::command();
    let command = command.find_subcommand(subcommand).unwrap();
    let own = command.get_arguments().filter(|argument| argument.get_long().is_some());
    own.map(|argument| {
        let env = argument.get_env().map(|env| env.to_str().unwrap().to_owned());
        (argument.get_long().unwrap().to_owned(), env)
    })
    .collect()
}

/// The cells of the table rows in `docs` whose first cell is a code span, without their back-quotes.
fn rows(section: &str) -> Vec<Vec<String>> {
    let start = DOCS.find(&format!("\n## {section}\n")).unwrap_or_else(|| panic!("no section {section}"));
    let text = &DOCS[start + 4..];
    let text = text.find("\n## ").map_or(text, |end| &text[..end]);
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    rows.map(|line| {
        line.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
    })
    .collect()
}

#[test]
fn clap_finds_no_fault_with_the_definition() {
    Cli::command().debug_assert();
}

#[test]
fn every_flag_of_run_has_an_environment_variable_of_its_own_and_a_key() {
    let keys: BTreeSet<&str> = KEYS
        .iter()
        .filter_map(|key| match key.meaning {
            Meaning::Setting(setting) => setting.flag(),
            Meaning::Nothing { .. } => None,
        })
        .collect();
    for (flag, env) in flags("run") {
        let expected = format!("NPM_{}", flag.to_uppercase().replace('-', "_"));
        assert_eq!(env.as_deref(), Some(expected.as_str()), "--{flag}");
        // A config file that names a config file would be a puzzle.
        assert!(keys.contains(flag.as_str()) || flag == "config", "--{flag} has no key in the config file");
    }
}

#[test]
fn the_documentation_lists_every_flag_variable_and_key_and_no_other() {
    let mut documented: BTreeSet<(String, String, String)> =
        rows("Settings").into_iter().map(|row| (row[0].clone(), row[1].clone(), row[2].clone())).collect();
    for (flag, env) in flags("run") {
        let key = KEYS.iter().find(|key| match key.meaning {
            Meaning::Setting(setting) => setting.flag() == Some(&flag),
            Meaning::Nothing { .. } => false,
        });
        let key = key.map_or("-", |key| key.name).to_owned();
        let row = (format!("--{flag}"), env.unwrap(), key);
        assert!(documented.remove(&row), "docs/configuration.md, Settings, lacks {row:?}");
    }
    assert_eq!(documented, BTreeSet::new(), "documented and not there");

    let mut documented: BTreeSet<String> =
        rows("Azure NPM's keys").into_iter().map(|row| row[0].clone()).collect();
    for key in KEYS {
        let is_ours = match key.meaning {
            Meaning::Setting(setting) => setting.flag().is_some(),
            Meaning::Nothing { .. } => false,
        };
        assert!(is_ours || documented.remove(key.name), "docs/configuration.md lacks {}", key.name);
    }
    assert_eq!(documented, BTreeSet::new(), "documented and not there");
}

#[test]
fn the_documentation_lists_the_flags_of_the_other_commands() {
    for command in ["status", "cleanup"] {
        let mut documented: BTreeSet<(String, String)> = rows(&format!("npm-agent {command}"))
            .into_iter()
            .map(|row| (row[0].clone(), row[1].clone()))
            .collect();
        for (flag, env) in flags(command) {
            let row = (format!("--{flag}"), env.unwrap_or_else(|| "-".to_owned()));
            assert!(documented.remove(&row), "docs/configuration.md, {command}, lacks {row:?}");
        }
        assert_eq!(documented, BTreeSet::new(), "documented and not there");
    }
}

#[test]
fn the_documentations_example_is_a_valid_file_without_notices() {
    let start = DOCS.find("```json\n").unwrap() + "```json\n".len();
    let text = &DOCS[start..][..DOCS[start..].find("```").unwrap()];
    let file = crate::config::file::File::parse(text, Path::new("docs")).unwrap();
    assert_eq!(file.notices, []);
    assert!(file.node.is_some() && file.manifests.is_some());
}

const TROUBLESHOOTING: &str = include_str!("../../../docs/troubleshooting.md");

#[test]
fn the_commands_for_when_something_is_wrong_exist() {
    let mut fenced = false;
    let mut seen = 0;
    for line in TROUBLESHOOTING.lines().map(str::trim) {
        fenced ^= line.starts_with("```");
        let Some(command) = line.strip_prefix("npm-agent ").filter(|_| fenced) else { continue };
        let command = command.split(['#', '|', '>']).next().unwrap();
        if let Err(error) = parse(command) {
            panic!("{line}: {error}");
        }
        seen += 1;
    }
    assert!(seen >= 6, "{seen}");
}

#[test]
fn every_reason_for_not_being_ready_is_explained() {
    let backend = |inherited| BackendStatus {
        name: "iptables".into(),
        inherited,
        consecutive_failures: 3,
        last_error: Some("...".into()),
        unverified_ms: 95_000,
        attempt_ms: Some(95_000),
        stale_after_ms: 90_000,
        generation: 4,
        ..BackendStatus::default()
    };
    for (inherited, unread) in
        [(true, vec!["FILES".to_owned()]), (false, vec!["FILES".into()]), (false, vec![])]
    {
        let status = Status {
            version: String::new(),
            node: String::new(),
            instance: String::new(),
            started: std::time::SystemTime::UNIX_EPOCH,
            known_differences: vec![],
            source: SourceStatus { in_sync: false, unread, ..SourceStatus::default() },
            warnings: vec![],
            world: WorldStatus::default(),
            generation: 5,
            backends: vec![backend(inherited)],
            escapes: vec![],
        };
        let reasons = status.reasons(5);
        assert_eq!(reasons.len(), 5);
        for reason in reasons {
            assert!(
                TROUBLESHOOTING.contains(&format!("| `{reason}` |")),
                "docs/troubleshooting.md lacks {reason}"
            );
        }
    }
}

#[test]
fn the_unit_waits_with_a_command_that_exists_for_less_long_than_systemd() {
    let unit = include_str!("../../../deploy/systemd/npm-agent.service");
    let value =
        |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key}"));
    let program = value("ExecStart=").split_whitespace().next().unwrap();
    let command = value("ExecStartPost=-").strip_prefix(program).unwrap();
    let asked = parse(command).unwrap().command;
    assert!(matches!(asked, Command::Status(_)), "{asked:?}");
    let timeout = command.split_once("--timeout ").unwrap().1;
    let timeout = crate::config::duration::parse_duration(timeout).unwrap();
    assert!(timeout.as_secs() < value("TimeoutStartSec=").parse().unwrap());
}

#[test]
fn what_is_no_value_is_refused_with_what_would_be() {
    for (line, expected) in [
        ("run --source api", "\"api\" is none of manifests, kube"),
        ("run --listening-address all", "is no IP address"),
        ("run --watch-timeout 10ms", "at least 1s"),
        ("run --backend nft", "\"nft\" is none of iptables"),
        ("run --iptables-variant xtables", "is none of auto, nft, legacy"),
        ("run --verify-interval 5", "whole number with ms, s, m or h"),
        ("run --verify-interval 1ms", "at least 100ms"),
        ("run --log-level loud", "is none of info, error, warn, debug, trace"),
        ("run --log-format xml", "is none of auto, human, json"),
        ("run --instance ../x", "is no instance name"),
        ("run --instance .x", "is no instance name"),
        ("run --node=", "is no node name"),
        ("run --nod n", "unexpected argument '--nod'"),
        ("run extra", "unexpected argument 'extra'"),
        ("status --output yaml", "possible values: table, json"),
        ("status --timeout soon", "whole number"),
        ("render --node n", "--filename"),
        ("render -f x --node n --family 5", "possible values: 4, 6"),
        ("render -f x --node n --backend nft", "possible values: iptables, ebpf"),
        ("cleanup --all", "unexpected argument '--all'"),
        ("completions tcsh", "possible values: bash"),
        ("fly", "unrecognized subcommand 'fly'"),
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), i32::from(USAGE), "{line}");
        let text = error.to_string();
        assert!(text.contains(expected), "{line}: {text}");
    }
}

#[test]
fn every_command_explains_itself() {
    let command = Cli::command();
    for subcommand in command.get_subcommands() {
        let name = subcommand.get_name();
        let help = subcommand.clone().render_long_help().to_string();
        assert!(subcommand.get_about().is_some(), "{name} has no about");
        for argument in subcommand.get_arguments() {
            assert!(argument.get_help().is_some(), "{name}: {} has no help", argument.get_id());
        }
        assert!(!help.contains("TODO"), "{name}");
    }
    for name in ["run", "status", "cleanup"] {
        let help = command.find_subcommand(name).unwrap().clone().render_long_help().to_string();
        assert!(help.contains("Exit codes: 0"), "{name} documents no exit codes");
    }
}

#[test]
fn causes_choose_the_exit_code() {
    let code = |error: anyhow::Error| format!("{:?}", exit_code(&error));
    let is = |code: u8| format!("{:?}", ExitCode::from(code));
    assert_eq!(code(ConfigError::NoNode.into()), is(2));
    let held = || LockError::Held { path: "x".into() };
    assert_eq!(code(held().into()), is(3));
    let taken = crate::status::server::ServerError::Taken { path: "x".into(), source: held() };
    assert_eq!(code(anyhow::Error::from(taken).context("binding")), is(3));
    assert_eq!(code(anyhow::anyhow!("matrix").context(Usage)), is(2));
    assert_eq!(code(anyhow::anyhow!("other")), is(1));
}
