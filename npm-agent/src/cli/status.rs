//! `npm-agent status`.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context;

use crate::config::duration::parse_duration;
use crate::config::{self, value};
use crate::reconcile::Freshness;
use crate::status::Client;
use crate::status::client::WaitError;
use crate::status::report::{BackendStatus, EscapeStatus, Report, SourceStatus, WatchStatus};

/// Ask a running agent how it stands
///
/// With --wait, the agent first reads everything from its source again, and the command waits until all of that is
/// programmed. So after `kubectl`-like changes to the manifests, `npm-agent status --wait` returns when they are
/// enforced.
///
/// Exit codes: 0 ready (everything that was seen is enforced); 1 not ready, with the reasons, or no agent answers;
/// 2 bad flags.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Wait until everything that the source can see now is programmed; also for an agent that is just starting
    #[arg(long)]
    wait: bool,

    /// How long to wait (for the answer, or with --wait until ready)
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    timeout: Duration,

    /// How to print: table or json
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    output: Output,

    /// Name of the agent
    #[arg(long, env = "NPM_INSTANCE", value_name = "NAME", default_value = config::DEFAULT_INSTANCE,
        value_parser = value::parse_instance)]
    instance: String,

    /// Its unix socket, if it is not the one of its name [default: /run/npm-agent/INSTANCE.sock]
    #[arg(long, env = "NPM_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For machines.
    Json,
}

/// Asks, prints, and says with the exit code whether the agent is ready.
///
/// # Errors
/// There was no answer.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = Client::new(args.socket.unwrap_or_else(|| config::default_socket(&args.instance)));
    let (report, ready) = if args.wait {
        match client.wait(args.timeout) {
            // What came after the wait began may be on its way; that is not what was waited for.
            Ok(report) => (report, true),
            Err(WaitError::NotReady { waited, reasons, report }) => {
                eprintln!("npm-agent: not ready after {waited:.1?}: {}", reasons.join("; "));
                (*report, false)
            }
            Err(error @ WaitError::NoStatus { .. }) => return Err(error.into()),
        }
    } else {
        let report = client.status(Freshness::Now, args.timeout)?;
        let ready = report.ready;
        (report, ready)
    };
    let text = match args.output {
        Output::Table => table(&report, SystemTime::now()),
        Output::Json => serde_json::to_string_pretty(&report).context("writing the status as JSON")? + "\n",
    };
    super::print(&text)?;
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The form for people.
fn table(report: &Report, now: SystemTime) -> String {
    let Report { ready, reasons, status } = report;
    let mut lines = vec![
        ("agent", format!("{} on node {}, version {}", status.instance, status.node, status.version)),
        ("running", ago(status.started, now).replace(" ago", "")),
        ("ready", if *ready { "yes".to_owned() } else { format!("no: {}", reasons.join("; ")) }),
        ("source", source(&status.source)),
        (
            "objects",
            format!(
                "{} pods, {} namespaces, {} policies; {} pods of this node are selected",
                status.world.pods,
                status.world.namespaces,
                status.world.policies,
                status.world.local_subjects
            ),
        ),
        ("goal", format!("number {}", status.generation)),
    ];
    lines.extend(status.source.watches.iter().map(|watch| ("watch", watch_line(watch))));
    for backend in &status.backends {
        lines.extend(backend_lines(backend, now).into_iter().map(|line| (backend.name.as_str(), line)));
    }
    lines.extend(status.escapes.iter().map(|escape| {
        let EscapeStatus { name: _, effect, what, remedy } = escape;
        ("escape", format!("{effect}: {what}; to do: {remedy}"))
    }));
    lines.extend(status.known_differences.iter().map(|line| ("difference", line.clone())));
    lines.extend(status.warnings.iter().map(|line| ("warning", line.clone())));
    lines.extend(
        status.source.problems.iter().map(|problem| {
            ("problem", format!("{}: {}: {}", problem.origin, problem.object, problem.message))
        }),
    );
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for (name, line) in lines {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:width$}  {line}");
    }
    text
}

fn source(source: &SourceStatus) -> String {
    match (source.in_sync, source.unread.len()) {
        (true, _) => "in sync".to_owned(),
        (false, 0) => "not in sync".to_owned(),
        (false, count) => format!("in sync but for what was not readable since the start: {count}"),
    }
}

fn watch_line(watch: &WatchStatus) -> String {
    let WatchStatus { name, following, unwatched_ms, failures, lists, last_error } = watch;
    let seconds = unwatched_ms / 1000;
    let now = match (following, last_error) {
        (true, _) => "changes come as they happen".to_owned(),
        (false, Some(error)) => format!("not watched for {seconds} s: {error}"),
        (false, None) => format!("being read for {seconds} s"),
    };
    format!("{name}: {now}; read {lists} times, {failures} failures")
}

fn backend_lines(backend: &BackendStatus, now: SystemTime) -> Vec<String> {
    let size = backend.size;
    let mut lines = vec![match backend.last_apply {
        None if backend.inherited => "what an earlier process programmed is in force".to_owned(),
        None => "nothing programmed yet".to_owned(),
        Some(last) => format!(
            "goal {} programmed {}, in {} ms ({} set writes, {} rule writes)",
            backend.generation,
            ago(last.at, now),
            last.duration_ms,
            last.set_writes,
            last.rule_writes
        ),
    }];
    lines.push(format!(
        "{} sets with {} members, {} policies with {} rules",
        size.sets, size.members, size.policies, size.rules
    ));
    let verified = backend.last_verify.map_or("not yet".to_owned(), |time| ago(time, now));
    lines.push(format!("read back {verified}; {} repairs of what others changed", backend.drift_repairs));
    if let Some(error) = &backend.last_error {
        lines.push(format!("failed {} times in a row: {error}", backend.consecutive_failures));
    }
    lines.extend(
        backend.degraded.iter().map(|degraded| format!("degraded: {}: {}", degraded.policy, degraded.reason)),
    );
    lines
}

/// How long ago, in the largest unit that keeps two digits.
fn ago(time: SystemTime, now: SystemTime) -> String {
    let seconds = now.duration_since(time).unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::escape::Effect;
    use crate::status::report::{DegradedStatus, LastApply, ObjectProblem, Size, Status, WorldStatus};

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn the_table_says_everything_that_the_json_says() {
        let status = Status {
            version: "9.8.7".into(),
            node: "node-1".into(),
            instance: "npm-agent".into(),
            started: at(0),
            known_differences: vec!["placed behind others".into()],
            source: SourceStatus {
                in_sync: true,
                unread: vec![],
                problems: vec![ObjectProblem {
                    origin: "a.yaml".into(),
                    object: "NetworkPolicy x/a".into(),
                    message: "is odd".into(),
                }],
                watches: vec![
                    WatchStatus { name: "pods".into(), following: true, lists: 1, ..WatchStatus::default() },
                    WatchStatus {
                        name: "namespaces".into(),
                        unwatched_ms: 2_000,
                        failures: 3,
                        lists: 4,
                        last_error: Some("no answer".into()),
                        ..WatchStatus::default()
                    },
                ],
            },
            warnings: vec!["address 10.0.0.1 is claimed twice".into()],
            world: WorldStatus { pods: 11, namespaces: 12, policies: 13, local_subjects: 14 },
            generation: 21,
            backends: vec![BackendStatus {
                name: "iptables".into(),
                generation: 20,
                last_apply: Some(LastApply { at: at(50), duration_ms: 31, set_writes: 32, rule_writes: 33 }),
                last_verify: Some(at(90)),
                consecutive_failures: 3,
                last_error: Some("apply: refused".into()),
                drift_repairs: 41,
                degraded: vec![DegradedStatus { policy: "x/b".into(), reason: "too long".into() }],
                size: Size { sets: 51, members: 52, policies: 53, rules: 54 },
                ..BackendStatus::default()
            }],
            escapes: vec![
                EscapeStatus {
                    name: "ipvs".into(),
                    effect: Effect::Unjudged,
                    what: "IPVS is there".into(),
                    remedy: "take it away".into(),
                },
                EscapeStatus {
                    name: "notrack".into(),
                    effect: Effect::Stricter,
                    what: "a rule".into(),
                    remedy: "nothing".into(),
                },
            ],
        };
        let expected = "\
agent       npm-agent on node node-1, version 9.8.7
running     100 s
ready       no: iptables: goal 20 of 21 is programmed; iptables: failed 3 times, last: apply: refused; not judged: IPVS is there
source      in sync
objects     11 pods, 12 namespaces, 13 policies; 14 pods of this node are selected
goal        number 21
watch       pods: changes come as they happen; read 1 times, 0 failures
watch       namespaces: not watched for 2 s: no answer; read 4 times, 3 failures
iptables    goal 20 programmed 50 s ago, in 31 ms (32 set writes, 33 rule writes)
iptables    51 sets with 52 members, 53 policies with 54 rules
iptables    read back 10 s ago; 41 repairs of what others changed
iptables    failed 3 times in a row: apply: refused
iptables    degraded: x/b: too long
escape      unjudged: IPVS is there; to do: take it away
escape      stricter: a rule; to do: nothing
difference  placed behind others
warning     address 10.0.0.1 is claimed twice
problem     a.yaml: NetworkPolicy x/a: is odd
";
        assert_eq!(table(&Report::from(status), at(100)), expected);
    }

    #[test]
    fn ages_are_short() {
        for (seconds, text) in
            [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7_200, "2 h"), (172_800, "2 days")]
        {
            assert_eq!(ago(at(1), at(1 + seconds)), format!("{text} ago"));
        }
        assert_eq!(ago(at(5), at(1)), "0 s ago", "a clock that was set back");
    }
}
