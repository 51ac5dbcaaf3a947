use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use downpour_client::DenseCache;
use tch::Device;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::dense::DenseVariable;
use crate::features::Layout;
use crate::pipeline::{Command, Finished, Loaded, Traffic};
use crate::progress::{Position, Progress};
use crate::reader::{self, Reading};
use crate::recorder::{Recorder, Staleness};
use crate::step::{Context, Ticket};
use crate::tasks::{Start, Tasks};
use crate::{Error, Every, Features, Job, NonFinite, Result, Source, Step};

/// A training loop before it starts.
#[must_use = "call `start`"]
pub struct TrainBuilder {
    pub(crate) job: Job,
    pub(crate) opened: Result<(Arc<Layout>, Arc<dyn downpour_data::Dataset>)>,
    pub(crate) reading: Reading,
    pub(crate) depth: usize,
    pub(crate) in_order: bool,
    pub(crate) device: Device,
    on_nonfinite: OnNonFinite,
    out: Option<PathBuf>,
    log_every: Every,
    shared: bool,
}

/// What follows a loss or a gradient that is not a finite number. The batch is saved in [`TrainBuilder::out`] either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNonFinite {
    /// `backward` or `push` fails with [`Error::NonFinite`].
    #[default]
    Stop,
    /// The step pushes nothing and training goes on.
    Skip,
}

impl TrainBuilder {
    pub(crate) fn new(job: &Job, source: impl Source, features: Features) -> Self {
        Self::with_layout(job, source, features.layout().map(Arc::new))
    }

    pub(crate) fn with_layout(job: &Job, source: impl Source, layout: Result<Arc<Layout>>) -> Self {
        let opened = layout.and_then(|layout| {
            let dataset = source.open(&layout.schema)?;
            Ok((layout, dataset))
        });
        let reading = Reading { batch: 1024, epochs: 1, shuffle_rows: 1 << 16, seed: 0 };
        Self {
            job: job.clone(),
            opened,
            reading,
            depth: 1,
            in_order: false,
            device: Device::Cpu,
            on_nonfinite: OnNonFinite::Stop,
            out: None,
            log_every: Every::Steps(100),
            shared: false,
        }
    }

    /// Rows of a step; 1024 otherwise.
    pub fn batch(mut self, rows: usize) -> Self {
        self.reading.batch = rows;
        self
    }

    /// Passes over the data; 1 otherwise.
    pub fn epochs(mut self, epochs: u64) -> Self {
        self.reading.epochs = epochs;
        self
    }

    /// How many steps are in the pipeline; 1 otherwise. A step sees at least this worker's pushes up to `depth` steps before it: with 1 it
    /// reads its own writes, with 2 the network works while the caller computes. In rounds (`sync` and `hybrid` jobs) steps are one after the other all the same: only one may be open.
    pub fn depth(mut self, depth: usize) -> Self {
        self.depth = depth;
        self
    }

    /// Pulls and pushes one after the other: a step sees exactly this worker's pushes up to `depth` steps before it, and one worker with a
    /// seed is repeatable at any depth; at depth 1 it is anyway. The traffic of a step then costs two round trips that overlap with no other.
    pub fn in_order(mut self, in_order: bool) -> Self {
        self.in_order = in_order;
        self
    }

    /// Seed of the order of rows; 0 otherwise.
    pub fn seed(mut self, seed: u64) -> Self {
        self.reading.seed = seed;
        self
    }

    /// Rows that wait in memory to be drawn at random; 65,536 otherwise. 0 keeps the order of the files.
    pub fn shuffle_rows(mut self, rows: usize) -> Self {
        self.reading.shuffle_rows = rows;
        self
    }

    /// Where the rows, and so the gradients of tables, are; the CPU otherwise.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// What follows a number that is not finite; [`OnNonFinite::Stop`] otherwise.
    pub fn on_nonfinite(mut self, on_nonfinite: OnNonFinite) -> Self {
        self.on_nonfinite = on_nonfinite;
        self
    }

    /// The folder for `metrics.jsonl` and for batches that led to numbers that are not finite; none otherwise.
    pub fn out(mut self, folder: impl Into<PathBuf>) -> Self {
        self.out = Some(folder.into());
        self
    }

    /// How often a line is added to `metrics.jsonl`; every 100 steps otherwise.
    pub fn log_every(mut self, every: Every) -> Self {
        self.log_every = every;
        self
    }

    /// Shares the data with every other worker of the job that says so too, and goes on where the job is in it: the coordinators lease the tasks of a pass to workers, note
    /// what is trained, and give what a worker held to others when it ends or dies. Workers come and go at any time; a pass ends when all of it is trained, each task once, and again only
    /// where who trained it was gone before it was done. Checkpoints hold what is done, so a job that began from one goes on from there.
    ///
    /// All must have the same files and seed. It is an error when the job is in the midst of other data. [`Steps::began`] says where it is.
    /// Without this a loop trains all of the data by itself.
    pub fn shared(mut self) -> Self {
        self.shared = true;
        self
    }

    /// Starts reading and pulling.
    pub fn start(self) -> Result<Steps> {
        if let Ok((layout, _)) = &self.opened {
            self.job.remember(layout);
        }
        let shared = match &self.opened {
            Ok((_, dataset)) if self.shared => {
                let (cluster, session) = (self.job.cluster(), self.job.session());
                let (coordinators, turns) = (cluster.coordinators(), self.job.turns());
                let begun =
                    Tasks::begin(coordinators, session, &self.reading, dataset.as_ref(), turns);
                let begun = cluster.block_on(begun)??;
                self.job.schedule_checkpoints()?;
                Some(begun)
            }
            _ => None,
        };
        let (tasks, began) =
            shared.map_or_else(Default::default, |(tasks, start)| (Some(tasks), start));
        let recorder = Recorder::new(
            self.out.as_deref(),
            self.log_every,
            self.job.optimizers(),
            (began.clock, began.samples),
            self.planned_samples(began.passes)?,
        )?;
        let context = Context {
            device: self.device,
            trains: true,
            on_nonfinite: self.on_nonfinite,
            recorder: Rc::new(RefCell::new(recorder)),
        };
        Steps::start(self, context, began, tasks)
    }

    /// How many rows will have been trained in the end, nearly, where the files tell: by all workers where they share them.
    fn planned_samples(&self, passes: u64) -> Result<Option<u64>> {
        let Ok((_, dataset)) = &self.opened else { return Ok(None) };
        let rows: Option<u64> = dataset.tasks()?.iter().map(|task| task.rows).sum();
        Ok(rows.map(|rows| rows * self.reading.epochs.max(passes)))
    }
}

/// So many steps without a good one between them end a run also where they may be skipped: its weights are spoilt.
const SKIPPED_IN_A_ROW_MAX: u64 = 100;

impl OnNonFinite {
    /// Saves the batch, and stops or goes on.
    pub(crate) fn decide(self, fault: NonFinite, recorder: &RefCell<Recorder>) -> Result<()> {
        let saved = recorder.borrow_mut().save(&fault)?;
        let saved = saved.map_or_else(String::new, |path| path.display().to_string());
        match self {
            OnNonFinite::Stop => {
                tracing::error!(%saved, "a number is not finite");
                Err(Error::NonFinite(Box::new(fault)))
            }
            OnNonFinite::Skip => {
                tracing::warn!(%saved, "skipped: {fault}");
                let in_a_row = recorder.borrow_mut().skipped(&fault);
                if in_a_row < SKIPPED_IN_A_ROW_MAX {
                    return Ok(());
                }
                tracing::error!(in_a_row, "nothing is learnt any more");
                Err(Error::NonFinite(Box::new(fault)))
            }
        }
    }
}

/// The steps of a training loop.
pub struct Steps {
    job: Job,
    ready: mpsc::Receiver<Loaded>,
    /// `None` once the pipeline has been told to end.
    commands: Option<mpsc::Sender<Command>>,
    /// Gives dense values back to the pipeline for the next pull.
    caches: mpsc::UnboundedSender<DenseCache>,
    traffic: Option<JoinHandle<Result<Vec<Finished>>>>,
    /// How far the pipeline is.
    told: watch::Receiver<Position>,
    /// Of the job, and who keeps them, where they are shared.
    tasks: Option<(Arc<Tasks>, JoinHandle<Result<()>>)>,
    finished_by_us: bool,
    began: Start,
    stop: watch::Receiver<bool>,
    dense: Rc<[DenseVariable]>,
    context: Context,
    open: Arc<std::sync::atomic::AtomicUsize>,
    /// Steps that were dropped, and of which the pipeline has not heard.
    skipped: Rc<RefCell<Vec<u64>>>,
    depth: usize,
    clock: u64,
    waited: Duration,
}

impl Steps {
    pub(crate) fn start(
        builder: TrainBuilder,
        context: Context,
        began: Start,
        shared: Option<Arc<Tasks>>,
    ) -> Result<Self> {
        let TrainBuilder { job, opened, reading, depth, in_order, .. } = builder;
        let (layout, dataset) = opened?;
        if reading.batch == 0 || depth == 0 {
            let batch = reading.batch;
            let problem = format!("batch ({batch}) and depth ({depth}) must be above 0");
            return Err(Error::usage(problem));
        }
        let stop = job.cluster().stop()?;
        let dense: Rc<[DenseVariable]> = job.dense_variables().into();
        let prepared = reader::start(dataset, layout, reading, shared.clone(), depth + 1)?;
        let (ready_send, ready) = mpsc::channel(depth);
        // An end for each open step and one lookup, for whose reply its step waits.
        let (commands, commands_receive) = mpsc::channel(depth + 1);
        let (caches, caches_receive) = mpsc::unbounded_channel();
        let (tell, told) = watch::channel(Position::default());
        let traffic = Traffic {
            session: job.session().clone(),
            dense: dense.iter().map(|variable| variable.id).collect(),
            dense_once: !context.trains,
            depth,
            in_order,
            prepared,
            ready: Some(ready_send),
            commands: commands_receive,
            caches: caches_receive,
            clock: began.clock,
            progress: Progress::new(began.clock, tell, shared.clone()),
        };
        let traffic = job.cluster().runtime().spawn(traffic.run());
        let tasks = shared.map(|tasks| {
            let coordinators = job.cluster().coordinators().clone();
            let keep = tasks.clone().keep(coordinators, job.session().clone());
            (tasks, job.cluster().runtime().spawn(keep))
        });
        let open = if context.trains { job.open_steps().clone() } else { Arc::default() };
        Ok(Self {
            job,
            ready,
            commands: Some(commands),
            caches,
            traffic: Some(traffic),
            told,
            tasks,
            finished_by_us: false,
            stop,
            dense,
            context,
            open,
            skipped: Rc::default(),
            depth,
            clock: began.clock,
            began,
            waited: Duration::ZERO,
        })
    }

    /// The next step, when its rows are here; `None` at the end of the data, or after SIGTERM or Ctrl-C (see
    /// [`Cluster::stopping`](crate::Cluster::stopping)). Errors of earlier pushes are told here. Writes the dense weights that
    /// were pulled for this step into the VarStore: no other call does.
    #[allow(clippy::should_implement_trait, reason = "a fallible iterator, as the loop wants it")]
    pub fn next(&mut self) -> Result<Option<Step>> {
        if self.open.load(Ordering::Relaxed) >= self.depth {
            return Err(Error::usage(format!(
                "{} steps are open and depth is {}: push or drop a step before asking for the next",
                self.open.load(Ordering::Relaxed),
                self.depth
            )));
        }
        if self.commands.is_none() {
            return Ok(None);
        }
        if self.open.load(Ordering::Relaxed) > 0 && self.is_in_rounds() {
            let problem = "a step is open and the job trains in rounds: push or drop it before asking for the next";
            return Err(Error::usage(problem));
        }
        self.skip();
        if self.tasks.as_ref().is_some_and(|(_, keep)| keep.is_finished()) {
            self.tasks_end()?;
        }
        if let Some((tasks, _)) = &self.tasks {
            self.context.recorder.borrow_mut().job_trained(tasks.samples());
        }
        self.context.recorder.borrow_mut().write_due(self.job.session(), false)?;
        let (ready, stop) = (&mut self.ready, &mut self.stop);
        let asked = Instant::now();
        let loaded = self.job.cluster().block_on(async {
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => None,
                loaded = ready.recv() => loaded,
            }
        })?;
        let ended = if loaded.is_none() { self.end() } else { Ok(()) };
        self.waited += asked.elapsed();
        ended?;
        let (Some(mut loaded), Some(commands)) = (loaded, self.commands.clone()) else {
            return Ok(None);
        };
        self.context.recorder.borrow_mut().finished(&loaded.finished);
        if let Some(cache) = loaded.dense.take() {
            for variable in self.dense.iter() {
                cache.values(variable.id).map_or(Ok(()), |values| variable.write(values))?;
            }
            // A pipeline that has ended needs it no more.
            _ = self.caches.send(cache);
        }
        let ticket = Ticket::new(commands, self.open.clone(), self.skipped.clone(), self.clock);
        let (dense, context) = (self.dense.clone(), self.context.clone());
        let step = Step::new(loaded, self.clock, dense, context, ticket)?;
        self.clock += 1;
        Ok(Some(step))
    }

    /// The next step comes when the round of this one is over.
    fn is_in_rounds(&self) -> bool {
        let state = self.job.session().state();
        self.context.trains && state.view.consistency.backup_workers().is_some()
    }

    /// Where the job was in its data when this loop began, where it is [shared](TrainBuilder::shared).
    #[must_use]
    pub fn began(&self) -> &Start {
        &self.began
    }

    /// How far it is: batches that this loop has trained, one after the other from where it began, their pushes acknowledged.
    #[must_use]
    pub fn position(&self) -> Position {
        *self.told.borrow()
    }

    /// Whether every task of the job is done, and this worker did the last one: who has something to do when all is trained.
    #[must_use]
    pub fn finished_the_job(&self) -> bool {
        self.finished_by_us
    }

    /// How long [`Steps::next`] has waited for rows, and in the end for acknowledgements: what a higher depth, or a faster cluster, would save.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// How stale the steps were whose pushes are acknowledged.
    #[must_use]
    pub fn staleness(&self) -> Staleness {
        self.context.recorder.borrow().staleness()
    }

    /// Ends the loop, also before its data does: what was pushed is acknowledged when this returns, and tasks that are not done are for other workers.
    pub fn finish(&mut self) -> Result<Position> {
        self.skip();
        self.end()?;
        Ok(self.position())
    }

    /// Whoever goes on meant to drop the steps that it dropped.
    fn skip(&self) {
        let Some(commands) = &self.commands else { return };
        for clock in self.skipped.borrow_mut().drain(..) {
            // As in `Ticket::push`.
            _ = commands.try_send(Command::Skip(clock));
        }
    }

    /// What is done is told, and the rest given back.
    fn tasks_end(&mut self) -> Result<()> {
        let Some((tasks, keep)) = self.tasks.take() else { return Ok(()) };
        tasks.close();
        let kept = self.job.cluster().block_on(keep)?;
        self.finished_by_us = tasks.finished_by() == self.job.session().id();
        self.context.recorder.borrow_mut().job_trained(tasks.samples());
        kept.unwrap_or_else(|lost| Err(Error::usage(format!("the task of tasks broke: {lost}"))))
    }

    /// Waits until every push is acknowledged, or, after a signal, for a while.
    fn end(&mut self) -> Result<()> {
        self.ready.close();
        self.commands = None;
        let Some(mut traffic) = self.traffic.take() else { return Ok(()) };
        let open = self.open.load(Ordering::Relaxed);
        if open > 0 && !traffic.is_finished() {
            return Err(Error::usage(format!(
                "the loop is over and {open} steps are open: push or drop each step before you ask for the next"
            )));
        }
        let patience = if *self.stop.borrow() { STOP_GRACE } else { Duration::MAX };
        let ended = self
            .job
            .cluster()
            .block_on(async { tokio::time::timeout(patience, &mut traffic).await })?;
        let ended = match ended {
            Ok(Ok(finished)) => finished.map(|finished| {
                self.context.recorder.borrow_mut().finished(&finished);
            }),
            Ok(Err(lost)) => Err(Error::usage(format!("the pipeline broke: {lost}"))),
            Err(_) => {
                traffic.abort();
                Ok(())
            }
        };
        // Also after an error others may have the tasks; the first error tells more.
        let told = self.tasks_end();
        ended?;
        told?;
        self.context.recorder.borrow_mut().write_due(self.job.session(), true)
    }
}

/// How long a stopped loop waits for what is under way.
const STOP_GRACE: Duration = Duration::from_secs(10);

impl Drop for Steps {
    /// Left early: what was pushed is acknowledged before the job can be closed.
    fn drop(&mut self) {
        if let Some((tasks, _)) = &self.tasks {
            tasks.close();
        }
        if !std::thread::panicking()
            && let Err(error) = self.end()
        {
            tracing::warn!("at the end of a loop that was left early: {error}");
        }
    }
}
