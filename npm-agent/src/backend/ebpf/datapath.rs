//! The enforcing program: chosen, told where the kernel keeps things, loaded with the instance's maps.

use std::collections::BTreeMap;
use std::path::Path;

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use npm_common::event::{Mode, Outcome};
use npm_common::layout::MAX_PROOFS;
use npm_common::mark::ProofBit;

use super::any_maps::AnyMaps;
use super::btf::Offsets;
use super::choice::{Choice, Drops, Proofs, Reading};
use super::denials::EVENTS;
use super::kernel::{KernelError, VERDICT, permitted};
use super::maps::{MapsError, NAMES};
use super::pins::Pins;
use super::width::Width;

/// The maps that programs of every width share: what is known of connections, what packets came to, and the mode.
const SHARED: [&str; 4] = [PROOFS, "DENIED", "OUTCOME", "MODE"];

/// What every program knows of connections that were allowed.
pub(super) const PROOFS: &str = "PROOFS";
/// What serves programs that keep proofs in maps; it goes with them.
pub(super) const RECENT: &str = "RECENT";

/// Proofs that have room in the map where most are in the connections' marks. The least that the kernel takes for a map of
/// this kind, whatever the number of CPUs.
pub(super) const LEAST_PROOFS: u32 = 4096;

/// What decides which programs are loaded, and how.
#[derive(Clone, Debug)]
pub(super) struct Settings<'a> {
    /// What is forced.
    pub(super) choice: Choice,
    /// Where the maps that all widths share are.
    pub(super) pins: &'a Pins,
    /// The bit of connections' marks that is the proof.
    pub(super) proof: ProofBit,
}

/// Where aya-log puts what programs tell as text.
pub(super) const TEXT: &str = "AYA_LOGS";

/// Bytes of a ring buffer that nothing is written to: as few as the kernel takes.
const LEAST_RING: u32 = 4096;

/// The programs, loaded.
pub(super) struct Datapath {
    ebpf: Ebpf,
    reading: Reading,
    proofs: Proofs,
    width: Width,
}

impl Datapath {
    /// Loads the programs of a width with the maps that are pinned, those of the width in a directory of their own, or makes
    /// and pins them. Nothing is attached.
    ///
    /// # Errors
    /// The process may not, or the kernel lacks what the programs need. Maps may have been pinned.
    pub(super) fn load(settings: &Settings<'_>, width: Width, directory: &Path) -> Result<Self, KernelError> {
        let offsets = Offsets::of_this_kernel()?;
        match (settings.choice.proofs, offsets.writes) {
            (Some(proofs @ Proofs::Maps), _) => Self::load_with(settings, &offsets, proofs, width, directory),
            (None, None) => Self::load_with(settings, &offsets, Proofs::Maps, width, directory),
            (Some(Proofs::Kfuncs), None) => Err(KernelError::NoWrites),
            (Some(proofs @ Proofs::Kfuncs), Some(_)) => {
                Self::load_with(settings, &offsets, proofs, width, directory)
            }
            (None, Some(_)) => {
                let marking = Self::load_with(settings, &offsets, Proofs::Kfuncs, width, directory);
                // Its types do not say whether a kernel lets a mark be written (it does from 6.1 on): the verifier does.
                if let Err(KernelError::Program(error)) = &marking {
                    tracing::debug!(%error, "the kernel does not let programs write to connections");
                    return Self::load_with(settings, &offsets, Proofs::Maps, width, directory);
                }
                marking
            }
        }
    }

    fn load_with(
        Settings { choice, pins, proof }: &Settings<'_>,
        offsets: &Offsets,
        proofs: Proofs,
        width: Width,
        directory: &Path,
    ) -> Result<Self, KernelError> {
        let reading = match (choice.reading, offsets.casts) {
            (Some(Reading::Probe), _) | (None, None) => Reading::Probe,
            (Some(Reading::Cast) | None, Some(_)) => Reading::Cast,
            (Some(Reading::Cast), None) => return Err(KernelError::NoCasts),
        };
        let mut object = width.object().to_vec();
        offsets.link(&mut object);
        let shared = SHARED.iter().map(|name| (*name, pins.map(name)));
        let paths: Vec<_> = shared.chain(NAMES.iter().map(|name| (*name, directory.join(name)))).collect();
        let mut loader = EbpfLoader::new();
        offsets.tell(&mut loader);
        let bit = proof.mask();
        loader.override_global("PROOF_BIT", &bit, true);
        if proofs == Proofs::Kfuncs {
            loader.map_max_entries(PROOFS, LEAST_PROOFS);
            loader.map_max_entries(RECENT, 1);
        }
        let told = u32::from(choice.drops == Drops::Told);
        loader.override_global("TELL", &told, true);
        if choice.drops == Drops::Counted {
            loader.map_max_entries(EVENTS, LEAST_RING);
        }
        // For `trace` alone.
        loader.map_max_entries(TEXT, LEAST_RING);
        let small = match proofs {
            Proofs::Maps => small_proofs(pins).map_err(KernelError::Maps)?,
            Proofs::Kfuncs => None,
        };
        for (name, path) in &paths {
            loader.map_pin_path(name, path.as_path());
        }
        let mut ebpf = loader.load(&object).map_err(|error| permitted(error, KernelError::Object))?;
        for name in [entry(reading, proofs), VERDICT] {
            program(&mut ebpf, name)?.load().map_err(|error| permitted(error, KernelError::Program))?;
        }
        if let Some(small) = small {
            copy_proofs(small, &mut ebpf).map_err(KernelError::Maps)?;
        }
        Ok(Self { ebpf, reading, proofs, width })
    }

    /// Pins the enforcing program in the place of the one that is pinned.
    ///
    /// # Errors
    /// It can't be pinned; the other is there still.
    pub(super) fn publish(&mut self, pins: &Pins) -> Result<(), KernelError> {
        Ok(pins.replace_program(program(&mut self.ebpf, entry(self.reading, self.proofs))?)?)
    }

    /// How it reads the kernel's connections.
    pub(super) fn reading(&self) -> Reading {
        self.reading
    }

    /// Where proofs are.
    pub(super) fn proofs(&self) -> Proofs {
        self.proofs
    }

    /// All programs and maps.
    pub(super) fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    /// The same, to take maps out.
    pub(super) fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// The classification's maps. They can be taken once.
    pub(super) fn take_maps(&mut self) -> Result<AnyMaps, KernelError> {
        Ok(AnyMaps::take(self.width, &mut self.ebpf)?)
    }

    /// Whether denied packets are dropped.
    pub(super) fn mode(&self) -> Result<Mode, KernelError> {
        const NAME: &str = "MODE";
        let failed = |source| KernelError::Maps(MapsError::Map { name: NAME, source });
        let map = self.ebpf.map(NAME).ok_or(KernelError::Missing { name: NAME })?;
        let map = Array::<_, u32>::try_from(map).map_err(failed)?;
        map.get(&0, 0).map(Mode::of).map_err(failed)
    }

    /// Changes whether denied packets are dropped, from the next packet on.
    pub(super) fn set_mode(&mut self, mode: Mode) -> Result<(), KernelError> {
        const NAME: &str = "MODE";
        let failed = |source| KernelError::Maps(MapsError::Map { name: NAME, source });
        let map = self.ebpf.map_mut(NAME).ok_or(KernelError::Missing { name: NAME })?;
        let mut map = Array::<_, u32>::try_from(map).map_err(failed)?;
        map.set(0, mode.number(), 0).map_err(failed)
    }

    /// Packets by what became of them, over all CPUs.
    pub(super) fn outcomes(&self) -> Result<BTreeMap<Outcome, u64>, KernelError> {
        const NAME: &str = "OUTCOME";
        let failed = |source| KernelError::Maps(MapsError::Map { name: NAME, source });
        let map = self.ebpf.map(NAME).ok_or(KernelError::Missing { name: NAME })?;
        let map = PerCpuArray::<_, u64>::try_from(map).map_err(failed)?;
        let count =
            |outcome: Outcome| Ok((outcome, map.get(&outcome.slot(), 0).map_err(failed)?.iter().sum()));
        Outcome::ALL.into_iter().map(count).collect()
    }
}

/// The map of proofs that is pinned, if programs that mark have made it: it is too small for those that do not, and the
/// loader would take it as it is. It is not pinned any more then.
fn small_proofs(pins: &Pins) -> Result<Option<MapData>, MapsError> {
    let failed = |source| MapsError::Map { name: PROOFS, source };
    let path = pins.map(PROOFS);
    if !path.exists() {
        return Ok(None);
    }
    let map = MapData::from_pin(&path).map_err(failed)?;
    if map.info().map_err(failed)?.max_entries() >= MAX_PROOFS {
        return Ok(None);
    }
    std::fs::remove_file(&path).map_err(|error| failed(MapError::IoError(error)))?;
    Ok(Some(map))
}

/// Tells the programs' map of proofs what another holds.
fn copy_proofs(from: MapData, to: &mut Ebpf) -> Result<(), MapsError> {
    let failed = |source| MapsError::Map { name: PROOFS, source };
    let from = Map::from_map_data(from).and_then(HashMap::<_, [u64; 5], u64>::try_from).map_err(failed)?;
    let to = to.map_mut(PROOFS).ok_or(MapsError::Missing { name: PROOFS })?;
    let mut to = HashMap::<_, [u64; 5], u64>::try_from(to).map_err(failed)?;
    for entry in from.iter() {
        match entry {
            Ok((tuple, proof)) => to.insert(tuple, proof, 0).map_err(failed)?,
            // Programs write to it still.
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

/// The names of all enforcing programs that there are and were.
pub(super) const ENTRIES: [&str; 4] = ["enforce_probe", "enforce_cast", "mark_probe", "mark_cast"];

/// The name of the program in the object.
pub(super) fn entry(reading: Reading, proofs: Proofs) -> &'static str {
    match (reading, proofs) {
        (Reading::Cast, Proofs::Maps) => "enforce_cast",
        (Reading::Probe, Proofs::Maps) => "enforce_probe",
        (Reading::Cast, Proofs::Kfuncs) => "mark_cast",
        (Reading::Probe, Proofs::Kfuncs) => "mark_probe",
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, KernelError> {
    let program = ebpf.program_mut(name).ok_or(KernelError::Missing { name })?;
    program.try_into().map_err(|source: ProgramError| KernelError::Program(source))
}
