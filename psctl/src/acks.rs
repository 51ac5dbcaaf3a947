//! How long clients waited: after each fault that takes a server away, until the first push that was sent after it was acknowledged.
//!
//! Every push of the [probe](crate::probe) touches every shard, so that one acknowledgement proves all shards that the server led.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// How a server went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// It died: whoever is connected to it is told so.
    Reset,
    /// It says nothing any more.
    Silence,
}

#[derive(Debug)]
struct Wait {
    outage: Outage,
    since: Instant,
    ended: Option<Instant>,
}

/// See the module; shared by all clients.
#[derive(Debug, Default)]
pub struct Acks {
    waits: Mutex<Vec<Wait>>,
    /// Every push with when it was sent and acknowledged, where that is asked for.
    pushes: Option<Mutex<Vec<(Instant, Instant)>>>,
}

impl Acks {
    /// Remembers every push: some 32 bytes each.
    #[must_use]
    pub fn recording() -> Self {
        Acks { pushes: Some(Mutex::default()), ..Acks::default() }
    }

    /// The pushes that were acknowledged since this was asked last: when each was sent, and when acknowledged.
    #[must_use]
    pub fn take_pushes(&self) -> Vec<(Instant, Instant)> {
        let pushes = self
            .pushes
            .as_ref()
            .map(|pushes| pushes.lock().unwrap_or_else(PoisonError::into_inner));
        pushes.map(|mut pushes| std::mem::take(&mut *pushes)).unwrap_or_default()
    }

    fn waits(&self) -> MutexGuard<'_, Vec<Wait>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A server went now.
    pub fn outage(&self, outage: Outage, since: Instant) {
        self.waits().push(Wait { outage, since, ended: None });
    }

    /// A push that was sent then is acknowledged now.
    pub fn acknowledged(&self, sent: Instant, now: Instant) {
        if let Some(pushes) = &self.pushes {
            pushes.lock().unwrap_or_else(PoisonError::into_inner).push((sent, now));
        }
        let mut waits = self.waits();
        let open = waits.iter_mut().rev().take_while(|wait| wait.ended.is_none());
        open.filter(|wait| wait.since < sent).for_each(|wait| wait.ended = Some(now));
    }

    /// Whether a server went and nothing was acknowledged since.
    #[must_use]
    pub fn waiting(&self) -> bool {
        self.waits().last().is_some_and(|wait| wait.ended.is_none())
    }

    /// How long the waits after such outages were.
    #[must_use]
    pub fn recovery(&self, outage: Outage) -> Recovery {
        let waits = self.waits();
        let such = waits.iter().filter(|wait| wait.outage == outage);
        let ended = such.filter_map(|wait| Some(wait.ended?.duration_since(wait.since)));
        Recovery::of(ended.collect())
    }
}

/// Waits in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Recovery {
    /// Median.
    pub p50: u64,
    /// Longest.
    pub max: u64,
    /// How many.
    pub n: usize,
}

impl Recovery {
    fn of(mut waits: Vec<Duration>) -> Self {
        waits.sort_unstable();
        let ms = |at: usize| waits.get(at).map_or(0, |wait| wait.as_millis() as u64);
        Recovery {
            p50: ms(waits.len() / 2),
            max: ms(waits.len().saturating_sub(1)),
            n: waits.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_push_that_was_sent_after_the_fault_ends_the_wait() {
        let (acks, start) = (Acks::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        acks.outage(Outage::Reset, at(100));
        acks.acknowledged(at(99), at(110));
        assert!(acks.waiting());
        acks.acknowledged(at(101), at(150));
        acks.acknowledged(at(102), at(160));
        assert!(!acks.waiting());
        assert_eq!(acks.recovery(Outage::Reset), Recovery { p50: 50, max: 50, n: 1 });
        assert_eq!(acks.recovery(Outage::Silence).n, 0);
    }

    #[test]
    fn the_median_and_the_longest_are_told() {
        let waits = [5, 1, 9, 2, 7].map(Duration::from_millis).to_vec();
        assert_eq!(Recovery::of(waits), Recovery { p50: 5, max: 9, n: 5 });
        assert_eq!(Recovery::of(Vec::new()), Recovery::default());
    }
}
