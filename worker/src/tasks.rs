//! The tasks that this worker trains, leased from the job's ledger (docs/protocol.md 7.2).
//!
//! Three threads meet in [`Tasks`]: the reader's takes tasks, the network's says when all pushes of one are acknowledged, and [`Tasks::keep`] tells the coordinators and asks for more.
//! What a checkpoint holds of the ledger is captured before its shards are cut, so what it says is done is in the rows (8.1).

mod holding;

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use downpour_client::{Coordinators, Error as ClientError, Refused, Session};
use downpour_core::id::{JobId, SessionId};
use downpour_core::ledger::{PASSES_MAX, Plan};
use downpour_data::{Dataset, hash};
use downpour_proto::v1;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use crate::pipeline::explained;
use crate::reader::Reading;
use crate::{Error, Result, begin};
use holding::{Grant, Holding};

/// What is done is told this often, where nothing else is asked.
const TELL_EVERY: Duration = Duration::from_millis(200);
/// Between two requests, unless the reader waits.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// That the ledger is another one is noticed by then, also within a long task.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long an answer may wait that has nothing to tell.
const WAIT_MS: u64 = 1000;
/// For what a worker that ends still has to tell: if it fails, its tasks go back when its session ends.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);
/// Steps that tell how long one takes.
const STEPS: usize = 128;

/// Where a worker begins: what its job had trained of its data then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The pass, from 0, and how many there are.
    pub pass: u64,
    /// How many there are.
    pub passes: u64,
    /// Of the pass.
    pub tasks_done: u32,
    /// In a pass.
    pub tasks: u32,
    /// Rows of all tasks that are done.
    pub samples: u64,
    /// Clocks go on from here: one after the highest under which a task was done.
    pub clock: u64,
    /// The checkpoint, and where it is, that the job began from, if it did.
    pub checkpoint: Option<(String, String)>,
    /// Every task of every pass is done: nothing is left to do. More epochs would go on.
    pub done: bool,
}

/// What the threads share.
pub(crate) struct Tasks {
    plan: Plan,
    state: Mutex<State>,
    /// For the reader.
    granted: Condvar,
    /// For the keeper.
    news: Notify,
}

struct State {
    holding: Holding,
    /// No more is wanted, or none can be got.
    closed: bool,
    /// How long the newest steps took, in microseconds.
    steps_us: VecDeque<u64>,
    /// Who did the last task of the last pass.
    finished_by: u64,
    /// Rows of all tasks that are done.
    samples: u64,
}

/// What the reader reads next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Next {
    pub(crate) pass: u64,
    pub(crate) position: u32,
}

impl Tasks {
    /// Says what this worker is to train, and where its job is in it. `turns` counts the session's requests.
    pub(crate) async fn begin(
        coordinators: &Coordinators,
        session: &Session,
        reading: &Reading,
        dataset: &dyn Dataset,
        turns: &Arc<AtomicU64>,
    ) -> Result<(Arc<Self>, Start)> {
        let plan = plan(reading, dataset)?;
        let name = session.state().view.spec.name.clone();
        let status = begin::status(coordinators, &name).await?;
        let defined = coordinators.define_ledger(session.job(), session.id(), &plan).await;
        let defined = defined.map_err(|error| match error {
            ClientError::Refused { code: Refused::AlreadyExists, message, .. } => Error::usage(format!(
                "job {name:?} cannot go on: {message}. Give what it was begun with, or --fresh to start the job over"
            )),
            error => error.into(),
        });
        let view = explained(session, defined).await?;
        let holding = Holding::new(&view, turns);
        let start = Start {
            pass: view.pass,
            passes: view.plan.as_ref().map_or(0, |plan| plan.passes),
            tasks_done: view.done,
            tasks: plan.tasks,
            samples: view.samples,
            clock: view.clock,
            checkpoint: status
                .as_ref()
                .and_then(begin::began_from)
                .map(|(uri, name)| (name.to_owned(), uri.to_owned())),
            done: holding.is_over(),
        };
        let state = State {
            holding,
            closed: false,
            steps_us: VecDeque::new(),
            finished_by: view.finished_by,
            samples: view.samples,
        };
        let tasks =
            Self { plan, state: Mutex::new(state), granted: Condvar::new(), news: Notify::new() };
        Ok((Arc::new(tasks), start))
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The next task of this pass, when it is this worker's. None: others have what is left, or the pass is over, or nothing more is wanted.
    pub(crate) fn next_of(&self, pass: u64) -> Option<u32> {
        let mut state = self.state();
        loop {
            if state.closed || state.holding.pass() != pass {
                return None;
            }
            match state.holding.take() {
                Grant::Task { position, .. } => {
                    self.news.notify_one();
                    return Some(position);
                }
                Grant::NothingNow | Grant::Over => return None,
                Grant::Wait => {}
            }
            self.news.notify_one();
            state = self.granted.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next task of any pass, however long it takes. None: all is done, or nothing more is wanted.
    pub(crate) fn next(&self) -> Option<Next> {
        let mut state = self.state();
        loop {
            if state.closed {
                return None;
            }
            match state.holding.take() {
                Grant::Task { pass, position } => {
                    self.news.notify_one();
                    return Some(Next { pass, position });
                }
                Grant::Over => return None,
                Grant::NothingNow | Grant::Wait => {}
            }
            self.news.notify_one();
            state = self.granted.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Every push of the steps of this task is acknowledged; the step of this clock had its last row.
    pub(crate) fn done(&self, position: u32, rows: u64, clock: u64) {
        self.state().holding.done(v1::TaskDone { position, clock, rows });
        self.news.notify_one();
    }

    /// How long a step took, from its rows to the acknowledgement of its push.
    pub(crate) fn step_took(&self, time: Duration) {
        let mut state = self.state();
        if state.steps_us.len() == STEPS {
            state.steps_us.pop_front();
        }
        state.steps_us.push_back(time.as_micros() as u64);
    }

    /// Nothing more is read.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.granted.notify_all();
        self.news.notify_one();
    }

    /// The session that did the last task of all.
    pub(crate) fn finished_by(&self) -> SessionId {
        SessionId(self.state().finished_by)
    }

    /// Rows of all tasks of the job that are done.
    pub(crate) fn samples(&self) -> u64 {
        self.state().samples
    }

    /// Tells the coordinators and asks them, until [`Tasks::close`]; then what is not done goes back.
    pub(crate) async fn keep(
        self: Arc<Self>,
        coordinators: Coordinators,
        session: Session,
    ) -> Result<()> {
        let kept = self.keep_on(&coordinators, session.job(), session.id()).await;
        let kept = explained(&session, kept).await;
        self.close();
        kept
    }

    async fn keep_on(
        &self,
        coordinators: &Coordinators,
        job: JobId,
        session: SessionId,
    ) -> Result<()> {
        let mut asked: Option<Instant> = None;
        loop {
            let wait = match self.pause() {
                Pause::Leave => break,
                Pause::Until(pause) => {
                    pause.saturating_sub(asked.map_or(Duration::MAX, |asked| asked.elapsed()))
                }
            };
            if !wait.is_zero() {
                _ = timeout(wait, self.news.notified()).await;
                continue;
            }
            asked = Some(Instant::now());
            let (mut request, idle) = self.request(false);
            (request.job, request.session) = (job.0, session.0);
            if idle {
                request.wait_ms = WAIT_MS;
            }
            let reply = tokio::select! {
                reply = coordinators.advance_ledger(&request) => reply,
                () = self.interrupted(idle) => continue,
            };
            match reply {
                Ok(reply) => self.answered(&reply)?,
                Err(error @ ClientError::Deadline { .. }) => {
                    tracing::warn!(%error, "goes on with the tasks that it has");
                    sleep(TELL_EVERY).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        let (mut request, _) = self.request(true);
        (request.job, request.session) = (job.0, session.0);
        let coordinators = coordinators.clone().with_deadline(LEAVE_WITHIN);
        match coordinators.advance_ledger(&request).await {
            Ok(reply) => self.answered(&reply),
            // What was trained last is for others, if anything is.
            Err(ClientError::NotFound { .. }) if self.state().holding.is_over() => Ok(()),
            Err(error @ ClientError::NotFound { .. }) => Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "what was trained last is not noted, and will be trained again");
                Ok(())
            }
        }
    }

    fn pause(&self) -> Pause {
        let state = self.state();
        let holding = &state.holding;
        if state.closed || (holding.is_over() && !holding.has_news()) {
            return Pause::Leave;
        }
        Pause::Until(match () {
            () if holding.is_waited_for() => Duration::ZERO,
            () if holding.is_short() => ASK_EVERY,
            () if holding.has_news() => TELL_EVERY,
            () => LOOK_EVERY,
        })
    }

    fn request(&self, leave: bool) -> (v1::AdvanceLedgerRequest, bool) {
        let mut state = self.state();
        let mut steps: Vec<u64> = state.steps_us.iter().copied().collect();
        steps.sort_unstable();
        let p95 = steps.get((steps.len() * 95).div_ceil(100).saturating_sub(1));
        let idle = state.holding.is_idle();
        (state.holding.request(p95.copied().unwrap_or(0), leave), idle)
    }

    fn answered(&self, reply: &v1::AdvanceLedgerReply) -> Result<()> {
        let mut state = self.state();
        if let Some(view) = &reply.ledger {
            (state.finished_by, state.samples) = (view.finished_by, view.samples);
        }
        let known = state.holding.answered(reply);
        drop(state);
        self.granted.notify_all();
        known.map_err(|_| Error::SetBack)
    }

    /// Who ends waits for no answer, also where nobody leads. While it is idle, what has come meanwhile may be what everybody waits for.
    async fn interrupted(&self, idle: bool) {
        let goes_on = || {
            let state = self.state();
            !(state.closed || idle && state.holding.has_news())
        };
        while goes_on() {
            self.news.notified().await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Pause {
    Leave,
    /// So long after the last request.
    Until(Duration),
}

/// What must be the same for all workers of a job.
fn plan(reading: &Reading, dataset: &dyn Dataset) -> Result<Plan> {
    let tasks = dataset.tasks()?;
    let mut seen = HashSet::new();
    if let Some(twice) = tasks.iter().find(|task| !seen.insert(*task)) {
        return Err(Error::usage(format!("the training data lists {twice:?} twice")));
    }
    let sum = tasks.iter().fold(0, |sum, task| {
        // The folder may be another one on another machine.
        let file = task.file.rsplit('/').next().unwrap_or_default();
        let text = format!("{file}\n{:?}\n{:?}", task.part, task.rows);
        text.bytes().fold(sum, |sum, byte| hash::mix64(sum ^ u64::from(byte)))
    });
    let plan = Plan {
        data: format!("{sum:016x}"),
        tasks: tasks.len().try_into().unwrap_or(u32::MAX),
        passes: reading.epochs.clamp(1, PASSES_MAX),
        seed: reading.seed,
        shuffled: reading.shuffle_rows > 0,
    };
    plan.validate().map_err(|invalid| Error::usage(format!("the training data: {invalid}")))?;
    Ok(plan)
}
