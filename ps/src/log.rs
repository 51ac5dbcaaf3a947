//! The records of a shard that not every member is known to have.

use std::collections::VecDeque;
use std::sync::Arc;

use downpour_core::id::Lsn;

use crate::record::Record;

/// Contiguous records after [`Log::base`]. Primary and backups keep them alike: a promoted backup levels the others from its own.
#[derive(Debug, Default)]
pub(crate) struct Log {
    base: Lsn,
    records: VecDeque<Arc<Record>>,
    bytes: usize,
}

impl Log {
    /// Empty, for the records after `base`.
    pub(crate) fn starting_after(base: Lsn) -> Self {
        Log { base, ..Log::default() }
    }

    /// Bytes that the records occupy, about.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// Appends the next record.
    pub(crate) fn push(&mut self, record: Arc<Record>) {
        debug_assert_eq!(record.previous, self.records.back().map_or(self.base, |last| last.lsn));
        self.bytes += record.bytes();
        self.records.push_back(record);
    }

    /// Forgets the records up to `lsn`.
    pub(crate) fn trim(&mut self, lsn: Lsn) {
        let count = self.records.partition_point(|record| record.lsn <= lsn);
        for record in self.records.drain(..count) {
            self.bytes -= record.bytes();
            self.base = record.lsn;
        }
    }

    /// The records after `lsn`, or nothing where the log no longer reaches back that far.
    pub(crate) fn after(&self, lsn: Lsn) -> Option<impl Iterator<Item = &Arc<Record>>> {
        let start = self.records.partition_point(|record| record.lsn <= lsn);
        (lsn >= self.base).then(|| self.records.range(start..))
    }
}

#[cfg(test)]
mod tests {
    use downpour_core::cells::ClosedSessions;
    use downpour_core::id::Epoch;

    use super::*;
    use crate::record::Body;

    fn at(epoch: u64, count: u64) -> Lsn {
        Lsn::new(Epoch(epoch), count)
    }

    fn log() -> Log {
        let mut log = Log::default();
        let mut previous = Lsn::ZERO;
        for lsn in [at(1, 1), at(1, 2), at(3, 1)] {
            let body = Body::Close(ClosedSessions::default());
            log.push(Arc::new(Record { lsn, previous, body }));
            previous = lsn;
        }
        log
    }

    fn after(log: &Log, lsn: Lsn) -> Option<Vec<Lsn>> {
        log.after(lsn).map(|records| records.map(|record| record.lsn).collect())
    }

    #[test]
    fn a_reader_gets_what_follows_its_position_across_epochs() {
        let log = log();
        assert_eq!(after(&log, Lsn::ZERO), Some(vec![at(1, 1), at(1, 2), at(3, 1)]));
        assert_eq!(after(&log, at(1, 1)), Some(vec![at(1, 2), at(3, 1)]));
        assert_eq!(after(&log, at(3, 1)), Some(vec![]));
    }

    #[test]
    fn what_was_trimmed_is_not_passed_over_in_silence() {
        let mut log = log();
        log.trim(at(1, 2));
        assert_eq!(after(&log, at(1, 1)), None);
        assert_eq!(after(&log, at(1, 2)), Some(vec![at(3, 1)]));
        log.trim(at(3, 1));
        assert_eq!((log.bytes(), log.len()), (0, 0));
    }
}
