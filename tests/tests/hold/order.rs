//! In which order an apply forgets, programs and admits; and what becomes of an apply that fails.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use npm_agent::backend::hold::{Holding, set_name};
use npm_agent::backend::iptables::variant::Variant;
use npm_agent::backend::meter::Meter;
use npm_agent::backend::{Applied, Backend, BackendError, Removed, Write};
use npm_agent::exec::Tools;
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::{Family, Goal};
use npm_tests::lab::netns::Namespaces;
use npm_tests::lab::require_root;

/// A backend that programs nothing, and notes what is known at the moment when it would.
#[derive(Clone, Default)]
struct Noting {
    known: Arc<Mutex<Vec<Vec<String>>>>,
    fails: Arc<AtomicBool>,
}

/// The addresses in the sets; none if there are no sets.
fn known() -> Vec<String> {
    let of = |family| Tools::default().run("ipset", &["save", set_name(family)], "").unwrap_or_default();
    let all = Family::BOTH.map(of).concat();
    let member =
        |line: &str| line.strip_prefix("add ").and_then(|rest| Some(rest.split_once(' ')?.1.to_owned()));
    let mut known: Vec<String> = all.lines().filter_map(member).collect();
    known.sort();
    known
}

impl Backend for Noting {
    fn name(&self) -> &'static str {
        "noting"
    }

    fn inherits(&self) -> bool {
        false
    }

    fn apply(&mut self, _: &Goal) -> Result<Applied, BackendError> {
        self.known.lock().expect("no test panics with it").push(known());
        match self.fails.load(Ordering::Relaxed) {
            true => Err(BackendError::Unsupported { what: "anything".to_owned() }),
            false => Ok(Applied::default()),
        }
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        Ok(Applied::default())
    }

    fn writes(&mut self) -> Vec<Write> {
        Vec::new()
    }

    fn meter(&self) -> Option<Meter> {
        None
    }

    fn decide(&mut self, _: &Flow) -> Result<Decision, BackendError> {
        Ok(Decision::Allow)
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        Ok(Removed::default())
    }
}

fn goal(locals: &[&str]) -> Goal {
    let locals = locals.iter().map(|address| address.parse::<IpAddr>().expect("an address")).collect();
    Goal { locals: Some(locals), ..Goal::default() }
}

#[test]
fn who_is_gone_is_forgotten_first_and_who_is_new_is_known_last() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let namespaces = Namespaces::create(["hold"])?;
    namespaces.members().first().context("a namespace")?.run(|| {
        let inner = Noting::default();
        let holding = || {
            let boxed = Box::new(inner.clone());
            Holding::new(boxed, "pod*".parse()?, Some(Variant::Nft), Tools::default()).context("making it")
        };
        let mut backend = holding()?;
        ensure!(!backend.inherits(), "it inherits nothing from nobody");
        let seen = || inner.known.lock().expect("no test panics with it").last().cloned();

        // Where not all is known nobody is held, and nothing is left behind.
        backend.apply(&Goal::default())?;
        ensure!(!rules()?.contains("HOLD"), "rules without all being known");

        backend.apply(&goal(&["10.0.0.1", "fd00::1"]))?;
        ensure!(
            (seen(), known()) == (Some(vec![]), vec!["10.0.0.1".into(), "fd00::1".into()]),
            "{:?}",
            known()
        );
        let applied = backend.apply(&goal(&["10.0.0.1", "10.0.0.2"]))?;
        ensure!(seen() == Some(vec!["10.0.0.1".into()]), "known while it is programmed: {:?}", seen());
        ensure!(known() == ["10.0.0.1", "10.0.0.2"], "{:?}", known());
        ensure!((applied.set_writes, applied.rule_writes) == (2, 0), "{applied:?}");
        let applied = backend.apply(&goal(&["10.0.0.1", "10.0.0.2"]))?;
        ensure!(applied == Applied::default(), "nothing is new: {applied:?}");
        ensure!(backend.verify()? == Applied::default(), "nobody has changed anything");

        // An apply that fails forgets and admits nobody.
        inner.fails.store(true, Ordering::Relaxed);
        ensure!(backend.apply(&goal(&["10.0.0.1", "10.0.0.3"])).is_err(), "the backend inside has failed");
        ensure!(known() == ["10.0.0.1"], "{:?}", known());
        ensure!(backend.verify()? == Applied::default(), "nobody has changed anything");
        inner.fails.store(false, Ordering::Relaxed);
        backend.apply(&goal(&["10.0.0.1", "10.0.0.3"]))?;
        ensure!(known() == ["10.0.0.1", "10.0.0.3"], "{:?}", known());

        // One that remembers nothing goes on from there, and repairs before it has a goal.
        let mut backend = holding()?;
        ensure!(backend.inherits(), "what an earlier one left is there");
        backend.verify()?;
        Tools::default().write("ipset", &["flush", set_name(Family::V4)], "")?;
        let repaired = backend.verify()?;
        ensure!(repaired.drift.len() == 1 && known() == ["10.0.0.1", "10.0.0.3"], "{repaired:?}");
        let applied = backend.apply(&goal(&["10.0.0.3", "10.0.0.4"]))?;
        ensure!(applied.drift.is_empty(), "{applied:?}");
        ensure!(seen() == Some(vec!["10.0.0.3".into()]), "known while it is programmed: {:?}", seen());
        ensure!(known() == ["10.0.0.3", "10.0.0.4"], "{:?}", known());
        ensure!(!backend.inherits(), "it is its own by now");
        let removed = backend.remove()?;
        ensure!((removed.sets, removed.chains) == (2, 2), "{removed:?}");
        ensure!(!rules()?.contains("HOLD"), "rules are left");
        Ok(())
    })
}

fn rules() -> Result<String> {
    Ok(Tools::default().run("iptables-nft-save", &["-t", "filter"], "")?)
}
