//! What happens between the reader's thread and the caller's: pulls ahead, pushes behind.
//!
//! At most `depth` steps are open. The pull of a step begins when the step `depth` before it is over, its push acknowledged; pulls and pushes of
//! different steps do not wait for each other. So step t sees **at least** this worker's pushes up to t − depth, and of the later ones what
//! happened to be applied. With depth 1 a step reads exactly its own writes.
//!
//! *In order* one thing is done after the other: `depth` pulls, then for each step its push, the wait until that is acknowledged, and the next
//! pull. Then step t sees **exactly** the pushes up to t − depth, whatever the network does, and one worker alone ends byte-identical every
//! time, at any depth. The price: one thing at a time is under way.

use std::collections::BTreeMap;
use std::time::Instant;

use downpour_client::{
    DenseCache, DenseTensor, Pulled, PushBatch, PushOutcome, PushTicket, RowGradients, Session,
    TableRows,
};
use downpour_core::cells::Refusal;
use downpour_core::id::VariableId;
use futures::StreamExt as _;
use futures::stream::{FuturesOrdered, FuturesUnordered};
use tokio::sync::{mpsc, oneshot};

use crate::keys::UniqueKeys;
use crate::prepare::Prepared;
use crate::progress::{Batch, Progress};
use crate::reader::Read;
use crate::{Error, Result, TableHandle};

/// A batch with everything that a step needs.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) prepared: Prepared,
    /// For each table of the layout the rows of its keys.
    pub(crate) rows: Vec<Vec<f32>>,
    /// The dense variables; to be given back.
    pub(crate) dense: Option<DenseCache>,
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
    /// The step of this clock is over and has nothing to push.
    Skip(u64),
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
    /// The dense variables.
    pub(crate) dense: Vec<VariableId>,
    /// They come with the first batch only.
    pub(crate) dense_once: bool,
    pub(crate) depth: usize,
    pub(crate) in_order: bool,
    pub(crate) prepared: mpsc::Receiver<Result<Read>>,
    /// Gone when there is nothing more to give.
    pub(crate) ready: Option<mpsc::Sender<Loaded>>,
    pub(crate) commands: mpsc::Receiver<Command>,
    /// What the caller has copied out of.
    pub(crate) caches: mpsc::UnboundedReceiver<DenseCache>,
    /// Clock of the first step.
    pub(crate) clock: u64,
    /// Told of every step that is over.
    pub(crate) progress: Progress,
}

/// A step that the caller has.
struct Given {
    /// What the shards had when it was pulled.
    pulled: Pulled,
    batch: Batch,
    since: Instant,
}

impl Traffic {
    /// Runs until the batches are used up or the caller has gone, and every push is acknowledged.
    pub(crate) async fn run(self) -> Result<Vec<Finished>> {
        let session = self.session.clone();
        match self.carry().await {
            Err(Error::Cluster(error)) => Err(session.explain(error).await.into()),
            ended => ended,
        }
    }

    async fn carry(mut self) -> Result<Vec<Finished>> {
        let mut finished = Vec::new();
        // By clock.
        let mut given: BTreeMap<u64, Given> = BTreeMap::new();
        let (mut pulls, mut pushes) = (FuturesOrdered::new(), FuturesUnordered::new());
        let mut lookups = FuturesUnordered::new();
        let (mut more, mut asked, mut held) = (true, true, false);
        // Nothing comes before steps are over, its own or other workers': nobody may wait for its clock meanwhile, or the pass would never end.
        let mut paused = false;
        loop {
            if !more && pulls.is_empty() {
                self.ready = None;
            }
            let calm = pulls.is_empty() && pushes.is_empty() && lookups.is_empty();
            let open = pulls.len() + given.len() + pushes.len();
            let next = more && open < self.depth && (calm || !self.in_order);
            let hold = next && self.session.paused();
            if std::mem::replace(&mut held, hold) != hold {
                let clock = self.clock;
                if hold {
                    tracing::info!(clock, "the job is paused: holding before the next step");
                } else if more {
                    tracing::info!(clock, "goes on with the next step");
                }
            }
            let pull = next && !hold;
            let ask = asked && !given.is_empty() && (!self.in_order || (calm && (!next || paused)));
            if calm && !next && !ask {
                return Ok(finished);
            }
            tokio::select! {
                read = self.prepared.recv(), if pull => match read.transpose()? {
                    Some(Read::Batch(prepared)) => {
                        paused = false;
                        let cache = self.cache()?;
                        pulls.push_back(load(self.session.clone(), prepared, cache));
                    }
                    Some(Read::Pause(tasks)) => {
                        paused = true;
                        self.progress.ended_before(self.clock + pulls.len() as u64, tasks);
                    }
                    None => more = false,
                },
                () = self.session.resumed(), if hold => {}
                () = closed(self.ready.as_ref()), if more => more = false,
                Some(loaded) = pulls.next() => {
                    let (mut loaded, pulled): (Loaded, Pulled) = loaded?;
                    loaded.finished = std::mem::take(&mut finished);
                    let samples = loaded.prepared.encoded.rows() as u64;
                    let last_rows = std::mem::take(&mut loaded.prepared.last_rows);
                    let batch = Batch { samples, last_rows };
                    given.insert(self.clock, Given { pulled, batch, since: Instant::now() });
                    self.clock += 1;
                    // It has room for all open steps; it is closed when no more are wanted.
                    more &= self.ready.as_ref().is_some_and(|ready| ready.try_send(loaded).is_ok());
                }
                command = self.commands.recv(), if ask => match command {
                    None => asked = false,
                    Some(Command::Skip(clock)) => {
                        if let Some(Given { batch, since, .. }) = given.remove(&clock) {
                            self.progress.over(clock, batch, since.elapsed());
                        }
                    }
                    Some(Command::Push(push)) => {
                        let clock = push.clock;
                        let Some(Given { pulled, batch, since }) = given.remove(&clock) else {
                            continue;
                        };
                        // Taken over one after the other, so that their order is that of the steps.
                        let ticket = self.push(&push).await?;
                        pushes.push(async move {
                            let outcome = ticket.await?.applied_to_known_keys()?;
                            let refused = outcome.refusals.first().map(|(_, refusal)| *refusal);
                            let staleness = staleness(&pulled, &outcome);
                            Ok::<_, Error>((Finished { staleness, refused }, clock, batch, since))
                        });
                    }
                    Some(Command::Lookup { table, keys, reply }) => {
                        let session = self.session.clone();
                        lookups.push(async move {
                            // Nobody waits for the reply any more when the step was dropped meanwhile.
                            _ = reply.send(lookup(&session, &table, &keys).await);
                        });
                    }
                },
                Some(outcome) = pushes.next() => {
                    let (outcome, clock, batch, since) = outcome?;
                    self.progress.over(clock, batch, since.elapsed());
                    finished.push(outcome);
                }
                Some(()) = lookups.next() => {}
            }
        }
    }

    /// One that no step uses; they are as many as there are steps between their pull and [`crate::Steps::next`].
    fn cache(&mut self) -> Result<Option<DenseCache>> {
        if self.dense.is_empty() {
            return Ok(None);
        }
        let cache = match self.caches.try_recv() {
            Ok(cache) => cache,
            Err(_) => self.session.dense_cache(&self.dense)?,
        };
        if self.dense_once {
            self.dense.clear();
        }
        Ok(Some(cache))
    }

    async fn push(&self, push: &Push) -> Result<PushTicket> {
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
            round: None,
        };
        Ok(self.session.push(&batch).await?)
    }
}

/// Waits until the caller wants no more.
async fn closed(ready: Option<&mpsc::Sender<Loaded>>) {
    if let Some(ready) = ready {
        ready.closed().await;
    }
}

/// Pulls what a batch needs.
async fn load(
    session: Session,
    prepared: Prepared,
    mut dense: Option<DenseCache>,
) -> Result<(Loaded, Pulled)> {
    let tables = prepared.layout.tables.iter().zip(&prepared.keys);
    let mut rows: Vec<Vec<f32>> =
        tables.map(|(table, keys)| vec![0.0; keys.len() * table.dim() as usize]).collect();
    let mut wanted: Vec<TableRows> = (prepared.layout.tables.iter().zip(&prepared.keys))
        .zip(&mut rows)
        .filter(|((_, keys), _)| !keys.is_empty())
        .map(|((table, keys), values)| TableRows { variable: table.id(), keys, values })
        .collect();
    let pulled = session.pull(&mut wanted, dense.as_mut()).await?;
    Ok((Loaded { prepared, rows, dense, finished: Vec::new() }, pulled))
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

fn staleness(pulled: &Pulled, outcome: &PushOutcome) -> f64 {
    let overtaken = outcome.lsns.iter().filter_map(|(shard, lsn)| {
        let seen = pulled.lsns.get(shard)?;
        // The record itself is not stale.
        (seen.epoch() == lsn.epoch()).then(|| (lsn.count() - seen.count()).saturating_sub(1) as f64)
    });
    let (count, sum) = overtaken.fold((0, 0.0), |(count, sum), one| (count + 1, sum + one));
    if count == 0 { 0.0 } else { sum / f64::from(count) }
}
