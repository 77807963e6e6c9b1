//! Every scenario, and every hand-written case, as real packets: observed = oracle.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use npm_agent::backend::ebpf::choice::{Choice, Proofs};
use npm_policy::flow::Transport;
use npm_policy::model::Protocol;
use npm_policy::world::World;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Lab, require_root};
use npm_tests::scenario::cluster::{Cluster, spec};
use npm_tests::scenario::enforcer::{Enforcer, Means, Site};
use npm_tests::scenario::runner::{Report, Route, Runner};
use npm_tests::scenario::{Scenario, load};

/// Labs at a time: most of a scenario is waiting for packets that must not come.
const LABS: usize = 6;
/// How many scenarios one lab plays at most.
const PART: usize = 8;

/// Plays all scenarios, those with one lab one after the other.
fn play_all(
    scenarios: &[Scenario],
    means: Means,
    dialect: Dialect,
    route: Route,
) -> Vec<(String, Result<Report>)> {
    let mut labs: BTreeMap<String, Vec<&Scenario>> = BTreeMap::new();
    for scenario in scenarios {
        let lab = match &scenario.cluster {
            Some(cluster) => format!("{cluster} {:?} {:?}", scenario.layout, scenario.external),
            None => scenario.name.clone(),
        };
        labs.entry(lab).or_default().push(scenario);
    }
    // Parts of a long list have a lab each, side by side.
    let part = scenarios.len().div_ceil(LABS).clamp(1, PART);
    let parts = labs.values().flat_map(|list| list.chunks(part));
    let left = Mutex::new(parts.collect::<Vec<_>>());
    let reports = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..LABS {
            scope.spawn(|| {
                loop {
                    let Some(group) = lock(&left).pop() else { break };
                    let mut runner = Runner::new(means, dialect);
                    for scenario in group {
                        let report = runner.play(scenario, route);
                        lock(&reports).push((scenario.name.clone(), report));
                    }
                }
            });
        }
    });
    reports.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check(scenarios: &[Scenario], means: Means, dialect: Dialect, route: Route) {
    let start = std::time::Instant::now();
    let (mut wrong, mut allowed, mut denied) = (Vec::new(), 0, 0);
    for (name, report) in play_all(scenarios, means, dialect, route) {
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
fn where_nobody_enforces_every_denial_is_missed() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let scenarios = load("scenarios")?;
    let names =
        ["deny-both", "both-ends-on-two-nodes", "service-ingress", "bridged-discovery", "address-reused"];
    for scenario in scenarios.iter().filter(|scenario| names.contains(&scenario.name.as_str())) {
        let report = Runner::new(Means::Nothing, Dialect::Nft).play(scenario, Route::Straight)?;
        assert!(report.denied > 0, "{} denies nothing", scenario.name);
        assert_eq!(report.differences.len(), report.denied, "{}: {:?}", scenario.name, report.differences);
    }
    Ok(())
}

/// Semantics 25, our choice: a connection that was allowed lives on when a policy comes that denies new ones.
#[test]
fn established_connections_live_on() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let scenarios = load("scenarios")?;
    let scenario = scenarios.iter().find(|scenario| scenario.name == "deny-both").unwrap();
    let cluster = &Cluster::stages(scenario)?[0];
    let world = cluster.world()?;
    for dialect in Dialect::BOTH {
        let mut lab = Lab::build(&spec(scenario, std::slice::from_ref(&world))?)?;
        let directory = tempfile::tempdir()?;
        let site =
            Site { netns: &lab.endpoints()[0].netns, node: "node-a", dialect, directory: directory.path() };
        let mut enforcer = Enforcer::start(Means::Rendering, &site)?;
        enforcer.enforce(&World::default())?;
        let port = Transport::Port(Protocol::Tcp, 80);
        lab.listen(&[port])?;
        for destination in ["10.241.0.2", "fd00:241::2"] {
            let destination: IpAddr = destination.parse()?;
            let from =
                lab.endpoints().iter().position(|it| it.addresses.contains(&"10.241.0.18".parse().unwrap()));
            let from = from.unwrap();
            let mut connection =
                lab.endpoints()[from].netns.run(|| Ok(TcpStream::connect((destination, 80))?))?;
            connection.set_read_timeout(Some(Duration::from_secs(20)))?;
            let mut echo = |word: &[u8; 4]| -> Result<()> {
                let mut answer = [0; 4];
                connection.write_all(word)?;
                connection.read_exact(&mut answer)?;
                assert_eq!(answer, *word);
                Ok(())
            };
            echo(b"open")?;
            enforcer.enforce(&world)?;
            let source =
                lab.endpoints()[from].addresses.iter().find(|it| it.is_ipv4() == destination.is_ipv4());
            let source = *source.unwrap();
            let probe = Probe { from, source, destination, transport: port, expected: None };
            assert_eq!(lab.probe(&[probe])?, [Outcome::Blocked]);
            echo(b"shut")?;
            enforcer.enforce(&World::default())?;
        }
    }
    Ok(())
}

#[test]
fn scenarios_rendered() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let scenarios = load("scenarios")?;
    for dialect in Dialect::BOTH {
        check(&scenarios, Means::Rendering, dialect, Route::Straight);
    }
    Ok(())
}

#[test]
fn scenarios_by_the_backend() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let scenarios = load("scenarios")?;
    for dialect in Dialect::BOTH {
        check(&scenarios, Means::Backend, dialect, Route::Straight);
    }
    Ok(())
}

/// The same packets, judged by the programs with proofs in maps.
#[test]
fn scenarios_by_ebpf_with_maps() -> Result<()> {
    scenarios_by_ebpf(Proofs::Maps)
}

/// With proofs in the connections' marks.
#[test]
fn scenarios_by_ebpf_with_kfuncs() -> Result<()> {
    scenarios_by_ebpf(Proofs::Kfuncs)
}

fn scenarios_by_ebpf(proofs: Proofs) -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let scenarios = load("scenarios")?;
    let choices = Choice::every().filter(|choice| choice.proofs == Some(proofs));
    for (choice, dialect) in choices.zip(Dialect::BOTH.into_iter().cycle()) {
        check(&scenarios, Means::Ebpf(choice), dialect, Route::Straight);
    }
    Ok(())
}

/// Through the running agent, as [`scenarios_by_the_agent`].
#[test]
fn scenarios_by_the_ebpf_agent() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    check(&load("scenarios")?, Means::EbpfAgent, Dialect::Nft, Route::Straight);
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
        check(&cases, Means::Rendering, dialect, Route::Straight);
    }
    Ok(())
}

/// Through the running agent: each scenario's changes are written to its directory of manifests.
#[test]
fn scenarios_by_the_agent() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let scenarios = load("scenarios")?;
    for dialect in Dialect::BOTH {
        check(&scenarios, Means::Agent, dialect, Route::Straight);
    }
    Ok(())
}

/// Those in which something happens: reversed, squashed, split, with empties between.
#[test]
fn changes_come_in_every_way() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut scenarios = load("scenarios")?;
    scenarios.retain(|scenario| !scenario.steps.is_empty());
    assert!(scenarios.len() >= 12, "{} scenarios with steps", scenarios.len());
    check(&scenarios, Means::Agent, Dialect::Nft, Route::Every);
    check(&scenarios, Means::Backend, Dialect::Legacy, Route::Every);
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
    // 25 is `established_connections_live_on`; 31 and 32 (names, status) do not show in traffic.
    let expected: BTreeSet<u8> = (1..=30).filter(|row| *row != 25).collect();
    let shown: BTreeSet<u8> = scenarios.iter().flat_map(|scenario| scenario.rows.iter().copied()).collect();
    assert_eq!(shown, expected, "the rows of the semantics that scenarios show");
    Ok(())
}
