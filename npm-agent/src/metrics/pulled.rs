//! Values that are looked up when somebody asks: gauges and counters that live elsewhere.

use prometheus::core::{Collector, Desc};
use prometheus::proto;

use super::catalogue::{Declared, Kind};

/// A sample: the values of the declared labels in their order, and the number.
pub(crate) type Sample = (Vec<String>, f64);

/// A gauge or counter whose samples a function knows.
pub(crate) struct Pulled {
    declared: Declared,
    desc: Desc,
    read: Box<dyn Fn() -> Vec<Sample> + Send + Sync>,
}

impl Pulled {
    /// `read` is called at each scrape; no sample: the metric is left out.
    pub(crate) fn new(
        declared: Declared,
        read: impl Fn() -> Vec<Sample> + Send + Sync + 'static,
    ) -> Box<Self> {
        Box::new(Self { desc: declared.desc(), declared, read: Box::new(read) })
    }

    /// A single sample without labels.
    pub(crate) fn single(
        declared: Declared,
        read: impl Fn() -> Option<f64> + Send + Sync + 'static,
    ) -> Box<Self> {
        Self::new(declared, move || read().map(|value| (Vec::new(), value)).into_iter().collect())
    }
}

impl Collector for Pulled {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        vec![family(&self.declared, (self.read)())]
    }
}

/// A gauge or counter with these samples.
pub(crate) fn family(declared: &Declared, samples: Vec<Sample>) -> proto::MetricFamily {
    let metric = |(labels, value): Sample| {
        let mut metric = proto::Metric::from_label(pairs(declared.labels, labels));
        match declared.kind {
            Kind::Counter => {
                let mut counter = proto::Counter::default();
                counter.set_value(value);
                metric.set_counter(counter);
            }
            Kind::Gauge | Kind::Histogram | Kind::Summary => {
                let mut gauge = proto::Gauge::default();
                gauge.set_value(value);
                metric.set_gauge(gauge);
            }
        }
        metric
    };
    declared.family(samples.into_iter().map(metric).collect())
}

/// Label names with their values.
pub(crate) fn pairs(
    names: &[&str],
    values: impl IntoIterator<Item = impl Into<String>>,
) -> Vec<proto::LabelPair> {
    let pair = |(name, value): (&&str, _)| {
        let mut pair = proto::LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value(Into::into(value));
        pair
    };
    names.iter().zip(values).map(pair).collect()
}
