//! Where maps, programs and links stay when no process holds them: a directory of the BPF file system for each instance.
//!
//! ```text
//! /sys/fs/bpf/npm-agent/<instance>/v<schema>/<width>/<NAME>   what is enforced: narrow or wide rows
//!                                           /maps/<NAME>     what every width shares: connections, counts, the mode
//!                                           /program         by which program
//!                                           /links/<index>   where: an interface's TCX link
//!                                 /netns-<inode>             in which network namespace, for whoever cleans up
//! ```
//!
//! Another width is filled under `<width>-next`, and renamed when it holds the goal: a width that is there under its own name
//! can be enforced.
//!
//! The schema says what the maps hold and how they belong together; a process of another schema finds another directory
//! and replaces it. Names in that file system have no dots: instances spell theirs `_`, which no instance's name has.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use aya::pin::PinError;
use aya::programs::SchedClassifier;
use npm_common::layout::SCHEMA;
use rustix::fs::statfs;
use rustix::mount::{MountFlags, mount};

use super::width::Width;
use crate::config::RUN_DIRECTORY;

/// Where the BPF file system is by convention.
pub const BPF_FILE_SYSTEM: &str = "/sys/fs/bpf";

/// What all instances share.
const OURS: &str = "npm-agent";

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const MAGIC: i128 = 0xcafe_4a11;

/// Why nothing can be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    /// There is no BPF file system, and none can be mounted.
    #[error("cannot mount a BPF file system: mount one with `mount -t bpf bpf {}`", path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel does not pin something.
    #[error("cannot pin {}", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: PinError,
    },
    /// A file or directory can't be made, read or removed.
    #[error("cannot use {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The directory of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    /// `<root>/npm-agent/<instance>`.
    instance: PathBuf,
}

impl Pins {
    /// Of the instance of this name. Makes sure that there is a BPF file system; makes no directory.
    ///
    /// # Errors
    /// There is none, and it can't be mounted.
    pub fn of(instance: &str) -> Result<Self, PinsError> {
        mount_once(Path::new(BPF_FILE_SYSTEM))?;
        Ok(Self::as_they_are(instance))
    }

    /// The same to look at what an agent has left: nothing is made or mounted.
    pub fn as_they_are(instance: &str) -> Self {
        Self { instance: Path::new(BPF_FILE_SYSTEM).join(OURS).join(instance.replace('.', "_")) }
    }

    /// Of all instances that work in the calling thread's network namespace, of whatever version.
    ///
    /// # Errors
    /// They can't be listed.
    pub fn all() -> Result<Vec<Self>, PinsError> {
        let ours = Path::new(BPF_FILE_SYSTEM).join(OURS);
        let home = home()?;
        let all = names(&ours)?.into_iter().map(|instance| Self { instance: ours.join(instance) });
        Ok(all.filter(|pins| pins.instance.join(&home).is_dir()).collect())
    }

    fn version(&self) -> PathBuf {
        self.instance.join(format!("v{SCHEMA}"))
    }

    /// The widest rows that are enforced, or can be: what an earlier process left; narrow ones if there is nothing.
    pub(super) fn width(&self) -> Width {
        let is_there = |width: &Width| self.rows(*width).is_dir();
        Width::BOTH.into_iter().rev().find(is_there).unwrap_or_default()
    }

    /// Where the maps with rows of a width are pinned.
    pub(super) fn rows(&self, width: Width) -> PathBuf {
        self.version().join(width.name())
    }

    /// Makes an empty directory for maps with rows of a width that are to be filled.
    ///
    /// # Errors
    /// It can't be made.
    pub(super) fn begin(&self, width: Width) -> Result<PathBuf, PinsError> {
        let path = self.version().join(format!("{}-next", width.name()));
        remove_tree(&path)?;
        make_directory(&path)?;
        Ok(path)
    }

    /// Gives maps that are filled their proper name.
    ///
    /// # Errors
    /// They have not got it.
    pub(super) fn finish(&self, width: Width) -> Result<(), PinsError> {
        let next = self.version().join(format!("{}-next", width.name()));
        let path = self.rows(width);
        remove_tree(&path)?;
        std::fs::rename(next, &path).map_err(|source| PinsError::Io { path, source })
    }

    /// Takes away maps of all widths but one.
    ///
    /// # Errors
    /// Some are still there.
    pub(super) fn keep_only(&self, width: Width) -> Result<(), PinsError> {
        for other in Width::BOTH {
            remove_tree(&self.version().join(format!("{}-next", other.name())))?;
            if other != width {
                remove_tree(&self.rows(other))?;
            }
        }
        Ok(())
    }

    /// Where a map of this schema is pinned that every width shares.
    pub fn map(&self, name: &str) -> PathBuf {
        self.version().join("maps").join(name)
    }

    /// Where the program of this schema is pinned.
    pub fn program(&self) -> PathBuf {
        self.version().join("program")
    }

    /// Where the link of an interface is pinned.
    pub fn link(&self, index: u32) -> PathBuf {
        self.version().join("links").join(index.to_string())
    }

    /// Makes the directories of this schema.
    ///
    /// # Errors
    /// They can't be made.
    pub fn make(&self) -> Result<(), PinsError> {
        let version = self.version();
        let directories = [
            version.join("maps"),
            version.join("links"),
            self.rows(self.width()),
            self.instance.join(home()?),
        ];
        directories.iter().try_for_each(|path| make_directory(path))
    }

    /// Pins a program in the place of the one that is pinned.
    ///
    /// # Errors
    /// It can't be pinned; the other is there still.
    pub(super) fn replace_program(&self, program: &mut SchedClassifier) -> Result<(), PinsError> {
        let (path, next) = (self.program(), self.version().join("program-next"));
        // One that an earlier process did not come to rename.
        let _ = std::fs::remove_file(&next);
        program.pin(&next).map_err(|source| PinsError::Pin { path: next.clone(), source })?;
        std::fs::rename(&next, &path).map_err(|source| PinsError::Io { path, source })
    }

    /// The interfaces that have a link pinned here, by index.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn links(&self) -> Result<Vec<u32>, PinsError> {
        let names = names(&self.version().join("links"))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// What processes of other schemas have left of this instance.
    ///
    /// # Errors
    /// The directory can't be read.
    fn others(&self) -> Result<Vec<PathBuf>, PinsError> {
        let own = format!("v{SCHEMA}");
        let is_other = |name: &String| *name != own && name.starts_with('v');
        Ok(names(&self.instance)?.into_iter().filter(is_other).map(|name| self.instance.join(name)).collect())
    }

    /// Whether a program of another schema may be attached.
    ///
    /// # Errors
    /// The directory can't be read.
    pub(super) fn has_others(&self) -> Result<bool, PinsError> {
        Ok(!self.others()?.is_empty())
    }

    /// Takes away what processes of other schemas have left, and with it their links; gives the number of files.
    ///
    /// # Errors
    /// Something is still there.
    pub(super) fn remove_others(&self) -> Result<usize, PinsError> {
        let mut removed = 0;
        for version in self.others()? {
            removed += remove_tree(&version.join("links"))?;
            removed += remove_tree(&version)?;
        }
        Ok(removed)
    }

    /// Takes away the links; gives how many there were.
    ///
    /// # Errors
    /// Some are still there.
    pub(super) fn remove_links(&self) -> Result<usize, PinsError> {
        let links = self.version().join("links");
        let removed = remove_tree(&links)?;
        make_directory(&links)?;
        Ok(removed)
    }

    /// Takes away everything of this instance, of whatever schema. Links go first: no program is without its maps.
    /// Gives the number of files.
    ///
    /// # Errors
    /// Something is still there.
    pub fn remove(&self) -> Result<usize, PinsError> {
        let mut removed = 0;
        for version in names(&self.instance)? {
            let version = self.instance.join(version);
            let links = version.join("links");
            removed += remove_tree(&links)?;
            removed += remove_tree(&version)?;
        }
        removed += remove_tree(&self.instance)?;
        if let Some(ours) = self.instance.parent() {
            // Other instances may be there.
            let _ = std::fs::remove_dir(ours);
        }
        Ok(removed)
    }
}

/// The directory that says in which network namespace an instance works: it is empty, and its name has the namespace's
/// inode.
fn home() -> Result<String, PinsError> {
    let path = Path::new("/proc/thread-self/ns/net");
    let found = std::fs::metadata(path);
    let inode = found.map_err(|source| PinsError::Io { path: path.to_owned(), source })?.ino();
    Ok(format!("netns-{inode}"))
}

fn make_directory(path: &Path) -> Result<(), PinsError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| PinsError::Io { path: path.to_owned(), source })
}

/// The names of the entries of a directory; none if there is no such directory.
fn names(path: &Path) -> Result<Vec<String>, PinsError> {
    let failed = |source| PinsError::Io { path: path.to_owned(), source };
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let names: io::Result<Vec<String>> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect();
    names.map_err(failed)
}

/// Removes a directory with all that is in it; gives the number of files.
fn remove_tree(path: &Path) -> Result<usize, PinsError> {
    let failed = |source| PinsError::Io { path: path.to_owned(), source };
    let mut removed = 0;
    for name in names(path)? {
        let inside = path.join(name);
        if inside.is_dir() {
            removed += remove_tree(&inside)?;
        } else {
            std::fs::remove_file(&inside).map_err(|source| PinsError::Io { path: inside, source })?;
            removed += 1;
        }
    }
    match std::fs::remove_dir(path) {
        Ok(()) => Ok(removed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(removed),
        Err(error) => Err(failed(error)),
    }
}

/// Mounts a BPF file system at `root` if none is there, as other tools do. It stays when the agent ends: what is pinned
/// in it would be gone otherwise.
fn mount_once(root: &Path) -> Result<(), PinsError> {
    if is_bpf(root) {
        return Ok(());
    }
    // A second mount would hide the first: one process at a time looks.
    let lock = Path::new(RUN_DIRECTORY).join("bpf-mount.lock");
    let failed = |source| PinsError::Io { path: lock.clone(), source };
    std::fs::create_dir_all(RUN_DIRECTORY).map_err(failed)?;
    let file = File::options().create(true).append(true).open(&lock).map_err(failed)?;
    file.lock().map_err(failed)?;
    if is_bpf(root) {
        return Ok(());
    }
    mount("bpf", root, "bpf", MountFlags::empty(), Some(c"mode=0700"))
        .map_err(|error| PinsError::Mount { path: root.to_owned(), source: error.into() })
}

fn is_bpf(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| i128::from(found.f_type) == MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_instance_and_schema() {
        let pins = Pins { instance: Path::new("/sys/fs/bpf/npm-agent").join("a_b") };
        let version = format!("/sys/fs/bpf/npm-agent/a_b/v{SCHEMA}");
        assert_eq!(pins.map("PROOFS"), Path::new(&version).join("maps/PROOFS"));
        assert_eq!(pins.link(7), Path::new(&version).join("links/7"));
    }

    #[test]
    fn removing_takes_everything_of_one_instance() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("npm-agent");
        for instance in ["one", "other"] {
            for file in ["v0/maps/OLD", "v9/links/4", "v9/program"] {
                let path = root.join(instance).join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "").unwrap();
            }
        }
        let pins = Pins { instance: root.join("one") };
        assert_eq!(pins.remove().unwrap(), 3);
        assert!(!root.join("one").exists());
        assert!(root.join("other/v9/links/4").exists());
        assert_eq!(pins.remove().unwrap(), 0, "nothing is left");
    }
}
