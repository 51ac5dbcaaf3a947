//! Who waits for what: proposals by their place in the log, reads by the index that they need. Plain bookkeeping without a clock: a caller
//! that gave up has dropped its end.

use std::collections::BTreeMap;

use tokio::sync::oneshot;

use super::handle::Error;
use crate::state::Outcome;

/// Most proposals that wait to be committed.
const PROPOSALS_MAX: usize = 4096;

type ProposalReply = oneshot::Sender<Result<Outcome, Error>>;
pub(super) type ReadReply = oneshot::Sender<Result<(), Error>>;

/// Proposals that this member appended as leader.
#[derive(Debug, Default)]
pub(super) struct Proposals(BTreeMap<u64, (u64, ProposalReply)>);

impl Proposals {
    pub(super) fn full(&self) -> bool {
        self.0.len() >= PROPOSALS_MAX
    }

    pub(super) fn add(&mut self, index: u64, term: u64, reply: ProposalReply) {
        // What was appended here before was lost with its term.
        if let Some((_, replaced)) = self.0.insert(index, (term, reply)) {
            let _ = replaced.send(Err(Error::Overwritten));
        }
    }

    /// The entry at `index` is applied: it was the proposal if the term is the same.
    pub(super) fn applied(&mut self, index: u64, term: u64, outcome: Option<Outcome>) {
        let Some((proposed, reply)) = self.0.remove(&index) else { return };
        let _ = reply.send(match outcome {
            Some(outcome) if proposed == term => Ok(outcome),
            _ => Err(Error::Overwritten),
        });
    }

    /// A snapshot took the place of all entries up to `index`.
    pub(super) fn skipped(&mut self, index: u64) {
        let later = self.0.split_off(&(index + 1));
        self.abandon();
        self.0 = later;
    }

    /// Nobody knows what becomes of them.
    pub(super) fn abandon(&mut self) {
        for (_, reply) in std::mem::take(&mut self.0).into_values() {
            let _ = reply.send(Err(Error::Unknown));
        }
    }

    /// Forgets those whose callers gave up.
    pub(super) fn prune(&mut self) {
        self.0.retain(|_, (_, reply)| !reply.is_closed());
    }
}

/// Reads on their way: waiting to be asked for, asked (one ReadIndex carries all that waited), known to need an index.
#[derive(Debug, Default)]
pub(super) struct Reads {
    waiting: Vec<ReadReply>,
    asked: Option<(u64, Vec<ReadReply>)>,
    granted: Vec<(u64, ReadReply)>,
    last_context: u64,
}

impl Reads {
    pub(super) fn add(&mut self, reply: ReadReply) {
        self.waiting.push(reply);
    }

    /// The context of a ReadIndex to begin now, if any: the next batch leaves when the one before is answered.
    pub(super) fn begin(&mut self) -> Option<u64> {
        if self.asked.is_some() || self.waiting.is_empty() {
            return None;
        }
        self.last_context += 1;
        self.asked = Some((self.last_context, std::mem::take(&mut self.waiting)));
        Some(self.last_context)
    }

    /// The leadership was confirmed after the ReadIndex began: whoever has applied `index` may answer.
    pub(super) fn grant(&mut self, context: u64, index: u64) {
        if let Some((_, replies)) = self.asked.take_if(|(asked, _)| *asked == context) {
            self.granted.extend(replies.into_iter().map(|reply| (index, reply)));
        }
    }

    pub(super) fn answer(&mut self, applied: u64) {
        for (_, reply) in self.granted.extract_if(.., |(index, _)| *index <= applied) {
            let _ = reply.send(Ok(()));
        }
    }

    /// This member does not lead any more: Raft forgot what was asked.
    pub(super) fn fail(&mut self, leader: Option<u64>) {
        let asked = self.asked.take().into_iter().flat_map(|(_, replies)| replies);
        for reply in self.waiting.drain(..).chain(asked) {
            let _ = reply.send(Err(Error::NotLeader { leader }));
        }
    }

    /// Forgets those whose callers gave up.
    pub(super) fn prune(&mut self) {
        self.waiting.retain(|reply| !reply.is_closed());
        self.granted.retain(|(_, reply)| !reply.is_closed());
    }
}
