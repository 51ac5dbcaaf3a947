//! How long to wait before the next attempt.

use std::time::Duration;

use downpour_core::mix::mix64;

/// Doubling waits with a bound. The jitter is a pure function of (seed, attempt): two clients differ, one client repeats itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    pub(crate) first: Duration,
    pub(crate) max: Duration,
}

impl Backoff {
    /// The wait before attempt `attempt` (from 0): between half of the doubled wait and all of it.
    pub(crate) fn wait(self, seed: u64, attempt: u32) -> Duration {
        let whole = self.first.saturating_mul(1 << attempt.min(20)).min(self.max);
        let share = (mix64(seed ^ u64::from(attempt).rotate_left(32)) >> 40) as f64;
        whole.mul_f64(0.5 + share / f64::from(1 << 25))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_bound_and_seeds_differ() {
        let backoff = Backoff { first: Duration::from_millis(2), max: Duration::from_millis(100) };
        for attempt in 0..64 {
            let whole = Duration::from_millis(2 << attempt.min(20)).min(backoff.max);
            let wait = backoff.wait(7, attempt);
            assert!(wait >= whole / 2 && wait <= whole, "{attempt}: {wait:?}");
        }
        assert_ne!(backoff.wait(1, 5), backoff.wait(2, 5));
    }
}
