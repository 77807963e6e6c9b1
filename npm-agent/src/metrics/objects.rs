//! Which object, and what became of it: the unit in which Azure NPM's `exec_time` metrics count.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use npm_policy::goal::Goal;
use npm_policy::model::{PodKey, PolicyKey};
use npm_policy::world::{Change, World};

/// An object of the cluster. Prints as sources name it: `NetworkPolicy default/web`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Object {
    /// A namespace.
    Namespace(Arc<str>),
    /// A pod.
    Pod(PodKey),
    /// A policy.
    Policy(PolicyKey),
}

impl Object {
    /// The object that a change is about.
    pub fn of(change: &Change) -> Self {
        match change {
            Change::Namespace(name, _) => Self::Namespace(Arc::clone(name)),
            Change::Pod(key, _) => Self::Pod(key.clone()),
            Change::Policy(key, _) => Self::Policy(key.clone()),
        }
    }

    /// The object that a source names; `None` for a file, or for a kind that decides nothing.
    pub fn named(text: &str) -> Option<Self> {
        let (kind, name) = text.split_once(' ')?;
        let key = || name.split_once('/');
        match kind {
            "Namespace" => Some(Self::Namespace(name.into())),
            "Pod" => key().map(|(namespace, name)| Self::Pod(PodKey::new(namespace, name))),
            "NetworkPolicy" => key().map(|(namespace, name)| Self::Policy(PolicyKey::new(namespace, name))),
            _ => None,
        }
    }

    /// The kind, as a label's value.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Namespace(_) => "namespace",
            Self::Pod(_) => "pod",
            Self::Policy(_) => "policy",
        }
    }

    /// Whether a goal is what it is because of this very object. (Pods are in sets by their addresses, and namespaces
    /// nowhere: of those a goal does not tell.)
    pub fn is_programmed(&self, goal: &Goal) -> bool {
        match self {
            Self::Namespace(_) => false,
            Self::Pod(key) => goal.subjects.contains_key(key),
            Self::Policy(key) => goal.programs.contains_key(key),
        }
    }

    /// Whether the world holds it.
    pub fn is_in(&self, world: &World) -> bool {
        match self {
            Self::Namespace(name) => world.namespace(name).is_some(),
            Self::Pod(key) => world.pod(key).is_some(),
            Self::Policy(key) => world.policy(key).is_some(),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace(name) => write!(f, "Namespace {name}"),
            Self::Pod(key) => write!(f, "Pod {key}"),
            Self::Policy(key) => write!(f, "NetworkPolicy {key}"),
        }
    }
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// It was not there before.
    Create,
    /// It is another than before.
    Update,
    /// It is gone.
    Delete,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Create, Self::Update, Self::Delete];

    /// What a change does to a world; `None`: nothing.
    pub fn of(change: &Change, world: &World) -> Option<Self> {
        fn compare<T: PartialEq>(old: Option<&Arc<T>>, new: Option<&T>) -> Option<Operation> {
            match (old, new) {
                (None, None) => None,
                (None, Some(_)) => Some(Operation::Create),
                (Some(_), None) => Some(Operation::Delete),
                (Some(old), Some(new)) => (**old != *new).then_some(Operation::Update),
            }
        }
        match change {
            Change::Namespace(name, new) => compare(world.namespace(name), new.as_ref()),
            Change::Pod(key, new) => compare(world.pod(key), new.as_ref()),
            Change::Policy(key, new) => compare(world.policy(key), new.as_ref()),
        }
    }

    /// As a label's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }

    /// What two operations, of which nobody has seen the first, come to; `None`: nothing.
    pub fn then(self, next: Self) -> Option<Self> {
        match (self, next) {
            (Self::Create, Self::Delete) => None,
            (Self::Create, Self::Create | Self::Update) => Some(Self::Create),
            (Self::Update | Self::Delete, Self::Create | Self::Update) => Some(Self::Update),
            (Self::Update | Self::Delete, Self::Delete) => Some(Self::Delete),
        }
    }
}

/// What is told of a version once it is known what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tell {
    /// Nothing more: its failure has been counted.
    Nothing,
    /// A failure only: it was there at the start, so its programming is no event of the cluster.
    Failure,
    /// Success or failure.
    Outcome,
}

/// A version of an object on its way to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Which object.
    pub object: Object,
    /// How it differs from the version that the kernel has.
    pub operation: Operation,
    /// When the agent took it up.
    pub since: Instant,
    /// What to tell of it.
    pub tell: Tell,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sources_name_is_recognised() {
        for object in [
            Object::Namespace("x".into()),
            Object::Pod(PodKey::new("x", "a")),
            Object::Policy(PolicyKey::new("x", "web")),
        ] {
            assert_eq!(Object::named(&object.to_string()), Some(object));
        }
        for other in ["", "a.yaml", "Service x/a", "Pod a", "a file"] {
            assert_eq!(Object::named(other), None, "{other}");
        }
    }

    #[test]
    fn operations_add_up() {
        use Operation::{Create, Delete, Update};
        assert_eq!(Create.then(Update), Some(Create));
        assert_eq!(Create.then(Delete), None);
        assert_eq!(Delete.then(Create), Some(Update));
        assert_eq!(Update.then(Delete), Some(Delete));
    }
}
