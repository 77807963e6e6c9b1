//! Quantiles of what was observed in the last ten minutes: a ring of sketches, one for each half minute.
//!
//! The sketch is KLL (Karnin, Lang, Liberty 2016) as Apache DataSketches has it: its answers are values that were
//! observed, their error is a bound on the rank that holds for every distribution and survives merging, and up to a
//! thousand observations it is exact. (T-digests interpolate: of two clusters they name a median that nobody observed.
//! DDSketch and HDR histograms bound the error of the value and say nothing of the rank.)

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use datasketches::common::SearchCriteria;
use datasketches::kll::{KllFloat, KllSketch};

/// How far back the quantiles look, at most; as Azure NPM's summaries do.
pub(super) const MAX_AGE: Duration = Duration::from_secs(600);

/// How many sketches cover [`MAX_AGE`]: the oldest is dropped as a whole, so they cover between 19 and 20 twentieths.
const SLICES: u32 = 20;

/// KLL's parameter: a rank is off by less than 0.3 % with 99 % confidence.
const K: u16 = 1000;

type Sketch = KllSketch<KllFloat<f64>>;

/// Observations of the last ten minutes.
#[derive(Debug)]
pub(super) struct Window {
    /// When the slice of number 0 began.
    start: Instant,
    /// Slices that have observations, by number, oldest first.
    slices: VecDeque<(u64, Sketch)>,
}

impl Window {
    /// Nothing observed.
    pub(super) fn new(start: Instant) -> Self {
        Self { start, slices: VecDeque::new() }
    }

    /// Takes in a value. One that is not a number is left out.
    pub(super) fn observe(&mut self, now: Instant, value: f64) {
        let Ok(value) = KllFloat::<f64>::new(value) else { return };
        let number = self.expire(now);
        if self.slices.back().is_none_or(|(newest, _)| *newest != number) {
            self.slices.push_back((number, sketch()));
        }
        if let Some((_, sketch)) = self.slices.back_mut() {
            sketch.update(value);
        }
    }

    /// The values below which these shares of the observations lie; NaN where there is no observation.
    pub(super) fn quantiles<const N: usize>(&mut self, now: Instant, ranks: [f64; N]) -> [f64; N] {
        self.expire(now);
        let mut merged = sketch();
        for (_, sketch) in &self.slices {
            merged.merge(sketch).expect("sketches of one K merge");
        }
        let view = merged.sorted_view();
        let quantile = |rank| match view.quantile(rank, SearchCriteria::Inclusive) {
            Ok(Some(value)) => value.into_inner(),
            // Nothing was observed.
            Ok(None) | Err(_) => f64::NAN,
        };
        ranks.map(quantile)
    }

    /// Drops the slices that are too old; gives the number of the one that is open now.
    fn expire(&mut self, now: Instant) -> u64 {
        let slice = MAX_AGE / SLICES;
        let age = now.saturating_duration_since(self.start);
        let number = u64::try_from(age.as_nanos() / slice.as_nanos()).unwrap_or(u64::MAX);
        while self.slices.front().is_some_and(|(oldest, _)| oldest + u64::from(SLICES) <= number) {
            self.slices.pop_front();
        }
        // A clock read before another's may come after it: it belongs to the slice that is open.
        self.slices.back().map_or(number, |(newest, _)| number.max(*newest))
    }
}

fn sketch() -> Sketch {
    KllSketch::new(K).expect("KLL takes this K")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANKS: [f64; 3] = [0.5, 0.9, 0.99];

    /// What a value's rank is away from the wanted one, as a share of the observations. A value that occurs more than
    /// once has all the ranks that its occurrences have.
    fn rank_error(sorted: &[f64], wanted: f64, value: f64) -> f64 {
        let share = |count: usize| count as f64 / sorted.len() as f64;
        let first = share(sorted.partition_point(|other| *other < value));
        let last = share(sorted.partition_point(|other| *other <= value));
        (first - wanted).max(wanted - last).max(0.0)
    }

    /// Numbers between 0 and 1, the same in every run (xorshift64).
    fn uniform(mut state: u64) -> impl FnMut() -> f64 {
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    /// Puts `values` evenly into `MAX_AGE` and asks at its end.
    fn worst_error(name: &str, values: &[f64]) -> f64 {
        let start = Instant::now();
        let mut window = Window::new(start);
        let step = (MAX_AGE - Duration::from_millis(1)) / u32::try_from(values.len()).unwrap();
        let mut now = start;
        for value in values {
            window.observe(now, *value);
            now += step;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let found = window.quantiles(now, RANKS);
        let errors = RANKS.iter().zip(found).map(|(rank, value)| rank_error(&sorted, *rank, value));
        let worst = errors.fold(0.0, f64::max);
        println!("{name}: quantiles {found:?}, rank error at most {worst:.5}");
        worst
    }

    #[test]
    fn a_million_observations_are_within_one_percent_of_rank() {
        let count = 1_000_000;
        let mut random = uniform(88_172_645_463_325_252);
        let mut of = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
            (0..count).map(|index| f(f64::from(index), random())).collect()
        };
        for (name, values) in [
            ("uniform", of(&|_, u| u)),
            ("exponential", of(&|_, u| -5.0 * (1.0 - u).ln())),
            ("heavy tail", of(&|_, u| (1.0 - u).powf(-1.5))),
            ("rising", of(&|index, _| index)),
            ("falling", of(&|index, _| -index)),
            ("two clusters", of(&|_, u| if u < 0.5 { 1.0 + u * 1e-6 } else { 1000.0 + u })),
            ("few values", of(&|_, u| (u * 10.0).floor())),
            ("one value but few", of(&|_, u| if u < 0.999 { 1.0 } else { 1e6 })),
        ] {
            assert!(worst_error(name, &values) < 0.01, "{name}");
        }
    }

    #[test]
    fn few_observations_are_exact() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert!(worst_error("200", &values) < 1e-9);
        let start = Instant::now();
        let mut window = Window::new(start);
        window.observe(start, 7.5);
        assert_eq!(window.quantiles(start, RANKS), [7.5; 3]);
    }

    #[test]
    fn what_is_old_is_forgotten_slice_by_slice() {
        let start = Instant::now();
        let mut window = Window::new(start);
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(window.quantiles(start, RANKS).iter().all(|value| value.is_nan()), "nothing yet");
        for second in 0..600 {
            window.observe(after(second), if second < 300 { 1.0 } else { 2.0 });
        }
        assert_eq!(window.quantiles(after(599), [0.49, 0.51]), [1.0, 2.0]);
        // The first half of the minutes is gone, the second not.
        assert_eq!(window.quantiles(after(899), [0.01, 0.99]), [2.0; 2]);
        assert_eq!(window.quantiles(after(1169), [0.5]), [2.0], "observed 9.5 minutes ago");
        assert!(window.quantiles(after(1200), RANKS).iter().all(|value| value.is_nan()), "all is old");
        window.observe(after(5000), 3.0);
        assert_eq!(window.quantiles(after(5000), RANKS), [3.0; 3], "and it goes on");
    }

    #[test]
    fn what_is_no_number_or_out_of_order_does_no_harm() {
        let start = Instant::now();
        let mut window = Window::new(start);
        window.observe(start + Duration::from_secs(90), 1.0);
        window.observe(start + Duration::from_secs(10), 2.0);
        window.observe(start + Duration::from_secs(90), f64::NAN);
        assert_eq!(window.quantiles(start + Duration::from_secs(90), [0.0, 1.0]), [1.0, 2.0]);
    }
}
