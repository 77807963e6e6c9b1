//! What the manifests and lock files of the two workspaces agree on, and what stands at the top of the tree.

use std::collections::BTreeMap;

/// Besides hidden files, and cargo's target directory.
const TOP_LEVEL: &[&str] = &[
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "deploy",
    "docs",
    "npm-agent",
    "npm-common",
    "npm-ebpf",
    "rust-toolchain.toml",
    "target",
    "tests",
    "xtask",
];

/// Complains about what is not agreed to be at the top.
pub(crate) fn top_level(names: impl Iterator<Item = String>) -> Vec<String> {
    names
        .filter(|name| !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()))
        .map(|name| {
            format!("{name}: not agreed to be at the top: find its home below, or say why in the commit")
        })
        .collect()
}

/// The releases of aya's two sides that were made for each other: user space's, the kernel's.
const AYA: (&str, &str) = ("0.14.0", "0.2.1");

/// Complains when the two lock files' aya crates do not belong together.
pub(crate) fn locks(workspace: &str, ebpf: &str) -> Vec<String> {
    let (workspace, ebpf) = (locked(workspace), locked(ebpf));
    let mut complaints = Vec::new();
    for (lock, name, wanted) in [(&workspace, "aya", AYA.0), (&ebpf, "aya-ebpf", AYA.1)] {
        match lock.get(name).map(Vec::as_slice) {
            Some([version]) if version == wanted => {}
            found => complaints.push(format!("{name} is locked at {found:?}, not at {wanted}")),
        }
    }
    for (name, versions) in workspace.iter().filter(|(name, _)| name.starts_with("aya")) {
        if let Some(others) = ebpf.get(name)
            && others != versions
        {
            complaints.push(format!("{name} is locked at {versions:?} here and at {others:?} in npm-ebpf"));
        }
    }
    complaints
}

/// The versions of each package in a lock file.
fn locked(lock: &str) -> BTreeMap<String, Vec<String>> {
    let mut packages: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        if let (Some(name), Some(version)) = (value(package, "name"), value(package, "version")) {
            packages.entry(name.to_owned()).or_default().push(version.to_owned());
        }
    }
    packages
}

/// The string that stands behind `key = ` at a line's beginning.
fn value<'a>(toml: &'a str, key: &str) -> Option<&'a str> {
    toml.lines().find_map(|line| {
        line.strip_prefix(key)?.trim_start().strip_prefix('=')?.trim().strip_prefix('"')?.split('"').next()
    })
}

/// The lines of a table, without comments.
fn table<'a>(toml: &'a str, name: &str) -> Vec<&'a str> {
    let header = format!("[{name}]");
    toml.lines()
        .skip_while(|line| line.trim() != header)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .collect()
}

/// Complains when npm-ebpf's package says something else than the workspace does.
pub(crate) fn packages(workspace: &str, ebpf: &str) -> Vec<String> {
    let workspace = table(workspace, "workspace.package").join("\n");
    let ebpf = table(ebpf, "package").join("\n");
    let mut complaints = Vec::new();
    for key in ["version", "edition", "rust-version", "license"] {
        let (here, there) = (value(&workspace, key), value(&ebpf, key));
        if here.is_none() || here != there {
            complaints.push(format!("{key} is {here:?} in the workspace and {there:?} in npm-ebpf"));
        }
    }
    complaints
}

/// Complains when the pinned toolchain is not of the version that the workspace asks for.
pub(crate) fn toolchain(workspace: &str, toolchain: &str) -> Vec<String> {
    match (value(workspace, "rust-version"), value(toolchain, "channel")) {
        (Some(least), Some(pinned)) if pinned == least || pinned.starts_with(&format!("{least}.")) => {
            Vec::new()
        }
        (least, pinned) => vec![format!("rust-version is {least:?}, rust-toolchain.toml pins {pinned:?}")],
    }
}

/// What the pure crates may depend on; development dependencies are free.
const PURE: &[(&str, &[&str])] = &[("npm-agent/policy", &["imbl", "ipnet", "sha2"]), ("npm-common", &[])];

/// Complains about dependencies that a pure crate may not have.
pub(crate) fn dependencies(package: &str, manifest: &str) -> Vec<String> {
    let Some((_, allowed)) = PURE.iter().find(|(name, _)| *name == package) else {
        return vec![format!("{package}: not known as a pure crate")];
    };
    let mut complaints = Vec::new();
    for line in table(manifest, "dependencies").into_iter().chain(table(manifest, "build-dependencies")) {
        let name = line.split(['.', '=', ' ']).next().unwrap_or(line);
        if !allowed.contains(&name) {
            complaints.push(format!("{package}: a pure crate does not depend on {name}"));
        }
    }
    complaints
}

/// Complains about a member that does not take the workspace's lints, or names a version of its own.
pub(crate) fn inherits(name: &str, manifest: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    if !table(manifest, "lints").contains(&"workspace = true") {
        complaints.push(format!("{name}: does not take the workspace's lints"));
    }
    for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
        for line in table(manifest, kind) {
            if !line.contains("workspace = true") && line.contains('=') {
                complaints.push(format!("{name}: versions stand in the top Cargo.toml: {line}"));
            }
        }
    }
    complaints
}

#[test]
fn something_new_at_the_top_is_seen() {
    let names = ["npm-agent", ".ci", "utils"].map(str::to_owned);
    assert_eq!(top_level(names.into_iter()).len(), 1);
}

#[test]
fn locks_that_do_not_belong_together_are_seen() {
    let lock = |packages: &[(&str, &str)]| -> String {
        packages
            .iter()
            .map(|(name, version)| format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n"))
            .collect()
    };
    let good = lock(&[("aya", AYA.0), ("aya-build", "1"), ("b", "2")]);
    assert!(locks(&good, &lock(&[("aya-ebpf", AYA.1), ("aya-build", "1"), ("b", "3")])).is_empty());
    assert_eq!(locks(&good, &lock(&[("aya-ebpf", AYA.1), ("aya-build", "2")])).len(), 1);
    assert_eq!(locks(&good, &lock(&[("aya-ebpf", "0.3.0")])).len(), 1);
    assert_eq!(locks(&lock(&[]), &lock(&[("aya-ebpf", AYA.1)])).len(), 1);
}

#[test]
fn workspaces_that_differ_are_seen() {
    let workspace = "[workspace.package]\nversion = \"1\"\nedition = \"2024\"\nrust-version = \"1.95\"\nlicense = \"MIT\"\n";
    let same = "[package]\nname = \"x\"\nversion = \"1\"\nedition = \"2024\"\nrust-version = \"1.95\"\nlicense = \"MIT\"\n";
    assert!(packages(workspace, same).is_empty());
    assert_eq!(packages(workspace, &same.replace("2024", "2021")).len(), 1);
    assert_eq!(packages(workspace, "[package]\n").len(), 4);
    assert!(toolchain(workspace, "[toolchain]\nchannel = \"1.95.0\"\n").is_empty());
    assert_eq!(toolchain(workspace, "[toolchain]\nchannel = \"1.96.0\"\n").len(), 1);
}

#[test]
fn an_impure_dependency_is_seen() {
    let manifest = "[dependencies]\nimbl.workspace = true\ntokio.workspace = true\n\n[dev-dependencies]\nproptest = \"1\"\n";
    assert_eq!(
        dependencies("npm-agent/policy", manifest),
        ["npm-agent/policy: a pure crate does not depend on tokio"]
    );
    assert_eq!(dependencies("npm-common", manifest).len(), 2);
    assert_eq!(dependencies("npm-agent", manifest).len(), 1);
}

#[test]
fn a_member_of_its_own_mind_is_seen() {
    let good = "[dependencies]\na.workspace = true\nb = { workspace = true, features = [\"c\"] }\n[lints]\nworkspace = true\n";
    assert!(inherits("x", good).is_empty());
    assert_eq!(inherits("x", &good.replace("a.workspace = true", "a = \"1\"")).len(), 1);
    assert_eq!(inherits("x", "[dependencies]\n").len(), 1);
}
