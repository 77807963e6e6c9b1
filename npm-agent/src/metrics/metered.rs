//! What backends count by themselves, asked at each scrape: once for all metrics that it makes.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto;

use super::catalogue::{self, Declared};
use super::pulled::{Sample, family};
use crate::backend::meter::{Meter, Reading, Timekeeping};

const FAMILIES: [Declared; 9] = [
    catalogue::VERDICTS,
    catalogue::PASSES,
    catalogue::DROPS,
    catalogue::UNLOGGED,
    catalogue::PROGRAM_RUNS,
    catalogue::PROGRAM_SECONDS,
    catalogue::PROGRAM_STATISTICS,
    catalogue::STORE_ENTRIES,
    catalogue::STORE_LIMIT,
];

/// The meters of all backends, by the backends' names.
#[derive(Clone)]
pub(super) struct Metered {
    descs: Arc<[Desc]>,
    meters: Arc<Mutex<Vec<(&'static str, Meter)>>>,
}

impl Metered {
    pub(super) fn new() -> Self {
        Self { descs: FAMILIES.iter().map(Declared::desc).collect(), meters: Arc::default() }
    }

    /// From here on this backend's meter is read; one that it had before is not.
    pub(super) fn set(&self, backend: &'static str, meter: Meter) {
        let mut meters = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        meters.retain(|(name, _)| *name != backend);
        meters.push((backend, meter));
    }
}

impl Collector for Metered {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        let [mut verdicts, mut passes, mut drops, mut untold] = [(); 4].map(|()| Vec::new());
        let [mut runs, mut seconds, mut statistics, mut entries, mut limits] = [(); 5].map(|()| Vec::new());
        for (backend, meter) in self.meters.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let Reading {
                passes: passed,
                drops: dropped,
                verdicts: judged,
                unlogged,
                timed,
                timekeeping,
                stores,
            } = meter();
            let number = |labels: &[&str], value: f64| -> Sample {
                (std::iter::once(backend).chain(labels).map(ToString::to_string).collect(), value)
            };
            let sample = |labels: &[&str], value: u64| number(labels, value as f64);
            passes.extend(passed.iter().map(|(why, count)| sample(&[why], *count)));
            untold.extend(unlogged.iter().map(|(why, count)| sample(&[why], *count)));
            drops.extend(dropped.iter().map(|(why, count)| sample(&[why], *count)));
            verdicts.extend(
                judged.iter().map(|(direction, it, count)| sample(&[direction.name(), it.name()], *count)),
            );
            runs.extend(timed.iter().map(|timed| sample(&[&timed.program], timed.runs)));
            seconds.extend(timed.iter().map(|timed| number(&[&timed.program], timed.took.as_secs_f64())));
            statistics.extend(timekeeping.map(|timekeeping| match timekeeping {
                Timekeeping::Off => sample(&[], 0),
                Timekeeping::On => sample(&[], 1),
            }));
            entries.extend(stores.iter().map(|store| sample(&[store.name], store.used)));
            limits.extend(stores.iter().map(|store| sample(&[store.name], store.limit)));
        }
        let samples = [verdicts, passes, drops, untold, runs, seconds, statistics, entries, limits];
        FAMILIES.iter().zip(samples).map(|(declared, samples)| family(declared, samples)).collect()
    }
}
