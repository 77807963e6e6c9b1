//! The files on the command line, standard input and pipes among them.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::MemfdFlags;

/// How much a pipe may bring: as much as a manifest may hold.
const MAX_BYTES: u64 = 64 << 20;

/// Files that can be read by their paths, as often as one likes.
#[derive(Debug, Default)]
pub(super) struct Input {
    /// The files and directories.
    pub(super) paths: Vec<PathBuf>,
    /// What came from pipes, in memory, and what it is called.
    held: Vec<(PathBuf, String, File)>,
}

impl Input {
    /// Finds the files. `-` is standard input; it, pipes and devices are read to their end, once.
    ///
    /// # Errors
    /// Something is not there, can't be read, or is bigger than 64 MiB.
    pub(super) fn open(files: &[PathBuf]) -> anyhow::Result<Self> {
        let mut input = Self::default();
        for path in files {
            let called =
                if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
            if input.held.iter().any(|(_, other, _)| *other == called) {
                continue;
            }
            input.add(path, called.clone()).with_context(|| format!("reading {called}"))?;
        }
        Ok(input)
    }

    fn add(&mut self, path: &Path, called: String) -> anyhow::Result<()> {
        let held = if path == Path::new("-") {
            in_memory(io::stdin().lock())?
        } else {
            let metadata = std::fs::metadata(path)?;
            if metadata.is_file() || metadata.is_dir() {
                self.paths.push(path.to_owned());
                return Ok(());
            }
            in_memory(File::open(path)?)?
        };
        let path = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
        self.paths.push(path.clone());
        self.held.push((path, called, held));
        // The path of descriptor 3 begins that of 30.
        self.held.sort_by_key(|(path, ..)| std::cmp::Reverse(path.as_os_str().len()));
        Ok(())
    }

    /// A text for people, with the names by which they know the files.
    pub(super) fn called(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (path, called, _) in &self.held {
            text = text.replace(&path.display().to_string(), called);
        }
        text
    }
}

/// All that a reader gives, as a file that has no name but a descriptor.
fn in_memory(from: impl Read) -> anyhow::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("manifest", MemfdFlags::CLOEXEC)?);
    if io::copy(&mut from.take(MAX_BYTES + 1), &mut file)? > MAX_BYTES {
        bail!("bigger than {} MiB", MAX_BYTES >> 20);
    }
    Ok(file)
}
