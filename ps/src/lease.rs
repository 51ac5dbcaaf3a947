//! Until when this server may acknowledge (docs/protocol.md 4, 8.5): for how long it was not answered by the coordinators.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use downpour_core::planted::{Bug, planted};

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

/// How this server stands with the coordinators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contact {
    /// Nobody else is given what it holds alone: its lease holds.
    Leased,
    /// The lease is over: what others hold too goes on.
    Late,
    /// Not answered for so long that what it holds may be set back to a checkpoint elsewhere: it acknowledges nothing.
    Isolated,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Lease {
    until_ms: AtomicU64,
    /// When [`Contact::Isolated`] begins, unless the lease goes on.
    isolated_ms: AtomicU64,
    /// None: never.
    isolation: Option<Duration>,
}

impl Lease {
    /// Of a life whose registration was sent at `sent`. Zero: without a bound it goes on for ever where it is not alone.
    pub(crate) fn new(sent: BootTime, isolation: Duration) -> Self {
        let isolation = Some(isolation).filter(|isolation| !isolation.is_zero());
        let isolated = isolation.map_or(u64::MAX, |isolation| millis(sent, isolation));
        let (until_ms, isolated_ms) = (AtomicU64::new(0), AtomicU64::new(isolated));
        Lease { until_ms, isolated_ms, isolation }
    }

    /// An answer to a request sent at `sent` granted `granted`, counted from then. Nothing granted: it does not count.
    pub(crate) fn renew(&self, sent: BootTime, granted: Duration) {
        if granted.is_zero() {
            return;
        }
        self.until_ms.fetch_max(millis(sent, granted), Ordering::AcqRel);
        if let Some(isolation) = self.isolation {
            self.isolated_ms.fetch_max(millis(sent, isolation), Ordering::AcqRel);
        }
    }

    /// At `now`.
    pub(crate) fn contact_at(&self, now: BootTime) -> Contact {
        let now = now.0.as_millis();
        if now < u128::from(self.until_ms.load(Ordering::Acquire)) {
            Contact::Leased
        } else if now < u128::from(self.isolated_ms.load(Ordering::Acquire))
            || planted(Bug::ForgetIsolation)
        {
            Contact::Late
        } else {
            Contact::Isolated
        }
    }

    /// Now.
    pub(crate) fn contact(&self) -> Contact {
        self.contact_at(BootTime::now())
    }
}

fn millis(from: BootTime, long: Duration) -> u64 {
    u64::try_from(from.0.saturating_add(long).as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> BootTime {
        BootTime(Duration::from_millis(ms))
    }

    #[test]
    fn a_lease_counts_from_the_sending_and_never_shrinks() {
        let lease = Lease::new(at(0), Duration::ZERO);
        assert_eq!(lease.contact_at(at(0)), Contact::Late);
        lease.renew(at(1000), Duration::from_millis(500));
        lease.renew(at(200), Duration::from_millis(500));
        assert_eq!(lease.contact_at(at(1499)), Contact::Leased);
        assert_eq!(lease.contact_at(at(1500)), Contact::Late);
        assert_eq!(lease.contact_at(at(u64::MAX / 2)), Contact::Late, "there is no bound");
        assert!(BootTime::now() <= BootTime::now());
    }

    #[test]
    fn who_is_not_answered_for_its_bound_from_the_sending_on_is_isolated_until_it_is() {
        let lease = Lease::new(at(100), Duration::from_millis(2000));
        assert_eq!(lease.contact_at(at(2099)), Contact::Late);
        assert_eq!(lease.contact_at(at(2100)), Contact::Isolated, "the registration counts too");
        lease.renew(at(1000), Duration::from_millis(500));
        lease.renew(at(5000), Duration::ZERO);
        assert_eq!(lease.contact_at(at(2999)), Contact::Late);
        assert_eq!(lease.contact_at(at(3000)), Contact::Isolated, "it was told no");
        lease.renew(at(2900), Duration::from_millis(5000));
        assert_eq!(lease.contact_at(at(7000)), Contact::Leased, "nobody is given it before");
        assert_eq!(lease.contact_at(at(8000)), Contact::Isolated);
    }
}
