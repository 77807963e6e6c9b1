//! The programs of the committed object, loaded into this kernel to see what they cost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};
use nix::time::{ClockId, clock_gettime};
use npm_agent::backend::ebpf::btf::Offsets;
use npm_agent::backend::ebpf::choice::Drops;
use npm_agent::backend::ebpf::width::Width;
use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection, ObjectSymbol, RelocationTarget, SymbolKind};

/// What the kernel says of a program that it has loaded (`struct bpf_prog_info`, include/uapi/linux/bpf.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Instructions that the verifier walked, each as often as it came by.
    pub verified: u32,
    /// Instructions after the kernel has rewritten them.
    pub instructions: u32,
    /// What they were compiled to.
    pub machine_code_bytes: u32,
    /// Calls of the kernel's helpers and kfuncs in the program's text and in that of the functions that it calls, each
    /// text counted once: not how often a packet makes them.
    pub helper_calls: u32,
}

/// The objects, by the width of their rows, with this kernel's numbers written in.
fn bytes(width: Width, kernel: &Offsets) -> Vec<u8> {
    let mut object = width.object().to_vec();
    kernel.link(&mut object);
    object
}

/// The narrow object, nothing of it loaded yet but its maps.
///
/// # Errors
/// The kernel refuses a map, or does not say what the programs have to know of it.
pub fn object() -> Result<Ebpf> {
    object_of(Width::Narrow)
}

fn object_of(width: Width) -> Result<Ebpf> {
    object_that(width, Drops::Counted)
}

fn object_that(width: Width, drops: Drops) -> Result<Ebpf> {
    let kernel = Offsets::of_this_kernel().context("asking the kernel for its types")?;
    let tell = u32::from(drops == Drops::Told);
    let mut loader = EbpfLoader::new();
    kernel.tell(&mut loader);
    loader.override_global("TELL", &tell, true);
    loader.load(&bytes(width, &kernel)).context("loading the object")
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

/// Every program's cost, those of the wide object under `wide/`; those that tell of what they drop apart (`--log-denied flows`).
///
/// # Errors
/// The kernel refuses one, or does not say (before Linux 5.16 it has no count of verified instructions).
pub fn costs() -> Result<BTreeMap<String, Cost>> {
    let kernel = Offsets::of_this_kernel().context("asking the kernel for its types")?;
    let mut costs = BTreeMap::new();
    let all = Width::BOTH.map(|width| [(width, Drops::Counted), (width, Drops::Told)]);
    for (width, drops) in all.into_iter().flatten() {
        let mut ebpf = object_that(width, drops)?;
        let text = bytes(width, &kernel);
        let text = Text::of(&text)?;
        // The others tell of nothing.
        let tells = |name: &String| name.starts_with("enforce_") || name.starts_with("mark_");
        for name in names(&ebpf).into_iter().filter(|name| drops == Drops::Counted || tells(name)) {
            let program = program(&mut ebpf, &name)?;
            program.load().with_context(|| format!("loading {name}"))?;
            let said = program.info().with_context(|| format!("asking about {name}"))?;
            let cost = Cost {
                verified: said.verified_instruction_count().context("no count of verified instructions")?,
                // The kernel says bytes, of 8 an instruction.
                instructions: said.size_translated().context("no count of instructions")? / 8,
                machine_code_bytes: said.size_jitted(),
                helper_calls: text.helper_calls(&name)?,
            };
            let told = if drops == Drops::Told { ", telling" } else { "" };
            costs.insert(full_name(width, &name) + told, cost);
        }
    }
    Ok(costs)
}

fn full_name(width: Width, program: &str) -> String {
    match width {
        Width::Narrow => program.to_owned(),
        Width::Wide => format!("wide/{program}"),
    }
}

/// How much of this thread's CPU time each program takes to load, best of so many times: the verifier and the compiler
/// work in the call, and a busy machine does not count.
///
/// # Errors
/// The kernel refuses one.
pub fn load_times(times: u32) -> Result<BTreeMap<String, Duration>> {
    let mut best = BTreeMap::new();
    for _ in 0..times {
        for width in Width::BOTH {
            let mut ebpf = object_of(width)?;
            for name in names(&ebpf) {
                let program = program(&mut ebpf, &name)?;
                let began = cpu_time()?;
                program.load().with_context(|| format!("loading {name}"))?;
                let took = cpu_time()?.saturating_sub(began);
                let name = full_name(width, &name);
                best.entry(name).and_modify(|best: &mut Duration| *best = took.min(*best)).or_insert(took);
            }
        }
    }
    Ok(best)
}

fn cpu_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("asking for the time")?.into())
}

/// A function's place: its section's index and the offset in it.
type Place = (usize, u64);

/// The functions of an object, and what each calls.
struct Text {
    names: BTreeMap<String, Place>,
    functions: BTreeMap<Place, Function>,
}

#[derive(Default)]
struct Function {
    helper_calls: u32,
    callees: BTreeSet<Place>,
}

/// `BPF_JMP | BPF_CALL` (Documentation/bpf/standardization/instruction-set.rst).
const CALL: u8 = 0x85;
/// `BPF_PSEUDO_CALL`, in the source register: a call of a function of the object.
const OWN_FUNCTION: u8 = 1;

impl Text {
    fn of(object: &[u8]) -> Result<Self> {
        let file = ElfFile64::<Endianness>::parse(object).context("reading the object")?;
        let (mut names, mut functions) = (BTreeMap::new(), BTreeMap::new());
        for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
            let index = symbol.section_index().context("a function in no section")?;
            let section = file.section_by_index(index).context("a function's section")?;
            let mut relocations = BTreeMap::new();
            for (offset, relocation) in section.relocations() {
                if let RelocationTarget::Symbol(to) = relocation.target() {
                    let to = file.symbol_by_index(to).context("what a relocation is about")?;
                    relocations.insert(offset, (to.section_index(), to.address(), to.kind()));
                }
            }
            let data = section.data().context("a section's bytes")?;
            let mut function = Function::default();
            for offset in (symbol.address()..symbol.address() + symbol.size()).step_by(8) {
                let instruction = data.get(offset as usize..offset as usize + 8).context("a cut function")?;
                if instruction[0] != CALL {
                    continue;
                }
                if instruction[1] >> 4 != OWN_FUNCTION {
                    function.helper_calls += 1;
                    continue;
                }
                let relative =
                    i32::from_le_bytes([instruction[4], instruction[5], instruction[6], instruction[7]]);
                let from = |base: u64| base.wrapping_add_signed((i64::from(relative) + 1) * 8);
                let callee = match relocations.get(&offset) {
                    // A section's symbol stands for its start; a function's for itself.
                    Some((Some(section), _, SymbolKind::Section)) => (section.0, from(0)),
                    Some((Some(section), address, _)) => (section.0, *address),
                    Some((None, ..)) => bail!("a call of what is in no section"),
                    None => (index.0, from(offset)),
                };
                function.callees.insert(callee);
            }
            let place = (index.0, symbol.address());
            names.insert(symbol.name().context("a function's name")?.to_owned(), place);
            functions.insert(place, function);
        }
        Ok(Self { names, functions })
    }

    fn helper_calls(&self, program: &str) -> Result<u32> {
        let mut left = vec![*self.names.get(program).with_context(|| format!("no function {program}"))?];
        let (mut seen, mut calls) = (BTreeSet::new(), 0);
        while let Some(place) = left.pop() {
            if seen.insert(place) {
                let function =
                    self.functions.get(&place).with_context(|| format!("no function at {place:?}"))?;
                calls += function.helper_calls;
                left.extend(&function.callees);
            }
        }
        Ok(calls)
    }
}
