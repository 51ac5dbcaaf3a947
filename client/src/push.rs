//! Sending gradients.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use downpour_core::cells::Refusal;
use downpour_core::id::{Lsn, ShardId, VariableId};

use crate::Error;

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
}

/// Gradients of rows of one table.
#[derive(Clone, Copy, Debug)]
pub struct RowGradients<'a> {
    /// The table.
    pub variable: VariableId,
    /// Strictly increasing: gradients of equal keys are summed before.
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
    /// Shards that refused their part for good, and why. The others applied theirs.
    pub refusals: Vec<(ShardId, Refusal)>,
}

/// The outcome of a push, to be awaited. Dropping it does not take the push back.
///
/// Fails with [`Error::Unknown`] at the session's deadline (the session goes on trying as long as it is open, since later pushes need this
/// one's numbers), when the session closes, or with [`Error::RolledBack`].
#[derive(Debug)]
pub struct PushTicket {
    pub(crate) deadline: Pin<Box<tokio::time::Sleep>>,
    pub(crate) outcome: tokio::sync::oneshot::Receiver<Result<PushOutcome, Error>>,
}

impl Future for PushTicket {
    type Output = Result<PushOutcome, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(outcome) = Pin::new(&mut self.outcome).poll(context) {
            let ended = || Error::Unknown { reason: "the session ended".into() };
            return Poll::Ready(outcome.unwrap_or_else(|_| Err(ended())));
        }
        self.deadline
            .as_mut()
            .poll(context)
            .map(|()| Err(Error::Unknown { reason: "not acknowledged before the deadline".into() }))
    }
}
