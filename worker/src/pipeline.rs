//! What happens between the reader's thread and the caller's: pulls ahead, pushes behind, in one fixed order.
//!
//! One task does all of a worker's traffic, one thing after the other: `depth` pulls, then for each step its push, the wait
//! until that is acknowledged, and the next pull. So step t sees exactly the pushes of this worker up to t − depth, whatever the
//! network does, and one worker alone ends byte-identical every time. With depth 1 a step reads its own writes; with depth 2 the
//! traffic of one step runs while the caller computes the other. The price: at most one push of a worker is under way at a time.

use std::collections::VecDeque;

use downpour_client::{
    DenseCache, DenseTensor, PushBatch, PushOutcome, RowGradients, Session, TableRows,
};
use downpour_core::cells::Refusal;
use downpour_core::id::VariableId;
use tokio::sync::{mpsc, oneshot};

use crate::keys::UniqueKeys;
use crate::prepare::Prepared;
use crate::{Result, TableHandle};

/// A batch with everything that a step needs.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) prepared: Prepared,
    /// For each table of the layout the rows of its keys.
    pub(crate) rows: Vec<Vec<f32>>,
    /// The dense variables, in the order of the cache.
    pub(crate) dense: Vec<(VariableId, Vec<f32>)>,
    /// What became of earlier steps since the last batch.
    pub(crate) finished: Vec<Finished>,
}

/// A push that was acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished {
    /// How many records were applied between its pull and itself: the mean over the shards that it touched.
    pub(crate) staleness: f64,
    /// A server had no memory for some of its new keys.
    pub(crate) refused: Option<Refusal>,
}

/// What a step asks for, in the order of the caller's calls.
#[derive(Debug)]
pub(crate) enum Command {
    /// Rows of keys that became known in the step.
    Lookup { table: TableHandle, keys: UniqueKeys, reply: oneshot::Sender<Result<Vec<f32>>> },
    /// The step is over.
    Push(Push),
    /// The step is over and has nothing to push.
    Skip,
}

/// The gradients of a step.
#[derive(Debug, Default)]
pub(crate) struct Push {
    pub(crate) clock: u64,
    pub(crate) rows: Vec<(VariableId, UniqueKeys, Vec<f32>)>,
    pub(crate) dense: Vec<(VariableId, Vec<f32>)>,
}

/// The traffic of one worker, or of one evaluation.
pub(crate) struct Traffic {
    pub(crate) session: Session,
    /// The dense variables, as long as they are wanted.
    pub(crate) cache: Option<DenseCache>,
    /// They come with the first batch only.
    pub(crate) dense_once: bool,
    pub(crate) depth: usize,
    pub(crate) prepared: mpsc::Receiver<Result<Prepared>>,
    /// Gone when there is nothing more to give.
    pub(crate) ready: Option<mpsc::Sender<Loaded>>,
    pub(crate) commands: mpsc::Receiver<Command>,
}

impl Traffic {
    /// Runs until the batches are used up or the caller has gone, and every push is acknowledged.
    pub(crate) async fn run(mut self) -> Result<Vec<Finished>> {
        let mut finished = Vec::new();
        // What the shards had when the open steps were pulled.
        let mut open: VecDeque<downpour_client::Pulled> = VecDeque::new();
        loop {
            while open.len() < self.depth {
                let Some(ready) = self.ready.take() else { break };
                let Some(prepared) = self.prepared.recv().await else { break };
                let (mut loaded, pulled) = self.pull(prepared?).await?;
                loaded.finished = std::mem::take(&mut finished);
                if ready.send(loaded).await.is_ok() {
                    self.ready = Some(ready);
                }
                open.push_back(pulled);
            }
            if open.is_empty() {
                return Ok(finished);
            }
            match self.commands.recv().await {
                None => return Ok(finished),
                Some(Command::Skip) => _ = open.pop_front(),
                Some(Command::Push(push)) => {
                    let pulled = open.pop_front().unwrap_or_default();
                    let outcome = self.push(&push).await?;
                    let refused = outcome.refusals.first().map(|(_, refusal)| *refusal);
                    finished.push(Finished { staleness: staleness(&pulled, &outcome), refused });
                }
                Some(Command::Lookup { table, keys, reply }) => {
                    // Nobody waits for the reply any more when the step was dropped meanwhile.
                    _ = reply.send(lookup(&self.session, &table, &keys).await);
                }
            }
        }
    }

    async fn pull(&mut self, prepared: Prepared) -> Result<(Loaded, downpour_client::Pulled)> {
        let tables = prepared.layout.tables.iter().zip(&prepared.keys);
        let mut rows: Vec<Vec<f32>> =
            tables.map(|(table, keys)| vec![0.0; keys.len() * table.dim() as usize]).collect();
        let mut wanted: Vec<TableRows> = (prepared.layout.tables.iter().zip(&prepared.keys))
            .zip(&mut rows)
            .filter(|((_, keys), _)| !keys.is_empty())
            .map(|((table, keys), values)| TableRows { variable: table.id(), keys, values })
            .collect();
        let pulled = self.session.pull(&mut wanted, self.cache.as_mut()).await?;
        let dense = self.cache.as_ref().map_or_else(Vec::new, dense_values);
        if self.dense_once {
            self.cache = None;
        }
        Ok((Loaded { prepared, rows, dense, finished: Vec::new() }, pulled))
    }

    async fn push(&self, push: &Push) -> Result<PushOutcome> {
        let rows = push.rows.iter().map(|(variable, keys, gradients)| RowGradients {
            variable: *variable,
            keys,
            gradients,
        });
        let dense =
            push.dense.iter().map(|(variable, floats)| DenseTensor { variable: *variable, floats });
        let batch = PushBatch {
            clock: push.clock,
            rows: rows.collect(),
            dense: dense.collect(),
            values: Vec::new(),
        };
        Ok(self.session.push(&batch).await?.await?.applied_to_known_keys()?)
    }
}

/// Every tensor of the cache.
fn dense_values(cache: &DenseCache) -> Vec<(VariableId, Vec<f32>)> {
    let values = |id| cache.values(id).map(|values| (id, values.to_vec()));
    cache.variables().filter_map(values).collect()
}

/// Rows of one table, now.
pub(crate) async fn lookup(
    session: &Session,
    table: &TableHandle,
    keys: &[u64],
) -> Result<Vec<f32>> {
    let mut values = vec![0.0; keys.len() * table.dim() as usize];
    let wanted = TableRows { variable: table.id(), keys, values: &mut values };
    session.pull(&mut [wanted], None).await?;
    Ok(values)
}

fn staleness(pulled: &downpour_client::Pulled, outcome: &PushOutcome) -> f64 {
    let overtaken = outcome.lsns.iter().filter_map(|(shard, lsn)| {
        let seen = pulled.lsns.get(shard)?;
        // The record itself is not stale.
        (seen.epoch() == lsn.epoch()).then(|| (lsn.count() - seen.count()).saturating_sub(1) as f64)
    });
    let (count, sum) = overtaken.fold((0, 0.0), |(count, sum), one| (count + 1, sum + one));
    if count == 0 { 0.0 } else { sum / f64::from(count) }
}
