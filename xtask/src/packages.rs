//! The programs and libraries that the tree needs from the system: finds what is missing, and installs it with
//! apt-get where there is one. Elsewhere it says what is missing, and for what.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::exec::Program;
use crate::sink::Sink;

/// How to see whether something is there.
enum Probe {
    /// A program of this name.
    Program(&'static str),
    /// A C header below one of the include directories.
    Header(&'static str),
    /// A shared library whose file name starts so, in one of the library directories.
    Library(&'static str),
    /// A file at this place.
    File(&'static str),
}

/// One thing we need.
struct Need {
    probe: Probe,
    /// Debian's package.
    package: &'static str,
    why: &'static str,
}

const NEEDS: &[Need] = &[
    Need { probe: Probe::Program("ip"), package: "iproute2", why: "the lab's namespaces and interfaces" },
    Need { probe: Probe::Program("ipset"), package: "ipset", why: "the iptables backend's sets" },
    Need { probe: Probe::Program("iptables-nft"), package: "iptables", why: "the iptables backend" },
    Need { probe: Probe::Program("iptables-legacy"), package: "iptables", why: "the iptables backend" },
    Need { probe: Probe::Program("ip6tables-nft"), package: "iptables", why: "the iptables backend, IPv6" },
    Need { probe: Probe::Program("conntrack"), package: "conntrack", why: "the lab's look at connections" },
    Need { probe: Probe::Program("nft"), package: "nftables", why: "tests with rules of nftables' own" },
    Need { probe: Probe::Program("prometheus"), package: "prometheus", why: "the test of metrics and rules" },
    Need { probe: Probe::Program("promtool"), package: "prometheus", why: "the test of metrics and rules" },
    Need { probe: Probe::Program("openssl"), package: "openssl", why: "the certificates of the test of TLS" },
    Need {
        probe: Probe::Program("strace"),
        package: "strace",
        why: "the test that kills the agent at each call",
    },
    Need { probe: Probe::Program("chromium"), package: "chromium", why: "the test of the status page" },
    Need {
        probe: Probe::Program("chromedriver"),
        package: "chromium-driver",
        why: "the test of the status page",
    },
    Need { probe: Probe::Program("cc"), package: "gcc", why: "linking, and C parts of dependencies" },
    Need { probe: Probe::Program("python3"), package: "python3-venv", why: "the check of deploy/" },
    Need { probe: Probe::Program("node"), package: "nodejs", why: "the check of the dashboards" },
    Need { probe: Probe::Program("npm"), package: "npm", why: "the check of the dashboards" },
    Need { probe: Probe::Header("stdlib.h"), package: "libc6-dev", why: "C parts of dependencies" },
    Need { probe: Probe::Header("libipset/session.h"), package: "libipset-dev", why: "the ipset crate" },
    Need { probe: Probe::Library("libipset.so"), package: "libipset-dev", why: "the ipset crate" },
    Need { probe: Probe::Library("libclang"), package: "libclang-dev", why: "the ipset crate's bindgen" },
];

/// What building Debian's source package of Kubernetes needs, on top.
const KUBERNETES_NEEDS: &[Need] = &[
    Need {
        probe: Probe::File("/usr/lib/go-1.19/bin/go"),
        package: "golang-1.19-go",
        why: "kube-apiserver's language",
    },
    Need { probe: Probe::Program("rsync"), package: "rsync", why: "kube-apiserver's makefiles" },
    Need { probe: Probe::Program("make"), package: "make", why: "kube-apiserver's makefiles" },
    Need {
        probe: Probe::Program("dpkg-source"),
        package: "dpkg-dev",
        why: "unpacking Debian's source package",
    },
    Need { probe: Probe::Program("curl"), package: "curl", why: "asking etcd to forget" },
];

const INCLUDES: &[&str] = &["/usr/include", "/usr/local/include"];
const LIBRARIES: &[&str] = &["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib"];
/// Searched after PATH: the PATH of an ordinary user often lacks them.
const SYSTEM_PROGRAMS: &[&str] = &["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Installs what is missing; says nothing when nothing is.
///
/// # Errors
/// When something is missing and can't be installed: the message names each thing, its use, and what to do.
pub(crate) fn install_missing(sink: &Sink) -> Result<()> {
    install(NEEDS, sink)
}

/// Installs what building Kubernetes needs.
///
/// # Errors
/// As [`install_missing`].
pub(crate) fn install_for_kubernetes(sink: &Sink) -> Result<()> {
    install(KUBERNETES_NEEDS, sink)
}

fn install(needs: &'static [Need], sink: &Sink) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !is_there(&need.probe)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    packages.sort_unstable();
    packages.dedup();
    let list = packages.join(" ");

    if find_program("apt-get").is_none() {
        bail!(
            "missing:{}\nthis system has no apt-get: install these with its own package manager, then run again",
            described(&missing)
        );
    }
    if !is_root()? {
        bail!(
            "missing:{}\ninstall them, then run again:\n  sudo apt-get install {list}",
            described(&missing)
        );
    }

    sink.say(&format!("installing with apt-get: {list}{}", described(&missing)))?;
    let log = match sink {
        Sink::Terminal => env::temp_dir().join(format!("npm-agent-setup-{}.log", std::process::id())),
        Sink::Log(path) => path.clone(),
    };
    let outcome = apt_get(&packages, &Sink::Log(log.clone()));
    let still: Vec<&Need> = needs.iter().filter(|need| !is_there(&need.probe)).collect();
    if let Err(error) = outcome {
        bail!(
            "{error:#}\nstill missing:{}\napt-get's output is in {}; repair it, or install by hand: {list}",
            described(&still),
            log.display()
        );
    }
    if !still.is_empty() {
        bail!("apt-get installed {list}, yet these are not found:{}", described(&still));
    }
    match sink {
        Sink::Terminal => std::fs::remove_file(log).context("removing apt-get's log"),
        Sink::Log(_) => Ok(()),
    }
}

fn apt_get(packages: &[&str], output: &Sink) -> Result<()> {
    let apt_get = || Program::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").arg("-q");
    // A stale list names files that the mirror no longer has.
    apt_get().arg("update").run(output)?;
    apt_get().args(["install", "--yes", "--no-install-recommends"]).args(packages).run(output)
}

fn described(needs: &[&Need]) -> String {
    let mut text = String::new();
    for Need { probe, package, why } in needs {
        let (Probe::Program(thing) | Probe::Header(thing) | Probe::Library(thing) | Probe::File(thing)) =
            probe;
        text.push_str(&format!("\n  {thing} (Debian package {package}): {why}"));
    }
    text
}

fn is_there(probe: &Probe) -> bool {
    match probe {
        Probe::Program(name) => find_program(name).is_some(),
        Probe::File(path) => Path::new(path).is_file(),
        Probe::Header(name) => {
            // Multiarch systems keep some headers one directory further down.
            INCLUDES.iter().any(|directory| {
                Path::new(directory).join(name).exists()
                    || subdirectories(Path::new(directory), |name| name.contains("-linux-"))
                        .iter()
                        .any(|below| below.join(name).exists())
            })
        }
        Probe::Library(prefix) => {
            let configured = env::var_os("LIBCLANG_PATH").map(PathBuf::from);
            LIBRARIES.iter().map(PathBuf::from).chain(configured).any(|directory| {
                // Debian: lib/<triplet>/ and lib/llvm-<major>/lib/.
                let triplets = subdirectories(&directory, |name| name.contains("-linux-"));
                let llvm = subdirectories(&directory, |name| name.starts_with("llvm"));
                std::iter::once(directory)
                    .chain(triplets)
                    .chain(llvm.into_iter().map(|llvm| llvm.join("lib")))
                    .any(|directory| has_library(&directory, prefix))
            })
        }
    }
}

/// `libclang` is also `libclang-14.so.1`, but never `libclang-cpp.so`.
fn has_library(directory: &Path, prefix: &str) -> bool {
    let Ok(entries) = directory.read_dir() else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.strip_prefix(prefix).is_some_and(|rest| {
            !rest.starts_with("-cpp") && (rest.is_empty() || rest.contains(".so") || rest.starts_with('.'))
        })
    })
}

fn subdirectories(directory: &Path, wanted: fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = directory.read_dir() else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| wanted(&entry.file_name().to_string_lossy()) && entry.path().is_dir())
        .map(|entry| entry.path())
        .collect()
}

/// The program's path, from PATH or the system's directories.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_PROGRAMS.iter().map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// Whether this process may change the system.
///
/// # Errors
/// When the kernel does not say.
pub(crate) fn is_root() -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let owner = std::fs::metadata("/proc/self").context("asking who we are")?.uid();
    Ok(owner == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_told_from_their_neighbours() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("libclang-cpp.so.14"), "").unwrap();
        assert!(!has_library(directory.path(), "libclang"));
        std::fs::write(directory.path().join("libclang-14.so.1"), "").unwrap();
        assert!(has_library(directory.path(), "libclang"));
        assert!(!has_library(directory.path(), "libipset.so"));
    }

    #[test]
    fn a_program_that_no_system_has_is_missing() {
        assert!(is_there(&Probe::Program("sh")));
        assert!(!is_there(&Probe::Program("npm-agent-no-such-program")));
        assert!(!is_there(&Probe::Header("npm-agent/no-such-header.h")));
    }

    #[test]
    fn what_is_missing_is_named_with_its_use() {
        let text = described(&NEEDS.iter().collect::<Vec<_>>());
        for Need { package, why, .. } in NEEDS {
            assert!(text.contains(package) && text.contains(why), "{package}: {why}");
        }
    }
}
