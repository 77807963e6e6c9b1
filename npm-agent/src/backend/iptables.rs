//! The iptables/ipset backend: Azure NPM's chains and sets, converged from whatever is in the kernel.
//!
//! ```text
//! Goal ─► render ─► State ─┐
//!                          ├─► plan ─► steps ─► write (ipset, iptables-restore)
//! kernel ─► readback ─► State ─► interpret ─► what a flow meets
//! ```
//!
//! Everything but `readback`, `write` and `variant` is pure. The state is read before every change: what someone else did
//! in between is repaired by the same plan that carries the change out.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::{Family, Goal};

use self::layout::Placement;
use self::plan::{Other, SetOp, Step, Transaction};
use self::readback::Sets;
use self::refusal::Refusals;
use self::render::Rendered;
use self::state::{Line, Name, Rule, State, Target};
use self::variant::Variant;
use super::{Applied, Backend, BackendError, Removed, Write, Written};
use crate::exec::Tools;

pub mod drift;
pub mod interpret;
pub mod layout;
pub mod plan;
pub mod readback;
mod refusal;
mod remove;
pub mod render;
pub mod state;
pub mod text;
pub mod variant;
mod write;

/// How often a change is planned again after a write was refused.
const MAX_ATTEMPTS: u32 = 8;

/// The pause after the first refusal; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// How the backend is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The iptables to use; `None`: the one that the node's kubelet uses.
    pub variant: Option<Variant>,
    /// Where in `FORWARD` our jump stands.
    pub placement: Placement,
    /// How long to wait for the lock that users of iptables share. Whole seconds, one at least.
    pub lock_wait: Duration,
    /// Where `ipset`, `iptables-nft-save` and their likes are.
    pub tools: Tools,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            variant: None,
            placement: Placement::First,
            lock_wait: Duration::from_secs(5),
            tools: Tools::default(),
        }
    }
}

/// The backend. It works in the network namespace of the thread that calls it.
#[derive(Debug)]
pub struct Iptables {
    tools: Tools,
    variant: Variant,
    placement: Placement,
    lock_wait: Duration,
    /// The families that the kernel has.
    families: Vec<Family>,
    /// What the last apply left in the kernel; before the first, what an earlier process did.
    last: Option<Left>,
    /// Drift that applies have found which then failed: the next success tells of it.
    untold: Vec<String>,
    /// What was written since somebody asked.
    writes: RefCell<Vec<Write>>,
}

/// What an apply left in the kernel.
#[derive(Clone, Debug)]
struct Left {
    /// What the goal asks for.
    wanted: BTreeMap<Family, State>,
    /// The same without what the kernel does not take.
    states: BTreeMap<Family, State>,
    people: BTreeMap<Name, Name>,
    refusals: Refusals,
    /// Sets that rules of others hold fast.
    spared: BTreeSet<Name>,
    /// The families whose state is all there: what is missing was taken by someone else. In the others a failure on
    /// the way may have left it out.
    whole: BTreeSet<Family>,
}

impl Iptables {
    /// Finds out what the node has. Changes nothing.
    ///
    /// # Errors
    /// The kernel or its tools lack what is needed for IPv4. Without IPv6 the backend goes on, and logs that.
    pub fn new(options: Options) -> Result<Self, BackendError> {
        let Options { variant, placement, lock_wait, tools } = options;
        let variant = variant.unwrap_or_else(|| Variant::detect(&tools));
        let mut families = vec![Family::V4];
        if variant::has_ipv6()? {
            families.push(Family::V6);
        } else {
            tracing::warn!("the kernel has no IPv6: policies are enforced for IPv4 only");
        }
        let sets = readback::sets(&tools)?;
        let mut states = BTreeMap::new();
        for family in &families {
            states.insert(*family, readback::state(&tools, variant, *family, &sets)?);
        }
        let last = Left::inherited(states);
        Ok(Self {
            tools,
            variant,
            placement,
            lock_wait,
            families,
            last,
            untold: Vec::new(),
            writes: RefCell::default(),
        })
    }

    /// The iptables that is used.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// The families that are enforced.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// What is in the kernel.
    ///
    /// # Errors
    /// A tool could not be run, or printed what it is not known to print.
    pub fn read(&self) -> Result<BTreeMap<Family, State>, BackendError> {
        let sets = readback::sets(&self.tools)?;
        self.families.iter().map(|family| Ok((*family, self.read_family(*family, &sets)?))).collect()
    }

    /// Makes the kernel hold `left`, and keeps in mind what became of it.
    fn leave(&mut self, mut left: Left, before: Option<&Left>) -> Result<Applied, BackendError> {
        let mut applied = Applied { drift: std::mem::take(&mut self.untold), ..Applied::default() };
        let outcome = self.converge(&mut left, before, &mut applied);
        applied.degraded = left.refusals.degraded();
        self.last = Some(left);
        outcome.inspect_err(|_| self.untold = std::mem::take(&mut applied.drift)).map(|()| applied)
    }

    /// Whether the kernel takes a rule.
    fn probe(&self, family: Family, rule: &Line) -> bool {
        write::probe(&self.tools, self.variant, family, self.lock_wait, rule)
    }

    fn read_family(&self, family: Family, sets: &Sets) -> Result<State, BackendError> {
        readback::state(&self.tools, self.variant, family, sets)
    }

    /// Converges the kernel to `left`, and notes in it what the kernel would not take. Differences to `before` are drift.
    /// A family that fails does not keep the other from its rules.
    ///
    /// # Errors
    /// The first failure, after both were tried.
    fn converge(
        &self,
        left: &mut Left,
        before: Option<&Left>,
        applied: &mut Applied,
    ) -> Result<(), BackendError> {
        let mut outcome = Ok(());
        let mut sets = None;
        for family in &self.families {
            let converged = self.converge_family(*family, &mut sets, left, before, applied);
            if let (Err(error), Err(_)) = (&converged, &outcome) {
                tracing::warn!(?family, %error, "the second family fails as well");
            }
            outcome = outcome.and(converged);
        }
        outcome
    }

    /// Converges one family. `sets` is what is known of the sets, if it is fresh.
    fn converge_family(
        &self,
        family: Family,
        sets: &mut Option<Sets>,
        left: &mut Left,
        before: Option<&Left>,
        applied: &mut Applied,
    ) -> Result<(), BackendError> {
        let mut before = before.filter(|before| before.whole.contains(&family));
        let mut attempt = 0;
        loop {
            let Err(Failure { error, cause }) = self.attempt(family, sets, left, &mut before, applied) else {
                left.whole.insert(family);
                return Ok(());
            };
            *sets = None;
            match cause {
                Cause::Learnt => {
                    tracing::warn!(%error, "the kernel does not take all of it, going on without the rest");
                    continue;
                }
                Cause::Held(set) if attempt + 1 >= MAX_ATTEMPTS => {
                    tracing::warn!(%set, "rules that are not ours name a set of ours, leaving it");
                    left.spared.insert(set);
                    continue;
                }
                Cause::Held(_) | Cause::Unknown => {}
            }
            attempt += 1;
            // What hangs has taken long enough; whoever calls tries again.
            if attempt >= MAX_ATTEMPTS || matches!(error, BackendError::TimedOut { .. }) {
                return Err(error);
            }
            tracing::debug!(%error, attempt, "a write was refused, reading again");
            // Sets are let go of some time after the rules that named them.
            std::thread::sleep(FIRST_PAUSE * 2_u32.pow(attempt - 1));
        }
    }

    /// Reads, plans, and carries the plan out.
    fn attempt(
        &self,
        family: Family,
        sets: &mut Option<Sets>,
        left: &mut Left,
        before: &mut Option<&Left>,
        applied: &mut Applied,
    ) -> Result<(), Failure> {
        let sets = match sets {
            Some(sets) => sets,
            None => sets.insert(readback::sets(&self.tools)?),
        };
        let actual = self.read_family(family, sets)?;
        let leftovers = readback::leftovers(&self.tools, self.variant.other(), family, sets)?;
        if let Some(before) = before.take() {
            applied.drift.extend(self.drift(&actual, before));
        }
        left.whole.remove(&family);
        let other = match &leftovers {
            None => Other::Absent,
            Some(rules) => Other::Present(rules.referenced_sets()),
        };
        let desired = left.states.get(&family).cloned().unwrap_or_else(|| State::empty(family));
        for step in plan::plan(&actual, &desired, self.placement, &other) {
            self.step(family, step, leftovers.as_ref(), left, applied)?;
        }
        Ok(())
    }

    fn step(
        &self,
        family: Family,
        step: Step,
        leftovers: Option<&State>,
        left: &mut Left,
        applied: &mut Applied,
    ) -> Result<(), Failure> {
        match step {
            Step::Sets(mut ops) => {
                self.spare(&mut ops, left)?;
                if !ops.is_empty() {
                    let written = self.timed(Written::Sets, || write::sets(&self.tools, family, &ops));
                    written.map_err(|error| {
                        let cause = write::held_set(&ops, &error).map_or(Cause::Unknown, Cause::Held);
                        Failure { error, cause }
                    })?;
                    applied.set_writes += ops.len();
                }
            }
            Step::Rules(transaction) => {
                self.transact(family, &transaction, left)?;
                applied.rule_writes += rule_writes(&transaction);
            }
            Step::Enforced => {
                if let Some(rules) = leftovers {
                    let transaction = remove::transaction(rules);
                    self.write_rules(self.variant.other(), family, &transaction)?;
                    applied.rule_writes += rule_writes(&transaction);
                }
            }
        }
        Ok(())
    }

    /// Takes the destruction of sets that others hold out of `ops`. Those that they have let go of are spared no more.
    fn spare(&self, ops: &mut Vec<SetOp>, left: &mut Left) -> Result<(), BackendError> {
        let is_spared = |op: &SetOp, left: &Left| match op {
            SetOp::Destroy { set } => left.spared.contains(set),
            SetOp::Create { .. } | SetOp::Add { .. } | SetOp::Delete { .. } | SetOp::Swap { .. } => false,
        };
        if ops.iter().any(|op| is_spared(op, left)) {
            let held = readback::held_sets(&self.tools)?;
            left.spared.retain(|set| held.contains(set));
            ops.retain(|op| !is_spared(op, left));
        }
        Ok(())
    }

    fn transact(&self, family: Family, transaction: &Transaction, left: &mut Left) -> Result<(), Failure> {
        let Err(error) = self.write_rules(self.variant, family, transaction) else { return Ok(()) };
        let probe = |rule: &_| self.probe(family, rule);
        // While someone holds the lock nothing is taken: that says nothing of any rule.
        let learnt = match (&error, left.states.get_mut(&family)) {
            (BackendError::Refused { .. }, Some(desired))
                if probe(&Line::Rule(Rule::new(Target::Return))) =>
            {
                left.refusals.learn(family, desired, probe)
            }
            _ => false,
        };
        Err(Failure { error, cause: if learnt { Cause::Learnt } else { Cause::Unknown } })
    }

    fn write_rules(
        &self,
        variant: Variant,
        family: Family,
        transaction: &Transaction,
    ) -> Result<(), BackendError> {
        let makes = transaction.chains.values().any(Option::is_some);
        let what = if makes { Written::Chains } else { Written::Removals };
        self.timed(what, || write::rules(&self.tools, variant, family, self.lock_wait, transaction))
    }

    /// Writes, and notes how long it took.
    fn timed(
        &self,
        what: Written,
        write: impl FnOnce() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let start = Instant::now();
        let outcome = write();
        let took = start.elapsed();
        self.writes.borrow_mut().push(Write { what, took, failed: outcome.is_err() });
        outcome
    }

    /// What someone else has changed since `before` was left.
    fn drift(&self, actual: &State, before: &Left) -> Vec<String> {
        let Some(expected) = before.states.get(&actual.family) else { return Vec::new() };
        let mut actual = actual.clone();
        actual.sets.retain(|name, _| !before.spared.contains(name));
        drift::differences(&actual, expected, self.placement, &before.people)
    }
}

impl Left {
    /// What an earlier process of ours left: until the first apply it stays, and is repaired. Nothing if there is none,
    /// or not in our forms.
    fn inherited(states: BTreeMap<Family, State>) -> Option<Self> {
        let enforces = |state: &State| state.chains.get(layout::ENTRY).is_some_and(|chain| !chain.is_empty());
        if !states.values().any(enforces) || !states.values().all(State::is_readable) {
            return None;
        }
        Some(Self {
            wanted: states.clone(),
            whole: states.keys().copied().collect(),
            states,
            people: BTreeMap::new(),
            refusals: Refusals::new(BTreeMap::new()),
            spared: BTreeSet::new(),
        })
    }

    /// What has yet to be there, where others hold these sets.
    fn of(rendered: Rendered, families: &[Family], spared: BTreeSet<Name>) -> Self {
        let people = rendered.names.values().flat_map(|names| {
            [
                (Arc::clone(&names.v4), Arc::clone(&names.name)),
                (Arc::clone(&names.v6), Arc::clone(&names.name)),
            ]
        });
        let people = people.collect();
        let states: BTreeMap<Family, State> =
            families.iter().map(|family| (*family, rendered.family(*family).clone())).collect();
        Self {
            wanted: states.clone(),
            states,
            people,
            refusals: Refusals::new(rendered.owners),
            spared,
            whole: BTreeSet::new(),
        }
    }
}

/// A write that failed.
struct Failure {
    error: BackendError,
    cause: Cause,
}

/// What is known of a failure.
enum Cause {
    /// Nothing: the same may work after reading again.
    Unknown,
    /// The kernel does not take a rule, and the next attempt will do without it.
    Learnt,
    /// A set could not be destroyed because rules name it: ours, gone but not yet let go of; or others'.
    Held(Name),
}

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Self {
        Self { error, cause: Cause::Unknown }
    }
}

fn rule_writes(transaction: &Transaction) -> usize {
    transaction.chains.len() + usize::from(transaction.forward.is_some())
}

impl Backend for Iptables {
    fn name(&self) -> &'static str {
        "iptables"
    }

    fn inherits(&self) -> bool {
        self.last.is_some()
    }

    fn apply(&mut self, goal: &Goal) -> Result<Applied, BackendError> {
        let before = self.last.take();
        let spared = before.as_ref().map(|before| before.spared.clone()).unwrap_or_default();
        let left = Left::of(Rendered::of(goal), &self.families, spared);
        self.leave(left, before.as_ref())
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        let Some(before) = self.last.take() else { return Ok(Applied::default()) };
        let mut left = before.clone();
        // The kernel may take by now (a module has been loaded) what it once refused.
        if left.refusals.any_lifted(|family, rule| self.probe(family, rule)) {
            left.states = left.wanted.clone();
            left.refusals.forget();
        }
        self.leave(left, Some(&before))
    }

    fn writes(&mut self) -> Vec<Write> {
        self.writes.take()
    }

    fn decide(&mut self, flow: &Flow) -> Result<Decision, BackendError> {
        let sets = readback::sets(&self.tools)?;
        let family = Family::of(flow.source);
        if !self.families.contains(&family) {
            return Ok(Decision::Allow);
        }
        let state = self.read_family(family, &sets)?;
        interpret::decide(&state, &state, flow).map_err(|error| BackendError::Unreadable {
            program: self.variant.save(family),
            detail: error.to_string(),
        })
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        self.last = None;
        self.untold.clear();
        remove::everything(&self.tools, self.lock_wait)
    }
}
