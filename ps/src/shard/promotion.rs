//! Fence, level, serve (docs/protocol.md 5).

use downpour_core::id::{Epoch, Lsn, ServerRef};
use thiserror::Error;

use super::{Role, Shard};
use crate::record::Record;
use crate::state::CannotApply;

/// What a candidate does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Promotion {
    /// Ask these members to adopt the epoch.
    Fence(Vec<ServerRef>),
    /// Fetch what a member has after this position.
    Fetch {
        /// The member that is furthest.
        from: ServerRef,
        /// Last position here.
        after: Lsn,
    },
    /// Wait for these members: they are being sent what they lack.
    Level(Vec<ServerRef>),
    /// There is nothing to do: it serves, or is a candidate no longer.
    Over,
}

/// A member's answer to a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// Highest epoch it has seen; above the one that was asked for: the candidate was itself replaced.
    pub epoch: Epoch,
    /// It has everything up to here.
    pub last: Lsn,
    /// It cannot say yet.
    pub not_ready: bool,
}

/// A member has records that are not of this replica's history, which the protocol makes impossible: it must leave the set.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{member} is at {last}, which is not in the history here")]
pub struct Diverged {
    /// Which.
    pub member: ServerRef,
    /// Its position.
    pub last: Lsn,
}

impl Shard {
    /// A candidate asks this member to adopt `epoch`, to refuse lower ones for ever, and to say how far it is.
    pub fn fence(&mut self, epoch: Epoch, candidate: ServerRef) -> Fenced {
        self.adopt(epoch, Some(candidate));
        // Epochs have one primary each: nobody else can be the candidate of an epoch in which this replica is.
        let not_ready = !matches!(self.role, Role::Backup) || self.differs;
        if epoch == self.epoch && !not_ready {
            self.leader = Some(candidate);
        }
        Fenced { epoch: self.epoch, last: self.last(), not_ready }
    }

    /// What to do next to serve.
    #[must_use]
    pub fn promotion(&self) -> Promotion {
        let Role::Promoting(set) = &self.role else { return Promotion::Over };
        let unfenced: Vec<_> =
            set.members().filter(|(_, m)| m.acked.is_none()).map(|(server, _)| server).collect();
        if !unfenced.is_empty() {
            return Promotion::Fence(unfenced);
        }
        let last = self.last();
        let furthest = set.members().max_by_key(|(_, member)| member.acked);
        match furthest {
            Some((from, member)) if member.acked > Some(last) => {
                Promotion::Fetch { from, after: last }
            }
            _ => Promotion::Level(
                (set.members().filter(|(_, m)| m.acked != Some(last)))
                    .map(|(server, _)| server)
                    .collect(),
            ),
        }
    }

    /// A member answered the fence of `epoch`.
    ///
    /// # Errors
    /// The member cannot be followed or levelled.
    pub fn fenced(
        &mut self,
        epoch: Epoch,
        member: ServerRef,
        answer: Fenced,
    ) -> Result<(), Diverged> {
        self.adopt(answer.epoch, None);
        if epoch != self.epoch || answer.epoch != epoch || answer.not_ready {
            return Ok(());
        }
        let Fenced { last, .. } = answer;
        let known = last > self.last() || self.state.lineage().contains(last);
        if let Role::Promoting(set) = &mut self.role
            && let Some(position) = set.get_mut(member)
            && position.acked.is_none()
        {
            if !known {
                return Err(Diverged { member, last });
            }
            position.acked = Some(last);
            position.rewind();
        }
        self.progress();
        Ok(())
    }

    /// Records that a member had and this candidate lacked.
    ///
    /// # Errors
    /// They do not continue the history here.
    pub fn fetched(&mut self, epoch: Epoch, records: Vec<Record>) -> Result<(), CannotApply> {
        if epoch == self.epoch && matches!(self.role, Role::Promoting(_)) {
            self.follow(records, None)?;
        }
        self.progress();
        Ok(())
    }

    /// Members that [`Shard::fenced`] accepted before the fetch and that are not of the history that was fetched.
    #[must_use]
    pub fn diverged(&self) -> Vec<Diverged> {
        let Role::Promoting(set) = &self.role else { return Vec::new() };
        let stranger = |last: &Lsn| *last <= self.last() && !self.state.lineage().contains(*last);
        set.members()
            .filter_map(|(member, position)| Some((member, position.acked.filter(stranger)?)))
            .map(|(member, last)| Diverged { member, last })
            .collect()
    }
}
