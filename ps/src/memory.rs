//! How much memory new rows may take.
//!
//! What the process has resident is counted in two parts. The slabs of rows and indexes grow with new keys, are known to the byte at any time, and are counted
//! when they are mapped. All else (dense blocks, records for backups, requests on their way, the program) is *sampled*, as resident memory without
//! slabs; its recent peak counts, because it comes and goes between two samples.
//!
//! Only new keys are refused. A dense variable's first values and what backups are sent are always taken: the one is small and known before, the other was
//! admitted by the primary.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;

use crate::pool::{self, CHUNK_BYTES};

const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);
/// Refusals are told at once, and then at most this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// Of a peak that is over, this much of what is above the newest sample is forgotten at each sample: half of it in nine seconds.
const FORGET: u64 = 128;
/// One push may take this much of the room that is left: others are decided at the same time.
const ROOM_SHARE: u64 = 8;
/// A file of a checkpoint that is being written waits in so much memory at most: a shard of 8 million floats needs no temporary file, which would be written
/// and read once more.
const SCRATCH_BYTES_MAX: u64 = 64 << 20;
/// And in this part of the limit: rows may have taken all that is below it.
const SCRATCH_SHARE: u64 = 100;
/// Examples of refused keys in one report.
const EXAMPLES_MAX: usize = 5;

/// The memory of the process and its limit.
#[derive(Debug)]
pub(crate) struct Memory {
    /// None without a limit.
    limit: Option<u64>,
    /// Left free for chunks that are mapped for one row: one of rows and one of indexes by each thread.
    margin: u64,
    /// Recent peak of what is resident beside slabs.
    other: AtomicU64,
    refused: Mutex<Refused>,
}

/// What was refused since the last report.
#[derive(Debug, Default)]
struct Refused {
    keys: u64,
    examples: Vec<String>,
    reported: Option<Instant>,
}

impl Memory {
    /// With `limit` bytes, 0 for no limit, and so many threads that apply pushes.
    ///
    /// # Errors
    /// The system does not tell what the process has resident.
    pub(crate) fn new(limit: u64, threads: usize) -> anyhow::Result<Self> {
        let memory = Memory {
            limit: (limit > 0).then_some(limit),
            margin: 2 * CHUNK_BYTES as u64 * threads as u64,
            other: AtomicU64::new(0),
            refused: Mutex::default(),
        };
        if memory.is_limited() {
            memory.sample(resident_bytes()?);
        }
        Ok(memory)
    }

    #[cfg(test)]
    pub(crate) fn unlimited() -> Self {
        Memory::new(0, 1).expect("nothing is read without a limit")
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.limit.is_some()
    }

    /// Bytes that the new rows of one push may take.
    pub(crate) fn room(&self) -> u64 {
        self.limit
            .map_or(u64::MAX, |limit| limit.saturating_sub(self.used() + self.margin) / ROOM_SHARE)
    }

    /// Whether the limit is reached: nothing that can wait may take more.
    pub(crate) fn is_full(&self) -> bool {
        self.limit.is_some_and(|limit| self.used() >= limit)
    }

    /// Bytes that a file may occupy until it can be laid out.
    pub(crate) fn scratch(&self) -> usize {
        let share = self.limit.map_or(u64::MAX, |limit| limit / SCRATCH_SHARE);
        share.min(SCRATCH_BYTES_MAX) as usize
    }

    /// Bytes that the process has resident, as the system counts them; 0: it does not say.
    pub(crate) fn resident(&self) -> u64 {
        resident_bytes().unwrap_or(0)
    }

    fn used(&self) -> u64 {
        pool::mapped_bytes() + self.other.load(Ordering::Relaxed)
    }

    /// New keys were refused; `example` names one of them.
    pub(crate) fn refused(&self, keys: u64, example: impl FnOnce() -> String) {
        let mut refused = self.refused.lock();
        refused.keys += keys;
        if refused.examples.len() < EXAMPLES_MAX {
            refused.examples.push(example());
        }
    }

    /// Samples and reports for ever.
    pub(crate) async fn watch(&self) {
        let mut ticks = interval(SAMPLE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let now = ticks.tick().await;
            match resident_bytes() {
                Ok(resident) => self.sample(resident),
                Err(error) => warn!("the memory limit goes by an old sample: {error:#}"),
            }
            if let Some(Refused { keys, examples, .. }) = self.report_due(now) {
                warn!(
                    keys,
                    examples = examples.join(", "),
                    limit = self.limit,
                    "new keys were refused: the memory limit is reached"
                );
            }
        }
    }

    fn sample(&self, resident: u64) {
        let other = resident.saturating_sub(pool::mapped_bytes());
        let peak = self.other.load(Ordering::Relaxed);
        let fading = peak - peak.saturating_sub(other) / FORGET;
        self.other.store(fading.max(other), Ordering::Relaxed);
    }

    fn report_due(&self, now: Instant) -> Option<Refused> {
        let mut refused = self.refused.lock();
        let quiet = refused.reported.is_none_or(|last| now - last >= REPORT_INTERVAL);
        (refused.keys > 0 && quiet).then(|| {
            let next = Refused { reported: Some(now), ..Refused::default() };
            std::mem::replace(&mut *refused, next)
        })
    }
}

/// What the process has resident now.
pub(crate) fn resident_bytes() -> anyhow::Result<u64> {
    let statm = fs::read_to_string("/proc/self/statm").context("read /proc/self/statm")?;
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    let pages = pages.context("find resident pages in /proc/self/statm")?;
    Ok(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limited() -> Memory {
        let memory = Memory::unlimited();
        // Other tests of this process map and unmap slabs meanwhile.
        Memory { limit: Some(1 << 40), ..memory }
    }

    #[test]
    fn a_peak_beside_the_slabs_counts_for_a_while() {
        let memory = limited();
        let peak = 1 << 38;
        memory.sample(peak + pool::mapped_bytes());
        let after_peak = memory.room();
        memory.sample(pool::mapped_bytes());
        assert!(memory.room() - after_peak < peak / ROOM_SHARE / 100, "one sample is not all");
        (0..2000).for_each(|_| memory.sample(pool::mapped_bytes()));
        assert!(memory.room() > (1 << 40) / ROOM_SHARE - 1024 * MIB);
    }

    #[test]
    fn at_the_limit_there_is_no_room_and_without_one_there_is_all() {
        let memory = limited();
        assert!(memory.room() > 0 && !memory.is_full());
        memory.sample((1 << 40) + pool::mapped_bytes() + 1024 * MIB);
        assert_eq!(memory.room(), 0);
        assert!(memory.is_full());
        assert_eq!(Memory::unlimited().room(), u64::MAX);
    }

    #[test]
    fn refusals_are_told_at_once_and_then_once_in_an_interval() {
        let memory = limited();
        let start = Instant::now();
        assert!(memory.report_due(start).is_none());
        (0..9).for_each(|key| memory.refused(3, || key.to_string()));
        let report = memory.report_due(start).expect("at once");
        assert_eq!((report.keys, report.examples.len()), (27, EXAMPLES_MAX));
        memory.refused(1, || "later".into());
        assert!(memory.report_due(start + REPORT_INTERVAL / 2).is_none());
        assert!(memory.report_due(start + REPORT_INTERVAL).is_some_and(|report| report.keys == 1));
    }
}
