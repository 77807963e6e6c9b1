//! Finds the expressions that a pod may match without testing them all.
//!
//! Every expression is filed under one or more anchors: a label that a matching pod must carry, in a namespace it
//! must be in. A pod is looked up under the anchors that its own labels spell, so a pod's change meets only the
//! expressions that name something of the pod's (and those so negative or empty that they name nothing).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::few::Few;
use crate::goal::Expression;
use crate::model::{Labels, NamespaceScope, Operator, Selector};

/// An expression with more anchors than this (long `In` lists crossed) is filed under broader ones.
const MAX_ANCHORS: usize = 64;

/// Something that a matching object must carry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    /// This namespace name (for namespaces only).
    Name(Arc<str>),
    /// This label.
    Label(Arc<str>, Arc<str>),
    /// A label with this key.
    Key(Arc<str>),
    /// Nothing that is known.
    Anything,
}

/// Files values of type `T` under the anchors of expressions.
#[derive(Clone, Debug)]
pub(super) struct AnchorIndex<T> {
    filed: BTreeMap<(Mark, Mark), Few<T>>,
}

impl<T> Default for AnchorIndex<T> {
    fn default() -> Self {
        Self { filed: BTreeMap::new() }
    }
}

impl<T: Clone + Ord> AnchorIndex<T> {
    pub(super) fn insert(&mut self, expression: &Expression, value: &T) {
        for anchor in anchors(expression) {
            self.filed.entry(anchor).or_default().insert(value.clone());
        }
    }

    pub(super) fn remove(&mut self, expression: &Expression, value: &T) {
        for anchor in anchors(expression) {
            if let Some(values) = self.filed.get_mut(&anchor) {
                values.remove(value);
                if values.is_empty() {
                    self.filed.remove(&anchor);
                }
            }
        }
    }

    /// Everything filed under an expression that a pod with these labels in this namespace may match.
    pub(super) fn candidates(
        &self,
        namespace: &Arc<str>,
        namespace_labels: &Labels,
        pod: &Labels,
    ) -> BTreeSet<T> {
        let mut found = BTreeSet::new();
        let name = std::iter::once(Mark::Name(Arc::clone(namespace)));
        for scope in name.chain(marks(namespace_labels)) {
            for mark in marks(pod) {
                if let Some(values) = self.filed.get(&(scope.clone(), mark)) {
                    found.extend(values.iter().cloned());
                }
            }
        }
        found
    }
}

/// Every mark that an object with these labels carries.
fn marks(labels: &Labels) -> impl Iterator<Item = Mark> {
    let own = labels.iter().flat_map(|(key, value)| {
        [Mark::Label(Arc::clone(key), Arc::clone(value)), Mark::Key(Arc::clone(key))]
    });
    own.chain(std::iter::once(Mark::Anything))
}

fn anchors(expression: &Expression) -> Vec<(Mark, Mark)> {
    let scopes = match &expression.namespaces {
        NamespaceScope::Named(name) => vec![Mark::Name(Arc::clone(name))],
        NamespaceScope::Matching(selector) => required_marks(selector),
    };
    let pods = required_marks(&expression.pods);
    let scopes = if scopes.len() * pods.len() > MAX_ANCHORS { vec![Mark::Anything] } else { scopes };
    let scopes = match &expression.namespaces {
        // A name is one mark; it never needs to give way.
        NamespaceScope::Named(name) => vec![Mark::Name(Arc::clone(name))],
        NamespaceScope::Matching(_) => scopes,
    };
    let pods = if scopes.len() * pods.len() > MAX_ANCHORS { vec![Mark::Anything] } else { pods };
    scopes.iter().flat_map(|scope| pods.iter().map(move |pod| (scope.clone(), pod.clone()))).collect()
}

/// Marks of which every matching object carries at least one: those of the most telling requirement.
fn required_marks(selector: &Selector) -> Vec<Mark> {
    let options = selector.requirements().filter_map(|requirement| match &requirement.operator {
        Operator::In(values) => Some(
            values
                .iter()
                .map(|value| Mark::Label(Arc::clone(&requirement.key), Arc::clone(value)))
                .collect::<Vec<_>>(),
        ),
        Operator::Exists => Some(vec![Mark::Key(Arc::clone(&requirement.key))]),
        Operator::NotIn(_) | Operator::DoesNotExist => None,
    });
    // A label says more than a key, one value more than several.
    let rank = |marks: &Vec<Mark>| match marks.first() {
        Some(Mark::Label(..)) | None => marks.len(),
        Some(Mark::Name(_) | Mark::Key(_) | Mark::Anything) => MAX_ANCHORS / 2,
    };
    options.min_by_key(rank).unwrap_or_else(|| vec![Mark::Anything])
}
