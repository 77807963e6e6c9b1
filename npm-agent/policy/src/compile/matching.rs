//! Selector matching, as the compiler does it. The oracle has its own.

use crate::model::{Labels, NamespaceScope, Operator, Selector};

/// Whether every requirement holds of `labels`.
pub(super) fn selects(selector: &Selector, labels: &Labels) -> bool {
    selector.requirements().all(|requirement| {
        let value = labels.get(&requirement.key);
        match &requirement.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    })
}

/// Whether a namespace with this name and these labels is in scope.
pub(super) fn in_scope(scope: &NamespaceScope, name: &str, labels: &Labels) -> bool {
    match scope {
        NamespaceScope::Named(named) => **named == *name,
        NamespaceScope::Matching(selector) => selects(selector, labels),
    }
}
