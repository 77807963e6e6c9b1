//! The enforcing program: chosen, told where the kernel keeps things, loaded with the instance's maps.

use std::collections::BTreeMap;

use aya::maps::{Array, PerCpuArray};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use npm_common::event::{Mode, Outcome};

use super::btf::Offsets;
use super::choice::{Choice, Reading};
use super::kernel::{KernelError, OBJECT, VERDICT, permitted};
use super::maps::Maps;
use super::pins::Pins;

/// The maps that outlive the process: whoever comes next goes on with them.
const PINNED: [&str; 15] = [
    "ENDPOINTS_V4",
    "ENDPOINTS_V6",
    "MEMBERS_V4",
    "MEMBERS_V6",
    "NETWORKS_V4",
    "NETWORKS_V6",
    "PAIRS_V4",
    "PAIRS_V6",
    "POLICIES",
    "SEGMENTS",
    "ROWS",
    "PROOFS",
    "DENIED",
    "OUTCOME",
    "MODE",
];

/// The programs, loaded.
pub(super) struct Datapath {
    ebpf: Ebpf,
    reading: Reading,
}

impl Datapath {
    /// Loads the programs with the maps that are pinned, or makes and pins them. Nothing is attached.
    ///
    /// # Errors
    /// The process may not, or the kernel lacks what the programs need. Maps may have been pinned.
    pub(super) fn load(choice: Choice, pins: &Pins) -> Result<Self, KernelError> {
        let offsets = Offsets::of_this_kernel()?;
        let reading = choice.reading.unwrap_or(Reading::Probe);
        pins.make()?;
        let paths: Vec<_> = PINNED.iter().map(|name| (*name, pins.map(name))).collect();
        let mut loader = EbpfLoader::new();
        loader
            .override_global("NFCT_OFFSET", &offsets.nfct, true)
            .override_global("ORIGINAL_OFFSET", &offsets.original, true)
            .override_global("REPLY_OFFSET", &offsets.reply, true);
        for (name, path) in &paths {
            loader.map_pin_path(name, path.as_path());
        }
        let mut ebpf = loader.load(OBJECT).map_err(|error| permitted(error, KernelError::Object))?;
        for name in [entry(reading), VERDICT] {
            program(&mut ebpf, name)?.load().map_err(|error| permitted(error, KernelError::Program))?;
        }
        Ok(Self { ebpf, reading })
    }

    /// How it reads the kernel's connections.
    pub(super) fn reading(&self) -> Reading {
        self.reading
    }

    /// The program to attach.
    pub(super) fn program(&mut self) -> Result<&mut SchedClassifier, KernelError> {
        program(&mut self.ebpf, entry(self.reading))
    }

    /// All programs and maps.
    pub(super) fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    /// The classification's maps. They can be taken once.
    pub(super) fn take_maps(&mut self) -> Result<Maps, KernelError> {
        Maps::take(&mut self.ebpf)
    }

    /// Whether denied packets are dropped.
    pub(super) fn mode(&self) -> Result<Mode, KernelError> {
        const NAME: &str = "MODE";
        let failed = |source| KernelError::Map { name: NAME, source };
        let map = self.ebpf.map(NAME).ok_or(KernelError::Missing { name: NAME })?;
        let map = Array::<_, u32>::try_from(map).map_err(failed)?;
        map.get(&0, 0).map(Mode::of).map_err(failed)
    }

    /// Changes whether denied packets are dropped, from the next packet on.
    pub(super) fn set_mode(&mut self, mode: Mode) -> Result<(), KernelError> {
        const NAME: &str = "MODE";
        let failed = |source| KernelError::Map { name: NAME, source };
        let map = self.ebpf.map_mut(NAME).ok_or(KernelError::Missing { name: NAME })?;
        let mut map = Array::<_, u32>::try_from(map).map_err(failed)?;
        map.set(0, mode.number(), 0).map_err(failed)
    }

    /// Packets by what became of them, over all CPUs.
    pub(super) fn outcomes(&self) -> Result<BTreeMap<Outcome, u64>, KernelError> {
        const NAME: &str = "OUTCOME";
        let failed = |source| KernelError::Map { name: NAME, source };
        let map = self.ebpf.map(NAME).ok_or(KernelError::Missing { name: NAME })?;
        let map = PerCpuArray::<_, u64>::try_from(map).map_err(failed)?;
        let count =
            |outcome: Outcome| Ok((outcome, map.get(&outcome.slot(), 0).map_err(failed)?.iter().sum()));
        Outcome::ALL.into_iter().map(count).collect()
    }
}

/// The name of the program in the object.
pub(super) fn entry(reading: Reading) -> &'static str {
    match reading {
        Reading::Probe => "enforce_probe",
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, KernelError> {
    let program = ebpf.program_mut(name).ok_or(KernelError::Missing { name })?;
    program.try_into().map_err(|source: ProgramError| KernelError::Program(source))
}
