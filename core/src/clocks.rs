//! The clocks of a job's workers, as its shard 0 keeps them (docs/protocol.md 7): who has finished how many steps, who may begin the next one, when a round of
//! synchronous training is over, and from which clock on which mode holds.
//!
//! It is replicated state: it changes only when a record is applied ([`Board::tick`], [`Board::leave`], [`Board::close`], [`Board::set`], [`Board::end_round`]).
//! The rest reads, and a primary makes records of the answers.
//!
//! A step that begins at clock c contributes to round c + 1; the round is over when it is *closed*.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use crate::cells::{CELLS_MAX, ClosedSessions};
use crate::consistency::Consistency;
use crate::id::SessionId;

/// A clock that nobody reaches, and that can be counted on from.
pub const CLOCK_MAX: u64 = 1 << 56;
/// Changes of mode that are under way at once; beyond, the last one is replaced.
pub const REGIMES_MAX: usize = 64;

/// What is known of one session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// Which of the session's seats it is, from 1: what comes late from an earlier one changes nothing.
    pub number: u64,
    /// Steps that it has finished, or that were closed without it.
    pub clock: u64,
    /// The last round that all of its contributions are there for.
    pub contributed: u64,
    /// The last round that its contributions were counted in.
    pub counted: u64,
}

/// The modes that hold from a clock on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Regime {
    /// For steps that begin at this clock or later.
    pub since: u64,
    /// What holds.
    pub consistency: Consistency,
}

/// A round that is over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Its number: the clock that its steps end with.
    pub number: u64,
    /// Whose contributions count.
    pub members: BTreeSet<SessionId>,
}

/// A board cannot have been like this.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct CannotBe(&'static str);

/// Clocks, rounds and modes of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Board {
    seats: BTreeMap<SessionId, Seat>,
    /// Who has none any more, and may take another: the number of the last one.
    left: BTreeMap<SessionId, u64>,
    /// The lowest clock of any seat. It never goes back, and stays when the last one is gone.
    floor: u64,
    /// The last round that was closed.
    last: Round,
    /// By rising clock.
    regimes: Vec<Regime>,
}

impl Default for Board {
    fn default() -> Self {
        Board {
            seats: BTreeMap::new(),
            left: BTreeMap::new(),
            floor: 0,
            last: Round::default(),
            regimes: vec![Regime::default()],
        }
    }
}

impl Board {
    /// Puts back a board from its parts.
    ///
    /// # Errors
    /// They do not fit together.
    pub fn restore(
        seats: BTreeMap<SessionId, Seat>,
        left: BTreeMap<SessionId, u64>,
        floor: u64,
        last: Round,
        regimes: Vec<Regime>,
    ) -> Result<Self, CannotBe> {
        let clocks = seats.values().map(|seat| seat.clock);
        if seats.len() + left.len() > CELLS_MAX || last.members.len() > CELLS_MAX {
            return Err(CannotBe("there are too many sessions"));
        }
        if left.keys().any(|session| seats.contains_key(session)) {
            return Err(CannotBe("a session has left and has a seat"));
        }
        if clocks.clone().chain([floor, last.number]).any(|clock| clock > CLOCK_MAX) {
            return Err(CannotBe("a clock is beyond all bounds"));
        }
        if seats.values().any(|seat| seat.contributed > seat.clock || seat.counted > seat.clock) {
            return Err(CannotBe("a session contributed to a round that it has not come to"));
        }
        if clocks.min().is_some_and(|lowest| lowest != floor) {
            return Err(CannotBe("the floor is not the lowest clock"));
        }
        let rise = regimes.is_sorted_by(|one, next| one.since < next.since);
        if regimes.is_empty() || regimes.len() > REGIMES_MAX || !rise {
            return Err(CannotBe("the modes do not follow each other"));
        }
        if regimes.iter().any(|regime| regime.consistency.validate().is_err()) {
            return Err(CannotBe("a mode is out of bounds"));
        }
        Ok(Board { seats, left, floor, last, regimes })
    }

    /// Everybody, by session.
    #[must_use]
    pub fn seats(&self) -> &BTreeMap<SessionId, Seat> {
        &self.seats
    }

    /// Sessions that gave their seat back, each with the number of the last one.
    #[must_use]
    pub fn left(&self) -> &BTreeMap<SessionId, u64> {
        &self.left
    }

    /// Whether a session has a seat, or had one: it is one that there is.
    #[must_use]
    pub fn knows(&self, session: SessionId) -> bool {
        self.seats.contains_key(&session) || self.left.contains_key(&session)
    }

    /// The slowest one's clock; that of the last one when nobody is there. A joiner starts here.
    #[must_use]
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// The last round that was closed.
    #[must_use]
    pub fn last_round(&self) -> &Round {
        &self.last
    }

    /// The modes that hold now and later, by rising clock.
    #[must_use]
    pub fn regimes(&self) -> &[Regime] {
        &self.regimes
    }

    /// The modes of a step that begins at `clock`.
    #[must_use]
    pub fn at(&self, clock: u64) -> &Consistency {
        let holds = self.regimes.iter().rev().find(|regime| regime.since <= clock);
        &holds.unwrap_or(&self.regimes[0]).consistency
    }

    /// The modes that hold for whoever comes furthest.
    #[must_use]
    pub fn newest(&self) -> &Consistency {
        &self.regimes[self.regimes.len() - 1].consistency
    }

    /// What the seat of a session becomes that has finished `clock` steps, and contributed to the round of the last one or not. Nothing if it says nothing new, or of a
    /// seat that the session gave back. A joiner starts at the floor, unless it was further (its seat was lost with a shard that was set back).
    #[must_use]
    pub fn ticked(
        &self,
        session: SessionId,
        number: u64,
        clock: u64,
        contributes: bool,
    ) -> Option<Seat> {
        if self.left.get(&session).is_some_and(|left| number <= *left) {
            return None;
        }
        let Some(seat) = self.seats.get(&session) else {
            let contributed = if contributes && clock >= self.floor { clock } else { 0 };
            return Some(Seat { number, clock: clock.max(self.floor), contributed, counted: 0 });
        };
        // A round that was closed meanwhile has taken it further: it contributed to that one in vain.
        if number < seat.number || (clock <= seat.clock && number == seat.number) {
            return None;
        }
        let contributed = if contributes && clock > seat.clock { clock } else { seat.contributed };
        Some(Seat { number, clock: clock.max(seat.clock), contributed, counted: seat.counted })
    }

    /// Whether it is news that a session gives back its seat of this number. It may not have that one yet: what would take it can still be under way.
    #[must_use]
    pub fn leaves(&self, session: SessionId, number: u64) -> bool {
        match self.seats.get(&session) {
            Some(seat) => seat.number <= number,
            None => self.left.get(&session).copied().unwrap_or_default() < number,
        }
    }

    /// Whether one more session finds a seat.
    #[must_use]
    pub fn has_room(&self, session: SessionId) -> bool {
        self.seats.len() + self.left.len() < CELLS_MAX || self.knows(session)
    }

    /// Whether a session may begin its next step: it is not further ahead of the slowest than the modes of that step allow, and if its last step contributed to a
    /// round, that round is closed. Who has no seat may not.
    #[must_use]
    pub fn may_begin(&self, session: SessionId) -> bool {
        let Some(Seat { clock, .. }) = self.seats.get(&session) else { return false };
        let bound = self.at(*clock).bound();
        let near = bound.is_none_or(|bound| clock - self.floor <= bound.into());
        let in_round = *clock > 0 && self.at(clock - 1).backup_workers().is_some();
        near && (!in_round || self.last.number >= *clock)
    }

    /// The round that is open: the first after the last one whose steps have rounds.
    #[must_use]
    pub fn open_round(&self) -> Option<u64> {
        let after = |at: usize| self.regimes.get(at + 1).map_or(u64::MAX, |next| next.since);
        let mut regimes = self.regimes.iter().enumerate();
        regimes.find_map(|(at, regime)| {
            let first = self.last.number.max(regime.since);
            let has = regime.consistency.backup_workers().is_some() && first < after(at);
            has.then_some(first + 1)
        })
    }

    /// The round that is to be closed now: all but the backup workers have finished its step. Rounds that nobody contributed to are closed together with the next
    /// one that is due: after a shard was set back, or told a clock that cannot be, there may be more of them than anybody can count.
    #[must_use]
    pub fn due(&self) -> Option<Round> {
        let open = self.open_round()?;
        let backup_workers = self.at(open - 1).backup_workers()? as usize;
        let there = self.seats.values().filter(|seat| seat.clock >= open).count();
        if there == 0 || there + backup_workers < self.seats.len() {
            return None;
        }
        let mut clocks: Vec<u64> = self.seats.values().map(|seat| seat.clock).collect();
        clocks.sort_unstable();
        let slowest = clocks[backup_workers.min(clocks.len() - 1)];
        let until = self.regimes.iter().map(|regime| regime.since).find(|since| *since >= open);
        let reach = slowest.min(until.unwrap_or(u64::MAX));
        let contributed = self.seats.values().map(|seat| seat.contributed);
        let number = contributed.filter(|round| (open..=reach).contains(round)).min();
        let number = number.unwrap_or(reach);
        let counts =
            |(session, seat): (&SessionId, &Seat)| (seat.contributed == number).then_some(*session);
        Some(Round { number, members: self.seats.iter().filter_map(counts).collect() })
    }

    /// From which clock other modes can hold for everybody: nobody has begun a step there.
    #[must_use]
    pub fn boundary(&self) -> u64 {
        let furthest = self.seats.values().map(|seat| seat.clock).max();
        furthest
            .map_or(self.floor, |clock| clock + 1)
            .max(self.regimes[self.regimes.len() - 1].since)
            .min(CLOCK_MAX)
    }

    /// Applies what [`Board::ticked`] said.
    pub fn tick(&mut self, session: SessionId, seat: Seat) {
        self.left.remove(&session);
        self.seats.insert(session, seat);
        self.settle();
    }

    /// A session waits for nobody any more, and nobody for it, until it takes a seat of a higher number.
    pub fn leave(&mut self, session: SessionId, number: u64) {
        if self.leaves(session, number) {
            self.seats.remove(&session);
            self.left.insert(session, number);
            self.settle();
        }
    }

    /// The board is an older one than sessions know. They take their seats again with what they tell next; who gave its seat back since then tells nothing, and would be waited
    /// for by those whom it waits for.
    pub fn set_back(&mut self) {
        self.seats.clear();
    }

    /// Sessions have ended.
    pub fn close(&mut self, closed: &ClosedSessions) {
        self.seats.retain(|session, _| !closed.contains(*session));
        self.left.retain(|session, _| !closed.contains(*session));
        self.settle();
    }

    /// Other modes hold from a clock on.
    pub fn set(&mut self, regime: Regime) {
        let full = self.regimes.len() == REGIMES_MAX;
        if let Some(last) = self.regimes.last_mut()
            && (full || last.since >= regime.since)
        {
            last.consistency = regime.consistency;
        } else {
            self.regimes.push(regime);
        }
        self.settle();
    }

    /// A round is over. Who was not in time goes on with the next one.
    pub fn end_round(&mut self, round: Round) {
        for (session, seat) in &mut self.seats {
            seat.clock = seat.clock.max(round.number);
            if round.members.contains(session) {
                seat.counted = round.number;
            }
        }
        self.last = round;
        self.settle();
    }

    /// Nobody is left who knows of the last round. Not for the board that decides rounds.
    pub fn forget_round(&mut self) {
        self.last = Round::default();
    }

    /// Restores what follows from the seats.
    fn settle(&mut self) {
        if let Some(lowest) = self.seats.values().map(|seat| seat.clock).min() {
            self.floor = lowest;
        }
        // Of a step that begins at the floor, the modes of the one before are asked for too.
        while self.regimes.get(1).is_some_and(|next| next.since < self.floor) {
            self.regimes.remove(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::consistency::Mode;

    fn session(number: u64) -> SessionId {
        SessionId(number)
    }

    fn board(consistency: Consistency) -> Board {
        let mut board = Board::default();
        board.set(Regime { since: board.boundary(), consistency });
        board
    }

    fn tick(board: &mut Board, number: u64, clock: u64, contributes: bool) {
        if let Some(seat) = board.ticked(session(number), 1, clock, contributes) {
            board.tick(session(number), seat);
        }
    }

    fn clock(board: &Board, number: u64) -> u64 {
        board.seats()[&session(number)].clock
    }

    #[test]
    fn a_joiner_starts_at_the_slowest_and_one_that_leaves_holds_nobody_back() {
        let mut board = board(Consistency::all(Mode::Ssp { bound: 1 }));
        (1..=2).for_each(|number| tick(&mut board, number, 0, false));
        tick(&mut board, 1, 1, false);
        assert!(board.may_begin(session(1)) && !board.may_begin(session(3)));
        tick(&mut board, 1, 2, false);
        assert!(!board.may_begin(session(1)), "2 is more than 1 ahead of 0");
        board.leave(session(2), 1);
        assert!(board.may_begin(session(1)));
        tick(&mut board, 3, 0, false);
        assert_eq!((clock(&board, 3), board.floor()), (2, 2));
        board.close(&ClosedSessions { high_water: 3, open: [].into() });
        tick(&mut board, 4, 0, false);
        assert_eq!(clock(&board, 4), 2, "nobody was there, and the job is as far as it was");
    }

    #[test]
    fn a_change_of_mode_holds_from_a_clock_that_nobody_has_come_to() {
        let mut board = board(Consistency::all(Mode::Ssp { bound: 3 }));
        (1..=2).for_each(|number| tick(&mut board, number, 0, false));
        tick(&mut board, 1, 2, false);
        assert_eq!(board.boundary(), 3);
        board.set(Regime {
            since: 3,
            consistency: Consistency::all(Mode::Sync { backup_workers: 0 }),
        });
        assert_eq!(board.open_round(), Some(4));
        assert!(board.may_begin(session(1)), "step 2 is still ssp's");
        tick(&mut board, 1, 3, false);
        assert!(board.may_begin(session(1)), "the first of the new mode waits for no round");
        tick(&mut board, 1, 4, true);
        assert!(!board.may_begin(session(1)) && board.due().is_none());
        (1..=3).for_each(|clock| tick(&mut board, 2, clock, false));
        assert_eq!(board.due(), None);
        tick(&mut board, 2, 4, true);
        let round = board.due().expect("both are there");
        assert_eq!(round, Round { number: 4, members: [session(1), session(2)].into() });
        board.end_round(round);
        assert!(board.may_begin(session(1)) && board.due().is_none());
        board.set(Regime { since: board.boundary(), consistency: Consistency::default() });
        (1..=2).for_each(|number| tick(&mut board, number, 5, true));
        board.end_round(board.due().expect("the step at 4 began in a round"));
        assert_eq!(board.open_round(), None);
        assert!(board.may_begin(session(1)));
    }

    #[test]
    fn the_backup_worker_is_not_waited_for_and_goes_on_with_the_next_round() {
        let mut board = board(Consistency::all(Mode::Sync { backup_workers: 1 }));
        (1..=3).for_each(|number| tick(&mut board, number, 0, false));
        tick(&mut board, 1, 1, true);
        assert_eq!(board.due(), None);
        // It comes in time, and has nothing to say.
        tick(&mut board, 2, 1, false);
        let round = board.due().expect("two of three");
        assert_eq!(round.members, [session(1)].into());
        board.end_round(round);
        assert_eq!((clock(&board, 3), board.due()), (1, None));
        tick(&mut board, 3, 1, true);
        let late = board.seats()[&session(3)];
        assert_eq!((late.clock, late.counted), (1, 0), "what it computed is dropped");
        tick(&mut board, 3, 2, true);
        tick(&mut board, 1, 2, true);
        let round = board.due().expect("another two of three");
        board.end_round(round);
        assert_eq!(board.seats()[&session(3)].counted, 2);
    }

    #[test]
    fn a_clock_that_nobody_can_have_costs_one_round_and_the_board_can_still_be_copied() {
        let mut board = board(Consistency::all(Mode::Sync { backup_workers: 0 }));
        tick(&mut board, 2, 7, true);
        tick(&mut board, 1, CLOCK_MAX, true);
        let mut rounds = Vec::new();
        while let Some(round) = board.due() {
            rounds.push((round.number, round.members.len()));
            board.end_round(round);
        }
        assert_eq!(rounds, [(7, 1)], "2 was never at 8");
        board.leave(session(2), 1);
        let last = board.due().expect("1 is alone");
        assert_eq!((last.number, last.members), (CLOCK_MAX, [session(1)].into()));
        board.end_round(board.due().expect("the same"));
        assert_eq!((board.due(), board.boundary()), (None, CLOCK_MAX));
        board.set(Regime { since: board.boundary(), consistency: Consistency::default() });
        let Board { seats, left, floor, last, regimes } = board.clone();
        assert!(regimes.iter().all(|regime| regime.since <= CLOCK_MAX));
        assert_eq!(Board::restore(seats, left, floor, last, regimes), Ok(board));
    }

    #[test]
    fn what_comes_late_from_a_seat_that_was_given_back_neither_takes_nor_gives_one() {
        let mut board = board(Consistency::all(Mode::Ssp { bound: 0 }));
        let tick = |board: &mut Board, number, clock| {
            let seat = board.ticked(session(1), number, clock, false);
            seat.into_iter().for_each(|seat| board.tick(session(1), seat));
        };
        tick(&mut board, 1, 0);
        tick(&mut board, 1, 3);
        board.leave(session(1), 1);
        tick(&mut board, 1, 9);
        assert!(board.seats().is_empty(), "it was under way when the session left");
        tick(&mut board, 2, 0);
        assert_eq!((clock(&board, 1), board.left().len()), (3, 0), "it comes back");
        tick(&mut board, 1, 9);
        board.leave(session(1), 1);
        assert_eq!(clock(&board, 1), 3, "the old seat's");
        board.leave(session(1), 2);
        board.close(&ClosedSessions { high_water: 1, open: [].into() });
        assert_eq!((board.seats().len(), board.left().len()), (0, 0), "nothing is kept for ever");
        // It left before what was to take the seat arrived.
        board.leave(session(1), 3);
        tick(&mut board, 3, 9);
        assert!(board.seats().is_empty() && !board.leaves(session(1), 3));
        // A board that was set back has an older seat than the session: it is that of the newer one then.
        tick(&mut board, 4, 5);
        tick(&mut board, 5, 2);
        let seat = board.seats()[&session(1)];
        assert_eq!((seat.number, seat.clock), (5, 5));
    }

    #[test]
    fn who_gave_its_seat_back_is_not_waited_for_on_a_board_that_is_older() {
        let mut board = board(Consistency::all(Mode::Ssp { bound: 1 }));
        (1..=2).for_each(|number| tick(&mut board, number, 0, false));
        let mut older = board.clone();
        board.leave(session(2), 1);
        older.set_back();
        tick(&mut older, 1, 9, false);
        assert!(older.may_begin(session(1)), "2 has left since then");
        tick(&mut older, 2, 7, false);
        assert_eq!(clock(&older, 2), 9, "or it has not, and comes again");
    }

    #[test]
    fn rounds_that_are_closed_together_end_where_other_modes_begin() {
        let mut board = board(Consistency::all(Mode::Sync { backup_workers: 1 }));
        board.set(Regime { since: 5, consistency: Consistency::default() });
        tick(&mut board, 2, 0, false);
        tick(&mut board, 1, 9, false);
        let due = board.due().expect("2 is not waited for");
        assert_eq!(due, Round { number: 5, members: BTreeSet::new() });
        board.end_round(due);
        assert_eq!((board.due(), clock(&board, 1), clock(&board, 2)), (None, 9, 5));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Tick { worker: u64, contributes: bool },
        Late { worker: u64, clock: u64, leaves: bool },
        Leave(u64),
        Set(Consistency),
    }

    fn event() -> impl Strategy<Value = Event> {
        let consistency = prop_oneof![
            Just(Consistency::default()),
            (0..4u32).prop_map(|bound| Consistency::all(Mode::Ssp { bound })),
            (0..3u32).prop_map(|k| Consistency::all(Mode::Sync { backup_workers: k })),
            (0..2u32).prop_map(Consistency::hybrid),
        ];
        prop_oneof![
            20 => (1..6u64, prop::bool::weighted(0.8))
                .prop_map(|(worker, contributes)| Event::Tick { worker, contributes }),
            1 => (1..6u64).prop_map(Event::Leave),
            2 => (1..6u64, 0..100u64, prop::bool::ANY)
                .prop_map(|(worker, clock, leaves)| Event::Late { worker, clock, leaves }),
            1 => consistency.prop_map(Event::Set),
        ]
    }

    proptest! {
        /// Whatever workers and operators do: nobody begins a step that is further ahead than the bound, each round is closed once and in order, its members have
        /// all contributed to it, the floor never goes back, and somebody may always go on.
        #[test]
        fn bounds_hold_rounds_close_once_and_somebody_goes_on(events in prop::collection::vec(event(), 1..200)) {
            let mut board = Board::default();
            let mut closed = 0;
            // How often each took a seat.
            let mut taken = [0u64; 6];
            for event in events {
                let floor = board.floor();
                match event {
                    Event::Tick { worker, contributes } => {
                        let worker = session(worker);
                        // As a client: it joins, or finishes a step that it was allowed to begin.
                        let number = &mut taken[worker.0 as usize];
                        let next = match board.seats().get(&worker) {
                            None => {
                                *number += 1;
                                0
                            }
                            Some(seat) if board.may_begin(worker) => {
                                if let Some(bound) = board.at(seat.clock).bound() {
                                    prop_assert!(seat.clock - board.floor() <= u64::from(bound));
                                }
                                seat.clock + 1
                            }
                            Some(_) => continue,
                        };
                        let contributes = contributes && next > 0 && board.at(next - 1).backup_workers().is_some();
                        if let Some(seat) = board.ticked(worker, *number, next, contributes) {
                            board.tick(worker, seat);
                        }
                    }
                    Event::Leave(worker) => board.leave(session(worker), taken[worker as usize]),
                    Event::Late { worker, clock, leaves } => {
                        // Of the seat before the one that it has, or had last.
                        let number = taken[worker as usize].saturating_sub(1);
                        let before = board.clone();
                        if number > 0 && leaves {
                            board.leave(session(worker), number);
                        } else if number > 0 {
                            prop_assert_eq!(board.ticked(session(worker), number, clock, false), None);
                        }
                        prop_assert_eq!(&board, &before);
                    }
                    Event::Set(consistency) => {
                        let since = board.boundary();
                        prop_assert!(board.seats().values().all(|seat| seat.clock < since));
                        board.set(Regime { since, consistency });
                    }
                }
                while let Some(round) = board.due() {
                    prop_assert!(round.number > closed);
                    closed = round.number;
                    let contributed = |member: &SessionId| board.seats()[member].contributed == closed;
                    prop_assert!(round.members.iter().all(contributed));
                    board.end_round(round);
                }
                prop_assert!(board.floor() >= floor);
                let mut seats = board.seats().keys();
                prop_assert!(board.seats().is_empty() || seats.any(|&one| board.may_begin(one)));
                let Board { seats, left, floor, last, regimes } = board.clone();
                prop_assert_eq!(&Board::restore(seats, left, floor, last, regimes), &Ok(board.clone()));
            }
        }
    }
}
