//! What backends count by themselves, asked at each scrape: once for all metrics that it makes.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto;

use super::catalogue::{self, Declared};
use super::pulled::{Sample, family};
use crate::backend::meter::{Meter, Reading};

const FAMILIES: [Declared; 6] = [
    catalogue::VERDICTS,
    catalogue::PASSES,
    catalogue::DROPS,
    catalogue::UNLOGGED,
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
        let [mut verdicts, mut passes, mut drops, mut untold, mut entries, mut limits] =
            [(); 6].map(|()| Vec::new());
        for (backend, meter) in self.meters.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let Reading { passes: passed, drops: dropped, verdicts: judged, unlogged, stores } = meter();
            let sample = |labels: &[&str], value: u64| -> Sample {
                let labels = std::iter::once(backend).chain(labels).map(ToString::to_string);
                (labels.collect(), value as f64)
            };
            passes.extend(passed.iter().map(|(why, count)| sample(&[why], *count)));
            untold.extend(unlogged.iter().map(|(why, count)| sample(&[why], *count)));
            drops.extend(dropped.iter().map(|(why, count)| sample(&[why], *count)));
            verdicts.extend(
                judged.iter().map(|(direction, it, count)| sample(&[direction.name(), it.name()], *count)),
            );
            entries.extend(stores.iter().map(|store| sample(&[store.name], store.used)));
            limits.extend(stores.iter().map(|store| sample(&[store.name], store.limit)));
        }
        let samples = [verdicts, passes, drops, untold, entries, limits];
        FAMILIES.iter().zip(samples).map(|(declared, samples)| family(declared, samples)).collect()
    }
}
