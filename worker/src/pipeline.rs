//! What happens between the reader's thread and the caller's: pulls ahead, pushes behind.
//!
//! At most `depth` steps are open. The pull of a step begins when the step `depth` before it is over, its push acknowledged; pulls and pushes of
//! different steps do not wait for each other. So step t sees **at least** this worker's pushes up to t − depth, and of the later ones what
//! happened to be applied. With depth 1 a step reads exactly its own writes.
//!
//! *In order* one thing is done after the other: `depth` pulls, then for each step its push, the wait until that is acknowledged, and the next
//! pull. Then step t sees **exactly** the pushes up to t − depth, whatever the network does, and one worker alone ends byte-identical every
//! time, at any depth. The price: one thing at a time is under way. (While the operator holds the job, open steps are ended before the next pull, which sees them.)
//!
//! Where the job has clocks (docs/consistency.md), a batch also waits for the other workers before its pull begins; meanwhile earlier steps go on.
//! Steps that contribute to rounds are one after the other, whatever the depth; one whose contribution came too late is not over: its batch is trained again.
//! Others wait for this worker only while it has something to train: without a task, or held by the operator, it gives its seat back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use downpour_client::{
    Begun, Clock, DenseCache, DenseTensor, Pulled, PushBatch, PushOutcome, PushTicket,
    RowGradients, Session, StepRound, TableRows,
};
use downpour_core::cells::{Refusal, RefusalReason};
use downpour_core::id::VariableId;
use futures::StreamExt as _;
use futures::stream::{FuturesOrdered, FuturesUnordered};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::keys::UniqueKeys;
use crate::prepare::Prepared;
use crate::progress::{Batch, Progress};
use crate::reader::Read;
use crate::{Error, Result, TableHandle};

/// For a loop that failed to tell that nobody needs to wait for it.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);

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
    /// How many steps the furthest worker went on in that time: the most over the shards. None: no server said so.
    pub(crate) stale_clocks: Option<u64>,
    /// How many steps this worker was ahead of the slowest when it began the step; 0 where nothing has clocks.
    pub(crate) ahead: u64,
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

/// A batch that is to be trained.
struct Work {
    /// Which of the loop's batches it is; one that is trained again keeps its number.
    number: u64,
    prepared: Prepared,
}

/// A step that the caller has.
struct Given {
    /// What the shards had when it was pulled.
    pulled: Arc<Pulled>,
    number: u64,
    batch: Batch,
    since: Instant,
    /// Of the slowest, when it began.
    ahead: u64,
    /// It contributes to a round.
    round: Option<InRound>,
}

/// What a step contributes to, and what is trained again if that came too late.
struct InRound {
    round: StepRound,
    prepared: Prepared,
}

/// A step whose push is acknowledged.
struct Pushed {
    number: u64,
    batch: Batch,
    took: Duration,
    finished: Finished,
    round: Option<InRound>,
    /// Its round was over for some shard.
    late: bool,
}

impl Traffic {
    /// Runs until the batches are used up or the caller has gone, and every push is acknowledged.
    pub(crate) async fn run(self) -> Result<Vec<Finished>> {
        let session = self.session.clone();
        let mut clocks = Clock::new(&session);
        let ended = self.carry(&mut clocks).await;
        if ended.is_err() {
            // The session may stay open, and others would wait for it. The first error tells more.
            _ = timeout(LEAVE_WITHIN, clocks.leave()).await;
        }
        explained(&session, ended).await
    }

    async fn carry(mut self, clocks: &mut Clock) -> Result<Vec<Finished>> {
        let mut finished = Vec::new();
        // By clock.
        let mut given: BTreeMap<u64, Given> = BTreeMap::new();
        let (mut pulls, mut pushes) = (FuturesOrdered::new(), FuturesUnordered::new());
        let mut lookups = FuturesUnordered::new();
        let (mut more, mut asked, mut held) = (true, true, false);
        // Nothing comes before steps are over, its own or other workers'.
        let mut paused = false;
        // The next batch, until it may begin: new, or dropped by its round.
        let mut waiting: Option<Work> = None;
        let mut number = self.clock;
        // What the clock granted to it; nothing if the clock is to be asked.
        let mut begun: Option<Begun> = None;
        let mut rounds = false;
        // The last step, until its round is over.
        let mut in_round: Option<Pushed> = None;
        loop {
            // An evaluation trains nothing.
            let free = self.dense_once || clocks.is_idle();
            rounds &= !free;
            let open = pulls.len() + given.len() + pushes.len();
            let wanted = more || waiting.is_some();
            // In rounds, the last step's batch may have to be given once more.
            let all_given = if rounds { open == 0 && in_round.is_none() } else { pulls.is_empty() };
            if !wanted && all_given {
                self.ready = None;
            }
            let calm = pulls.is_empty() && pushes.is_empty() && lookups.is_empty();
            let depth = if rounds { 1 } else { self.depth };
            let next = wanted && open < depth && (calm || !self.in_order);
            let hold = next && self.session.paused();
            if std::mem::replace(&mut held, hold) != hold {
                let clock = self.clock;
                if hold {
                    tracing::info!(clock, "the job is paused: holding before the next step");
                } else if wanted {
                    tracing::info!(clock, "goes on with the next step");
                }
            }
            let pull = next && !hold;
            // Where nothing more is pulled for now, what was begun is ended, also in order.
            let ask = asked && !given.is_empty() && (!self.in_order || (calm && (!pull || paused)));
            if calm && !next && !ask && in_round.is_none() {
                clocks.leave().await?;
                return Ok(finished);
            }
            if hold {
                // What the clock granted before may not hold any more when the job goes on.
                begun = None;
            }
            let rests = hold || (paused && waiting.is_none());
            if rests && open == 0 && in_round.is_none() && !free {
                // Who waits for others, or for the operator, is waited for by nobody: the pass, or the job, would never end.
                clocks.leave().await?;
                begun = None;
            }
            if pull
                && in_round.is_none()
                && (free || begun.is_some())
                && let Some(work) = waiting.take()
            {
                let begun = begun.take().unwrap_or_default();
                let round = begun.round(&self.session.state().view);
                let cache = self.cache()?;
                pulls.push_back(load(self.session.clone(), work, (begun.ahead, round), cache));
                continue;
            }
            let tell = in_round.is_some() || (pull && waiting.is_some());
            tokio::select! {
                answer = clocks.begin(), if tell => {
                    let answer = answer?;
                    rounds = answer.consistency.backup_workers().is_some();
                    if let Some(step) = in_round.take() {
                        match step.round {
                            Some(InRound { prepared, .. }) if answer.counted == Some(false) => {
                                // Whoever wants no more leaves it to others.
                                let again = self.ready.as_ref().is_some_and(|ready| !ready.is_closed());
                                waiting = again.then_some(Work { number: step.number, prepared });
                            }
                            _ => {
                                self.progress.over(step.number, step.batch, step.took);
                                finished.push(step.finished);
                            }
                        }
                    }
                    // Steps that began before there were rounds end first: then the clock is asked again.
                    begun = (!rounds || open == 0).then_some(answer);
                }
                read = self.prepared.recv(), if pull && waiting.is_none() && in_round.is_none() => match read.transpose()? {
                    Some(Read::Batch(prepared)) => {
                        paused = false;
                        waiting = Some(Work { number, prepared });
                        number += 1;
                    }
                    Some(Read::Pause(tasks)) => {
                        paused = true;
                        self.progress.ended_before(number, tasks);
                    }
                    None => more = false,
                },
                () = self.session.resumed(), if hold => {}
                () = closed(self.ready.as_ref()), if wanted => (more, waiting) = (false, None),
                Some(loaded) = pulls.next() => {
                    let (mut loaded, step): (Loaded, Given) = loaded?;
                    loaded.finished = std::mem::take(&mut finished);
                    given.insert(self.clock, step);
                    self.clock += 1;
                    // It has room for all open steps; it is closed when no more are wanted.
                    if self.ready.as_ref().is_none_or(|ready| ready.try_send(loaded).is_err()) {
                        (more, waiting) = (false, None);
                    }
                }
                command = self.commands.recv(), if ask => match command {
                    None => asked = false,
                    Some(Command::Skip(clock)) => {
                        if let Some(Given { number, batch, since, .. }) = given.remove(&clock) {
                            clocks.finished(None, false);
                            self.progress.over(number, batch, since.elapsed());
                        }
                    }
                    Some(Command::Push(push)) => {
                        let Some(step) = given.remove(&push.clock) else { continue };
                        // Taken over one after the other, so that their order is that of the steps.
                        let round = step.round.as_ref().map(|contribution| contribution.round.clone());
                        let ticket = self.push(&push, round, step.pulled.clone()).await?;
                        pushes.push(async move {
                            let outcome = ticket.await?.applied_to_known_keys()?;
                            let full = |refusal: &Refusal| refusal.reason == RefusalReason::MemoryLimit;
                            let mut refusals = outcome.refusals.iter().map(|(_, refusal)| *refusal);
                            let refused = refusals.find(full);
                            let Given { pulled, number, batch, since, ahead, round } = step;
                            let staleness = staleness(&pulled, &outcome);
                            let (stale_clocks, late) = (outcome.stale_clocks, outcome.late());
                            let finished = Finished { staleness, stale_clocks, ahead, refused };
                            let took = since.elapsed();
                            Ok::<_, Error>(Pushed { number, batch, took, finished, round, late })
                        });
                    }
                    Some(Command::Lookup { table, keys, reply }) => {
                        let session = self.session.clone();
                        lookups.push(async move {
                            // Nobody waits for the reply any more when the step was dropped meanwhile.
                            let rows = lookup(&session, &table, &keys).await;
                            _ = reply.send(explained(&session, rows).await);
                        });
                    }
                },
                Some(pushed) = pushes.next() => {
                    let step: Pushed = pushed?;
                    let number = step.round.as_ref().map(|contribution| contribution.round.number);
                    clocks.finished(number, step.late);
                    if clocks.awaits_round() {
                        in_round = Some(step);
                    } else {
                        self.progress.over(step.number, step.batch, step.took);
                        finished.push(step.finished);
                    }
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

    async fn push(
        &self,
        push: &Push,
        round: Option<StepRound>,
        read: Arc<Pulled>,
    ) -> Result<PushTicket> {
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
            round,
            read: Some(read),
        };
        Ok(self.session.push(&batch).await?)
    }
}

/// An error says why the session is over, where that is what lies behind it.
pub(crate) async fn explained<T>(session: &Session, outcome: Result<T>) -> Result<T> {
    match outcome {
        Err(Error::Cluster(error)) => Err(session.explain(error).await.into()),
        outcome => outcome,
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
    Work { number, mut prepared }: Work,
    (ahead, round): (u64, Option<StepRound>),
    mut dense: Option<DenseCache>,
) -> Result<(Loaded, Given)> {
    let round = round.map(|round| InRound { round, prepared: prepared.clone() });
    let samples = prepared.encoded.rows() as u64;
    let batch = Batch { samples, last_rows: std::mem::take(&mut prepared.last_rows) };
    let tables = prepared.layout.tables.iter().zip(&prepared.keys);
    let mut rows: Vec<Vec<f32>> =
        tables.map(|(table, keys)| vec![0.0; keys.len() * table.dim() as usize]).collect();
    let mut wanted: Vec<TableRows> = (prepared.layout.tables.iter().zip(&prepared.keys))
        .zip(&mut rows)
        .filter(|((_, keys), _)| !keys.is_empty())
        .map(|((table, keys), values)| TableRows { variable: table.id(), keys, values })
        .collect();
    let pulled = session.pull(&mut wanted, dense.as_mut()).await?;
    let (pulled, since) = (Arc::new(pulled), Instant::now());
    let given = Given { pulled, number, batch, since, ahead, round };
    Ok((Loaded { prepared, rows, dense, finished: Vec::new() }, given))
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
