//! Work beside what is served: on its threads a millisecond at a time, on the network so many bytes a second.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Longest turn: heartbeats and other streams wait behind it.
const TURN_MAX: Duration = Duration::from_millis(1);

/// Lets other tasks run when this one had its turn.
#[derive(Debug)]
pub(crate) struct Pace {
    turn: Instant,
}

impl Pace {
    pub(crate) fn start() -> Self {
        Pace { turn: Instant::now() }
    }

    /// Call it between two pieces of work.
    pub(crate) async fn rest(&mut self) {
        if self.turn.elapsed() > TURN_MAX {
            tokio::task::yield_now().await;
            self.turn = Instant::now();
        }
    }
}

/// Bytes that may go out in a second, for all who share it. The first comes at once and pays for it by the wait of the next.
#[derive(Debug)]
pub(crate) struct Budget {
    /// 0: without limit.
    bytes_per_s: u64,
    /// When what was spent so far is paid for.
    paid: Mutex<Instant>,
}

impl Budget {
    pub(crate) fn new(bytes_per_s: u64) -> Self {
        Budget { bytes_per_s, paid: Mutex::new(Instant::now()) }
    }

    /// Takes `bytes`, and waits until they may go. Those that press go at once: others wait for them later.
    pub(crate) async fn spend(&self, bytes: usize, presses: bool) {
        if self.bytes_per_s > 0 {
            let until = self.book(bytes, Instant::now());
            if !presses {
                tokio::time::sleep_until(until.into()).await;
            }
        }
    }

    /// When `bytes` may go that were asked for at `now`.
    fn book(&self, bytes: usize, now: Instant) -> Instant {
        let mut paid = self.paid.lock();
        let at = now.max(*paid);
        *paid = at + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_shares_a_budget_gets_no_more_of_it_together_and_nothing_is_saved_up() {
        let budget = Budget::new(1000);
        let start = *budget.paid.lock();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(budget.book(500, start), start);
        assert_eq!(budget.book(100, at(200)), at(500));
        assert_eq!(budget.book(100, at(200)), at(600));
        assert_eq!(budget.book(100, at(5000)), at(5000));
        assert_eq!(budget.book(100, at(5000)), at(5100));
    }
}
