//! The third opinion: tables made by hand from the Kubernetes documentation (`tests/cases/*.yaml`) against every engine.
//!
//! A case is a small world (plain manifests, as a user writes them), the sentence of the documentation that it stands
//! for, and who may open a connection to whom: one string a source, one character a destination, `.` allowed, `X`
//! denied, `#` itself, in the order of `endpoints`. The tables were made by reading, not by running an engine; where one
//! disagrees, either the code or the reading is wrong, and the documentation says which.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use npm_agent::source::convert::{Doubt, document};
use npm_policy::compile::compile;
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::Goal;
use npm_policy::model::{PodPhase, Protocol};
use npm_policy::verdict::oracle;
use npm_policy::world::{Change, World};
use serde::Deserialize;

/// One document of a case file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    says: String,
    manifests: String,
    #[serde(default)]
    external: BTreeMap<String, IpAddr>,
    #[serde(default)]
    family: Option<u8>,
    probes: Vec<String>,
    expect: BTreeMap<String, Table>,
}

/// Who may open a connection to whom.
#[derive(Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Table {
    endpoints: Vec<String>,
    rows: Vec<String>,
}

fn cases() -> Vec<(String, Case)> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/cases");
    let mut files: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut cases = Vec::new();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).unwrap();
        let documents: Vec<Case> = match serde_saphyr::from_multiple(&text) {
            Ok(documents) => documents,
            Err(error) => panic!("{name}: {error}"),
        };
        cases.extend(documents.into_iter().map(|case| (name.clone(), case)));
    }
    cases
}

/// The world of a case. Every pod gets a node of its own, so that both directions count.
fn world(case: &Case) -> World {
    let mut world = World::default();
    let values: Vec<serde_json::Value> = serde_saphyr::from_multiple(&case.manifests).unwrap();
    for object in values.into_iter().flat_map(|value| document(value, Doubt::None).objects) {
        let change = match object.change {
            Some(Change::Pod(key, Some(mut pod))) => {
                pod.node = Some(key.to_string().into());
                Change::Pod(key, Some(pod))
            }
            Some(change) => change,
            None => panic!("{}: {:?}", case.name, object.problems),
        };
        world.apply(change);
    }
    world
}

fn endpoints(case: &Case, world: &World) -> Vec<(String, IpAddr)> {
    let of_family = |address: &&IpAddr| match case.family {
        Some(6) => address.is_ipv6(),
        _ => address.is_ipv4(),
    };
    let pods = world.pods().filter(|pod| pod.phase == PodPhase::Active);
    let pods = pods.filter_map(|pod| Some((pod.key.to_string(), *pod.addresses.iter().find(of_family)?)));
    let external = case.external.iter().map(|(name, address)| (format!("ext/{name}"), *address));
    pods.chain(external).collect()
}

fn transport(probe: &str) -> Transport {
    let (name, port) = probe.split_once('/').unwrap();
    let protocol = Protocol::ALL.into_iter().find(|it| it.to_string() == name).unwrap();
    Transport::Port(protocol, port.parse().unwrap())
}

fn table(endpoints: &[(String, IpAddr)], judge: impl Fn(IpAddr, IpAddr) -> Decision) -> Table {
    let cell = |source: &(String, IpAddr), destination: &(String, IpAddr)| {
        if source.0 == destination.0 {
            return '#';
        }
        match judge(source.1, destination.1) {
            Decision::Allow => '.',
            Decision::Deny => 'X',
        }
    };
    let row = |source| endpoints.iter().map(|destination| cell(source, destination)).collect();
    Table {
        endpoints: endpoints.iter().map(|(name, _)| name.clone()).collect(),
        rows: endpoints.iter().map(row).collect(),
    }
}

/// What each engine says of a probe.
fn tables(case: &Case, probe: &str) -> Vec<(&'static str, Table)> {
    let world = world(case);
    let endpoints = endpoints(case, &world);
    let transport = transport(probe);
    let goals: BTreeMap<String, Goal> =
        world.pods().map(|pod| (pod.key.to_string(), compile(&world, &pod.key.to_string()).0)).collect();
    let compiled = |source, destination| {
        let flow = Flow { source, destination, transport };
        let at = |address| goals.get(&world.holder(address)?.key.to_string()).map(|goal| goal.verdict(&flow));
        let decisions = [source, destination].map(|end| at(end).map(|verdict| verdict.decision()));
        decisions.into_iter().flatten().find(|it| *it == Decision::Deny).unwrap_or(Decision::Allow)
    };
    let literal = |source, destination| oracle(&world, &Flow { source, destination, transport }).decision();
    vec![("oracle", table(&endpoints, literal)), ("goal", table(&endpoints, compiled))]
}

fn show(table: &Table) -> String {
    let mut text = format!("    endpoints: {}\n", table.endpoints.join(" "));
    for row in &table.rows {
        let _ = writeln!(text, "      {row}");
    }
    text
}

#[test]
fn every_engine_agrees_with_the_documentation() {
    let mut failures = String::new();
    let mut wrong = BTreeSet::new();
    let all = cases();
    let mut compared = 0;
    for (file, case) in &all {
        assert_eq!(case.probes.len(), case.expect.len(), "{}", case.name);
        for probe in &case.probes {
            let expected =
                case.expect.get(probe).unwrap_or_else(|| panic!("{}: no table for {probe}", case.name));
            for (engine, observed) in tables(case, probe) {
                compared += 1;
                if observed == *expected {
                    continue;
                }
                wrong.insert(&case.name);
                let _ = write!(
                    failures,
                    "\n{file}: {}: {probe}: engine {engine} disagrees\n  {}\n  expected:\n{}  observed:\n{}",
                    case.name,
                    case.says.trim(),
                    show(expected),
                    show(&observed),
                );
            }
        }
    }
    println!("{} cases, {compared} tables compared", all.len());
    assert!(all.len() >= 200, "{} cases found", all.len());
    assert!(wrong.is_empty(), "{} of {} cases: {wrong:?}\n{failures}", wrong.len(), all.len());
}

/// Names are unique, every case says what it stands for, and each could fail: something is denied in it, or it is one
/// of the cases about what must stay open, in which some policy or address stands beside.
#[test]
fn cases_are_well_formed() {
    let mut names = BTreeSet::new();
    for (file, case) in cases() {
        assert!(names.insert(case.name.clone()), "{file}: {} is there twice", case.name);
        assert!(case.says.split_whitespace().count() >= 5, "{file}: {}: says {:?}", case.name, case.says);
        assert!(matches!(case.family, None | Some(4 | 6)), "{file}: {}", case.name);
        for (probe, table) in &case.expect {
            assert!(case.probes.contains(probe), "{file}: {}: {probe}", case.name);
            assert_eq!(table.rows.len(), table.endpoints.len(), "{file}: {}", case.name);
            for (at, row) in table.rows.iter().enumerate() {
                let own: Vec<usize> = row.match_indices('#').map(|(at, _)| at).collect();
                assert_eq!((own, row.len()), (vec![at], table.endpoints.len()), "{file}: {}", case.name);
                assert!(row.chars().all(|c| matches!(c, '#' | '.' | 'X')), "{file}: {}", case.name);
            }
        }
    }
}
