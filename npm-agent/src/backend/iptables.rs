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
use std::time::{Duration, Instant};

use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::{Family, Goal};

use self::layout::Placement;
use self::left::{Belief, Known, Left};
use self::meter::Counted;
use self::plan::{Other, SetOp, Step, Transaction};
use self::readback::Sets;
use self::render::{Form, Rendered};
use self::state::{Line, Name, Rule, State, Target};
use self::variant::Variant;
use super::meter::Meter;
use super::{Applied, Backend, BackendError, Removed, Write, Written};
use crate::exec::Tools;

pub mod drift;
pub mod interpret;
pub mod layout;
mod left;
mod meter;
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
    /// How goals are rendered.
    pub form: Form,
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
            form: Form::default(),
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
    form: Form,
    lock_wait: Duration,
    /// The families that the kernel has.
    families: Vec<Family>,
    /// What the last apply left in the kernel; before the first, what an earlier process did.
    known: Known,
    /// Drift that applies have found which then failed: the next success tells of it.
    untold: Vec<String>,
    /// What was written since somebody asked.
    writes: RefCell<Vec<Write>>,
    /// What rules have counted and sets hold, as last read.
    counted: Counted,
}

impl Iptables {
    /// Finds out what the node has. Changes nothing.
    ///
    /// # Errors
    /// The kernel or its tools lack what is needed for IPv4. Without IPv6 the backend goes on, and logs that.
    pub fn new(options: Options) -> Result<Self, BackendError> {
        let Options { variant, placement, form, lock_wait, tools } = options;
        let variant = variant.unwrap_or_else(|| Variant::detect(&tools));
        let mut families = vec![Family::V4];
        if variant::has_ipv6()? {
            families.push(Family::V6);
        } else {
            tracing::warn!("the kernel has no IPv6: policies are enforced for IPv4 only");
        }
        let sets = readback::sets(&tools)?;
        let (mut states, mut others) = (BTreeMap::new(), Vec::new());
        for family in &families {
            states.insert(*family, readback::state(&tools, variant, *family, &sets)?);
            others.extend(readback::leftovers(&tools, variant.other(), *family, &sets)?);
        }
        let known = Known::inherited(states, &others);
        Ok(Self {
            tools,
            variant,
            placement,
            form,
            lock_wait,
            families,
            known,
            untold: Vec::new(),
            writes: RefCell::default(),
            counted: Counted::default(),
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
    fn leave(&mut self, mut left: Left) -> Result<Applied, BackendError> {
        let mut applied = Applied { drift: std::mem::take(&mut self.untold), ..Applied::default() };
        let outcome = self.converge(&mut left, &mut applied);
        applied.degraded = left.refusals.degraded();
        self.known = Known::Left(left);
        outcome.inspect_err(|_| self.untold = std::mem::take(&mut applied.drift)).map(|()| applied)
    }

    /// Whether the kernel takes a rule.
    fn probe(&self, family: Family, rule: &Line) -> bool {
        write::probe(&self.tools, self.variant, family, self.lock_wait, rule)
    }

    fn read_family(&self, family: Family, sets: &Sets) -> Result<State, BackendError> {
        let (state, counts) = readback::state_and_counts(&self.tools, self.variant, family, sets)?;
        self.counted.note(family, counts, &state);
        Ok(state)
    }

    /// Converges the kernel to `left`, and notes in it what the kernel would not take. A family that fails does not keep
    /// the other from its rules.
    ///
    /// # Errors
    /// The first failure, after both were tried.
    fn converge(&self, left: &mut Left, applied: &mut Applied) -> Result<(), BackendError> {
        let mut outcome = Ok(());
        let mut sets = None;
        for family in &self.families {
            let converged = self.converge_family(*family, &mut sets, left, applied);
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
        applied: &mut Applied,
    ) -> Result<(), BackendError> {
        let mut attempt = 0;
        loop {
            let Err(Failure { error, cause }) = self.attempt(family, sets, left, applied) else {
                left.believe(family);
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
        applied: &mut Applied,
    ) -> Result<(), Failure> {
        let sets = match sets {
            Some(sets) => sets,
            None => sets.insert(readback::sets(&self.tools)?),
        };
        let actual = self.read_family(family, sets)?;
        let leftovers = readback::leftovers(&self.tools, self.variant.other(), family, sets)?;
        // From here on differences are ours as well.
        if let Some(belief) = left.believed.remove(&family) {
            applied.drift.extend(self.drift(&actual, &belief, &left.spared));
        }
        let other = match &leftovers {
            None => Other::Absent,
            Some(rules) => Other::Present(rules.referenced_sets()),
        };
        left.avoid_held(&actual);
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
        let Err(error) = self.write_rules(self.variant, family, transaction) else {
            self.counted.rewritten(family, transaction.chains.keys());
            return Ok(());
        };
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

    /// What someone else has changed since the kernel held what is believed.
    fn drift(&self, actual: &State, belief: &Belief, spared: &BTreeSet<Name>) -> Vec<String> {
        let mut actual = actual.clone();
        actual.sets.retain(|name, _| !spared.contains(name) || belief.state.sets.contains_key(name));
        drift::differences(&actual, &belief.state, self.placement, &belief.people)
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
        match self.known {
            Known::Nothing => false,
            Known::Foreign | Known::Left(_) => true,
        }
    }

    fn apply(&mut self, goal: &Goal) -> Result<Applied, BackendError> {
        let mut left = Left::of(Rendered::in_form(goal, self.form), &self.families);
        if let Known::Left(before) = std::mem::replace(&mut self.known, Known::Nothing) {
            (left.spared, left.believed) = (before.spared, before.believed);
        }
        self.leave(left)
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        let mut left = match &self.known {
            Known::Nothing | Known::Foreign => return Ok(Applied::default()),
            Known::Left(left) => left.clone(),
        };
        // The kernel may take by now (a module has been loaded) what it once refused.
        if left.refusals.any_lifted(|family, rule| self.probe(family, rule)) {
            left.want_all();
        }
        self.leave(left)
    }

    fn writes(&mut self) -> Vec<Write> {
        self.writes.take()
    }

    fn meter(&self) -> Option<Meter> {
        Some(self.counted.meter())
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
        self.known = Known::Nothing;
        self.untold.clear();
        remove::everything(&self.tools, self.lock_wait)
    }
}
