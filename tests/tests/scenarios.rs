//! Every scenario, and every hand-written case, as real packets: observed = oracle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use anyhow::Result;
use npm_tests::lab::require_root;
use npm_tests::lab::service::Dialect;
use npm_tests::scenario::enforcer::Means;
use npm_tests::scenario::runner::{Report, Runner};
use npm_tests::scenario::{Scenario, load};

/// Labs at a time: most of a scenario is waiting for packets that must not come.
const LABS: usize = 6;

/// Plays all scenarios, those with one lab one after the other.
fn play_all(scenarios: &[Scenario], means: Means, dialect: Dialect) -> Vec<(String, Result<Report>)> {
    let mut groups: BTreeMap<String, Vec<&Scenario>> = BTreeMap::new();
    for scenario in scenarios {
        let lab = match &scenario.cluster {
            Some(cluster) => format!("{cluster} {:?} {:?}", scenario.layout, scenario.external),
            None => scenario.name.clone(),
        };
        // Halves of a big group may run side by side.
        let groups_of_lab = groups.keys().filter(|key| key.starts_with(&lab)).count();
        let part = format!("{lab} {}", groups_of_lab.saturating_sub(1));
        let group = groups.entry(part).or_default();
        match group.len() {
            0..12 => group.push(scenario),
            _ => groups.entry(format!("{lab} {groups_of_lab}")).or_default().push(scenario),
        }
    }
    let left = Mutex::new(groups.into_values().collect::<Vec<_>>());
    let reports = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..LABS {
            scope.spawn(|| {
                loop {
                    let Some(group) = left.lock().unwrap().pop() else { break };
                    let mut runner = Runner::new(means, dialect);
                    for scenario in group {
                        let report = runner.play(scenario);
                        reports.lock().unwrap().push((scenario.name.clone(), report));
                    }
                }
            });
        }
    });
    reports.into_inner().unwrap()
}

fn check(scenarios: &[Scenario], means: Means, dialect: Dialect) {
    let start = std::time::Instant::now();
    let (mut wrong, mut allowed, mut denied) = (Vec::new(), 0, 0);
    for (name, report) in play_all(scenarios, means, dialect) {
        match report {
            Ok(report) => {
                allowed += report.allowed;
                denied += report.denied;
                wrong.extend(report.differences.iter().map(|line| format!("{name}: {line}")));
            }
            Err(error) => wrong.push(format!("{name}: {error:#}")),
        }
    }
    let (count, took) = (scenarios.len(), start.elapsed());
    eprintln!("{means:?} {dialect:?}: {count} scenarios, {allowed} flows allowed, {denied} denied, {took:?}");
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn scenarios_rendered() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let scenarios = load("scenarios")?;
    for dialect in Dialect::BOTH {
        check(&scenarios, Means::Rendering, dialect);
    }
    Ok(())
}

/// Malformed objects and the like are in there too: what they are taken for is the converter's, so a lab shows it.
#[test]
fn cases_rendered() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let cases = load("cases")?;
    for dialect in Dialect::BOTH {
        check(&cases, Means::Rendering, dialect);
    }
    Ok(())
}

#[test]
fn scenarios_are_well_formed() -> Result<()> {
    let scenarios = load("scenarios")?;
    let mut names = BTreeSet::new();
    for scenario in &scenarios {
        assert!(names.insert(&scenario.name), "{} is there twice", scenario.name);
        assert!(!scenario.rows.is_empty(), "{} shows no row", scenario.name);
        assert!(scenario.says.split_whitespace().count() >= 4, "{} says too little", scenario.name);
    }
    assert!(scenarios.len() >= 60, "{} scenarios", scenarios.len());
    Ok(())
}
