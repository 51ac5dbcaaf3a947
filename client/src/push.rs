//! Sending gradients.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use downpour_core::cells::{Refusal, RefusalReason};
use downpour_core::id::{Epoch, Lsn, ShardId, VariableId};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep};

use crate::{Error, Pulled, StepRound};

/// Pushes that a shard had acknowledged and that are lost all the same: every copy of it died, and it goes on from a checkpoint (docs/protocol.md 8.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RolledBack {
    /// Which shard.
    pub shard: ShardId,
    /// That it goes on with.
    pub epoch: Epoch,
    /// Number of the first of these pushes among the session's to this shard.
    pub first: u64,
    /// Number of the last.
    pub last: u64,
    /// Clocks of the first and the last; none where they are no longer known.
    pub clocks: Option<(u64, u64)>,
}

impl fmt::Display for RolledBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RolledBack { shard, epoch, first, last, clocks } = self;
        write!(f, "shard {shard} lost pushes {first} to {last} of this session")?;
        if let Some((first, last)) = clocks {
            write!(f, " (clocks {first} to {last})")?;
        }
        write!(
            f,
            ", which it had acknowledged: every copy of it died, and it goes on from a checkpoint in epoch {epoch}"
        )
    }
}

/// Gradients of one step, and first values of dense variables. Each variable appears at most once.
#[derive(Clone, Debug, Default)]
pub struct PushBatch<'a> {
    /// Steps that the client had finished when it computed these.
    pub clock: u64,
    /// Of tables.
    pub rows: Vec<RowGradients<'a>>,
    /// Gradients of dense variables.
    pub dense: Vec<DenseTensor<'a>>,
    /// First values of dense variables: a block that has a value keeps it.
    pub values: Vec<DenseTensor<'a>>,
    /// Given: the gradients of some variables are applied at the end of a round ([`crate::Clock`]).
    pub round: Option<StepRound>,
    /// What the gradients were computed with. Given, servers measure how stale they are, and scale learning rates that are to heed it.
    pub read: Option<Arc<Pulled>>,
}

/// Gradients of rows of one table.
#[derive(Clone, Copy, Debug)]
pub struct RowGradients<'a> {
    /// The table.
    pub variable: VariableId,
    /// Each once (fastest in the order of the table's [`crate::Arrangement`]): gradients of equal keys are summed before.
    pub keys: &'a [u64],
    /// In the order of the keys: `keys.len() * dim` floats.
    pub gradients: &'a [f32],
}

/// A whole dense tensor, row-major.
#[derive(Clone, Copy, Debug)]
pub struct DenseTensor<'a> {
    /// The variable.
    pub variable: VariableId,
    /// All its floats.
    pub floats: &'a [f32],
}

/// What became of a push: every part of it was consumed by its shard, once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PushOutcome {
    /// The LSN that each shard gave (for a part that had been applied before: one at or after it).
    pub lsns: BTreeMap<ShardId, Lsn>,
    /// Shards that refused their part for good, and why: whole, or [in part](Refusal::partial). The others applied theirs.
    pub refusals: Vec<(ShardId, Refusal)>,
    /// How far a shard's clock had gone on since what [`PushBatch::read`] says: the most of all shards. None: no shard said so.
    pub stale_clocks: Option<u64>,
}

impl PushOutcome {
    /// A shard dropped what was contributed to a round that is over there.
    #[must_use]
    pub fn late(&self) -> bool {
        self.refusals.iter().any(|(_, refusal)| refusal.reason == RefusalReason::RoundOver)
    }

    /// An error when a shard refused its part, or some of it.
    ///
    /// # Errors
    /// [`Error::PushRefused`] with the first refusal.
    pub fn applied(self) -> Result<Self, Error> {
        match self.refusals.first() {
            Some(&(shard, refusal)) => Err(Error::PushRefused { shard, refusal }),
            None => Ok(self),
        }
    }

    /// An error when a shard refused its part as a whole. That a server has no memory for new keys is none: they stay in
    /// [`refusals`](Self::refusals), all known keys were trained, and training may go on.
    ///
    /// # Errors
    /// [`Error::PushRefused`] with the first of these refusals.
    pub fn applied_to_known_keys(self) -> Result<Self, Error> {
        match self.refusals.iter().find(|(_, refusal)| !refusal.partial()) {
            Some(&(shard, refusal)) => Err(Error::PushRefused { shard, refusal }),
            None => Ok(self),
        }
    }
}

/// The outcome of a push, to be awaited. Dropping it does not take the push back.
///
/// Fails with [`Error::Unknown`] at the session's deadline (the session goes on trying as long as it is open, since later pushes need this
/// one's numbers) or when the session ends.
#[derive(Debug)]
pub struct PushTicket {
    /// Of the push's pieces, each for some of its shards.
    pending: Vec<oneshot::Receiver<Result<PushOutcome, Error>>>,
    /// Of the pieces that have theirs.
    outcome: PushOutcome,
    within: Duration,
    deadline: Pin<Box<Sleep>>,
    trouble: Arc<Mutex<String>>,
}

impl PushTicket {
    pub(crate) fn new(
        pending: Vec<oneshot::Receiver<Result<PushOutcome, Error>>>,
        within: Duration,
        trouble: Arc<Mutex<String>>,
    ) -> Self {
        let (outcome, deadline) = (PushOutcome::default(), Box::pin(sleep(within)));
        PushTicket { pending, outcome, within, deadline, trouble }
    }

    /// The outcome if it is there; `None` means to ask again later. After an outcome: [`Error::Unknown`].
    pub fn try_outcome(&mut self) -> Option<Result<PushOutcome, Error>> {
        let gathered = self.gather(|pending| match pending.try_recv() {
            Ok(outcome) => Poll::Ready(outcome),
            Err(oneshot::error::TryRecvError::Closed) => Poll::Ready(Err(ended())),
            Err(oneshot::error::TryRecvError::Empty) => Poll::Pending,
        });
        match gathered {
            Poll::Ready(outcome) => Some(outcome),
            Poll::Pending => (Instant::now() >= self.deadline.deadline()).then(|| Err(self.late())),
        }
    }

    /// Takes the outcomes that are there over, and gives the whole once all are.
    fn gather(
        &mut self,
        mut poll: impl FnMut(
            &mut oneshot::Receiver<Result<PushOutcome, Error>>,
        ) -> Poll<Result<PushOutcome, Error>>,
    ) -> Poll<Result<PushOutcome, Error>> {
        if self.pending.is_empty() {
            return Poll::Ready(Err(ended()));
        }
        while let Some(pending) = self.pending.last_mut() {
            match poll(pending) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(outcome)) => {
                    self.outcome.lsns.extend(outcome.lsns);
                    self.outcome.refusals.extend(outcome.refusals);
                    self.outcome.stale_clocks = self.outcome.stale_clocks.max(outcome.stale_clocks);
                    self.pending.pop();
                }
                Poll::Ready(Err(error)) => {
                    self.pending.clear();
                    return Poll::Ready(Err(error));
                }
            }
        }
        let mut outcome = std::mem::take(&mut self.outcome);
        outcome.refusals.sort_unstable_by_key(|(shard, _)| *shard);
        Poll::Ready(Ok(outcome))
    }

    fn late(&self) -> Error {
        let trouble = self.trouble.lock().clone();
        let reason = format!("not acknowledged within {:?}; last problem: {trouble}", self.within);
        Error::Unknown { reason }
    }
}

impl Future for PushTicket {
    type Output = Result<PushOutcome, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let gathered = self.gather(|pending| {
            Pin::new(pending).poll(context).map(|outcome| outcome.unwrap_or_else(|_| Err(ended())))
        });
        if gathered.is_ready() {
            return gathered;
        }
        self.deadline.as_mut().poll(context).map(|()| Err(self.late()))
    }
}

fn ended() -> Error {
    Error::Unknown { reason: "the session was dropped".into() }
}
