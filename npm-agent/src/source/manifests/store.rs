//! What the files say, and what has been told of it.
//!
//! The files' objects together are one value, made anew after each look at them; changes are what differs from what was
//! told last.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use npm_policy::world::Change;
use tracing::debug;

use super::text::{self, Parsed};
use super::tree::{Stamp, Tree, read_text};
use crate::source::key::Key;
use crate::source::{Completeness, Problem};

/// One manifest, as last read.
#[derive(Debug, Default)]
struct Manifest {
    /// `None`: it could not be read, so any stamp is news.
    stamp: Option<Stamp>,
    /// Its good objects; while it is broken also those that it had before.
    objects: BTreeMap<Key, Change>,
    problems: Vec<Problem>,
    /// Whether it was ever read from end to end: what is broken since then has its last good objects.
    is_known: bool,
}

/// All manifests under some paths.
#[derive(Debug)]
pub(super) struct Store {
    paths: Vec<PathBuf>,
    manifests: BTreeMap<PathBuf, Manifest>,
    /// What has been told of objects: each is as its change says.
    told: BTreeMap<Key, Change>,
    /// What has been told of problems.
    told_problems: BTreeMap<String, Vec<Problem>>,
}

/// What is news.
#[derive(Debug, Default)]
pub(super) struct News {
    /// Changed objects.
    pub(super) changes: Vec<Change>,
    /// Changed problems, by origin.
    pub(super) problems: BTreeMap<String, Vec<Problem>>,
    /// Files that may change without looking changed, or are still being written: look again soon.
    pub(super) look_again: bool,
    /// Some file is empty and was changed just now: whoever writes it may only have begun.
    pub(super) is_begun: bool,
}

impl Store {
    pub(super) fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, manifests: BTreeMap::new(), told: BTreeMap::new(), told_problems: BTreeMap::new() }
    }

    /// Looks at all files, reads those that have changed, and gives what is news since the last look.
    pub(super) fn look(&mut self) -> News {
        let Tree { files, unread } = Tree::list(&self.paths);
        // What lies under something that can't be listed may still be there: it keeps its last good objects.
        self.manifests.retain(|path, _| {
            files.contains_key(path) || unread.keys().any(|unread| path.starts_with(unread))
        });
        let mut look_again = false;
        let mut is_begun = false;
        for (path, stamp) in files {
            look_again |= stamp.is_fresh();
            is_begun |= stamp.is_begun();
            let manifest = self.manifests.entry(path.clone()).or_default();
            if manifest.stamp.as_ref().is_some_and(|read| read.is_surely(&stamp)) {
                continue;
            }
            if stamp.is_begun() && !manifest.objects.is_empty() {
                continue;
            }
            match read_text(&path) {
                Ok(text) => manifest.take(&path, text::parse(&text), stamp),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.manifests.remove(&path);
                }
                Err(error) => manifest.keep(&path, &error),
            }
        }
        for (path, error) in &unread {
            self.manifests.entry(path.clone()).or_default().keep(path, error);
        }
        let (objects, problems) = self.merged();
        let changes = changes(&self.told, &objects);
        self.told = objects;
        let mut news: BTreeMap<_, _> = self
            .told_problems
            .keys()
            .filter(|origin| !problems.contains_key(*origin))
            .map(|o| (o.clone(), vec![]))
            .collect();
        news.extend(
            problems
                .iter()
                .filter(|(o, p)| self.told_problems.get(*o) != Some(p))
                .map(|(o, p)| (o.clone(), p.clone())),
        );
        self.told_problems = problems;
        News { changes, problems: news, look_again, is_begun }
    }

    /// What could not be read at the last look.
    pub(super) fn unread(&self) -> Vec<PathBuf> {
        let unread = self.manifests.iter().filter(|(_, manifest)| manifest.stamp.is_none());
        unread.map(|(path, _)| path.clone()).collect()
    }

    /// What was never read from end to end.
    pub(super) fn completeness(&self) -> Completeness {
        let unread = self.manifests.iter().filter(|(_, manifest)| !manifest.is_known);
        let unread: Vec<String> = unread.map(|(path, _)| path.display().to_string()).collect();
        if unread.is_empty() { Completeness::Complete } else { Completeness::Incomplete { unread } }
    }

    /// All files' objects together, the last in the order of paths winning; and the problems by file.
    fn merged(&self) -> (BTreeMap<Key, Change>, BTreeMap<String, Vec<Problem>>) {
        let mut objects = BTreeMap::new();
        let mut owners: BTreeMap<&Key, &Path> = BTreeMap::new();
        let mut problems: BTreeMap<String, Vec<Problem>> = BTreeMap::new();
        for (path, manifest) in &self.manifests {
            let mut here = manifest.problems.clone();
            for (key, change) in &manifest.objects {
                if let Some(other) = owners.insert(key, path) {
                    let message = format!("also in {}; this one counts", other.display());
                    here.push(Problem { object: key.name(), message });
                }
                objects.insert(key.clone(), change.clone());
            }
            if !here.is_empty() {
                problems.insert(path.display().to_string(), here);
            }
        }
        (objects, problems)
    }
}

impl Manifest {
    /// Takes what was read.
    fn take(&mut self, path: &Path, parsed: Parsed, stamp: Stamp) {
        let Parsed { objects, broken, ignored } = parsed;
        debug!(path = %path.display(), objects = objects.len(), ignored, broken = broken.len(), "manifest read");
        let file = path.display().to_string();
        let mut kept = BTreeMap::new();
        let mut problems = Vec::new();
        let is_whole = broken.is_empty();
        problems.extend(broken.into_iter().map(|problem| Problem { object: file.clone(), ..problem }));
        for object in objects {
            let said = object.problems.into_iter();
            problems.extend(said.map(|problem| match problem.object.is_empty() {
                true => Problem { object: file.clone(), ..problem },
                false => problem,
            }));
            let Some(change) = object.change else { continue };
            let key = Key::of(&change);
            if kept.contains_key(&key) {
                let message = "twice in this file; the last one counts".to_owned();
                problems.push(Problem { object: key.name(), message });
            }
            kept.insert(key, change);
        }
        if !is_whole {
            // The broken part may be where they are.
            let before = std::mem::take(&mut self.objects);
            let missing: Vec<_> = before.into_iter().filter(|(key, _)| !kept.contains_key(key)).collect();
            if !missing.is_empty() {
                let names: BTreeSet<_> = missing.iter().take(8).map(|(key, _)| key.name()).collect();
                let names = names.into_iter().collect::<Vec<_>>().join(", ");
                let more = if missing.len() > 8 { ", ..." } else { "" };
                let message = format!("stays as it was before the file was broken: {names}{more}");
                problems.push(Problem { object: file, message });
            }
            kept.extend(missing);
        }
        let is_known = self.is_known || (is_whole && !stamp.is_begun());
        *self = Self { stamp: Some(stamp), objects: kept, problems, is_known };
    }

    /// Keeps what was read last.
    fn keep(&mut self, path: &Path, error: &io::Error) {
        let kept = match self.objects.len() {
            0 => "left out".to_owned(),
            1 => "its object stays as it was".to_owned(),
            count => format!("its {count} objects stay as they were"),
        };
        let object = path.display().to_string();
        self.problems = vec![Problem { object, message: format!("cannot be read: {error}; {kept}") }];
        self.stamp = None;
    }
}

/// What to change so that `old` becomes `new`.
fn changes(old: &BTreeMap<Key, Change>, new: &BTreeMap<Key, Change>) -> Vec<Change> {
    let gone = old.keys().filter(|key| !new.contains_key(*key)).cloned().map(Key::gone);
    let here =
        new.iter().filter(|(key, change)| old.get(*key) != Some(*change)).map(|(_, change)| change.clone());
    gone.chain(here).collect()
}
