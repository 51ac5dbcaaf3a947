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

    /// The epochs with the position before the first record of each, as [`Lineage::restore`] takes them.
    #[must_use]
    pub fn starts(&self) -> &[(Epoch, Lsn)] {
        &self.starts
    }

    /// A history that ends at `last`; none where there can be no such one.
    #[must_use]
    pub fn restore(starts: Vec<(Epoch, Lsn)>, last: Lsn) -> Option<Lineage> {
        let mut end = Lsn::ZERO;
        let ends = starts.iter().skip(1).map(|(_, previous)| *previous).chain([last]);
        for (&(epoch, previous), next) in starts.iter().zip(ends) {
            let follows = previous == end && previous.epoch() < epoch && epoch <= Lsn::EPOCH_MAX;
            if !follows || next.epoch() != epoch || next.count() == 0 {
                return None;
            }
            end = next;
        }
        (end == last).then_some(Lineage { starts, last })
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

    /// How many records came after `lsn`. None where it is no position of this history.
    #[must_use]
    pub fn since(&self, lsn: Lsn) -> Option<u64> {
        if !self.contains(lsn) {
            return None;
        }
        let (mut records, mut end) = (0, self.last);
        for &(epoch, previous) in self.starts.iter().rev() {
            if epoch == lsn.epoch() {
                return Some(records + end.count() - lsn.count());
            }
            (records, end) = (records + end.count(), previous);
        }
        Some(records)
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

    #[test]
    fn records_are_counted_over_epochs_and_only_from_what_was_part_of_the_history() {
        let at = |epoch, count| Lsn::new(Epoch(epoch), count);
        let mut lineage = Lineage::default();
        assert_eq!(lineage.since(Lsn::ZERO), Some(0));
        for lsn in [at(1, 1), at(1, 2), at(3, 1), at(4, 1), at(4, 2), at(4, 3)] {
            lineage.advance(lsn);
        }
        let since = [Lsn::ZERO, at(1, 1), at(1, 2), at(3, 1), at(4, 1), at(4, 3)];
        assert_eq!(since.map(|lsn| lineage.since(lsn)), [6, 5, 4, 3, 2, 0].map(Some));
        assert_eq!([at(1, 3), at(2, 1), at(4, 4)].map(|lsn| lineage.since(lsn)), [None; 3]);
    }

    #[test]
    fn a_history_that_is_put_back_is_the_same_and_one_that_cannot_be_is_refused() {
        let mut lineage = Lineage::default();
        assert_eq!(Lineage::restore(Vec::new(), Lsn::ZERO), Some(lineage.clone()));
        let at = |epoch, count| Lsn::new(Epoch(epoch), count);
        for lsn in [at(1, 1), at(1, 2), at(3, 1), at(3, 2)] {
            lineage.advance(lsn);
        }
        let starts = lineage.starts().to_vec();
        assert_eq!(Lineage::restore(starts, at(3, 2)), Some(lineage));
        let (first, third) = ((Epoch(1), Lsn::ZERO), (Epoch(3), at(1, 2)));
        for (starts, last) in [
            (vec![], at(1, 1)),
            (vec![first], Lsn::ZERO),
            (vec![first], at(2, 1)),
            (vec![first], at(1, 0)),
            (vec![third], at(3, 1)),
            (vec![first, third], at(1, 2)),
            (vec![first, (Epoch(1), at(1, 2))], at(1, 3)),
            (vec![first, (Epoch(3), at(2, 2))], at(3, 3)),
        ] {
            assert_eq!(Lineage::restore(starts.clone(), last), None, "{starts:?} {last}");
        }
    }
}
