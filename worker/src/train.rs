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
use crate::position::{Labels, Position, Reads, Start, Told};
use crate::reader::{self, Reading};
use crate::recorder::Recorder;
use crate::step::{Context, Ticket};
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
    resumable: bool,
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
        let reading = Reading {
            batch: 1024,
            epochs: 1,
            shuffle_rows: 1 << 16,
            seed: 0,
            share: (0, 1),
            skip: (0, 0),
        };
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
            resumable: false,
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
    /// reads its own writes, with 2 the network works while the caller computes.
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

    /// This is worker `index` (from 0) of `workers`: it trains its share of the tasks, or of the batches where there are few tasks.
    /// All must have the same seed, batch size and files.
    pub fn worker(mut self, index: usize, workers: usize) -> Self {
        self.reading.share = (index, workers);
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

    /// Keeps with the job how far this worker is in its data, and begins there: batches whose pushes were all acknowledged are not read
    /// again. Without a label of this worker it begins at the start. Checkpoints keep the label, so a job that began from one goes on where it was; then,
    /// and after the death of a worker alone, what was pushed since the label was written (about a second) and what was on its way is trained again.
    ///
    /// It is an error when the worker was in the midst of a training that read other rows. [`Steps::began`] says where it begins.
    pub fn resumable(mut self) -> Self {
        self.resumable = true;
        self
    }

    /// Starts reading and pulling.
    pub fn start(mut self) -> Result<Steps> {
        if let Ok((layout, _)) = &self.opened {
            self.job.remember(layout);
        }
        let resumed = match &self.opened {
            Ok((_, dataset)) if self.resumable => {
                let reads = Reads::new(&self.reading, dataset.as_ref())?;
                let (cluster, session) = (self.job.cluster(), self.job.session());
                let begun = Labels::begin(cluster.coordinators(), session, &self.reading, reads);
                let (labels, start) = cluster.block_on(begun)??;
                let Position { batches, epoch, epoch_start, .. } = start.at;
                self.reading.skip = (epoch, batches - epoch_start);
                if start.done {
                    self.reading.epochs = 0;
                }
                self.job.schedule_checkpoints()?;
                Some((labels, start))
            }
            _ => None,
        };
        let began = resumed.as_ref().map_or_else(Start::default, |(_, start)| start.clone());
        let recorder = Recorder::new(
            self.out.as_deref(),
            self.log_every,
            self.job.optimizers(),
            began.at,
            self.planned_samples()?,
        )?;
        let context = Context {
            device: self.device,
            trains: true,
            on_nonfinite: self.on_nonfinite,
            recorder: Rc::new(RefCell::new(recorder)),
        };
        let mut steps = Steps::start(self, context, began)?;
        if let Some((labels, _)) = resumed {
            let told = steps.told.clone();
            steps.labels = Some(steps.job.cluster().runtime().spawn(labels.follow(told)));
        }
        Ok(steps)
    }

    /// How many rows this worker will have trained in the end, nearly, where the files tell.
    fn planned_samples(&self) -> Result<Option<u64>> {
        let Ok((_, dataset)) = &self.opened else { return Ok(None) };
        let rows: Option<u64> = dataset.tasks()?.iter().map(|task| task.rows).sum();
        let workers = self.reading.share.1.max(1) as u64;
        Ok(rows.map(|rows| rows * self.reading.epochs / workers))
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
    told: watch::Receiver<Told>,
    /// Writes that down, for a training that can be resumed.
    labels: Option<JoinHandle<Result<()>>>,
    began: Start,
    stop: watch::Receiver<bool>,
    dense: Rc<[DenseVariable]>,
    context: Context,
    open: Arc<std::sync::atomic::AtomicUsize>,
    depth: usize,
    clock: u64,
    waited: Duration,
}

impl Steps {
    pub(crate) fn start(builder: TrainBuilder, context: Context, began: Start) -> Result<Self> {
        let TrainBuilder { job, opened, reading, depth, in_order, .. } = builder;
        let (layout, dataset) = opened?;
        let (index, workers) = reading.share;
        if reading.batch == 0 || depth == 0 || index >= workers {
            return Err(Error::usage(format!(
                "batch ({}) and depth ({depth}) must be above 0, and the worker's index ({index}) below \
                 the number of workers ({workers})",
                reading.batch
            )));
        }
        let stop = job.cluster().stop()?;
        let dense: Rc<[DenseVariable]> = job.dense_variables().into();
        let prepared = reader::start(dataset, layout, reading, depth + 1)?;
        let (ready_send, ready) = mpsc::channel(depth);
        // An end for each open step and one lookup, for whose reply its step waits.
        let (commands, commands_receive) = mpsc::channel(depth + 1);
        let (caches, caches_receive) = mpsc::unbounded_channel();
        let (tell, told) = watch::channel((began.at, false));
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
            clock: began.at.batches,
            told: tell,
        };
        let traffic = job.cluster().runtime().spawn(traffic.run());
        let open = if context.trains { job.open_steps().clone() } else { Arc::default() };
        Ok(Self {
            job,
            ready,
            commands: Some(commands),
            caches,
            traffic: Some(traffic),
            told,
            labels: None,
            stop,
            dense,
            context,
            open,
            depth,
            clock: began.at.batches,
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
        if self.labels.as_ref().is_some_and(JoinHandle::is_finished) {
            self.labels_end()?;
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
        let ticket = Ticket::new(commands, self.open.clone(), self.clock);
        let (dense, context) = (self.dense.clone(), self.context.clone());
        let step = Step::new(loaded, self.clock, dense, context, ticket)?;
        self.clock += 1;
        Ok(Some(step))
    }

    /// Where it began: at the start, unless [`TrainBuilder::resumable`] went on.
    #[must_use]
    pub fn began(&self) -> &Start {
        &self.began
    }

    /// How far it is: batches that are trained, one after the other from the start, their pushes acknowledged.
    #[must_use]
    pub fn position(&self) -> Position {
        self.told.borrow().0
    }

    /// How long [`Steps::next`] has waited for rows, and in the end for acknowledgements: what a higher depth, or a faster cluster, would save.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Ends the loop before its data does: what was pushed is acknowledged when this returns, the position then.
    pub fn finish(mut self) -> Result<Position> {
        self.end()?;
        Ok(self.position())
    }

    /// Waits until the position is written down.
    fn labels_end(&mut self) -> Result<()> {
        let Some(labels) = self.labels.take() else { return Ok(()) };
        let written = self.job.cluster().block_on(labels)?;
        written.unwrap_or_else(|lost| Err(Error::usage(format!("the label's task broke: {lost}"))))
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
        match ended {
            Ok(Ok(finished)) => self.context.recorder.borrow_mut().finished(&finished?),
            Ok(Err(lost)) => return Err(Error::usage(format!("the pipeline broke: {lost}"))),
            Err(_) => traffic.abort(),
        }
        self.labels_end()?;
        self.context.recorder.borrow_mut().write_due(self.job.session(), true)
    }
}

/// How long a stopped loop waits for what is under way.
const STOP_GRACE: Duration = Duration::from_secs(10);

impl Drop for Steps {
    /// Left early: what was pushed is acknowledged before the job can be closed.
    fn drop(&mut self) {
        if !std::thread::panicking()
            && let Err(error) = self.end()
        {
            tracing::warn!("at the end of a loop that was left early: {error}");
        }
    }
}
