//! Files and directories: which manifests there are, whether one has changed, and its text.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How big a file may be.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// How many files and directories may lie under one path.
const MAX_ENTRIES: usize = 100_000;

/// How long after its last change a file may change again without another time stamp: the kernel stamps with its tick,
/// and network file systems with seconds.
const STAMP_GRAIN: Duration = Duration::from_secs(2);

/// What tells one version of a file from another without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
    modified: (i64, i64),
    /// The file was looked at so soon after its last change that the next one may not show.
    fresh: bool,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        let changed = Duration::new(metadata.ctime().max(0).unsigned_abs(), 0);
        let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + changed);
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            fresh: age.map_or(true, |age| age <= STAMP_GRAIN),
        }
    }

    /// Whether a file that had `self` when it was read, and has `newer`, is surely the same.
    pub(super) fn is_surely(&self, newer: &Self) -> bool {
        !self.fresh && Self { fresh: false, ..newer.clone() } == *self
    }

    /// Whether the file is empty and was changed just now: whoever writes it may only have begun.
    pub(super) fn is_begun(&self) -> bool {
        self.size == 0 && self.fresh
    }

    /// Whether the same file may soon look different without another stamp.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh
    }
}

/// What lies under some paths.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// The manifests, in the order of their paths.
    pub(super) files: BTreeMap<PathBuf, Stamp>,
    /// What could not be looked at, and why: what was known to lie under it may still be there.
    pub(super) unread: BTreeMap<PathBuf, io::Error>,
}

impl Tree {
    /// Lists files. A path that is a file counts whatever it is called; in directories, to any depth, those whose names
    /// end in `.yaml`, `.yml` or `.json`. Entries whose names begin with a dot are passed over (a mounted ConfigMap
    /// keeps its versions there and links to them).
    pub(super) fn list(paths: &[PathBuf]) -> Self {
        let mut tree = Self::default();
        let mut left = Vec::new();
        for path in paths {
            match fs::metadata(path) {
                Ok(metadata) if metadata.is_dir() => left.push(path.clone()),
                Ok(metadata) => drop(tree.files.insert(path.clone(), Stamp::of(&metadata))),
                Err(error) => drop(tree.unread.insert(path.clone(), error)),
            }
        }
        let mut entered = BTreeSet::new();
        let mut entries = 0;
        while let Some(directory) = left.pop() {
            if let Err(error) = tree.enter(&directory, &mut left, &mut entered, &mut entries) {
                // What was there a moment ago, and is not, is not unread but gone.
                if error.kind() != io::ErrorKind::NotFound || paths.contains(&directory) {
                    tree.unread.insert(directory, error);
                }
            }
        }
        tree
    }

    fn enter(
        &mut self,
        directory: &Path,
        left: &mut Vec<PathBuf>,
        entered: &mut BTreeSet<(u64, u64)>,
        entries: &mut usize,
    ) -> io::Result<()> {
        let metadata = fs::metadata(directory)?;
        // Links may lead back up.
        if !entered.insert((metadata.dev(), metadata.ino())) {
            return Ok(());
        }
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            *entries += 1;
            if *entries > MAX_ENTRIES {
                return Err(io::Error::other(format!("more than {MAX_ENTRIES} files and directories")));
            }
            let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            if hidden {
                continue;
            }
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => left.push(path),
                Ok(metadata) if is_manifest(&path) => drop(self.files.insert(path, Stamp::of(&metadata))),
                Ok(_) => {}
                // Gone since it was listed, or a link to nothing: a file that is not there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if is_manifest(&path) => drop(self.unread.insert(path, error)),
                Err(_) => {}
            }
        }
        Ok(())
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
}

/// Reads a manifest.
///
/// # Errors
/// It can't be read, is no regular file, is too big, or is not UTF-8.
pub(super) fn read_text(path: &Path) -> io::Result<String> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    // A device or pipe could block or never end; opening one for reading may already block.
    if !fs::metadata(path)?.is_file() {
        return Err(invalid("not a regular file".to_owned()));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(invalid(format!("bigger than {} MiB", MAX_FILE_BYTES >> 20)));
    }
    String::from_utf8(bytes)
        .map_err(|error| invalid(format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to())))
}
