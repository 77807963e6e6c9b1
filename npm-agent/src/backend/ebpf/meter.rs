//! What the programs count, what the kernel counts of them, and how full their maps are.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{Map, MapData, PerCpuArray};
use aya::programs::ProgramInfo;
use npm_common::event::Outcome;

use super::denials::Unlogged;
use super::kernel::KernelError;
use super::maps::MapsError;
use super::pins::Pins;
use crate::backend::meter::{Direction, Judged, Meter, Reading, Store, Timed, Timekeeping};

/// The map of counts.
const OUTCOME: &str = "OUTCOME";

/// 1 while whoever runs the node has programs timed (Documentation/admin-guide/sysctl/kernel.rst), and 0 otherwise, also while
/// only a descriptor of BPF_ENABLE_STATS does (kernel/bpf/syscall.c, bpf_stats_handler).
const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// How full the maps are, as last looked at: the backend writes it, scrapes read it.
#[derive(Clone, Debug, Default)]
pub(super) struct Fill(Arc<Mutex<Vec<Store>>>);

impl Fill {
    pub(super) fn replace(&self, stores: Vec<Store>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stores;
    }

    fn stores(&self) -> Vec<Store> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A meter of the programs that are pinned here: of whatever width, they share the counts.
///
/// # Errors
/// The map is missing.
pub(super) fn meter(pins: &Pins, fill: Fill, unlogged: Unlogged) -> Result<Meter, KernelError> {
    let failed = |source| MapsError::Map { name: OUTCOME, source };
    let map = MapData::from_pin(pins.map(OUTCOME)).and_then(Map::from_map_data).map_err(failed)?;
    let counts = PerCpuArray::<_, u64>::try_from(map).map_err(failed)?;
    let program = pins.program();
    Ok(Box::new(move || {
        let count = |outcome: Outcome| match counts.get(&outcome.slot(), 0) {
            Ok(values) => Some((outcome, values.iter().sum())),
            Err(error) => {
                tracing::debug!(%error, outcome = outcome.name(), "the kernel does not give a count");
                None
            }
        };
        let counts: Vec<(Outcome, u64)> = Outcome::ALL.into_iter().filter_map(count).collect();
        Reading {
            stores: fill.stores(),
            unlogged: unlogged.counts(),
            timed: timed(&program).into_iter().collect(),
            timekeeping: timekeeping(),
            ..of(&counts)
        }
    }))
}

/// What the kernel has timed of the program that is pinned at this moment: another takes its place when rows widen.
fn timed(program: &Path) -> Option<Timed> {
    let told = ProgramInfo::from_pin(program)
        .inspect_err(|error| tracing::debug!(%error, "the kernel does not tell of the eBPF program"));
    let told = told.ok()?;
    let name = told.name_as_str()?.to_owned();
    Some(Timed { program: name, runs: told.run_count(), took: told.run_time() })
}

fn timekeeping() -> Option<Timekeeping> {
    match std::fs::read_to_string(STATISTICS).ok()?.trim() {
        "0" => Some(Timekeeping::Off),
        "1" => Some(Timekeeping::On),
        _ => None,
    }
}

/// What the counts say.
fn of(counts: &[(Outcome, u64)]) -> Reading {
    let named = |passes: bool| {
        let those = counts.iter().filter(|(outcome, _)| outcome.passes() == passes);
        those.map(|(outcome, count)| (outcome.name(), *count)).collect()
    };
    let sum = |among: &[Outcome]| {
        counts.iter().filter(|(outcome, _)| among.contains(outcome)).map(|(_, count)| count).sum()
    };
    let verdicts = [
        (Direction::Ingress, Judged::Denied, [Outcome::Ingress, Outcome::Both]),
        (Direction::Egress, Judged::Denied, [Outcome::Egress, Outcome::Both]),
        (Direction::Ingress, Judged::Allowed, [Outcome::IngressAllowed, Outcome::BothAllowed]),
        (Direction::Egress, Judged::Allowed, [Outcome::EgressAllowed, Outcome::BothAllowed]),
    ];
    let verdicts = verdicts.map(|(direction, judged, among)| (direction, judged, sum(&among)));
    Reading { passes: named(true), drops: named(false), verdicts: verdicts.into(), ..Reading::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_is_told_once_and_directions_add_up() {
        let counts: Vec<(Outcome, u64)> =
            Outcome::ALL.into_iter().map(|outcome| (outcome, 1 << outcome.slot())).collect();
        let reading = of(&counts);
        let told = reading.passes.iter().chain(&reading.drops);
        assert_eq!(told.map(|(_, count)| count).sum::<u64>(), (1 << Outcome::ALL.len()) - 1);
        assert!(reading.drops.contains(&("ingress_denied", 1 << Outcome::Ingress.slot())));
        assert!(reading.passes.contains(&("established", 1 << Outcome::Proven.slot())));
        let both = |one: Outcome, both: Outcome| (1 << one.slot()) + (1 << both.slot());
        assert_eq!(
            reading.verdicts,
            [
                (Direction::Ingress, Judged::Denied, both(Outcome::Ingress, Outcome::Both)),
                (Direction::Egress, Judged::Denied, both(Outcome::Egress, Outcome::Both)),
                (Direction::Ingress, Judged::Allowed, both(Outcome::IngressAllowed, Outcome::BothAllowed)),
                (Direction::Egress, Judged::Allowed, both(Outcome::EgressAllowed, Outcome::BothAllowed)),
            ]
        );
    }
}
