//! Modes, clocks and rounds between the wire and the types of `downpour_core`.

use std::collections::{BTreeMap, BTreeSet};

use downpour_core::cells::CELLS_MAX;
use downpour_core::clocks::{Board, CLOCK_MAX, Regime, Round, Seat};
use downpour_core::consistency::{Consistency, Mode};
use downpour_core::id::{SessionId, VariableId};
use downpour_core::spec::{SHARDS_MAX, check_range};

use crate::{Invalid, v1};

/// Longest that a server lets a client wait for others before it answers.
pub const WAIT_MS_MAX: u32 = 10_000;

impl From<Mode> for v1::ConsistencyMode {
    fn from(mode: Mode) -> Self {
        use v1::consistency_mode::Mode as Wire;
        let mode = match mode {
            Mode::Async => Wire::Async(true),
            Mode::Ssp { bound } => Wire::Ssp(bound),
            Mode::Sync { backup_workers } => Wire::Sync(backup_workers),
        };
        v1::ConsistencyMode { mode: Some(mode) }
    }
}

impl TryFrom<v1::ConsistencyMode> for Mode {
    type Error = Invalid;

    fn try_from(mode: v1::ConsistencyMode) -> Result<Self, Invalid> {
        use v1::consistency_mode::Mode as Wire;
        let mode = match mode.mode {
            Some(Wire::Async(true)) => Mode::Async,
            Some(Wire::Ssp(bound)) => Mode::Ssp { bound },
            Some(Wire::Sync(backup_workers)) => Mode::Sync { backup_workers },
            Some(Wire::Async(false)) | None => {
                return Err(Invalid::new("consistency.mode", "is not given"));
            }
        };
        mode.validate()?;
        Ok(mode)
    }
}

impl From<&Consistency> for v1::Consistency {
    fn from(consistency: &Consistency) -> Self {
        let variable = |(id, mode): (&VariableId, &Mode)| v1::VariableMode {
            variable: id.0,
            mode: Some((*mode).into()),
        };
        v1::Consistency {
            tables: Some(consistency.tables.into()),
            dense: Some(consistency.dense.into()),
            variables: consistency.variables.iter().map(variable).collect(),
        }
    }
}

impl TryFrom<v1::Consistency> for Consistency {
    type Error = Invalid;

    fn try_from(consistency: v1::Consistency) -> Result<Self, Invalid> {
        let v1::Consistency { tables, dense, variables } = consistency;
        let shared =
            |mode: Option<v1::ConsistencyMode>| mode.map_or(Ok(Mode::Async), Mode::try_from);
        if !variables.is_sorted_by(|one, next| one.variable < next.variable) {
            return Err(Invalid::new("consistency.variables", "do not strictly increase"));
        }
        let variables = variables.into_iter().map(variable_mode).collect::<Result<_, _>>()?;
        Ok(Consistency { tables: shared(tables)?, dense: shared(dense)?, variables })
    }
}

/// A variable and its mode.
///
/// # Errors
/// One of them is not given.
pub fn variable_mode(of: v1::VariableMode) -> Result<(VariableId, Mode), Invalid> {
    if of.variable == 0 {
        return Err(Invalid::new("consistency.variables.variable", "is not given"));
    }
    Ok((VariableId(of.variable), of.mode.unwrap_or_default().try_into()?))
}

impl From<&Round> for v1::Round {
    fn from(round: &Round) -> Self {
        let members = round.members.iter().map(|member| member.0).collect();
        v1::Round { number: round.number, members }
    }
}

impl TryFrom<v1::Round> for Round {
    type Error = Invalid;

    fn try_from(round: v1::Round) -> Result<Self, Invalid> {
        check_range("round.number", round.number, 0, CLOCK_MAX)?;
        check_range("round.members", round.members.len() as u64, 0, CELLS_MAX as u64)?;
        if !round.members.is_sorted_by(|one, next| one < next) || round.members.first() == Some(&0)
        {
            return Err(Invalid::new("round.members", "are not numbers that strictly increase"));
        }
        let members: BTreeSet<SessionId> = round.members.into_iter().map(SessionId).collect();
        Ok(Round { number: round.number, members })
    }
}

impl From<&Regime> for v1::Regime {
    fn from(regime: &Regime) -> Self {
        v1::Regime { since: regime.since, consistency: Some((&regime.consistency).into()) }
    }
}

impl TryFrom<v1::Regime> for Regime {
    type Error = Invalid;

    fn try_from(regime: v1::Regime) -> Result<Self, Invalid> {
        check_range("regime.since", regime.since, 0, CLOCK_MAX)?;
        let consistency = regime.consistency.unwrap_or_default().try_into()?;
        Ok(Regime { since: regime.since, consistency })
    }
}

/// A session's seat as the wire has it.
#[must_use]
pub fn tick(session: SessionId, seat: Seat) -> v1::Tick {
    let Seat { number, clock, contributed, counted } = seat;
    v1::Tick { session: session.0, clock, contributed, counted, seat: number }
}

/// A session and its seat.
///
/// # Errors
/// They cannot be.
pub fn seat(tick: v1::Tick) -> Result<(SessionId, Seat), Invalid> {
    let v1::Tick { session, clock, contributed, counted, seat: number } = tick;
    check_range("tick.session", session, 1, u64::MAX)?;
    check_range("tick.clock", clock, 0, CLOCK_MAX)?;
    check_range("tick.contributed", contributed, 0, clock)?;
    check_range("tick.counted", counted, 0, clock)?;
    Ok((SessionId(session), Seat { number, clock, contributed, counted }))
}

/// A session and the number of the seat that it gave back.
///
/// # Errors
/// One of them is not given.
pub fn left(left: v1::Left) -> Result<(SessionId, u64), Invalid> {
    check_range("left.session", left.session, 1, u64::MAX)?;
    check_range("left.seat", left.seat, 1, u64::MAX)?;
    Ok((SessionId(left.session), left.seat))
}

impl From<&Board> for v1::Board {
    fn from(board: &Board) -> Self {
        v1::Board {
            seats: board.seats().iter().map(|(session, of)| tick(*session, *of)).collect(),
            floor: board.floor(),
            last_round: Some(board.last_round().into()),
            regimes: board.regimes().iter().map(Into::into).collect(),
            left: board
                .left()
                .iter()
                .map(|(session, seat)| v1::Left { session: session.0, seat: *seat })
                .collect(),
        }
    }
}

impl TryFrom<v1::Board> for Board {
    type Error = Invalid;

    fn try_from(board: v1::Board) -> Result<Self, Invalid> {
        let v1::Board { seats, floor, last_round, regimes, left: gone } = board;
        if !seats.is_sorted_by(|one, next| one.session < next.session) {
            return Err(Invalid::new("board.seats", "do not strictly increase"));
        }
        if !gone.is_sorted_by(|one, next| one.session < next.session) {
            return Err(Invalid::new("board.left", "does not strictly increase"));
        }
        let gone = gone.into_iter().map(left).collect::<Result<BTreeMap<_, _>, _>>()?;
        let seats = seats.into_iter().map(seat).collect::<Result<BTreeMap<_, _>, _>>()?;
        let last = last_round.unwrap_or_default().try_into()?;
        let regimes = regimes.into_iter().map(Regime::try_from).collect::<Result<Vec<_>, _>>()?;
        let restored = Board::restore(seats, gone, floor, last, regimes);
        restored.map_err(|cannot| Invalid::new("board", cannot.to_string()))
    }
}

/// Checks a [`v1::AdvanceRequest`].
///
/// # Errors
/// Names the first field that is wrong.
pub fn advance_request(request: &v1::AdvanceRequest) -> Result<(), Invalid> {
    check_range("job", request.job, 1, u64::MAX)?;
    check_range("incarnation", request.incarnation, 1, u64::MAX)?;
    check_range("epoch", request.epoch, 1, u64::MAX)?;
    check_range("session", request.session, 1, u64::MAX)?;
    check_range("seat", request.seat, 1, u64::MAX)?;
    check_range("clock", request.clock, 0, CLOCK_MAX)?;
    check_range("wait_ms", request.wait_ms.into(), 0, WAIT_MS_MAX.into())?;
    if request.contributes && request.clock == 0 {
        return Err(Invalid::new("contributes", "is given although no step was finished"));
    }
    Ok(())
}

/// Checks a [`v1::EndRoundRequest`], and reads its round.
///
/// # Errors
/// Names the first field that is wrong.
pub fn end_round_request(request: &v1::EndRoundRequest) -> Result<Round, Invalid> {
    check_range("job", request.job, 1, u64::MAX)?;
    check_range("incarnation", request.incarnation, 1, u64::MAX)?;
    check_range("parts", request.parts.len() as u64, 0, SHARDS_MAX.into())?;
    if !request.parts.is_sorted_by(|one, next| one.shard < next.shard) {
        return Err(Invalid::new("parts.shard", "must strictly increase"));
    }
    for part in &request.parts {
        check_range("parts.epoch", part.epoch, 1, u64::MAX)?;
    }
    let round = request.round.clone().ok_or_else(|| Invalid::new("round", "is not given"))?;
    check_range("round.number", round.number, 1, CLOCK_MAX)?;
    round.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board() -> Board {
        let mut board = Board::default();
        let mixed = Consistency {
            variables: [(VariableId(2), Mode::Ssp { bound: 7 })].into(),
            ..Consistency::hybrid(1)
        };
        board.set(Regime { since: board.boundary(), consistency: mixed });
        for (session, clock) in [(4, 0), (9, 0), (4, 1)] {
            let session = SessionId(session);
            if let Some(seat) = board.ticked(session, 1, clock, clock > 0) {
                board.tick(session, seat);
            }
        }
        board.tick(SessionId(11), Seat { number: 3, ..board.seats()[&SessionId(9)] });
        board.leave(SessionId(11), 3);
        board.end_round(board.due().expect("one of two is a backup worker"));
        board
    }

    #[test]
    fn a_board_survives_the_wire() {
        assert_eq!(Board::try_from(v1::Board::from(&board())), Ok(board()));
    }

    #[test]
    fn what_cannot_be_is_refused_by_field() {
        let refused = |change: &dyn Fn(&mut v1::Board)| {
            let mut wire = v1::Board::from(&board());
            change(&mut wire);
            Board::try_from(wire).expect_err("wrong").field
        };
        assert_eq!(refused(&|board| board.seats.swap(0, 1)), "board.seats");
        assert_eq!(refused(&|board| board.seats[0].clock = u64::MAX), "tick.clock");
        assert_eq!(refused(&|board| board.seats[0].counted = 99), "tick.counted");
        assert_eq!(refused(&|board| board.floor = 0), "board");
        assert_eq!(refused(&|board| board.regimes.clear()), "board");
        assert_eq!(refused(&|board| board.left[0].session = 4), "board", "it has a seat");
        assert_eq!(refused(&|board| board.left[0].seat = 0), "left.seat");
        assert_eq!(refused(&|board| board.left.push(board.left[0])), "board.left");
        assert_eq!(refused(&|board| board.regimes[0].since = u64::MAX), "regime.since");
        let mode = Some(v1::ConsistencyMode::default());
        let none = move |board: &mut v1::Board| {
            board.regimes[0].consistency =
                Some(v1::Consistency { tables: mode, ..Default::default() });
        };
        assert_eq!(refused(&none), "consistency.mode");
        let members = |board: &mut v1::Board| {
            board.last_round = Some(v1::Round { number: 1, members: vec![3, 3] });
        };
        assert_eq!(refused(&members), "round.members");
        let many = |board: &mut v1::Board| {
            let members = (1..=CELLS_MAX as u64 + 1).collect();
            board.last_round = Some(v1::Round { number: 1, members });
        };
        assert_eq!(refused(&many), "round.members", "more than a copy of the shard could have");
    }

    #[test]
    fn a_malformed_advance_is_refused_by_field() {
        let right = v1::AdvanceRequest {
            job: 1,
            incarnation: 1,
            epoch: 1,
            session: 1,
            seat: 1,
            ..Default::default()
        };
        assert_eq!(advance_request(&right), Ok(()));
        let refused = |request| advance_request(&request).expect_err("wrong").field;
        assert_eq!(refused(v1::AdvanceRequest { session: 0, ..right }), "session");
        assert_eq!(refused(v1::AdvanceRequest { seat: 0, ..right }), "seat");
        assert_eq!(refused(v1::AdvanceRequest { clock: u64::MAX, ..right }), "clock");
        assert_eq!(refused(v1::AdvanceRequest { wait_ms: u32::MAX, ..right }), "wait_ms");
        assert_eq!(refused(v1::AdvanceRequest { contributes: true, ..right }), "contributes");
    }
}
