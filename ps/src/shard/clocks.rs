//! Clocks and rounds (docs/protocol.md 7): what sessions tell shard 0, what follows from it, and the end of a round on every shard.

use downpour_core::clocks::{Regime, Round};
use downpour_core::consistency::Consistency;
use downpour_core::id::{Epoch, SessionId, ShardId};
use downpour_proto::v1::RetryReason;

use super::{Contact, Declined, Role, Shard, Ticket};
use crate::record::Body;

/// Where a job's clocks are.
pub const CLOCK_SHARD: ShardId = ShardId(0);

/// What a session says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Steps that it has finished.
    pub clock: u64,
    /// The last of them contributed to its round.
    pub contributes: bool,
    /// It begins none any more.
    pub leaves: bool,
    /// Which of its seats this is of, from 1.
    pub seat: u64,
}

/// What became of it at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advanced {
    /// So it stands, once the ticket [settles](Shard::settle).
    Seated(Ticket, Standing),
    /// Nothing was taken note of.
    Declined(Declined),
    /// The session has ended.
    SessionClosed,
}

/// How a session stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// It may begin its next step.
    pub may_begin: bool,
    /// Steps that it has finished, or that were closed without it.
    pub clock: u64,
    /// The slowest one's.
    pub floor: u64,
    /// The last round that its contributions were counted in.
    pub counted: u64,
    /// The last round that was closed.
    pub last_round: Round,
    /// Of its next step.
    pub consistency: Consistency,
    /// No step from here on has clocks.
    pub may_leave: bool,
}

impl Shard {
    /// A session tells its clock. Telling again what is known changes nothing.
    pub fn advance(
        &mut self,
        (epoch, view_version): (Epoch, u64),
        session: SessionId,
        told: Told,
        contact: Contact,
    ) -> Advanced {
        // A mode that the client knows must hold before it takes its seat.
        let ready = view_version <= self.view.version && self.id == CLOCK_SHARD;
        let may_log = self
            .may_log(epoch, contact)
            .and_then(|()| ready.then_some(()).ok_or(Declined::Retry(RetryReason::NotReady)));
        if let Err(declined) = may_log {
            return Advanced::Declined(declined);
        }
        if self.ended(session) {
            return Advanced::SessionClosed;
        }
        let board = self.state.board();
        if !board.has_room(session) {
            return Advanced::Declined(Declined::Retry(RetryReason::Overloaded));
        }
        let Told { clock, contributes, leaves, seat: number } = told;
        if leaves {
            if board.leaves(session, number) {
                self.append(Body::Leave(session, number));
            }
        } else if let Some(seat) = board.ticked(session, number, clock, contributes) {
            self.append(Body::Tick(session, seat));
        }
        self.decide();
        self.seated(epoch, session)
    }

    /// How a session stands that told its clock and waits. Nothing is told again: who has left meanwhile gets no seat by a request that nobody waits for any more.
    #[must_use]
    pub fn look(&self, epoch: Epoch, session: SessionId, contact: Contact) -> Advanced {
        match self.serving(epoch, contact) {
            Err(declined) => Advanced::Declined(declined),
            Ok(_) if self.ended(session) => Advanced::SessionClosed,
            Ok(_) => self.seated(epoch, session),
        }
    }

    fn seated(&self, epoch: Epoch, session: SessionId) -> Advanced {
        Advanced::Seated(self.ticket(epoch), self.standing(session))
    }

    /// For what every member must have by now before anybody is told.
    fn ticket(&self, epoch: Epoch) -> Ticket {
        Ticket { epoch, lsn: self.last(), repeated: false, refusal: None, staleness: None }
    }

    /// The last round that was decided here, where rounds are decided.
    ///
    /// # Errors
    /// This replica does not serve shard 0 in that epoch.
    pub fn decided(&self, epoch: Epoch, contact: Contact) -> Result<(Ticket, Round), Declined> {
        self.serving(epoch, contact)?;
        if self.id != CLOCK_SHARD {
            return Err(Declined::Retry(RetryReason::NotReady));
        }
        Ok((self.ticket(epoch), self.state.board().last_round().clone()))
    }

    fn ended(&self, session: SessionId) -> bool {
        self.state.cells().closed().contains(session) || self.view.sessions.contains(session)
    }

    /// The end of a round, as shard 0 [decided](Shard::decided) it, is brought: who calls this has it from there. Whoever brings it first has it applied here.
    ///
    /// # Errors
    /// It cannot be applied here now.
    pub fn end_round(
        &mut self,
        epoch: Epoch,
        round: Round,
        contact: Contact,
    ) -> Result<Ticket, Declined> {
        self.may_log(epoch, contact)?;
        if let Some(end) = self.state.resolve_round(round) {
            if self.id == CLOCK_SHARD {
                // Only here are rounds decided: what nobody decided here is known elsewhere only after this shard was set back.
                return Err(Declined::Retry(RetryReason::NotReady));
            }
            self.append(Body::EndRound(end));
        }
        Ok(self.ticket(epoch))
    }

    /// How a session stands.
    fn standing(&self, session: SessionId) -> Standing {
        let board = self.state.board();
        let seat = board.seats().get(&session).copied().unwrap_or_default();
        let later = board.regimes().iter().filter(|regime| regime.since > seat.clock);
        let calm = |consistency: &Consistency| !consistency.has_clocks();
        let consistency = board.at(seat.clock);
        Standing {
            may_begin: board.may_begin(session),
            clock: seat.clock,
            floor: board.floor(),
            counted: seat.counted,
            last_round: board.last_round().clone(),
            may_leave: calm(consistency) && later.map(|regime| &regime.consistency).all(calm),
            consistency: consistency.clone(),
        }
    }

    /// Whether a record that a client asks for can be logged now.
    fn may_log(&self, epoch: Epoch, contact: Contact) -> Result<(), Declined> {
        self.serving(epoch, contact)?;
        if self.too_few() {
            return Err(Declined::Retry(RetryReason::TooFewInSync));
        }
        if self.log.bytes() >= self.log_bytes_max {
            return Err(Declined::Retry(RetryReason::Overloaded));
        }
        Ok(())
    }

    /// Logs what follows from the clocks: the modes that the view has and the log has not, and rounds that are to be closed. It goes by records alone, so a new primary
    /// decides what the old one could not log any more.
    pub(super) fn decide(&mut self) {
        if self.id != CLOCK_SHARD || !matches!(self.role, Role::Primary(_)) {
            return;
        }
        let board = self.state.board();
        if self.view.consistency != *board.newest() {
            let (since, consistency) = (board.boundary(), self.view.consistency.clone());
            self.append(Body::Regime(Regime { since, consistency }));
        }
        while let Some(end) = self.state.board().due().and_then(|due| self.state.resolve_round(due))
        {
            self.append(Body::EndRound(end));
        }
    }
}
