//! Holds pods back until their policies are programmed: a backend around a backend.
//!
//! ```text
//! removed first: addresses that no pod of the node holds any more leave the set of the known
//!                the backend inside programs the goal
//! written last:  addresses of pods that are programmed now enter it
//! ```
//!
//! What is not in the set passes a pod's interface in neither direction. The rules ask for interfaces by name, so they are
//! there before the interface is, and whether an agent runs is nothing to them. A packet that is dropped in FORWARD leaves
//! no connection behind, so that nothing that is held opens one. (A program at an interface's egress would be there only
//! after the interface, and with no agent never.) It is the same for both backends: who is held depends on what the node
//! has programmed, not on any policy.
//!
//! Nothing is held before a source has been read whole for the first time: who is missing may have run for long. From
//! then on the gate stands until an agent is told to hold nobody.

mod gate;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use imbl::OrdSet;
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::{Family, Goal};

pub use self::gate::{CHAIN, set_name};
use self::gate::{Gate, SetOp};
use super::iptables::variant::{self, Variant};
use super::{Applied, Backend, BackendError, Meter, Removed, Write, Written};
use crate::exec::Tools;
use crate::interfaces::pods::PodInterfaces;

/// How many addresses of a drift are named.
const MAX_NAMED: usize = 5;

/// A backend that holds. It works in the network namespace of the thread that calls it.
pub struct Holding {
    inner: Box<dyn Backend>,
    gate: Gate,
    families: Vec<Family>,
    interfaces: PodInterfaces,
    /// What the kernel holds or is to hold, by family; nothing before a first apply if no earlier process has left
    /// anything.
    left: BTreeMap<Family, Left>,
    /// Whether the kernel is known to hold it.
    certainty: Certainty,
    /// Whose the rules are.
    author: Author,
    /// What was written since somebody asked.
    writes: Vec<Write>,
}

/// One family's gate.
#[derive(Clone, Debug, Default)]
struct Left {
    /// The chain's rules, as they are printed once they are there.
    rules: Vec<String>,
    known: BTreeSet<IpAddr>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Certainty {
    /// Something failed on the way, or nobody has looked yet.
    Unsure,
    /// Whatever differs was changed by someone else.
    Sure,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Author {
    /// An earlier process, or nobody.
    Another,
    /// This process.
    Ourselves,
}

impl Holding {
    /// Lets `inner` hold back who is not programmed behind `interfaces`. Changes nothing yet; what an earlier process has
    /// left is kept.
    ///
    /// # Errors
    /// The kernel or its tools lack what is needed.
    pub fn new(
        inner: Box<dyn Backend>,
        interfaces: PodInterfaces,
        variant: Option<Variant>,
        tools: Tools,
    ) -> Result<Self, BackendError> {
        let variant = variant.unwrap_or_else(|| Variant::detect(&tools));
        let gate = Gate { tools, variant };
        let mut families = vec![Family::V4];
        if variant::has_ipv6()? {
            families.push(Family::V6);
        }
        let mut left = BTreeMap::new();
        for family in &families {
            let found = gate.read(*family)?;
            if found.is_entered()
                && let (Some(rules), Some(known)) = (found.rules, found.known)
            {
                left.insert(*family, Left { rules, known });
            }
        }
        let (certainty, author) = (Certainty::Unsure, Author::Another);
        Ok(Self { inner, gate, families, interfaces, left, certainty, author, writes: Vec::new() })
    }

    /// Before the goal is programmed: from now on whoever has one of these addresses next is held.
    fn forget(&mut self, locals: &OrdSet<IpAddr>, applied: &mut Applied) -> Result<(), BackendError> {
        if self.certainty == Certainty::Unsure {
            self.converge(applied)?;
        }
        let is_gone = |address: &&IpAddr| !locals.contains(*address);
        let gone: Vec<IpAddr> =
            self.left.values().flat_map(|left| left.known.iter().filter(is_gone)).copied().collect();
        let ops: Vec<SetOp> = gone.iter().copied().map(SetOp::Delete).collect();
        for left in self.left.values_mut() {
            left.known.retain(|address| locals.contains(address));
        }
        self.write_sets(&ops, applied)
    }

    /// After the goal is programmed.
    fn admit(&mut self, locals: &OrdSet<IpAddr>, applied: &mut Applied) -> Result<(), BackendError> {
        let of = |family| locals.iter().filter(move |address| Family::of(**address) == family).copied();
        if self.author == Author::Another {
            let left = |family: &Family| {
                let rules = gate::rules(*family, &self.interfaces);
                (*family, Left { rules, known: of(*family).collect() })
            };
            self.left = self.families.iter().map(left).collect();
            // What differs is not someone else's doing.
            self.certainty = Certainty::Unsure;
            self.converge(applied)?;
            // What an agent with the other variant has left.
            applied.rule_writes += gate::remove_chains(&self.gate.tools, self.gate.variant.other())?;
            self.author = Author::Ourselves;
            tracing::info!(
                interfaces = %self.interfaces, known = locals.len(), "pods are held until they are programmed"
            );
            return Ok(());
        }
        let mut ops = Vec::new();
        for (family, left) in &mut self.left {
            ops.extend(of(*family).filter(|address| left.known.insert(*address)).map(SetOp::Add));
        }
        self.write_sets(&ops, applied)
    }

    /// Brings the kernel to what is to be left there; tells what someone else has changed.
    fn converge(&mut self, applied: &mut Applied) -> Result<(), BackendError> {
        let certainty = std::mem::replace(&mut self.certainty, Certainty::Unsure);
        let families: Vec<Family> = self.left.keys().copied().collect();
        for family in families {
            let found = self.gate.read(family)?;
            let Some(left) = self.left.get(&family).cloned() else { continue };
            let nobody = BTreeSet::new();
            let there = found.known.as_ref().unwrap_or(&nobody);
            let missing: Vec<IpAddr> = left.known.difference(there).copied().collect();
            let foreign: Vec<IpAddr> = there.difference(&left.known).copied().collect();
            let rules_differ = found.rules.as_ref() != Some(&left.rules) || !found.is_in_place(family);
            if certainty == Certainty::Sure {
                applied.drift.extend(set_drift(family, &missing, &foreign));
                applied.drift.extend(rules_differ.then(|| {
                    format!("{CHAIN} ({family:?}): its rules, or its place in FORWARD, were changed")
                }));
            }
            let create = found.known.is_none().then_some(SetOp::Create(family));
            let adds = missing.into_iter().map(SetOp::Add);
            let ops: Vec<SetOp> =
                create.into_iter().chain(foreign.into_iter().map(SetOp::Delete)).chain(adds).collect();
            self.write_sets(&ops, applied)?;
            self.certainty = Certainty::Unsure;
            if rules_differ {
                timed(&mut self.writes, Written::Chains, || {
                    self.gate.write_rules(family, &left.rules, &found)
                })?;
                applied.rule_writes += 1;
                self.adopt(family, left.rules.len())?;
            }
        }
        self.certainty = Certainty::Sure;
        Ok(())
    }

    /// Keeps in mind how the kernel's tools print the rules that were just written.
    fn adopt(&mut self, family: Family, count: usize) -> Result<(), BackendError> {
        let printed = self.gate.read(family)?.rules.unwrap_or_default();
        if printed.len() != count {
            return Err(BackendError::Unreadable {
                program: self.gate.variant.save(family),
                detail: format!("{CHAIN} has {} rules and not {count}", printed.len()),
            });
        }
        if let Some(left) = self.left.get_mut(&family) {
            left.rules = printed;
        }
        Ok(())
    }

    fn write_sets(&mut self, ops: &[SetOp], applied: &mut Applied) -> Result<(), BackendError> {
        if ops.is_empty() {
            return Ok(());
        }
        let certainty = std::mem::replace(&mut self.certainty, Certainty::Unsure);
        timed(&mut self.writes, Written::Sets, || self.gate.write_sets(ops))?;
        self.certainty = certainty;
        applied.set_writes += ops.len();
        Ok(())
    }
}

/// Writes, and notes how long it took.
fn timed(
    writes: &mut Vec<Write>,
    what: Written,
    write: impl FnOnce() -> Result<(), BackendError>,
) -> Result<(), BackendError> {
    let start = Instant::now();
    let outcome = write();
    writes.push(Write { what, took: start.elapsed(), failed: outcome.is_err() });
    outcome
}

/// What someone else has changed in a set, for people.
fn set_drift(family: Family, missing: &[IpAddr], foreign: &[IpAddr]) -> Vec<String> {
    let set = set_name(family);
    let some = |addresses: &[IpAddr]| {
        let named: Vec<String> = addresses.iter().take(MAX_NAMED).map(ToString::to_string).collect();
        format!("{}{}", named.join(", "), if addresses.len() > MAX_NAMED { ", .." } else { "" })
    };
    let lines = [
        (!missing.is_empty())
            .then(|| format!("{set}: known addresses were missing, their pods were held: {}", some(missing))),
        (!foreign.is_empty()).then(|| format!("{set}: somebody added addresses: {}", some(foreign))),
    ];
    lines.into_iter().flatten().collect()
}

/// Removes what holds, from either variant of iptables.
///
/// # Errors
/// Something of it is still there.
pub fn release(tools: &Tools) -> Result<Removed, BackendError> {
    let mut removed = Removed::default();
    for variant in Variant::BOTH {
        removed.chains += gate::remove_chains(tools, variant)?;
    }
    removed.sets = gate::remove_sets(tools)?;
    Ok(removed)
}

impl Backend for Holding {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn inherits(&self) -> bool {
        self.inner.inherits() || (self.author == Author::Another && !self.left.is_empty())
    }

    /// An error of the backend inside leaves those held who are new; one of ours does not keep the goal from being
    /// programmed.
    fn apply(&mut self, goal: &Goal) -> Result<Applied, BackendError> {
        let Some(locals) = &goal.locals else { return self.inner.apply(goal) };
        let mut held = Applied::default();
        let forgotten = self.forget(locals, &mut held);
        let mut applied = self.inner.apply(goal)?;
        forgotten?;
        self.admit(locals, &mut held)?;
        join(&mut applied, held);
        Ok(applied)
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        let inner = self.inner.verify();
        let mut held = Applied::default();
        self.converge(&mut held)?;
        let mut applied = inner?;
        join(&mut applied, held);
        Ok(applied)
    }

    fn writes(&mut self) -> Vec<Write> {
        let mut writes = self.inner.writes();
        writes.append(&mut self.writes);
        writes
    }

    fn meter(&self) -> Option<Meter> {
        self.inner.meter()
    }

    /// What policies say: who is held is no matter of theirs.
    fn decide(&mut self, flow: &Flow) -> Result<Decision, BackendError> {
        self.inner.decide(flow)
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        self.left.clear();
        (self.certainty, self.author) = (Certainty::Unsure, Author::Another);
        let Removed { sets, chains, rules } = self.inner.remove()?;
        let held = release(&self.gate.tools)?;
        Ok(Removed { sets: sets + held.sets, chains: chains + held.chains, rules: rules + held.rules })
    }
}

fn join(applied: &mut Applied, held: Applied) {
    let Applied { set_writes, rule_writes, drift, degraded } = held;
    applied.set_writes += set_writes;
    applied.rule_writes += rule_writes;
    applied.drift.extend(drift);
    applied.degraded.extend(degraded);
}
