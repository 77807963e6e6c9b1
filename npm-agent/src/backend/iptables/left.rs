//! What is known of our state in the kernel between two applies.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use npm_policy::goal::Family;

use super::layout;
use super::refusal::Refusals;
use super::render::Rendered;
use super::state::{Line, Name, State};

/// What is known before an apply.
#[derive(Clone, Debug)]
pub(super) enum Known {
    /// Nothing of ours enforces.
    Nothing,
    /// An earlier process enforces in forms that we do not write (Azure NPM does), or through the other variant: until
    /// the first apply nothing of it is touched.
    Foreign,
    /// What an apply left; or an earlier process in our forms, and then it is repaired until the first apply.
    Left(Left),
}

/// What an apply left in the kernel.
#[derive(Clone, Debug)]
pub(super) struct Left {
    /// What the goal asks for.
    pub(super) wanted: BTreeMap<Family, State>,
    /// The same without what the kernel does not take.
    pub(super) states: BTreeMap<Family, State>,
    /// Kernel names of sets to their names for people.
    people: Arc<BTreeMap<Name, Name>>,
    pub(super) refusals: Refusals,
    /// Sets that rules of others hold fast.
    pub(super) spared: BTreeSet<Name>,
    /// What the families hold that were left whole and not read since: what differs was changed by someone else. In the
    /// others a failure on the way may have done it.
    pub(super) believed: BTreeMap<Family, Belief>,
}

/// What a family is believed to hold.
#[derive(Clone, Debug)]
pub(super) struct Belief {
    pub(super) state: State,
    pub(super) people: Arc<BTreeMap<Name, Name>>,
}

impl Known {
    /// What an earlier process left, in the variant that is used and in the other one.
    pub(super) fn inherited(states: BTreeMap<Family, State>, others: &[State]) -> Self {
        let enforces = |state: &State| state.chains.get(layout::ENTRY).is_some_and(|chain| !chain.is_empty());
        if others.iter().any(enforces) {
            return Self::Foreign;
        }
        if !states.values().any(enforces) {
            return Self::Nothing;
        }
        if !states.values().all(State::is_readable) {
            return Self::Foreign;
        }
        let mut left = Left {
            wanted: states.clone(),
            states,
            people: Arc::default(),
            refusals: Refusals::new(BTreeMap::new()),
            spared: BTreeSet::new(),
            believed: BTreeMap::new(),
        };
        let families: Vec<Family> = left.states.keys().copied().collect();
        families.into_iter().for_each(|family| left.believe(family));
        Self::Left(left)
    }
}

impl Left {
    /// What has yet to be there.
    pub(super) fn of(rendered: Rendered, families: &[Family]) -> Self {
        let people = rendered.names.values().flat_map(|names| {
            [
                (Arc::clone(&names.v4), Arc::clone(&names.name)),
                (Arc::clone(&names.v6), Arc::clone(&names.name)),
            ]
        });
        let people = Arc::new(people.collect());
        let states: BTreeMap<Family, State> =
            families.iter().map(|family| (*family, rendered.family(*family).clone())).collect();
        Self {
            wanted: states.clone(),
            states,
            people,
            refusals: Refusals::new(rendered.owners),
            spared: BTreeSet::new(),
            believed: BTreeMap::new(),
        }
    }

    /// Notes that the kernel holds the whole of a family's state.
    pub(super) fn believe(&mut self, family: Family) {
        if let Some(state) = self.states.get(&family) {
            let belief = Belief { state: state.clone(), people: Arc::clone(&self.people) };
            self.believed.insert(family, belief);
        }
    }

    /// Gives other names to wanted sets whose own names are taken: by a set of another kind that rules of others hold
    /// fast, so that it can be neither used nor replaced.
    pub(super) fn avoid_held(&mut self, actual: &State) {
        let Some(state) = self.states.get_mut(&actual.family) else { return };
        let taken = |name: &&Name| {
            let kind = |state: &State| state.sets.get(*name).map(|set| set.kind.clone());
            let (wanted, found) = (kind(state), kind(actual));
            wanted.is_some() && found.is_some() && wanted != found
        };
        let taken: Vec<Name> = self.spared.iter().filter(taken).cloned().collect();
        for name in taken {
            let other: Name = layout::other_name(&name, actual.family);
            tracing::warn!(set = %name, instead = %other, "a rule that is not ours holds a set of the wrong kind");
            rename(state, &name, &other);
            let people = Arc::make_mut(&mut self.people);
            let shown = people.get(&name).cloned().unwrap_or_else(|| Arc::clone(&name));
            people.insert(other, shown);
        }
    }
}

/// Gives a set another name, in itself and in the rules that name it.
fn rename(state: &mut State, from: &Name, to: &Name) {
    if let Some(set) = state.sets.remove(from) {
        state.sets.insert(Arc::clone(to), set);
    }
    for chain in state.chains.values_mut() {
        if !chain.iter().any(|line| line.sets().contains(from)) {
            continue;
        }
        for line in Arc::make_mut(chain) {
            let Line::Rule(rule) = line else { continue };
            for matched in rule.sets.iter_mut().filter(|matched| matched.set == *from) {
                matched.set = Arc::clone(to);
            }
        }
    }
}
