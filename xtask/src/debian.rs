//! Parts of packages from another suite of Debian than the machine's, read from the mirror that this machine's apt uses,
//! without any change to the system's apt.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::exec::Program;
use crate::packages::{find_program, is_root};
use crate::sink::Sink;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What is wanted of a package.
pub(crate) struct Package<'a> {
    /// The suite that has it.
    pub(crate) suite: &'a str,
    /// Its name, with a version where that matters, as `apt-get download` takes it.
    pub(crate) name: &'a str,
    /// The file or directory in it, from `./` on.
    pub(crate) inside: &'a str,
}

/// Downloads the package and puts what is wanted of it into `own`, under its own last name: whole, or not at all.
///
/// # Errors
/// This machine has no apt, or no mirror of Debian; the package can't be had.
pub(crate) fn fetch(package: &Package<'_>, own: &Path, sink: &Sink) -> Result<()> {
    for program in ["apt-get", "dpkg-deb", "tar"] {
        if find_program(program).is_none() {
            bail!("{program} is not there");
        }
    }
    if !Path::new(KEYRING).is_file() {
        bail!("{KEYRING} is not there (package debian-archive-keyring)");
    }
    let mirrors = mirrors()?;
    if mirrors.is_empty() {
        bail!("this machine's apt knows no mirror of Debian");
    }

    let Package { suite, name, inside } = package;
    let work = own.with_extension("apt");
    for directory in ["lists/partial", "cache/archives/partial", "unpacked"] {
        fs::create_dir_all(work.join(directory)).context("making apt's private directories")?;
    }
    let sources = work.join("sources.list");
    let lines: String =
        mirrors.iter().map(|mirror| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n")).collect();
    fs::write(&sources, lines).context("writing apt's private sources list")?;
    let apt_get = || {
        let mut program = Program::new("apt-get")
            .current_dir(&work)
            .args(["-q", "-o", "Dir::Etc::sourceparts=-"])
            .args(["-o", &format!("Dir::Etc::sourcelist={}", sources.display())])
            .args(["-o", &format!("Dir::State::lists={}", work.join("lists").display())])
            .args(["-o", &format!("Dir::Cache={}", work.join("cache").display())]);
        if is_root().unwrap_or(false) {
            // apt's own user may not enter the work tree.
            program = program.args(["-o", "APT::Sandbox::User=root"]);
        }
        program
    };
    apt_get().arg("update").run(sink)?;
    apt_get().args(["download", name]).run(sink)?;

    let downloaded = fs::read_dir(&work)
        .context("looking for the package")?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get download left no package")?;
    // In two steps, so that only the part we need is ever unpacked.
    let archive = work.join("data.tar");
    let tar = fs::File::create(&archive).context("making the archive")?;
    Program::new("dpkg-deb").arg("--fsys-tarfile").arg(&downloaded).write_to(tar)?;
    let (above, last) = inside.rsplit_once('/').context("a path in the package")?;
    let unpacked = work.join("unpacked");
    let strip = format!("--strip-components={}", above.split('/').count());
    let tar = Program::new("tar").args(["-x", &strip, "-f"]).arg(&archive).arg("-C").arg(&unpacked);
    tar.arg(inside).run(sink)?;

    // Moved into place whole: what has that name is always complete.
    fs::create_dir_all(own).with_context(|| format!("making {}", own.display()))?;
    fs::rename(unpacked.join(last), own.join(last)).with_context(|| format!("moving {last} into place"))?;
    fs::remove_dir_all(&work).context("removing apt's private directories")
}

/// The mirrors of Debian's main archive in this machine's apt configuration.
fn mirrors() -> Result<Vec<String>> {
    // Without release information it lists what is configured, downloaded or not.
    let text = Program::new("apt-get")
        .args(["indextargets", "--no-release-info", "--format", "$(SITE)"])
        .output()?;
    Ok(main_archives(&text))
}

fn main_archives(sites: &str) -> Vec<String> {
    let mut mirrors: Vec<String> = sites
        .lines()
        .map(|site| site.trim_end_matches('/'))
        .filter(|site| site.ends_with("/debian"))
        .map(str::to_owned)
        .collect();
    mirrors.sort_unstable();
    mirrors.dedup();
    mirrors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_main_archive_counts_as_a_mirror() {
        let sites = "http://a.example/debian\nhttp://a.example/debian-security\nhttps://b.example/node\n\
                     http://a.example/debian\nhttp://c.example/debian/\n";
        assert_eq!(main_archives(sites), ["http://a.example/debian", "http://c.example/debian"]);
    }
}
