//! Policies of which the maps can't hold what they allow: they isolate and allow nothing, so that all others go on.
//!
//! One policy can name more networks than a map has room for, and its author is not the one who is paged. What is left out is
//! that of the policies that need the most of what is scarce. It is found by planning for maps that are empty: it depends on the
//! goal alone, so it is the same after a restart, and what is in force stays so while it is looked for.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use npm_common::layout::{NARROW_WORDS, WIDE_WORDS};
use npm_policy::goal::{Clause, Goal, PeerMatch, PortMatch, Program, Set, SetKey};
use npm_policy::model::PolicyKey;

use super::held::{Held, Limits};
use super::lower::{LowerError, lower, named_by};
use super::lowering::Unfit;
use super::plan::{Full, MapName, plan};
use super::width::Width;
use crate::backend::Degraded;

/// What is left out, and why.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Shed(BTreeMap<PolicyKey, String>);

/// What there is too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scarce {
    /// Bits of rows.
    Bits,
    /// Entries of a map.
    Entries(MapName),
}

impl Shed {
    /// What has to be left out of a goal.
    ///
    /// # Errors
    /// It does not fit whatever is left out.
    pub fn of(goal: &Goal) -> Result<Self, Unfit> {
        let mut shed = Self::default();
        let mut round = 0;
        while let Err(error) = fits(&shed.reduce(goal)) {
            if !shed.more(goal, &error, round) {
                return Err(error);
            }
            round += 1;
        }
        Ok(shed)
    }

    /// Whether nothing is left out.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The policies that allow less than they say.
    pub fn degraded(&self) -> Vec<Degraded> {
        let line = |(policy, reason): (&PolicyKey, &String)| Degraded {
            policy: policy.clone(),
            reason: format!("what it allows is left out: {reason}"),
        };
        self.0.iter().map(line).collect()
    }

    /// The same, and every policy that is not in force as it is: what is in force needs no room beside itself.
    pub fn and_what_differs(&self, goal: &Goal, in_force: &Goal) -> Self {
        let mut shed = self.clone();
        for (policy, program) in &goal.programs {
            if in_force.programs.get(policy) != Some(program) {
                let reason =
                    || "it has changed, and there is no room beside what was there before".to_owned();
                shed.0.entry(policy.clone()).or_insert_with(reason);
            }
        }
        shed
    }

    /// The goal without what is left out: it isolates whoever the goal does, and allows nothing that the goal does not.
    pub fn reduce<'a>(&self, goal: &'a Goal) -> Cow<'a, Goal> {
        if self.is_empty() {
            return Cow::Borrowed(goal);
        }
        let mut reduced = goal.clone();
        // Sets of what is left out, as long as nobody else names them.
        let mut unnamed = BTreeSet::new();
        for policy in self.0.keys() {
            let Some(program) = goal.programs.get(policy) else { continue };
            unnamed.extend(named(program));
            let Program { subjects, ingress, egress } = &**program;
            let nothing = |clauses: &Option<Vec<Clause>>| clauses.as_ref().map(|_| Vec::new());
            let (ingress, egress) = (nothing(ingress), nothing(egress));
            let empty = Program { subjects: subjects.clone(), ingress, egress };
            reduced.programs.insert(policy.clone(), empty.into());
        }
        for program in reduced.programs.values() {
            unnamed.remove(&program.subjects);
            for key in named(program) {
                unnamed.remove(key);
            }
        }
        for key in unnamed {
            reduced.sets.remove(key);
        }
        Cow::Owned(reduced)
    }

    /// Leaves out more, because the goal without what is left out already did not fit. Each round takes twice as much as the
    /// one before: what policies share is not free before the last of them goes. `false`: nothing more can be left out.
    pub fn more(&mut self, goal: &Goal, error: &Unfit, round: u32) -> bool {
        let (scarce, excess) = match error {
            Unfit::Lower(LowerError::Peers { needed, available }) => {
                (Scarce::Bits, needed.saturating_sub(*available))
            }
            Unfit::Full(Full { map, wanted, limit, in_use: _ }) => {
                (Scarce::Entries(*map), wanted.saturating_sub(*limit as usize))
            }
        };
        let mut excess = excess.max(1).saturating_mul(1 << round.min(16));
        let left = goal.programs.iter().filter(|(policy, _)| !self.0.contains_key(policy));
        let mut needs: Vec<(usize, &PolicyKey)> = left
            .map(|(policy, program)| (need(program, goal, scarce), policy))
            .filter(|(need, _)| *need > 0)
            .collect();
        // The most first; of equals the first by name, everywhere and every time.
        needs.sort_by(|one, other| other.0.cmp(&one.0).then(one.1.cmp(other.1)));
        let is_less = !needs.is_empty();
        let reason = match error {
            Unfit::Lower(error) => error.to_string(),
            Unfit::Full(Full { map, wanted, limit, in_use: _ }) => {
                format!("the eBPF map of {map} takes {limit} entries, and {wanted} are wanted")
            }
        };
        for (need, policy) in needs {
            self.0.insert(policy.clone(), reason.clone());
            excess = excess.saturating_sub(need);
            if excess == 0 {
                break;
            }
        }
        is_less
    }
}

/// Whether empty maps can hold a goal.
fn fits(goal: &Goal) -> Result<(), Unfit> {
    fn fits_into<const W: usize>(goal: &Goal) -> Result<(), Unfit> {
        plan(&Held::<W>::default(), &lower::<W>(goal)?, &Limits::OBJECT)?;
        Ok(())
    }
    match Width::needed(goal)? {
        Width::Narrow => fits_into::<NARROW_WORDS>(goal),
        Width::Wide => fits_into::<WIDE_WORDS>(goal),
    }
}

fn clauses(program: &Program) -> impl Iterator<Item = &Clause> {
    program.ingress.iter().chain(&program.egress).flatten()
}

/// The sets that a policy's clauses name.
fn named(program: &Program) -> BTreeSet<&SetKey> {
    let mut keys = BTreeSet::new();
    for Clause { peers, ports } in clauses(program) {
        match peers {
            PeerMatch::Sets(sets) => keys.extend(sets),
            PeerMatch::Any => {}
        }
        match ports {
            PortMatch::Only { named, ranges: _ } => keys.extend(named.iter().map(|named| &named.set)),
            PortMatch::Any => {}
        }
    }
    keys
}

/// How much a policy needs by itself of what is scarce, at most.
fn need(program: &Program, goal: &Goal, scarce: Scarce) -> usize {
    let members = |kind: fn(&SetKey) -> bool| -> usize {
        let sets = named(program).into_iter().filter(|key| kind(key)).filter_map(|key| goal.sets.get(key));
        sets.map(|Set { v4, v6 }| v4.len() + v6.len()).sum()
    };
    match scarce {
        Scarce::Bits => named_by(program).len(),
        Scarce::Entries(MapName::Records) => members(|key| matches!(key, SetKey::Pods(_))),
        Scarce::Entries(MapName::Networks) => members(|key| matches!(key, SetKey::Block(_))),
        Scarce::Entries(MapName::Pairs) => members(|key| matches!(key, SetKey::Ports { .. })),
        Scarce::Entries(MapName::Policies) => clauses(program).count(),
        Scarce::Entries(MapName::Segments | MapName::Rows) => {
            let ports = |clause: &Clause| match &clause.ports {
                PortMatch::Only { ranges, named } => ranges.len() + named.len(),
                PortMatch::Any => 1,
            };
            clauses(program).map(ports).sum()
        }
    }
}
