//! Which object of a source is meant.

use std::sync::Arc;

use npm_policy::model::{PodKey, PolicyKey};
use npm_policy::world::Change;

/// Which object, of any kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Namespace(Arc<str>),
    Pod(PodKey),
    Policy(PolicyKey),
}

impl Key {
    /// The object that a change is about.
    pub(super) fn of(change: &Change) -> Self {
        match change {
            Change::Namespace(name, _) => Self::Namespace(Arc::clone(name)),
            Change::Pod(key, _) => Self::Pod(key.clone()),
            Change::Policy(key, _) => Self::Policy(key.clone()),
        }
    }

    /// The change that takes the object away.
    pub(super) fn gone(self) -> Change {
        match self {
            Self::Namespace(name) => Change::Namespace(name, None),
            Self::Pod(key) => Change::Pod(key, None),
            Self::Policy(key) => Change::Policy(key, None),
        }
    }

    /// Its kind and name, for people.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Namespace(name) => format!("Namespace {name}"),
            Self::Pod(key) => format!("Pod {key}"),
            Self::Policy(key) => format!("NetworkPolicy {key}"),
        }
    }
}
