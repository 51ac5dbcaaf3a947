//! The training loop of the ready-made models.

use std::fs::File;
use std::io::Write as _;
use std::num::NonZeroU32;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use downpour::{Every, Job, Paths, Result, Start, Step};
use tch::{Kind, Tensor};

use crate::options::{Options, needed, parsed};
use crate::setup::{Learner, Purpose, Setup};

/// Trains to the end, from the last checkpoint again when the job is set back to it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut options = options.clone();
    loop {
        match train(&options) {
            Err(error) if is_set_back(&error) => tracing::warn!("{error}: goes on from there"),
            ended => return ended,
        }
        options.fresh = false;
    }
}

fn is_set_back(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(downpour::Error::SetBack))
}

fn train(options: &Options) -> anyhow::Result<()> {
    let train = needed(&options.train, "--train")?;
    let log_every = parsed(&options.log_every, "--log-every", Every::Steps(100))?;
    let beside = Beside::new(options)?;
    let setup = Setup::new(options, Purpose::Train, train)?;
    let trained = train_on(&setup, options, (train, log_every), beside);
    trained.map_err(|error| explained(&setup.job, error))
}

/// What lies behind an error. Who was told to stop goes on with nothing.
pub(crate) fn explained(job: &Job, error: anyhow::Error) -> anyhow::Error {
    match job.stopping() {
        true if is_set_back(&error) => downpour::Error::Stopped.into(),
        false if job.began_again() => downpour::Error::SetBack.into(),
        _ => error,
    }
}

fn train_on(
    setup: &Setup,
    options: &Options,
    (train, log_every): (&[String], Every),
    mut beside: Beside,
) -> anyhow::Result<()> {
    let mut builder = setup
        .job
        .train(Paths::new(train), setup.features())
        .batch(options.batch.unwrap_or(1024))
        .epochs(options.epochs.unwrap_or(1))
        .shuffle_rows(options.shuffle_rows.unwrap_or(1 << 16))
        .seed(options.seed())
        .depth(options.depth.unwrap_or(1))
        .in_order(options.in_order.unwrap_or(false))
        .device(setup.device)
        .log_every(log_every)
        .on_nonfinite(options.on_nonfinite.map(Into::into).unwrap_or_default());
    if let Some(out) = &options.out {
        builder = builder.out(out);
    }
    if let Some(norm) = options.clip_norm {
        ensure!(norm > 0.0 && norm.is_finite(), "--clip-norm is {norm}, but must be above 0");
    }
    let l2 = options.l2.unwrap_or(0.0);
    let mut steps = builder.shared().start()?;
    let began = steps.began().clone();
    let worker = options.worker_index.unwrap_or(0);
    announce(options, &began)?;
    let mut clock = began.clock;
    if clock > 0 {
        // Not the masks of dropout that were drawn before.
        tch::manual_seed(options.seed().wrapping_add(clock) as i64);
    }
    beside.last.0 = clock;
    while let Some(step) = steps.next()? {
        let loss = loss(setup, &step, l2)?;
        let mut grads = step.backward(&loss)?;
        if let Some(norm) = options.clip_norm {
            grads.clip_norm(norm);
        }
        grads.push()?;
        clock += 1;
        if beside.due(clock) && beside.evaluate(setup, clock)? == Verdict::Stop {
            break;
        }
    }
    let end = steps.finish()?;
    let rolled_back = setup.job.rolled_back();
    let stale = steps.staleness();
    tracing::info!(
        worker,
        batches = end.batches,
        samples = end.samples,
        stale_records = format!("{:.2}", stale.records),
        stale_clocks = format!("{:.2}", stale.clocks),
        stale_clocks_max = stale.clocks_max,
        rolled_back_pushes = rolled_back.iter().map(|lost| lost.last + 1 - lost.first).sum::<u64>(),
        "trained"
    );
    rolled_back.iter().for_each(|lost| tracing::warn!(worker, "{lost}"));
    if steps.finished_the_job()
        && !setup.job.stopping()
        && let Some(name) = setup.job.save()?
    {
        tracing::info!(checkpoint = name, "saved");
    }
    if let (Some(test), false) = (&options.test, setup.job.stopping()) {
        let report = setup.evaluate(test)?;
        writeln!(std::io::stdout(), "{report}").context("write to stdout")?;
    }
    let stopped = setup.job.stopping();
    setup.job.finish()?;
    if stopped { Err(downpour::Error::Stopped.into()) } else { Ok(()) }
}

/// The first line of what this process says, where it does not simply begin.
fn announce(options: &Options, began: &Start) -> anyhow::Result<()> {
    let job = needed(&options.job, "--job")?;
    let Start { pass, passes, tasks_done, tasks, samples, checkpoint, done, .. } = began;
    let from = match checkpoint {
        Some((name, uri)) => format!("job {job:?}, which began from checkpoint {name} in {uri}"),
        None => format!("job {job:?}"),
    };
    let line = match (done, samples, &options.checkpoint_to) {
        (true, ..) => format!(
            "{from}: all {passes} passes over {tasks} tasks were trained before, {samples} samples; more --epochs go on, --fresh starts over"
        ),
        (false, 0, None) if checkpoint.is_none() => return Ok(()),
        (false, 0, _) => format!("{from}: begins at the start of the data"),
        (false, ..) => format!(
            "resuming {from}: {tasks_done} of {tasks} tasks of pass {} of {passes} are trained, {samples} samples in all",
            pass + 1
        ),
    };
    writeln!(std::io::stderr(), "{line}").context("write to stderr")
}

fn loss(setup: &Setup, step: &Step, l2: f64) -> Result<Tensor> {
    let (model, objective) = match &setup.learner {
        Learner::Ranks(model) => return model.loss(step),
        Learner::Predicts { model, objective } => (model, objective),
    };
    let loss = objective.loss(&model.forward(step, true)?, step)?;
    if l2 == 0.0 {
        return Ok(loss);
    }
    let squares =
        (0..step.features().count()).map(|feature| step.rows_at(feature).square().sum(Kind::Float));
    let squares: Vec<Tensor> = squares.collect();
    let penalty =
        Tensor::f_stack(&squares, 0)?.f_sum(Kind::Float)?.f_mul_scalar(l2 / step.len() as f64)?;
    Ok(loss.f_add(&penalty)?)
}

/// Evaluation beside the training.
struct Beside {
    every: Option<Every>,
    data: Vec<String>,
    patience: Option<u32>,
    file: Option<File>,
    last: (u64, Instant),
    best: Option<f64>,
    without_gain: u32,
}

#[derive(PartialEq, Eq)]
enum Verdict {
    GoOn,
    Stop,
}

impl Beside {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let mine = options.worker_index.unwrap_or(0) == 0;
        let every = match &options.eval_every {
            Some(text) if mine => {
                Some(text.parse().map_err(|error| anyhow::anyhow!("--eval-every: {error}"))?)
            }
            _ => None,
        };
        let data = match every {
            Some(_) => needed(&options.eval_data, "--eval-data (for --eval-every)")?.clone(),
            None => Vec::new(),
        };
        let file = match (&options.out, every) {
            (Some(out), Some(_)) => {
                let path = out.join("evaluations.jsonl");
                std::fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
                Some(File::create(&path).with_context(|| format!("create {}", path.display()))?)
            }
            _ => None,
        };
        Ok(Self {
            every,
            data,
            patience: options.patience.map(NonZeroU32::get),
            file,
            last: (0, Instant::now()),
            best: None,
            without_gain: 0,
        })
    }

    fn due(&self, clock: u64) -> bool {
        self.every.is_some_and(|every| every.due(clock - self.last.0, self.last.1.elapsed()))
    }

    fn evaluate(&mut self, setup: &Setup, clock: u64) -> anyhow::Result<Verdict> {
        let mut report = setup.evaluate(&self.data)?;
        let gained = match quality(&report) {
            Some(quality) if self.best.is_none_or(|best| quality > best) => {
                self.best = Some(quality);
                true
            }
            _ => false,
        };
        self.without_gain = if gained { 0 } else { self.without_gain + 1 };
        report["clock"] = clock.into();
        report["best"] = gained.into();
        tracing::info!(%report, "evaluated");
        if let Some(file) = &mut self.file {
            writeln!(file, "{report}").context("write evaluations.jsonl")?;
        }
        self.last = (clock, Instant::now());
        if self.patience.is_some_and(|patience| self.without_gain >= patience) {
            tracing::info!(evaluations = self.without_gain, "stopping: nothing better came");
            return Ok(Verdict::Stop);
        }
        Ok(Verdict::GoOn)
    }
}

/// What grows when a model gets better: the AUC, the NDCG, or minus the error.
fn quality(report: &serde_json::Value) -> Option<f64> {
    let value = |name: &str| report.get(name).and_then(serde_json::Value::as_f64);
    value("auc").or_else(|| value("ndcg@10")).or_else(|| value("rmse").map(|error| -error))
}
