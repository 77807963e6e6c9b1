//! How long to wait before trying again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Waits that double from `first` to `most`, spread so that several backends (or nodes) that fail over the same
/// thing, as a lock that all want, do not come back in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The shortest wait.
    pub first: Duration,
    /// The longest wait.
    pub most: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_millis(100), most: Duration::from_secs(30) }
    }
}

impl Backoff {
    /// The wait after this many failures in a row (at least one), a quarter more or less, never beyond the bounds.
    pub fn delay(&self, failures: u32) -> Duration {
        self.delay_at(failures, random())
    }

    /// `chance` is from 0 to 1.
    fn delay_at(&self, failures: u32, chance: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let middle = self.first.saturating_mul(1 << doublings).min(self.most);
        middle.mul_f64(0.75 + chance / 2.0).clamp(self.first, self.most)
    }
}

/// This long or up to a quarter longer, so that what many do at intervals is not done by all at once.
pub fn spread(interval: Duration) -> Duration {
    interval.mul_f64(1.0 + random() / 4.0)
}

/// A number from 0 to 1, from the seed that the standard library draws for each hasher.
fn random() -> f64 {
    let bits = RandomState::new().hash_one(0u8) >> 32;
    bits as f64 / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_from_the_first_to_the_most() {
        let backoff = Backoff::default();
        let middles: Vec<u128> = [1, 2, 3, 9, 10, 100, u32::MAX]
            .map(|failures| backoff.delay_at(failures, 0.5).as_millis())
            .into();
        assert_eq!(middles, [100, 200, 400, 25_600, 30_000, 30_000, 30_000]);
        assert_eq!(backoff.delay_at(2, 0.0).as_millis(), 150);
        assert_eq!(backoff.delay_at(2, 1.0).as_millis(), 250);
        for failures in [1, 5, 50] {
            let delay = backoff.delay(failures);
            assert!((backoff.first..=backoff.most).contains(&delay), "{delay:?}");
        }
    }

    #[test]
    fn two_that_fail_together_come_back_apart() {
        let delays: std::collections::BTreeSet<Duration> =
            (0..20).map(|_| Backoff::default().delay(5)).collect();
        assert!(delays.len() > 10, "{delays:?}");
    }
}
