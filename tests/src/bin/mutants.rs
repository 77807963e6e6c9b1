//! Puts the typical bugs of `tests/mutants.yaml` into a copy of the tree, one by one, and demands that each turns a
//! test red.
//!
//! ```text
//! cargo xtask mutants                  all of them (minutes)
//! cargo xtask mutants --sample 3       three, others on other days
//! cargo xtask mutants --first 1        the first one, of a tree whose tests have just been green (in CI)
//! cargo xtask mutants --only endPort   those whose name contains it
//! ```
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use npm_tests::exec::run;
use serde::Deserialize;

/// What is run on every mutant, until something turns red: everything that needs no root and no kernel, what catches
/// most first.
const TESTS: &[&[&str]] = &[
    &["-p", "npm-tests", "--test", "agreement", "--test", "cases"],
    &["-p", "npm-policy", "-p", "npm-agent", "-p", "npm-common", "--lib"],
    &["-p", "npm-tests", "--test", "ebpf_agreement", "--test", "ebpf_plan"],
    &["-p", "npm-tests", "--test", "iptables_plan", "--test", "iptables_rendered"],
    &["-p", "npm-agent", "--test", "bad_input", "--test", "matrix"],
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    name: String,
    /// Where the bug comes from, for people.
    #[serde(rename = "row")]
    _row: String,
    file: PathBuf,
    find: String,
    replace: String,
}

enum Outcome {
    /// A test turned red.
    Caught,
    /// All tests stayed green.
    Survived,
    /// The mutant does not compile: the list is wrong.
    Broken(String),
}

fn main() -> Result<()> {
    let selection = Selection::parse(std::env::args().skip(1))?;
    let root =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests crate stands in the tree")?;
    let list =
        std::fs::read_to_string(root.join("tests/mutants.yaml")).context("reading tests/mutants.yaml")?;
    let mutants: Vec<Mutant> = serde_saphyr::from_str(&list).context("parsing tests/mutants.yaml")?;
    let mutants = selection.of(mutants);
    ensure!(!mutants.is_empty(), "no mutant is selected");

    let tree = Tree::copy(root)?;
    match selection {
        Selection::First(_) => {}
        Selection::All | Selection::Sample(_) | Selection::Only(_) => match tree.test()? {
            Outcome::Survived => {}
            Outcome::Caught => bail!("the tests are red without any mutant"),
            Outcome::Broken(said) => bail!("the tree does not build: {said}"),
        },
    }
    let mut failures = 0;
    for mutant in &mutants {
        let started = Instant::now();
        let outcome = tree.with(mutant, Tree::test)?;
        let seconds = started.elapsed().as_secs();
        match outcome {
            Outcome::Caught => println!("caught    {seconds:>4} s  {}", mutant.name),
            Outcome::Survived => {
                failures += 1;
                println!("SURVIVED  {seconds:>4} s  {} ({})", mutant.name, mutant.file.display());
            }
            Outcome::Broken(said) => {
                failures += 1;
                println!("BROKEN    {seconds:>4} s  {}: {said}", mutant.name);
            }
        }
    }
    println!("{} passed, {failures} failed", mutants.len() - failures);
    ensure!(failures == 0, "{failures} of {} mutants were not caught", mutants.len());
    Ok(())
}

enum Selection {
    All,
    Sample(usize),
    First(usize),
    Only(String),
}

impl Selection {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let selection = match (args.next().as_deref(), args.next()) {
            (None, _) => Self::All,
            (Some("--sample"), Some(count)) => {
                Self::Sample(count.parse().context("--sample takes a number")?)
            }
            (Some("--first"), Some(count)) => Self::First(count.parse().context("--first takes a number")?),
            (Some("--only"), Some(text)) => Self::Only(text),
            (Some(other), _) => {
                bail!("unknown or incomplete argument {other}: --sample N, --first N or --only TEXT")
            }
        };
        ensure!(args.next().is_none(), "too many arguments");
        Ok(selection)
    }

    fn of(&self, mutants: Vec<Mutant>) -> Vec<Mutant> {
        match self {
            Self::All => mutants,
            Self::First(count) => mutants.into_iter().take(*count).collect(),
            Self::Only(text) => mutants.into_iter().filter(|mutant| mutant.name.contains(text)).collect(),
            Self::Sample(count) => {
                // Another sample every day, spread over the list.
                let day =
                    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400);
                let total = mutants.len();
                let step = (total / (*count).max(1)).max(1);
                let first = usize::try_from(day).unwrap_or(0) % step;
                mutants.into_iter().skip(first).step_by(step).take(*count).collect()
            }
        }
    }
}

/// A copy of the tree, so that a run that is cut off leaves no bug behind.
struct Tree {
    root: PathBuf,
    target: PathBuf,
}

impl Tree {
    fn copy(from: &Path) -> Result<Self> {
        let base = from.join("target/mutants");
        let root = base.join("tree");
        if root.exists() {
            std::fs::remove_dir_all(&root).context("removing the old copy")?;
        }
        let from_text = from.to_str().context("the tree's path is UTF-8")?;
        let listing = ["-C", from_text, "ls-files", "--cached", "--others", "--exclude-standard", "-z"];
        for file in run("git", &listing)?.split('\0').filter(|file| !file.is_empty()) {
            let (source, copy) = (from.join(file), root.join(file));
            if !source.exists() {
                continue;
            }
            let parent = copy.parent().context("a file has a directory")?;
            std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
            std::fs::copy(&source, &copy).with_context(|| format!("copying {file}"))?;
        }
        let target = base.join("target");
        if !target.exists() {
            // What the tree was built with need not be built again. Cargo never writes into what it has built, but it does
            // into its notes on that.
            for (part, how) in [("deps", "--link"), ("build", "--link"), (".fingerprint", "--recursive")] {
                let (built, copy) = (from.join("target/debug").join(part), target.join("debug"));
                if built.exists() {
                    std::fs::create_dir_all(&copy).with_context(|| format!("creating {}", copy.display()))?;
                    let paths =
                        [built.to_str(), copy.to_str()].map(|path| path.context("the tree's path is UTF-8"));
                    let [built, copy] = paths;
                    run("cp", &["--archive", how, built?, copy?])?;
                }
            }
        }
        Ok(Self { root, target })
    }

    fn with<T>(&self, mutant: &Mutant, act: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let path = self.root.join(&mutant.file);
        let original =
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let places = original.matches(&mutant.find).count();
        ensure!(
            places == 1,
            "{}: `{}` stands {places} times in {}",
            mutant.name,
            mutant.find,
            mutant.file.display()
        );
        std::fs::write(&path, original.replacen(&mutant.find, &mutant.replace, 1))?;
        let result = act(self);
        std::fs::write(&path, original)?;
        result
    }

    fn test(&self) -> Result<Outcome> {
        let manifest = self.root.join("Cargo.toml");
        let target = format!("CARGO_TARGET_DIR={}", self.target.display());
        let manifest = manifest.to_str().context("the tree's path is UTF-8")?;
        // Whether there is a counterexample is the question, not the smallest one.
        let cargo =
            [target.as_str(), "NPM_SHRINK=0", "cargo", "test", "--quiet", "--manifest-path", manifest];
        for tests in TESTS {
            let test: Vec<&str> = cargo.iter().chain(*tests).copied().collect();
            let build: Vec<&str> = test.iter().copied().chain(["--no-run"]).collect();
            if let Err(error) = run("env", &build) {
                let text = format!("{error:#}");
                let line =
                    text.lines().find(|line| line.starts_with("error")).unwrap_or("it does not compile");
                return Ok(Outcome::Broken(line.to_owned()));
            }
            if run("env", &test).is_err() {
                return Ok(Outcome::Caught);
            }
        }
        Ok(Outcome::Survived)
    }
}
