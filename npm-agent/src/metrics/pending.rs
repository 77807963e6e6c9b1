//! The versions of objects that one backend's kernel does not hold yet.
//!
//! ```text
//! queue ─► queued ── begin ─► in flight ── finish ─► told as programmed
//!             ▲                   └─────── fail ───► told as failed, once ──┐
//!             └──────────── waits for the retry, to be measured ────────────┘
//! ```
//!
//! As in a work queue, an object that changes twice before it is programmed counts once, from the first change on.

use std::collections::BTreeMap;
use std::time::Instant;

use super::objects::{Object, Tell, Version};

/// What waits and what is being programmed.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// With the number of the goal that has the version; 0: every goal from now on.
    queued: BTreeMap<Object, (u64, Version)>,
    in_flight: BTreeMap<Object, Version>,
}

impl Pending {
    /// The goal of this number has these versions.
    pub(super) fn queue(&mut self, generation: u64, versions: impl IntoIterator<Item = Version>) {
        for version in versions {
            let merged = match self.queued.remove(&version.object) {
                Some((_, waiting)) if waiting.tell == Tell::Outcome => merge(waiting, version),
                Some(_) | None => Some(version),
            };
            if let Some(merged) = merged {
                self.queued.insert(merged.object.clone(), (generation, merged));
            }
        }
    }

    /// The goal of this number is being programmed.
    pub(super) fn begin(&mut self, generation: u64) {
        let ready = self.queued.extract_if(.., |_, (has, _)| *has <= generation);
        self.in_flight.extend(ready.map(|(object, (_, version))| (object, version)));
    }

    /// What was being programmed is.
    pub(super) fn finish(&mut self) -> impl Iterator<Item = Version> {
        std::mem::take(&mut self.in_flight).into_values()
    }

    /// What was being programmed is not: gives those that nobody was told of yet.
    pub(super) fn fail(&mut self) -> Vec<Version> {
        let mut untold = Vec::new();
        for (object, version) in std::mem::take(&mut self.in_flight) {
            if version.tell != Tell::Nothing {
                untold.push(version.clone());
            }
            // A newer version takes its place.
            self.queued.entry(object).or_insert((0, Version { tell: Tell::Nothing, ..version }));
        }
        untold
    }

    /// The object can't be taken as it is, whatever becomes of its programming: gives its version if nobody was told of
    /// it yet.
    pub(super) fn refuse(&mut self, object: &Object) -> Option<Version> {
        let queued = self.queued.get_mut(object).map(|(_, version)| version);
        let version = match queued {
            Some(version) => version,
            None => self.in_flight.get_mut(object)?,
        };
        let untold = version.clone();
        version.tell = Tell::Nothing;
        (untold.tell != Tell::Nothing).then_some(untold)
    }

    /// Since when the oldest waits.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let queued = self.queued.values().map(|(_, version)| version);
        queued.chain(self.in_flight.values()).map(|version| version.since).min()
    }
}

/// Two versions as one; `None`: the object has come and gone.
fn merge(first: Version, next: Version) -> Option<Version> {
    let operation = first.operation.then(next.operation)?;
    Some(Version { operation, since: first.since, ..next })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::objects::Operation;
    use super::*;

    fn version(name: &str, operation: Operation, since: Instant) -> Version {
        Version { object: Object::Namespace(name.into()), operation, since, tell: Tell::Outcome }
    }

    #[test]
    fn changes_before_the_programming_count_once() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut pending = Pending::default();
        pending.queue(1, [version("a", Operation::Create, start), version("b", Operation::Create, start)]);
        pending.queue(2, [version("a", Operation::Update, later), version("b", Operation::Delete, later)]);
        pending.begin(1);
        assert_eq!(pending.finish().count(), 0, "the goal before had neither as they are now");
        assert_eq!(pending.oldest(), Some(start));
        pending.begin(2);
        assert_eq!(pending.finish().collect::<Vec<_>>(), [version("a", Operation::Create, start)]);
        assert_eq!(pending.oldest(), None);
    }

    #[test]
    fn what_comes_during_the_programming_counts_by_itself() {
        let start = Instant::now();
        let mut pending = Pending::default();
        pending.queue(1, [version("a", Operation::Create, start)]);
        pending.begin(1);
        pending.queue(2, [version("a", Operation::Update, start)]);
        assert_eq!(pending.finish().collect::<Vec<_>>(), [version("a", Operation::Create, start)]);
        pending.begin(2);
        assert_eq!(pending.finish().collect::<Vec<_>>(), [version("a", Operation::Update, start)]);
    }

    #[test]
    fn a_failure_is_told_once_and_waits_on() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut pending = Pending::default();
        pending.queue(1, [version("a", Operation::Create, start)]);
        pending.begin(1);
        assert_eq!(pending.fail(), [version("a", Operation::Create, start)]);
        assert_eq!(pending.oldest(), Some(start), "the kernel is still without it");
        pending.begin(1);
        assert_eq!(pending.fail(), [], "told already");
        // Its next version is another matter.
        pending.queue(2, [version("a", Operation::Update, later)]);
        pending.begin(2);
        assert_eq!(pending.fail(), [version("a", Operation::Update, later)]);
        pending.begin(2);
        let finished: Vec<Version> = pending.finish().collect();
        assert_eq!((finished[0].tell, finished[0].since), (Tell::Nothing, later));
    }

    #[test]
    fn a_refused_version_is_told_once() {
        let start = Instant::now();
        let object = Object::Namespace("a".into());
        let mut pending = Pending::default();
        assert_eq!(pending.refuse(&object), None);
        pending.queue(1, [version("a", Operation::Create, start)]);
        assert_eq!(pending.refuse(&object), Some(version("a", Operation::Create, start)));
        assert_eq!(pending.refuse(&object), None);
        pending.begin(1);
        assert_eq!(pending.fail(), []);
    }
}
