//! Exactly-once: what each session last did to a shard (docs/protocol.md 1.4, 1.5 and 2.2).
//!
//! The cells are replicated state: they change only when a record is applied, so a retry after a failover is still recognised.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::ops::Bound;

use thiserror::Error;

use crate::id::{Lsn, SessionId, VariableId};
use crate::planted::{Bug, planted};

/// Refusals that a cell remembers. A client may have at most this many pushes to a shard unacknowledged, so a repeat is always inside.
pub const OUTCOME_WINDOW: u64 = 1024;

/// Sessions that a shard remembers. A job has at most 16,384 open at once; the rest is for those that ended and whose closing the shard has
/// not logged yet. Without a bound, made-up numbers of sessions would fill the memory.
pub const CELLS_MAX: usize = 65_536;

/// Why a push was consumed without being applied, or not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalReason {
    /// A gradient is infinite or not a number.
    NotFinite,
    /// The job has no such variable.
    UnknownVariable,
    /// The update does not fit the variable's definition.
    WrongShape,
    /// The server has no memory for keys that it does not know. Everything else of the push was applied.
    MemoryLimit,
    /// It contributed to a round that was over. Everything else of the push was applied.
    RoundOver,
    /// What is contributed to its round is more than a server keeps.
    RoundTooLarge,
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFinite => "a gradient is infinite or not a number",
            Self::UnknownVariable => "the job has no such variable",
            Self::WrongShape => "the update does not fit the variable's definition",
            Self::MemoryLimit => {
                "new keys were refused: the server is at its memory limit (known keys were trained)"
            }
            Self::RoundOver => "the round that it contributed to was over",
            Self::RoundTooLarge => {
                "what workers contribute to one round is more than a server keeps: give the job more shards, or smaller batches or fewer workers to a round, or servers more --contribution-bytes-max"
            }
        })
    }
}

/// A permanent refusal: the number is consumed and the reason recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub reason: RefusalReason,
    /// The first variable it is about.
    pub variable: VariableId,
}

impl Refusal {
    /// Whether the rest of the push was applied.
    #[must_use]
    pub fn partial(&self) -> bool {
        matches!(self.reason, RefusalReason::MemoryLimit | RefusalReason::RoundOver)
    }
}

/// What a primary does with a push of this session and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The next one: apply it.
    Apply,
    /// Seen. Acknowledge with this outcome once the commit LSN has reached `lsn`.
    Repeat {
        /// LSN of the session's newest record on this shard.
        lsn: Lsn,
        /// The recorded outcome.
        refusal: Option<Refusal>,
    },
    /// One before it is missing.
    Gap {
        /// The number that would be applied.
        expected: u64,
    },
    /// The session has ended, or this shard never knew it and cannot tell it from one that ended.
    Closed,
}

/// Sessions of a job that have ended: all up to `high_water` but for `open`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClosedSessions {
    /// Every session up to here is closed, but for those in `open`.
    pub high_water: u64,
    /// Sessions up to `high_water` that are open.
    pub open: BTreeSet<SessionId>,
}

impl ClosedSessions {
    /// Whether `session` has ended.
    #[must_use]
    pub fn contains(&self, session: SessionId) -> bool {
        session.0 <= self.high_water && !self.open.contains(&session)
    }
}

/// What a shard remembers of one session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Number of its last push.
    pub last: u64,
    /// LSN of that.
    pub lsn: Lsn,
    /// Those of its last pushes that were refused, by number.
    pub refusals: VecDeque<(u64, Refusal)>,
}

/// Why a cell cannot be one of these.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CannotRestore {
    /// Closed sessions have none.
    #[error("session {0} is closed, or comes twice")]
    Session(SessionId),
    /// Cells are bounded.
    #[error("there are more than {CELLS_MAX} cells")]
    TooMany,
    /// It has no last push, or refusals that are not of its last pushes in order.
    #[error("the cell of session {0} names pushes that cannot be")]
    Pushes(SessionId),
}

/// The cells of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionCells {
    cells: BTreeMap<SessionId, Cell>,
    closed: ClosedSessions,
}

impl SessionCells {
    /// What to do with push `sequence` of `session`. Reads only.
    #[must_use]
    pub fn check(&self, session: SessionId, sequence: u64) -> Verdict {
        if self.closed.contains(session) && !planted(Bug::DropClosedMark) {
            return Verdict::Closed;
        }
        let Some(cell) = self.cells.get(&session) else {
            return if sequence == 1 { Verdict::Apply } else { Verdict::Gap { expected: 1 } };
        };
        if sequence == cell.last + 1 {
            Verdict::Apply
        } else if sequence > cell.last {
            Verdict::Gap { expected: cell.last + 1 }
        } else {
            let refusal = cell.refusals.iter().find(|(number, _)| *number == sequence);
            Verdict::Repeat { lsn: cell.lsn, refusal: refusal.map(|(_, refusal)| *refusal) }
        }
    }

    /// The number that `session` is to send next.
    #[must_use]
    pub fn next(&self, session: SessionId) -> u64 {
        self.cells.get(&session).map_or(1, |cell| cell.last + 1)
    }

    /// Whether a push of `session` finds or gets a cell. A primary asks before it logs; a record that is logged is applied in any case.
    #[must_use]
    pub fn has_room(&self, session: SessionId) -> bool {
        self.cells.len() < CELLS_MAX || self.cells.contains_key(&session)
    }

    /// Records that push `sequence` was applied or refused at `lsn`. Called by apply, on primary and backups alike, with the number that
    /// [`SessionCells::check`] let through.
    pub fn record(
        &mut self,
        session: SessionId,
        sequence: u64,
        lsn: Lsn,
        refusal: Option<Refusal>,
    ) {
        let cell =
            self.cells.entry(session).or_insert(Cell { last: 0, lsn, refusals: VecDeque::new() });
        debug_assert_eq!(cell.last + 1, sequence, "check() guards this");
        (cell.last, cell.lsn) = (sequence, lsn);
        if let Some(refusal) = refusal {
            cell.refusals.push_back((sequence, refusal));
        }
        while cell.refusals.front().is_some_and(|(number, _)| number + OUTCOME_WINDOW <= sequence) {
            cell.refusals.pop_front();
        }
    }

    /// Applies a close record: ended sessions lose their cells and are refused for ever.
    pub fn close(&mut self, closed: ClosedSessions) {
        self.cells.retain(|session, _| !closed.contains(*session));
        self.closed = closed;
    }

    /// Cells without any session but those that are closed, to be [restored](SessionCells::restore).
    #[must_use]
    pub fn with_closed(closed: ClosedSessions) -> Self {
        SessionCells { cells: BTreeMap::new(), closed }
    }

    /// The cells of the sessions after `after`, in order.
    pub fn after(&self, after: SessionId) -> impl Iterator<Item = (SessionId, &Cell)> {
        let later = (Bound::Excluded(after), Bound::Unbounded);
        self.cells.range(later).map(|(session, cell)| (*session, cell))
    }

    /// Puts back a cell as [`SessionCells::after`] gave it.
    ///
    /// # Errors
    /// It cannot be one of these.
    pub fn restore(&mut self, session: SessionId, cell: Cell) -> Result<(), CannotRestore> {
        if !self.has_room(session) {
            return Err(CannotRestore::TooMany);
        }
        if session.0 == 0 || self.closed.contains(session) || self.cells.contains_key(&session) {
            return Err(CannotRestore::Session(session));
        }
        let mut numbers = cell.refusals.iter().map(|(number, _)| *number);
        let recent = |number: u64| number <= cell.last && cell.last - number < OUTCOME_WINDOW;
        if cell.last == 0 || !numbers.clone().is_sorted_by(|a, b| a < b) || !numbers.all(recent) {
            return Err(CannotRestore::Pushes(session));
        }
        self.cells.insert(session, cell);
        Ok(())
    }

    /// The sessions that were closed by the last close record.
    #[must_use]
    pub fn closed(&self) -> &ClosedSessions {
        &self.closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Epoch;

    const SESSION: SessionId = SessionId(7);

    fn at(count: u64) -> Lsn {
        Lsn::new(Epoch(1), count)
    }

    #[test]
    fn numbers_are_applied_once_and_in_order() {
        let mut cells = SessionCells::default();
        assert_eq!(cells.check(SESSION, 2), Verdict::Gap { expected: 1 });
        assert_eq!(cells.check(SESSION, 1), Verdict::Apply);
        cells.record(SESSION, 1, at(1), None);
        assert_eq!(cells.check(SESSION, 1), Verdict::Repeat { lsn: at(1), refusal: None });
        assert_eq!(cells.check(SESSION, 3), Verdict::Gap { expected: 2 });
        assert_eq!(cells.check(SESSION, 2), Verdict::Apply);
    }

    #[test]
    fn a_refusal_consumes_its_number_and_is_told_again() {
        let mut cells = SessionCells::default();
        let refusal = Refusal { reason: RefusalReason::NotFinite, variable: VariableId(3) };
        cells.record(SESSION, 1, at(1), Some(refusal));
        cells.record(SESSION, 2, at(2), None);
        assert_eq!(cells.check(SESSION, 1), Verdict::Repeat { lsn: at(2), refusal: Some(refusal) });
        assert_eq!(cells.check(SESSION, 2), Verdict::Repeat { lsn: at(2), refusal: None });
        for sequence in 3..=OUTCOME_WINDOW + 1 {
            cells.record(SESSION, sequence, at(sequence), None);
        }
        assert!(cells.cells[&SESSION].refusals.is_empty(), "bounded by the window");
    }

    #[test]
    fn cells_are_bounded_and_a_known_session_goes_on_until_closing_makes_room() {
        let mut cells = SessionCells::default();
        let stranger = SessionId(u64::MAX);
        for session in 1..=CELLS_MAX as u64 {
            assert!(cells.has_room(stranger));
            cells.record(SessionId(session), 1, at(session), None);
        }
        assert!(!cells.has_room(stranger));
        assert!(cells.has_room(SESSION));
        cells.close(ClosedSessions { high_water: 7, open: [SessionId(5)].into() });
        assert!(cells.has_room(stranger));
    }

    #[test]
    fn cells_that_are_put_back_are_the_same_and_those_that_cannot_be_are_refused() {
        let refusal = Refusal { reason: RefusalReason::NotFinite, variable: VariableId(3) };
        let mut cells = SessionCells::default();
        cells.record(SessionId(5), 1, at(1), Some(refusal));
        cells.record(SESSION, 1, at(2), None);
        cells.close(ClosedSessions { high_water: 6, open: [SessionId(5)].into() });
        let mut back = SessionCells::with_closed(cells.closed().clone());
        for (session, cell) in cells.after(SessionId(0)) {
            back.restore(session, cell.clone()).expect("as it was");
        }
        assert_eq!(back, cells);
        assert_eq!(cells.after(SessionId(5)).count(), 1);
        let good = Cell { last: 2000, lsn: at(1), refusals: [(1000, refusal)].into() };
        for session in [0, 4, 5] {
            let refused = Err(CannotRestore::Session(SessionId(session)));
            assert_eq!(back.restore(SessionId(session), good.clone()), refused);
        }
        let session = SessionId(9);
        let refused = Err(CannotRestore::Pushes(session));
        assert_eq!(back.restore(session, Cell { last: 0, ..good.clone() }), refused);
        for numbers in [vec![900], vec![2001], vec![1500, 1500], vec![0]] {
            let refusals = numbers.into_iter().map(|number| (number, refusal)).collect();
            assert_eq!(back.restore(session, Cell { refusals, ..good.clone() }), refused);
        }
        assert_eq!(back.restore(session, good), Ok(()));
    }

    #[test]
    fn a_closed_session_is_refused_for_ever_and_an_open_older_one_is_not() {
        let mut cells = SessionCells::default();
        cells.record(SessionId(5), 1, at(1), None);
        cells.record(SESSION, 1, at(2), None);
        cells.close(ClosedSessions { high_water: 7, open: [SessionId(5)].into() });
        assert_eq!(cells.check(SESSION, 1), Verdict::Closed);
        assert_eq!(cells.check(SESSION, 2), Verdict::Closed);
        assert_eq!(cells.check(SessionId(6), 1), Verdict::Closed, "unknown is not new");
        assert_eq!(cells.check(SessionId(5), 2), Verdict::Apply);
        assert_eq!(cells.check(SessionId(8), 1), Verdict::Apply);
    }
}
