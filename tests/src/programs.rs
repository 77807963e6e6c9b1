//! The programs of the committed object, loaded into this kernel to see what they cost.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::programs::SchedClassifier;

/// What the kernel says of a program that it has loaded (`struct bpf_prog_info`, include/uapi/linux/bpf.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Instructions that the verifier walked, each as often as it came by.
    pub verified: u32,
    /// Instructions after the kernel has rewritten them.
    pub instructions: u32,
    /// What they were compiled to.
    pub machine_code_bytes: u32,
}

/// The object, nothing of it loaded yet but its maps.
///
/// # Errors
/// It is not there, or the kernel refuses a map.
pub fn object() -> Result<Ebpf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../npm-ebpf/npm-ebpf.o");
    Ebpf::load_file(&path).with_context(|| format!("loading {}", path.display()))
}

/// A program of the object.
///
/// # Errors
/// There is none of this name for TC.
pub fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf.program_mut(name).with_context(|| format!("finding the program {name}"))?;
    program.try_into().with_context(|| format!("taking {name} as a TC program"))
}

/// The names of the object's programs.
pub fn names(ebpf: &Ebpf) -> Vec<String> {
    ebpf.programs().map(|(name, _)| name.to_owned()).collect()
}

/// Every program's cost.
///
/// # Errors
/// The kernel refuses one, or does not say (before Linux 5.16 it has no count of verified instructions).
pub fn costs() -> Result<BTreeMap<String, Cost>> {
    let mut ebpf = object()?;
    names(&ebpf)
        .into_iter()
        .map(|name| {
            let program = program(&mut ebpf, &name)?;
            program.load().with_context(|| format!("loading {name}"))?;
            let said = program.info().with_context(|| format!("asking about {name}"))?;
            let cost = Cost {
                verified: said.verified_instruction_count().context("no count of verified instructions")?,
                // The kernel says bytes, of 8 an instruction.
                instructions: said.size_translated().context("no count of instructions")? / 8,
                machine_code_bytes: said.size_jitted(),
            };
            Ok((name, cost))
        })
        .collect()
}

/// How long each program takes to load: the best of so many times.
///
/// # Errors
/// The kernel refuses one.
pub fn load_times(times: u32) -> Result<BTreeMap<String, Duration>> {
    let mut best = BTreeMap::new();
    for _ in 0..times {
        let mut ebpf = object()?;
        for name in names(&ebpf) {
            let program = program(&mut ebpf, &name)?;
            let began = Instant::now();
            program.load().with_context(|| format!("loading {name}"))?;
            let took = began.elapsed();
            best.entry(name).and_modify(|best: &mut Duration| *best = took.min(*best)).or_insert(took);
        }
    }
    Ok(best)
}
