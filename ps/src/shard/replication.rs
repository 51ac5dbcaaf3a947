//! The log on its way to the members, and what a member does with it (docs/protocol.md 2.5 and 3).

use std::sync::Arc;

use downpour_core::id::{Epoch, Lsn, ServerRef};
use thiserror::Error;

use super::{Contact, Diverged, Role, Shard, may_acknowledge};
use crate::record::Record;
use crate::state::CannotApply;

/// What a primary or candidate sends to one member.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Of the sender.
    pub epoch: Epoch,
    /// Every member has everything up to here.
    pub commit: Lsn,
    /// Contiguous.
    pub records: Vec<Arc<Record>>,
    /// Of one of the records.
    pub check: Option<Check>,
    /// There is more to send.
    pub more: bool,
}

/// What a replica must have after a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// The record.
    pub lsn: Lsn,
    /// See [`ShardState::sample_digest`](crate::state::ShardState::sample_digest).
    pub digest: u64,
}

/// Bytes that a message has for the records of a shard, about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Nothing else is in the message: one record goes, whatever its size, or it would never go.
    Whole(usize),
    /// Others are in the message: what is larger than this waits for the next one.
    Rest(usize),
}

/// What a member gets.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// Of the sender.
    pub epoch: Epoch,
    /// Who sends.
    pub source: ServerRef,
    /// Every member has everything up to here.
    pub commit: Lsn,
    /// Contiguous.
    pub records: Vec<Record>,
    /// Of one of the records.
    pub check: Option<Check>,
}

/// What a member answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Highest epoch it has seen.
    pub epoch: Epoch,
    /// It has everything up to here.
    pub last: Lsn,
    /// Nothing is acknowledged.
    pub not_ready: bool,
    /// What it has differs from what a primary had: it must leave the set.
    pub differs: bool,
}

/// Why the log cannot be fetched here.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FetchRefused {
    /// The candidate was replaced.
    #[error("epoch {0} is known here")]
    Epoch(Epoch),
    /// The position is not in the history here, or the records after it were let go.
    #[error("the records after {0} are not here")]
    Position(Lsn),
}

impl Shard {
    /// The next records for `member`, as many as there is room for; nothing if it was sent everything.
    pub fn batch(&mut self, member: ServerRef, room: Room) -> Option<Batch> {
        let (bytes_max, whatever) = match room {
            Room::Whole(bytes) => (bytes, true),
            Room::Rest(bytes) => (bytes, false),
        };
        let (epoch, commit, last) = (self.epoch, self.commit, self.last());
        let set = match &mut self.role {
            Role::Promoting(set) | Role::Primary(set) => set,
            Role::Backup | Role::Joining | Role::Removed => return None,
        };
        let learner = set.learner.as_mut().filter(|learner| learner.server() == member);
        let (position, log) = match learner {
            Some(learner) => (&mut learner.position, &learner.log),
            None => (set.member_mut(member)?, &self.log),
        };
        position.acked?;
        if position.sent >= last && position.sent_commit >= commit {
            return None;
        }
        let mut bytes = 0;
        let mut records = Vec::new();
        for record in log.after(position.sent)? {
            bytes += record.bytes();
            if bytes > bytes_max && !(whatever && records.is_empty()) {
                break;
            }
            records.push(Arc::clone(record));
        }
        if let Some(record) = records.last() {
            position.sent = record.lsn;
        }
        position.sent_commit = commit;
        let sent = |check: &Check| records.iter().any(|record| record.lsn == check.lsn);
        let check = self.check.filter(sent);
        Some(Batch { epoch, commit, check, more: position.sent < last, records })
    }

    /// The connection to `member` broke, or it answered that it is not ready: what it did not acknowledge is sent again.
    pub fn rewind(&mut self, member: ServerRef) {
        if let Some(position) = self.wait_set_mut().and_then(|set| set.get_mut(member)) {
            position.rewind();
            self.effects.send = true;
        }
    }

    /// A member answered.
    ///
    /// # Errors
    /// It claims a position that is not in the history here.
    pub fn acked(&mut self, member: ServerRef, ack: Ack) -> Result<(), Diverged> {
        self.adopt(ack.epoch, None);
        if ack.epoch != self.epoch || ack.not_ready {
            return Ok(());
        }
        let (last, known) = (self.last(), self.state.lineage().contains(ack.last));
        let promoting = matches!(self.role, Role::Promoting(_));
        let Some(position) = self.wait_set_mut().and_then(|set| set.get_mut(member)) else {
            return Ok(());
        };
        // A candidate that has not fetched everything yet has members ahead of it.
        let ahead = promoting && ack.last > last;
        if !known && !ahead {
            return Err(Diverged { member, last: ack.last });
        }
        if let Some(acked) = &mut position.acked {
            *acked = ack.last.max(*acked);
            let acked = *acked;
            if let Role::Primary(set) = &mut self.role
                && let Some(learner) = set.learner.as_mut().filter(|one| one.server() == member)
            {
                learner.log.trim(acked);
            }
        }
        self.progress();
        Ok(())
    }

    /// A primary or candidate sends records. A lower epoch, a gap and a foreign history are refused by an answer that acknowledges none of it; and everything while this server
    /// is isolated: so that no former primary acknowledges what its set holds, one member of the set is enough. `contact`: as it is now.
    pub fn replicate(
        &mut self,
        incoming: Incoming,
        contact: Contact,
    ) -> (Ack, Result<(), CannotApply>) {
        self.adopt(incoming.epoch, Some(incoming.source));
        let backup =
            matches!(self.role, Role::Backup | Role::Joining) && may_acknowledge(contact, false);
        let mut followed = Ok(());
        if backup && incoming.epoch == self.epoch && !self.differs {
            self.leader = Some(incoming.source);
            followed = self.follow(incoming.records, incoming.check);
            if followed.is_ok() {
                self.commit = self.commit.max(incoming.commit.min(self.last()));
                self.log.trim(self.commit);
            }
        }
        let differs = self.differs;
        let not_ready = !backup || differs || followed.is_err();
        (Ack { epoch: self.epoch, last: self.last(), not_ready, differs }, followed)
    }

    /// Records after `after`, about `bytes_max` of them, for a candidate of `epoch` that fenced this member.
    ///
    /// # Errors
    /// The candidate was replaced, or the records are not here.
    pub fn fetch(
        &self,
        epoch: Epoch,
        after: Lsn,
        bytes_max: usize,
    ) -> Result<Vec<Arc<Record>>, FetchRefused> {
        if epoch != self.epoch || !matches!(self.role, Role::Backup) {
            return Err(FetchRefused::Epoch(self.epoch));
        }
        let kept = self.log.after(after).filter(|_| self.state.lineage().contains(after));
        let mut bytes = 0;
        let fits = |record: &&Arc<Record>| {
            let first = bytes == 0;
            bytes += record.bytes();
            first || bytes <= bytes_max
        };
        let records = kept.ok_or(FetchRefused::Position(after))?;
        Ok(records.take_while(fits).cloned().collect())
    }

    /// Applies what continues the history here and passes over what is part of it already.
    pub(super) fn follow(
        &mut self,
        records: Vec<Record>,
        check: Option<Check>,
    ) -> Result<(), CannotApply> {
        for record in records {
            if record.lsn <= self.last() && self.state.lineage().contains(record.lsn) {
                continue;
            }
            if record.lsn.epoch() > self.epoch {
                return Err(CannotApply::Fit(record.lsn));
            }
            self.effects.not_stored += self.state.apply(&record)?.not_stored;
            let lsn = record.lsn;
            self.log.push(Arc::new(record));
            if let Some(check) = check.filter(|check| check.lsn == lsn)
                && check.digest != self.state.sample_digest()
            {
                self.differs = true;
                return Err(CannotApply::Differs(lsn));
            }
        }
        Ok(())
    }
}
