//! Follows each version of an object from the moment it is taken up, for the reconcile loop.
//!
//! A version counts once, with its own `had_error`: a failure as soon as the source says that the object can't be taken
//! as it is, or an attempt to program it fails; a success when the kernel holds it. What changes nothing that this node
//! programs is counted in `npm_node_changes_total` only: it would fill the quantiles with times in which nothing happened.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use npm_policy::compile::Compiler;
use npm_policy::world::{Change, World};

use super::Metrics;
use super::objects::{Object, Operation, Tell, Version};
use crate::source::Problem;

/// What the loop has taken up and not published yet, and which objects have problems.
pub struct Journal {
    metrics: Arc<Metrics>,
    /// Versions that change what this node programs.
    batch: Vec<Version>,
    /// Objects with problems now, and the origins that tell of them.
    troubled: BTreeMap<Object, BTreeSet<String>>,
    /// Objects whose failure has been told, and whose change may still come.
    told: BTreeSet<Object>,
    /// Whether the source is still telling what was there when it started.
    initial: bool,
}

impl Journal {
    /// Nothing taken up yet.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, batch: Vec::new(), troubled: BTreeMap::new(), told: BTreeSet::new(), initial: true }
    }

    /// Takes changes up: the compiler gets them.
    pub fn take(&mut self, compiler: &mut Compiler, changes: Vec<Change>) {
        let since = Instant::now();
        let tests = compiler.operations();
        let before = compiler.goal();
        for change in changes {
            let object = Object::of(&change);
            let operation = Operation::of(&change, compiler.world());
            let writes = compiler.writes();
            compiler.apply([change]);
            let Some(operation) = operation else { continue };
            self.metrics.changed(&object, operation);
            // What is programmed now may have left the goal with an earlier change of the batch: a policy with its pod.
            let is_ours = compiler.writes() != writes || object.is_programmed(&before);
            let tell = match operation {
                // What is gone is no failure.
                Operation::Delete => None,
                Operation::Create | Operation::Update => self.troubled.contains_key(&object).then(|| {
                    if !self.told.remove(&object) {
                        self.refused(&object, operation, since);
                    }
                    Tell::Nothing
                }),
            };
            let usual = if self.initial { Tell::Failure } else { Tell::Outcome };
            if is_ours {
                self.batch.push(Version { object, operation, since, tell: tell.unwrap_or(usual) });
            }
        }
        self.metrics.compiled(since.elapsed(), compiler.operations() - tests);
    }

    /// What is wrong with the objects of one origin was `old` and is `new`.
    pub fn problems(&mut self, world: &World, origin: &str, old: &[Problem], new: &[Problem]) {
        let now = Instant::now();
        let (old, new) = (by_object(old), by_object(new));
        for object in old.keys().filter(|object| !new.contains_key(object)) {
            if let Some(origins) = self.troubled.get_mut(object) {
                origins.remove(origin);
                if origins.is_empty() {
                    self.troubled.remove(object);
                    self.told.remove(object);
                }
            }
        }
        for (object, messages) in &new {
            self.troubled.entry(object.clone()).or_default().insert(origin.to_owned());
            if old.get(object) != Some(messages) {
                let operation = if object.is_in(world) { Operation::Update } else { Operation::Create };
                self.told.insert(object.clone());
                self.refused(object, operation, now);
            }
        }
    }

    /// What was there when the source started has been told, and taken.
    pub fn in_sync(&mut self) {
        if !std::mem::replace(&mut self.initial, false) {
            return;
        }
        // Its programming begins here: what came before was reading.
        let now = Instant::now();
        self.batch.iter_mut().for_each(|version| version.since = now);
    }

    /// The goal of this number has everything that was taken up, and goes to the backends next.
    pub fn published(&mut self, generation: u64) {
        for backend in self.metrics.backends() {
            backend.published(generation, &self.batch);
        }
        self.batch.clear();
        self.metrics.goal(generation);
    }

    /// Everything that was taken up leaves the goal as it was.
    pub fn settled(&mut self) {
        self.batch.clear();
    }

    /// Counts a failure of a version, once for each backend that would have programmed it.
    fn refused(&mut self, object: &Object, operation: Operation, now: Instant) {
        for version in self.batch.iter_mut().filter(|version| version.object == *object) {
            version.tell = Tell::Nothing;
        }
        for backend in self.metrics.backends() {
            backend.refused(object, operation, now);
        }
    }
}

/// What is wrong with each object, in the order in which it was told. What is wrong with files is nobody's failure.
fn by_object(problems: &[Problem]) -> BTreeMap<Object, Vec<&str>> {
    let mut objects: BTreeMap<Object, Vec<&str>> = BTreeMap::new();
    for Problem { object, message } in problems {
        if let Some(object) = Object::named(object) {
            objects.entry(object).or_default().push(message);
        }
    }
    objects
}
