//! Which LSNs belong to a shard's history.

use crate::id::{Epoch, Lsn};

/// The epochs of a shard's log with the last position before each: enough to say whether a position that somebody remembers was ever part of
/// *this* history. A pull may have seen a record that died unacknowledged with its primary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// (epoch, LSN of the record before its first), rising.
    starts: Vec<(Epoch, Lsn)>,
    last: Lsn,
}

impl Lineage {
    /// Takes note of the next record.
    pub fn advance(&mut self, lsn: Lsn) {
        debug_assert!(lsn > self.last);
        if lsn.epoch() != self.last.epoch() {
            self.starts.push((lsn.epoch(), self.last));
        }
        self.last = lsn;
    }

    /// Position of the last record.
    #[must_use]
    pub fn last(&self) -> Lsn {
        self.last
    }

    /// Whether `lsn` is a position of this history ([`Lsn::ZERO`] always is).
    #[must_use]
    pub fn contains(&self, lsn: Lsn) -> bool {
        if lsn == Lsn::ZERO {
            return true;
        }
        let Ok(index) = self.starts.binary_search_by_key(&lsn.epoch(), |start| start.0) else {
            return false;
        };
        let end = self.starts.get(index + 1).map_or(self.last, |next| next.1);
        lsn.count() > 0 && lsn <= end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_died_with_its_primary_is_not_part_of_the_history() {
        let mut lineage = Lineage::default();
        for lsn in [Lsn::new(Epoch(1), 1), Lsn::new(Epoch(1), 2), Lsn::new(Epoch(3), 1)] {
            lineage.advance(lsn);
        }
        assert!(lineage.contains(Lsn::ZERO));
        assert!(lineage.contains(Lsn::new(Epoch(1), 2)));
        assert!(lineage.contains(Lsn::new(Epoch(3), 1)));
        assert!(!lineage.contains(Lsn::new(Epoch(1), 3)), "lost with the primary of epoch 1");
        assert!(!lineage.contains(Lsn::new(Epoch(2), 1)), "nothing was logged in epoch 2");
        assert!(!lineage.contains(Lsn::new(Epoch(3), 2)), "not yet");
    }
}
