//! The third opinion: tables made by hand from the Kubernetes documentation (`tests/cases/*.yaml`) against every engine.
//!
//! A case is a small world (plain manifests, as a user writes them), the sentence of the documentation that it stands
//! for, and who may open a connection to whom: one string a source, one character a destination, `.` allowed, `X`
//! denied, `#` itself, in the order of `endpoints`, as `npm-agent matrix` writes them. The tables were made by reading,
//! not by running an engine; where one disagrees, either the code or the reading is wrong, and the documentation says
//! which.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use npm_agent::matrix::{Cell, Engine, Evaluator, Matrix, Probe, Request, Rows};
use npm_agent::source::Problem;
use npm_agent::source::manifests::{self, Reading};
use npm_policy::goal::Family;
use npm_policy::verdict::oracle;
use npm_policy::world::World;
use serde::Deserialize;

/// The file of the policies that an API server refuses.
const INVALID: &str = "invalid.yaml";

/// One document of a case file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    /// The section or field of the documentation, and the rule.
    says: String,
    manifests: String,
    /// Hosts outside, which `endpoints` calls `ext/<name>`.
    #[serde(default)]
    external: BTreeMap<String, IpAddr>,
    /// 4 if missing.
    #[serde(default)]
    family: Option<u8>,
    probes: Vec<String>,
    /// A table for each probe.
    expect: BTreeMap<String, Table>,
}

/// Who may open a connection to whom.
#[derive(Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Table {
    endpoints: Vec<String>,
    rows: Vec<String>,
}

impl Table {
    fn observed(matrix: &Matrix, rows: &Rows) -> Self {
        Self {
            endpoints: matrix.endpoints.iter().map(|endpoint| endpoint.name.clone()).collect(),
            rows: rows.iter().map(|row| row.iter().map(|cell| cell.symbol()).collect()).collect(),
        }
    }

    fn show(&self) -> String {
        let width = self.endpoints.iter().map(String::len).max().unwrap_or_default();
        let rows = self.endpoints.iter().zip(&self.rows);
        rows.fold(String::new(), |text, (name, row)| format!("{text}    {name:width$} {row}\n"))
    }
}

/// The cases, each with the name of its file.
fn cases() -> Vec<(String, Case)> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/cases");
    let mut files: Vec<_> =
        std::fs::read_dir(directory).expect("the cases").map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    let mut cases = Vec::new();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).expect("a readable file");
        match serde_saphyr::from_multiple::<Case>(&text) {
            Ok(documents) => cases.extend(documents.into_iter().map(|case| (name.clone(), case))),
            Err(error) => panic!("{name}: {error}"),
        }
    }
    cases
}

/// What the manifests of a case say, and what is wrong with them, read from a file as a user's are.
fn read(case: &Case) -> (World, Vec<Problem>) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join(format!("{}.yaml", case.name));
    std::fs::write(&file, &case.manifests).expect("a file is written");
    let Reading { changes, problems, unread } = manifests::read(&[file]);
    assert!(unread.is_empty(), "{}: {problems:?}", case.name);
    let mut world = World::default();
    changes.into_iter().for_each(|change| world.apply(change));
    (world, problems)
}

/// All engines; without the right to load programs, which CI must have, all but eBPF's.
fn engines() -> Vec<Engine> {
    if nix::unistd::geteuid().is_root() {
        return Engine::ALL.to_vec();
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "a skipped engine is a failure in CI");
    Engine::UNPRIVILEGED.to_vec()
}

fn request(case: &Case, world: World) -> Request {
    let probe =
        |text: &String| text.parse::<Probe>().unwrap_or_else(|error| panic!("{}: {error}", case.name));
    Request {
        world,
        probes: case.probes.iter().map(probe).collect(),
        externals: case.external.iter().map(|(name, address)| (name.clone(), *address)).collect(),
        family: match case.family {
            None | Some(4) => Family::V4,
            Some(6) => Family::V6,
            Some(other) => panic!("{}: family {other}", case.name),
        },
        engines: engines().into_iter().collect(),
    }
}

/// Why the oracle says what it says, wherever `rows` are not as expected.
fn reasons(world: &World, matrix: &Matrix, probe: Probe, rows: &Rows, expected: &Table) -> String {
    let mut text = String::new();
    for (source, (row, expected)) in matrix.endpoints.iter().zip(rows.iter().zip(&expected.rows)) {
        for (destination, (cell, expected)) in matrix.endpoints.iter().zip(row.iter().zip(expected.chars())) {
            if *cell == Cell::Itself || cell.symbol() == expected {
                continue;
            }
            let flow = probe.flow(source.address, destination.address);
            let verdict = oracle(world, &flow).explain_as(&source.name, &destination.name, flow.transport);
            let _ = writeln!(text, "  {} -> {}: the oracle says {verdict}", source.name, destination.name);
        }
    }
    text
}

#[test]
fn every_engine_agrees_with_the_documentation() {
    let all = cases();
    let mut failures = String::new();
    let mut wrong = BTreeSet::new();
    let mut compared: BTreeMap<Engine, usize> = BTreeMap::new();
    let mut evaluator = Evaluator::default();
    for (file, case) in &all {
        let request = request(case, read(case).0);
        let matrix =
            evaluator.evaluate(&request).unwrap_or_else(|error| panic!("{file}: {}: {error}", case.name));
        for (engine, tables) in &matrix.engines {
            for (probe, rows) in tables {
                let expected = &case.expect[&probe.to_string()];
                let observed = Table::observed(&matrix, rows);
                *compared.entry(*engine).or_default() += 1;
                if observed != *expected {
                    wrong.insert(&case.name);
                    let _ = write!(
                        failures,
                        "\n{file}: {}: {probe}: engine {engine}\n  {}\n  expected:\n{}  observed:\n{}{}",
                        case.name,
                        case.says.trim(),
                        expected.show(),
                        observed.show(),
                        reasons(&request.world, &matrix, *probe, rows, expected),
                    );
                }
            }
        }
    }
    println!("{} cases, tables compared: {compared:?}", all.len());
    assert!(wrong.is_empty(), "{} of {} cases are wrong: {wrong:?}\n{failures}", wrong.len(), all.len());
    assert!(all.len() >= 200, "{} cases", all.len());
    let tables: usize = all.iter().map(|(_, case)| case.expect.len()).sum();
    assert_eq!(compared, engines().into_iter().map(|engine| (engine, tables)).collect());
    if !compared.contains_key(&Engine::Ebpf) {
        eprintln!("SKIPPED: the engine ebpf: eBPF programs are loaded by root only");
    }
}

/// A case that is read otherwise than it was meant proves nothing.
#[test]
fn problems_are_reported_of_invalid_policies_and_of_nothing_else() {
    let mut invalid = 0;
    for (file, case) in cases() {
        let (_, problems) = read(&case);
        assert_eq!(file == INVALID, !problems.is_empty(), "{file}: {}: {problems:?}", case.name);
        assert!(
            problems.iter().all(|it| it.object.starts_with("NetworkPolicy ")),
            "{}: {problems:?}",
            case.name
        );
        invalid += usize::from(file == INVALID);
    }
    assert!(invalid >= 25, "{invalid} cases of invalid policies");
}

#[test]
fn cases_are_well_formed() {
    let mut names = BTreeSet::new();
    for (file, case) in cases() {
        let name = &case.name;
        assert!(names.insert(name.clone()), "{file}: {name} is there twice");
        assert!(case.says.split_whitespace().count() >= 5, "{file}: {name}: says {:?}", case.says);
        let probes: BTreeSet<&String> = case.probes.iter().collect();
        assert_eq!(probes, case.expect.keys().collect(), "{file}: {name}: probes and tables");
        for (probe, table) in &case.expect {
            let size = table.endpoints.len();
            assert!(table.rows.len() == size && size >= 2, "{file}: {name}: {probe}");
            for (at, row) in table.rows.iter().enumerate() {
                let itself: Vec<usize> = row.match_indices('#').map(|(at, _)| at).collect();
                assert_eq!((itself, row.len()), (vec![at], size), "{file}: {name}: {probe}: {row}");
                assert!(
                    row.chars().all(|it| matches!(it, '#' | '.' | 'X')),
                    "{file}: {name}: {probe}: {row}"
                );
            }
        }
    }
}
