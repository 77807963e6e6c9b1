//! Prometheus summaries: quantiles over ten minutes, and the sum and count since the start.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto;

use super::catalogue::Declared;
use super::pulled::pairs;
use super::window::Window;

/// The quantiles that are told.
pub(crate) const QUANTILES: [f64; 3] = [0.5, 0.9, 0.99];

/// A summary in milliseconds, one series for each combination of label values that was observed. None exists before:
/// Azure NPM's alert takes the mere presence of `had_error="true"` for a failure.
#[derive(Clone)]
pub(crate) struct Summary {
    declared: Declared,
    desc: Desc,
    series: Arc<Mutex<BTreeMap<Vec<&'static str>, Series>>>,
}

struct Series {
    window: Window,
    sum: f64,
    count: u64,
}

impl Summary {
    /// A summary without a series.
    pub(crate) fn new(declared: Declared) -> Self {
        Self { desc: declared.desc(), declared, series: Arc::default() }
    }

    /// Takes in how long something took. `labels` are the values of the declared labels, in their order.
    pub(crate) fn observe(&self, now: Instant, labels: &[&'static str], took: Duration) {
        debug_assert_eq!(labels.len(), self.declared.labels.len(), "{}", self.declared.name);
        let milliseconds = took.as_secs_f64() * 1000.0;
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || Series { window: Window::new(now), sum: 0.0, count: 0 };
        let one = series.entry(labels.to_vec()).or_insert_with(fresh);
        one.window.observe(now, milliseconds);
        one.sum += milliseconds;
        one.count += 1;
    }

    fn metric(&self, labels: &[&'static str], series: &mut Series, now: Instant) -> proto::Metric {
        let values = series.window.quantiles(now, QUANTILES);
        let quantiles = QUANTILES.iter().zip(values).map(|(rank, value)| {
            let mut quantile = proto::Quantile::default();
            quantile.set_quantile(*rank);
            quantile.set_value(value);
            quantile
        });
        let mut summary = proto::Summary::default();
        summary.set_quantile(quantiles.collect());
        summary.set_sample_sum(series.sum);
        summary.set_sample_count(series.count);
        let mut metric = proto::Metric::from_label(pairs(self.declared.labels, labels.iter().copied()));
        metric.set_summary(summary);
        metric
    }
}

impl Collector for Summary {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        let now = Instant::now();
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = series.iter_mut().map(|(labels, series)| self.metric(labels, series, now)).collect();
        vec![self.declared.family(metrics)]
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{Registry, TextEncoder};

    use super::super::catalogue::ADD_POLICY;
    use super::*;

    #[test]
    fn a_summary_as_text() {
        let registry = Registry::new();
        let summary = Summary::new(ADD_POLICY);
        registry.register(Box::new(summary.clone())).unwrap();
        assert_eq!(registry.gather().len(), 0, "no series before the first observation");
        for milliseconds in [3, 1, 2] {
            summary.observe(Instant::now(), &["iptables", "false"], Duration::from_millis(milliseconds));
        }
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("# HELP")).collect();
        assert_eq!(
            lines,
            [
                "# TYPE npm_add_policy_exec_time summary",
                "npm_add_policy_exec_time{backend=\"iptables\",had_error=\"false\",quantile=\"0.5\"} 2",
                "npm_add_policy_exec_time{backend=\"iptables\",had_error=\"false\",quantile=\"0.9\"} 3",
                "npm_add_policy_exec_time{backend=\"iptables\",had_error=\"false\",quantile=\"0.99\"} 3",
                "npm_add_policy_exec_time_sum{backend=\"iptables\",had_error=\"false\"} 6",
                "npm_add_policy_exec_time_count{backend=\"iptables\",had_error=\"false\"} 3",
            ]
        );
    }
}
