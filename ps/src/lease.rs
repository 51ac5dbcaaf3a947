//! The lease of this server (docs/protocol.md 4): it matters to shards whose in-sync set is this server alone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A point on a clock that also runs while the machine is suspended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    /// Now.
    pub(crate) fn now() -> Self {
        #[cfg(not(downpour_sim))]
        let now = {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
            Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
        };
        // The one clock that a simulation replaces.
        #[cfg(downpour_sim)]
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        BootTime(now)
    }
}

/// Until when nobody else is given what this server holds alone.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    until_ms: AtomicU64,
}

impl Lease {
    /// An answer to a request sent at `sent` granted `granted`, counted from then.
    pub(crate) fn renew(&self, sent: BootTime, granted: Duration) {
        let until = sent.0.saturating_add(granted).as_millis();
        self.until_ms.fetch_max(u64::try_from(until).unwrap_or(u64::MAX), Ordering::AcqRel);
    }

    /// Whether it holds at `now`.
    pub(crate) fn holds_at(&self, now: BootTime) -> bool {
        now.0.as_millis() < u128::from(self.until_ms.load(Ordering::Acquire))
    }

    /// Whether it holds.
    pub(crate) fn holds(&self) -> bool {
        self.holds_at(BootTime::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_from_the_sending_and_never_shrinks() {
        let lease = Lease::default();
        let at = |ms| BootTime(Duration::from_millis(ms));
        assert!(!lease.holds_at(at(0)));
        lease.renew(at(1000), Duration::from_millis(500));
        lease.renew(at(200), Duration::from_millis(500));
        assert!(lease.holds_at(at(1499)) && !lease.holds_at(at(1500)));
        assert!(BootTime::now() <= BootTime::now());
    }
}
