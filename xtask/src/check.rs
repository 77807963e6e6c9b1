//! `cargo xtask test`: what CI runs, step by step. A line a step when all is well; a failed step's whole output.
//!
//! A failed step does not hide the later ones, unless they need it.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::exec::Program;
use crate::sink::Sink;
use crate::summary::{self, Counts};
use crate::tree::Tree;
use crate::{clean_lab, dashboards, ebpf, manifests, packages, prometheus};

/// One step of the check.
struct Step {
    name: &'static str,
    /// Steps that must have passed, or this one can't.
    needs: &'static [&'static str],
    run: fn(&Tree, &Sink) -> Result<Option<String>>,
}

/// How a step ended.
enum Outcome {
    /// With something to say, or not.
    Passed(Option<String>),
    Failed(anyhow::Error),
    /// The step that it needs and that did not pass.
    Skipped(&'static str),
}

const STEPS: &[Step] = &[
    Step {
        name: "setup",
        needs: &[],
        run: |_, log| {
            packages::install_missing(log)?;
            Ok(None)
        },
    },
    Step {
        name: "fmt",
        needs: &[],
        run: |tree, log| {
            tree.cargo().args(["fmt", "--all", "--check"]).run(log)?;
            let ebpf = ["fmt", "--check", "--manifest-path", "npm-ebpf/Cargo.toml"];
            tree.cargo().args(ebpf).run(log)?;
            Ok(None)
        },
    },
    Step {
        name: "clippy",
        needs: &["setup"],
        run: |tree, log| {
            let lint = ["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"];
            tree.cargo().args(lint).run(log)?;
            Ok(None)
        },
    },
    Step {
        name: "clippy-no-libipset",
        needs: &["setup"],
        run: |tree, log| {
            let lint = ["clippy", "--locked", "--package", "npm-agent", "--no-default-features"];
            tree.cargo().args(lint).args(["--all-targets", "--", "-D", "warnings"]).run(log)?;
            Ok(None)
        },
    },
    Step {
        name: "doc",
        needs: &["setup"],
        run: |tree, log| {
            let document = ["doc", "--locked", "--workspace", "--no-deps"];
            tree.cargo().env("RUSTDOCFLAGS", "-D warnings").args(document).run(log)?;
            Ok(None)
        },
    },
    Step { name: "manifests", needs: &["setup"], run: |tree, log| manifests::check(tree, log).map(Some) },
    Step { name: "dashboards", needs: &["setup"], run: |tree, log| dashboards::check(tree, log).map(Some) },
    Step { name: "ebpf", needs: &[], run: |tree, log| ebpf::check(tree, log).map(Some) },
    Step { name: "clippy-ebpf", needs: &["ebpf"], run: ebpf::lint },
    Step {
        name: "build",
        needs: &["setup"],
        run: |tree, log| {
            tree.cargo().args(["build", "--locked", "--workspace", "--all-targets"]).run(log)?;
            Ok(None)
        },
    },
    Step {
        name: "test",
        needs: &["build"],
        run: |tree, log| {
            // Tests of the lab find the agent's binary beside their own: the step before has built it.
            let mut cargo = tree.cargo();
            // Without them the step `manifests` has failed, and said why.
            if let Ok(tools) = manifests::tools(tree, log) {
                cargo = cargo.env(manifests::TOOLS, tools);
            }
            match prometheus::program(tree, log) {
                Ok(program) => cargo = cargo.env(prometheus::PROGRAM, program),
                // In CI the test that wants it fails, elsewhere it is skipped.
                Err(error) => log.say(&format!("no Prometheus that knows Kubernetes: {error:#}"))?,
            }
            // An error says what it was about; the frames of the test runner bury it.
            cargo = cargo.env("RUST_BACKTRACE", "0");
            cargo.args(["test", "--locked", "--workspace", "--no-fail-fast"]).run(log)?;
            // The tests themselves say so too, but a test runner hides what a test that passes prints.
            Ok((!packages::is_root()?)
                .then(|| "SKIPPED, NOT TESTED: everything that needs root (the lab, kernels)".to_owned()))
        },
    },
    Step {
        name: "demo",
        needs: &["build"],
        run: |tree, log| {
            if packages::is_root()? {
                Program::new(tree.target.join("debug/demo")).current_dir(&tree.root).run(log)?;
                return Ok(None);
            }
            if std::env::var("CI").as_deref() == Ok("true") {
                bail!("the demo needs root");
            }
            Ok(Some("SKIPPED, NOT TESTED: the demo needs root".to_owned()))
        },
    },
    Step {
        name: "leftovers",
        needs: &["demo"],
        run: |_, _| {
            if packages::is_root()? {
                clean_lab::check()?;
            }
            Ok(None)
        },
    },
    Step {
        // One of them; `cargo xtask mutants` runs all.
        name: "mutants",
        needs: &["test"],
        run: |tree, log| {
            let program = Program::new(tree.target.join("debug/mutants"));
            program.current_dir(&tree.root).args(["--first", "1"]).run(log)?;
            Ok(None)
        },
    },
];

/// Runs every step; the last line printed is the count of tests.
///
/// # Errors
/// When the logs can't be written. Failed steps are not errors but the exit code.
pub(crate) fn run(tree: &Tree) -> Result<ExitCode> {
    let logs = tree.own().join("logs");
    if logs.is_dir() {
        fs::remove_dir_all(&logs).context("removing old logs")?;
    }
    fs::create_dir_all(&logs).context("making the directory of the logs")?;
    let began = Instant::now();
    let mut failed: Vec<&str> = Vec::new();
    let mut tests = Counts::default();
    let mut failures = Vec::new();

    for step in STEPS {
        let log = logs.join(format!("{}.log", step.name));
        fs::write(&log, "").context("making a step's log")?;
        let start = Instant::now();
        let outcome = match step.needs.iter().find(|need| failed.contains(need)) {
            Some(need) => Outcome::Skipped(need),
            None => match (step.run)(tree, &Sink::Log(log.clone())) {
                Ok(note) => Outcome::Passed(note),
                Err(error) => Outcome::Failed(error),
            },
        };
        let seconds = start.elapsed().as_secs_f64();
        let text = read(&log)?;
        tests = tests + Counts::of(&text);
        failures.extend(summary::failures(&text));
        match outcome {
            Outcome::Passed(note) => {
                println!("ok      {:<20} {seconds:7.1} s", step.name);
                for line in note.iter().flat_map(|note| note.lines()) {
                    println!("        {line}");
                }
            }
            Outcome::Failed(error) => {
                failed.push(step.name);
                println!("FAILED  {:<20} {seconds:7.1} s", step.name);
                println!("{text}--- {}: {error:#}\n--- log: {}", step.name, log.display());
            }
            Outcome::Skipped(need) => {
                failed.push(step.name);
                println!("skipped {:<20} because {need} did not pass", step.name);
            }
        }
    }

    println!("total   {:<20} {:7.1} s, logs in {}", "", began.elapsed().as_secs_f64(), logs.display());
    if !failed.is_empty() {
        for failure in failures {
            println!("{failure}\n");
        }
        println!("failed steps: {}", failed.join(", "));
        // A step that broke off has run fewer tests than there are: that must not read as "0 failed".
        tests.failed = tests.failed.max(failed.len());
    }
    println!("{tests}");
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The log's text, whatever bytes a program printed.
fn read(log: &Path) -> Result<String> {
    let bytes = fs::read(log).with_context(|| format!("reading {}", log.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_needs_only_earlier_steps() {
        for (index, step) in STEPS.iter().enumerate() {
            for need in step.needs {
                assert!(
                    STEPS[..index].iter().any(|earlier| earlier.name == *need),
                    "{} needs {need}",
                    step.name
                );
            }
        }
    }
}
