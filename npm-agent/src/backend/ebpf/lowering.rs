//! From one goal to the next: what differs is lowered, and the rest is as it was.
//!
//! ```text
//! goal ─┬─ what differs from the goal before ─► a few addresses ─► their entries
//!       └─ too much is new, or blocks are ────► lower, plan: everything
//! ```
//!
//! Pods come and go all the time, and with them the policies that select this node's. What has a bit keeps it; so an address's
//! new row is its old one with the bits of the sets that it has entered or left, and without those that nothing names any
//! more. Both ways lead to the same maps but for numbers that mean nothing (`tests/tests/ebpf_plan.rs` compares them after
//! every change), and either goes on from what the other has left.

mod difference;
mod index;
mod known;

use std::collections::BTreeMap;

use npm_common::layout::{NARROW_WORDS, V4, V6};
use npm_policy::goal::Goal;

use super::held::{Held, Limits, Readers, Write};
use super::lower::{Bit, LowerError, lower_with};
use super::plan::{Full, Step, plan, settle, wrapped};
use difference::Difference;
use index::{Content, Meanings};
use known::{Changed, KeptFamily, Part};

/// Why a goal does not fit into the maps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Not into rows of this width.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// A map is full.
    #[error(transparent)]
    Full(#[from] Full),
}

/// What is known of the last goal, for the next.
#[derive(Debug, Default)]
pub struct Lowering<const W: usize = NARROW_WORDS> {
    kept: Option<Kept<W>>,
    /// The bits of a plan for everything that is being carried out.
    pending: Option<BTreeMap<usize, Bit>>,
    /// Whether the last goal was lowered as a whole.
    was_whole: bool,
}

/// The last goal, and where its parts are in the maps.
#[derive(Debug)]
struct Kept<const W: usize> {
    goal: Goal,
    meanings: Meanings<W>,
    content: Content<W>,
    v4: KeptFamily<V4>,
    v6: KeptFamily<V6>,
    /// A number that no pod has, nor any above.
    next_pod: u32,
}

impl<const W: usize> Lowering<W> {
    /// The steps that lead from what is held to a goal. Whoever has carried all of them out says so ([`Lowering::done`]), and
    /// whoever has not, too ([`Lowering::forget`]).
    ///
    /// # Errors
    /// The goal does not fit.
    pub fn steps(&mut self, held: &Held<W>, goal: &Goal, limits: &Limits) -> Result<Vec<Step<W>>, Unfit> {
        self.pending = None;
        // What is kept is of use only if all of the difference can be told by it.
        if let Some(mut kept) = self.kept.take()
            && let Some(steps) = kept.steps(held, goal)
        {
            self.kept = Some(kept);
            return Ok(steps);
        }
        let lowered = lower_with(goal, &held.numbers())?;
        let steps = plan(held, &lowered, limits)?;
        self.pending = Some(lowered.bits);
        Ok(steps)
    }

    /// The maps hold the goal whose steps were given last.
    pub fn done(&mut self, held: &Held<W>, goal: &Goal, limits: &Limits) {
        let pending = self.pending.take();
        self.was_whole = pending.is_some();
        if let Some(bits) = pending {
            self.kept = Kept::of(held, goal, bits, limits);
        }
    }

    /// The steps that make both halves what packets are judged by, after the goal that was done: as [`super::plan::settle`],
    /// but found by what is kept where the goal was. Whoever has not carried all of them out says so ([`Lowering::forget`]).
    pub fn settle(&mut self, held: &Held<W>, limits: &Limits) -> Vec<Step<W>> {
        match &mut self.kept {
            Some(kept) if !self.was_whole => kept.settle(held),
            Some(kept) => {
                kept.v4.settled();
                kept.v6.settled();
                settle(held, limits)
            }
            None => settle(held, limits),
        }
    }

    /// Nobody knows what the maps hold.
    pub fn forget(&mut self) {
        (self.kept, self.pending) = (None, None);
    }

    /// Whether the next goal may cost what differs.
    pub fn is_kept(&self) -> bool {
        self.kept.is_some()
    }
}

impl<const W: usize> Kept<W> {
    /// What is known when the maps hold a goal; `None`: something is in them that is not of our making.
    fn of(held: &Held<W>, goal: &Goal, bits: BTreeMap<usize, Bit>, limits: &Limits) -> Option<Self> {
        let half = held.half();
        let v4 = KeptFamily::of(&held.v4, half, limits)?;
        let v6 = KeptFamily::of(&held.v6, half, limits)?;
        let next_pod = held.numbers().pods.values().max().copied().unwrap_or(0).checked_add(1)?;
        let content = Content::of(held, limits);
        Some(Self { goal: goal.clone(), meanings: Meanings::of(bits, goal)?, content, v4, v6, next_pod })
    }

    /// `None`: not all of the difference can be told by what is kept, which is of no use any more.
    fn steps(&mut self, held: &Held<W>, goal: &Goal) -> Option<Vec<Step<W>>> {
        let Self { goal: before, meanings, content, v4, v6, next_pod } = self;
        let mut difference = Difference::between(before, goal, held, meanings)?;
        difference.number_pods(before, goal, held, next_pod)?;
        content.also(meanings.writes(held));
        let part = Part { held, goal, meanings };
        let (of_v4, of_v6) = (
            Changed::of(&part, &held.v4, &difference.v4, content)?,
            Changed::of(&part, &held.v6, &difference.v6, content)?,
        );
        *before = goal.clone();
        let fresh = content.take_writes();
        if of_v4.is_empty() && of_v6.is_empty() && fresh.is_empty() {
            return Some(Vec::new());
        }
        let half = held.half();
        let v4 = v4.steps(&held.v4, half, of_v4)?;
        let v6 = v6.steps(&held.v6, half, of_v6)?;
        let mut steps = Vec::new();
        if held.readers == Readers::Behind {
            steps.push(Step::Grace);
        }
        steps.extend(wrapped(v4.sweep, Write::V4));
        steps.extend(wrapped(v6.sweep, Write::V6));
        steps.extend(fresh.into_iter().map(Step::Write));
        steps.extend(wrapped(v4.fill, Write::V4));
        steps.extend(wrapped(v6.fill, Write::V6));
        steps.push(Step::Write(Write::Generation(1 - (held.generation & 1))));
        Some(steps)
    }

    /// What is behind is brought up to what packets use.
    fn settle(&mut self, held: &Held<W>) -> Vec<Step<W>> {
        let half = held.half();
        let (v4, v6) = (self.v4.settle(&held.v4, half), self.v6.settle(&held.v6, half));
        let mut steps: Vec<Step<W>> = wrapped(v4.sweep, Write::V4).collect();
        steps.extend(wrapped(v6.sweep, Write::V6));
        steps.extend(wrapped(v4.fill, Write::V4));
        steps.extend(wrapped(v6.fill, Write::V6));
        if !steps.is_empty() && held.readers == Readers::Behind {
            steps.insert(0, Step::Grace);
        }
        steps
    }
}
