//! What the programs cost: instructions that the verifier walks, instructions, bytes of machine code. Counts, and no
//! times: these depend on the machine.
//!
//! `UPDATE=1` records the counts in `tests/ebpf-cost.txt`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use npm_tests::programs::{Cost, costs};

/// What the verifier may walk for one program. It takes a million (BPF_COMPLEXITY_LIMIT_INSNS); 54,000 took 120 ms to
/// load, and programs are loaded while the node has no policy.
const MOST_VERIFIED: u32 = 30_000;

/// How much more than recorded is growth, in percent. Kernels differ: in how they prune, in what they inline.
const SLACK_PERCENT: u32 = 10;

/// Whether this test can run; under CI it must.
fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: eBPF programs are loaded by root only");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "a skipped test is a failure in CI");
    }
    root
}

const HEAD: &str = "\
# Written by UPDATE=1 cargo test -p npm-tests --test ebpf_cost, as root.
# program: instructions verified, instructions loaded, bytes of machine code
";

fn text(costs: &BTreeMap<String, Cost>) -> String {
    let lines = costs.iter().map(|(name, Cost { verified, instructions, machine_code_bytes })| {
        format!("{name}: {verified}, {instructions}, {machine_code_bytes}\n")
    });
    HEAD.to_owned() + &lines.collect::<String>()
}

fn recorded(path: &Path) -> Result<BTreeMap<String, Cost>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, numbers) = line.split_once(": ").with_context(|| format!("no name in {line}"))?;
            let numbers: Vec<u32> = numbers
                .split(", ")
                .map(str::parse)
                .collect::<Result<_, _>>()
                .with_context(|| line.to_owned())?;
            let [verified, instructions, machine_code_bytes] = numbers[..] else {
                anyhow::bail!("no three numbers in {line}")
            };
            Ok((name.to_owned(), Cost { verified, instructions, machine_code_bytes }))
        })
        .collect()
}

#[test]
fn no_program_grows_unseen() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let costs = costs()?;
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("ebpf-cost.txt");
    print!("{}", text(&costs));
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, text(&costs)).context("recording")?;
    }
    let recorded = recorded(&path)?;
    let again = "if it is worth it, record it: UPDATE=1 cargo test -p npm-tests --test ebpf_cost";
    ensure!(recorded.keys().eq(costs.keys()), "other programs than recorded: {again}");
    for (name, cost) in &costs {
        let before = &recorded[name];
        for (what, is, was) in [
            ("instructions verified", cost.verified, before.verified),
            ("instructions", cost.instructions, before.instructions),
            ("bytes of machine code", cost.machine_code_bytes, before.machine_code_bytes),
        ] {
            ensure!(
                u64::from(is) * 100 <= u64::from(was) * u64::from(100 + SLACK_PERCENT),
                "{name}: {is} {what}, recorded {was}: {again}"
            );
        }
        ensure!(cost.verified <= MOST_VERIFIED, "{name}: {} instructions verified", cost.verified);
    }
    Ok(())
}
