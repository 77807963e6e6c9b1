//! `cargo xtask test --real-apiserver`: the agent against a real kube-apiserver, so that the tests' own API server is known
//! to behave like one where it matters.
//!
//! It is built from the source package of Kubernetes 1.20 in Debian 12, the last that carries all of Kubernetes and what
//! it depends on; etcd comes from Debian's binary package. Both go into the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};

use crate::exec::Program;
use crate::manifests;
use crate::packages;
use crate::sink::Sink;
use crate::tree::Tree;

/// Where apt is told of its mirrors.
const APT: &str = "/etc/apt";

/// Builds what is missing, and runs the test.
///
/// # Errors
/// When something can't be installed, fetched or built. That the test failed is the exit code.
pub(crate) fn run(tree: &Tree) -> Result<ExitCode> {
    let sink = Sink::Terminal;
    packages::install_missing(&sink)?;
    if !packages::is_root()? {
        bail!("the lab makes network namespaces and needs root");
    }
    let home = tree.own().join("kubernetes-1.20");
    fs::create_dir_all(&home).context("making a directory for Kubernetes")?;
    let apt = Apt::new(&home)?;
    let etcd = etcd(&home, &apt, &sink)?;
    let server = server(&home, &apt, &sink)?;
    tree.cargo()
        .args(["build", "--locked", "--package", "npm-agent", "--package", "npm-tests", "--bin", "npm-agent"])
        .run(&sink)?;
    // Both, as built before: with one the same dependencies are built with other features.
    let both = ["test", "--locked", "--package", "npm-agent", "--package", "npm-tests"];
    let test = ["--test", "real_apiserver", "--", "--ignored"];
    let program = tree.cargo().args(both).args(test).env("NPM_REAL_APISERVER", server).env("NPM_ETCD", etcd);
    let status = program.env(manifests::TOOLS, manifests::tools(tree, &sink)?).status(&sink)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// apt with lists of its own: those of the machine have no source packages.
struct Apt {
    options: Vec<String>,
    directory: PathBuf,
}

impl Apt {
    fn new(home: &Path) -> Result<Self> {
        let directory = home.join("apt");
        let (parts, lists) = (directory.join("parts"), directory.join("lists"));
        for path in [&parts, &lists.join("partial")] {
            fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
        }
        let mut found = 0;
        let mut files = vec![Path::new(APT).join("sources.list")];
        let more = Path::new(APT).join("sources.list.d");
        for entry in fs::read_dir(&more).with_context(|| format!("reading {}", more.display()))? {
            files.push(entry?.path());
        }
        for file in files.iter().filter(|file| file.is_file()) {
            let name = file.file_name().context("a file's name")?;
            let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
            if let Some(text) = with_sources(&name.to_string_lossy(), &text) {
                fs::write(parts.join(name), text).context("writing apt's sources")?;
                found += 1;
            }
        }
        ensure!(found > 0, "{APT} names no mirror");
        let option = |name: &str, value: &Path| ["-o".to_owned(), format!("{name}={}", value.display())];
        let options = [
            option("Dir::Etc::SourceList", Path::new("/dev/null")),
            option("Dir::Etc::SourceParts", &parts),
            option("Dir::State::Lists", &lists),
        ];
        Ok(Self { options: options.concat(), directory })
    }

    /// Runs apt-get in its own directory.
    fn get(&self, args: &[&str], sink: &Sink) -> Result<()> {
        Program::new("apt-get")
            .arg("-q")
            .args(&self.options)
            .args(args)
            .current_dir(&self.directory)
            .run(sink)
    }

    /// The only file there with this beginning and end.
    fn file(&self, beginning: &str, end: &str) -> Result<PathBuf> {
        for entry in fs::read_dir(&self.directory).context("reading what apt has fetched")? {
            let path = entry?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name.starts_with(beginning) && name.ends_with(end) {
                return Ok(path);
            }
        }
        bail!("apt fetched no {beginning}...{end}")
    }
}

/// Apt's sources with source packages beside the binary ones; `None`: not a file of sources.
fn with_sources(name: &str, text: &str) -> Option<String> {
    let line = |line: &str| -> String {
        match (name.ends_with(".sources"), line.strip_prefix("deb ")) {
            (true, _) if line.starts_with("Types:") => "Types: deb deb-src".to_owned(),
            (false, Some(rest)) => format!("deb {rest}\ndeb-src {rest}"),
            _ => line.to_owned(),
        }
    };
    let is_list = name.ends_with(".sources") || name.ends_with(".list");
    is_list.then(|| text.lines().map(|text| line(text) + "\n").collect())
}

/// Where etcd is.
fn etcd(home: &Path, apt: &Apt, sink: &Sink) -> Result<PathBuf> {
    let program = home.join("etcd/usr/bin/etcd");
    if !program.is_file() {
        sink.say("fetching etcd (once)")?;
        apt.get(&["update"], sink)?;
        // Not installed: the package would start a server.
        apt.get(&["download", "etcd-server"], sink)?;
        let package = apt.file("etcd-server_", ".deb")?;
        Program::new("dpkg-deb").arg("--extract").arg(package).arg(home.join("etcd")).run(sink)?;
    }
    Ok(program)
}

/// Where the built server is.
fn server(home: &Path, apt: &Apt, sink: &Sink) -> Result<PathBuf> {
    let program = home.join("kube-apiserver");
    if program.is_file() {
        return Ok(program);
    }
    packages::install_for_kubernetes(sink)?;
    sink.say("building kube-apiserver from Debian's source package (once, about ten minutes)")?;
    let source = home.join("source");
    if source.exists() {
        fs::remove_dir_all(&source).context("removing half a build")?;
    }
    apt.get(&["update"], sink)?;
    apt.get(&["source", "--download-only", "kubernetes"], sink)?;
    let description = apt.file("kubernetes_", ".dsc")?;
    Program::new("dpkg-source").arg("--extract").arg(description).arg(&source).run(sink)?;
    // Its makefiles are from the time before modules.
    let workspace = source.join(".go/src/k8s.io");
    fs::create_dir_all(&workspace).context("making a Go workspace")?;
    let inside = workspace.join("kubernetes");
    std::os::unix::fs::symlink(&source, &inside).context("linking into the Go workspace")?;
    let path = std::env::var("PATH").context("PATH is not set")?;
    let mut make = Program::new("make").arg("WHAT=cmd/kube-apiserver").current_dir(&inside);
    for (name, value) in [
        ("PATH", format!("/usr/lib/go-1.19/bin:{path}")),
        ("GO111MODULE", "off".to_owned()),
        ("CGO_ENABLED", "0".to_owned()),
        ("GOFLAGS", String::new()),
        ("GOPATH", source.join(".go").display().to_string()),
        ("GOCACHE", home.join("go-cache").display().to_string()),
        ("KUBE_GIT_VERSION", "v1.20.2".to_owned()),
        ("KUBE_GIT_TREE_STATE", "clean".to_owned()),
        ("KUBE_GIT_MAJOR", "1".to_owned()),
        ("KUBE_GIT_MINOR", "20".to_owned()),
        ("KUBE_GIT_COMMIT", "debian".to_owned()),
    ] {
        make = make.env(name, value);
    }
    make.run(sink)?;
    fs::copy(source.join("_output/local/bin/linux/amd64/kube-apiserver"), &program)
        .context("keeping kube-apiserver (it is built for amd64 only)")?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::with_sources;

    #[test]
    fn sources_are_asked_for_in_either_form() {
        let old = with_sources("sources.list", "deb http://x y main\n# deb z\n");
        assert_eq!(old.as_deref(), Some("deb http://x y main\ndeb-src http://x y main\n# deb z\n"));
        let new = with_sources("debian.sources", "Types: deb\nURIs: http://x\n");
        assert_eq!(new.as_deref(), Some("Types: deb deb-src\nURIs: http://x\n"));
        assert_eq!(with_sources("debian.sources.disabled", "Types: deb\n"), None);
    }
}
