use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Serialize;
use tch::{Device, Tensor};

use crate::dense::floats;
use crate::features::Layout;
use crate::metrics::{Accuracy, Auc, LogLoss, Rmse, UserAuc};
use crate::recorder::Recorder;
use crate::step::Context;
use crate::tasks::Start;
use crate::{Error, Job, OnNonFinite, Result, Source, Step, Steps, TrainBuilder};

/// An evaluation before it runs.
#[must_use = "call `run`"]
pub struct EvaluateBuilder(TrainBuilder);

/// What a model is worth on a dataset. Every value is weighted by the samples' weights, where they have some.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Rows.
    pub samples: u64,
    /// Of the first label.
    #[serde(flatten)]
    pub scores: Scores,
    /// Of every label by name, where there are several.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Scores>,
}

/// Values for one label; `None` where a value is not defined: for example the AUC where only one class occurs, or a log loss for
/// labels beyond 0 and 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Scores {
    /// Area under the ROC curve.
    pub auc: Option<f64>,
    /// Mean binary cross-entropy.
    pub logloss: Option<f64>,
    /// Share on the right side of one half.
    pub accuracy: Option<f64>,
    /// Mean of the users' own AUCs, where the features name a user.
    pub user_auc: Option<f64>,
    /// Root mean squared error: of the probability for binary labels, of the prediction itself for others.
    pub rmse: Option<f64>,
}

impl std::ops::Deref for Report {
    type Target = Scores;

    fn deref(&self) -> &Scores {
        &self.scores
    }
}

impl EvaluateBuilder {
    pub(crate) fn with_layout(job: &Job, source: impl Source, layout: Result<Arc<Layout>>) -> Self {
        let mut builder = TrainBuilder::with_layout(job, source, layout).depth(DEPTH).batch(4096);
        builder.reading.shuffle_rows = 0;
        Self(builder)
    }

    /// Rows of a step; 4096 otherwise.
    pub fn batch(self, rows: usize) -> Self {
        Self(self.0.batch(rows))
    }

    /// Where the rows are; the CPU otherwise.
    pub fn device(self, device: Device) -> Self {
        Self(self.0.device(device))
    }

    /// Runs it; `predict` is as in [`Job::evaluate`].
    pub fn run(self, mut predict: impl FnMut(&Step) -> Result<Tensor>) -> Result<Report> {
        let names = match &self.0.opened {
            Ok((layout, _)) => {
                layout.schema.labels().iter().map(|label| label.name.clone()).collect()
            }
            Err(_) => Vec::new(),
        };
        let mut labels: Vec<Accumulator> = names.iter().map(|_| Accumulator::default()).collect();
        let mut samples = 0;
        self.for_each(|step| {
            let logits = tch::no_grad(|| predict(step))?;
            let logits = floats(&logits)?;
            if logits.len() != step.len() * names.len() {
                return Err(Error::usage(format!(
                    "the model gives {} numbers for {} rows with {} labels",
                    logits.len(),
                    step.len(),
                    names.len()
                )));
            }
            samples += step.len() as u64;
            labels.iter_mut().enumerate().try_for_each(|(label, of)| of.add(step, label, &logits))
        })?;
        let mut scores = labels.iter().map(Accumulator::scores);
        if names.len() < 2 {
            return Ok(Report {
                samples,
                scores: scores.next().unwrap_or_default(),
                labels: BTreeMap::new(),
            });
        }
        let scores: Vec<Scores> = scores.collect();
        let labels = names.into_iter().zip(scores.iter().cloned()).collect();
        Ok(Report { samples, scores: scores[0].clone(), labels })
    }

    /// Every step of the dataset, for metrics of your own. A step here has no gradients.
    pub fn for_each(self, mut each: impl FnMut(&Step) -> Result<()>) -> Result<()> {
        let job = &self.0.job;
        if job.open_steps().load(Ordering::Relaxed) > 0 {
            return Err(Error::usage(
                "evaluate while a step of training is open: push or drop the step first, because the dense \
                 weights change now",
            ));
        }
        let context = Context {
            device: self.0.device,
            trains: false,
            on_nonfinite: OnNonFinite::Stop,
            recorder: Rc::new(RefCell::new(Recorder::silent())),
        };
        let cluster = job.cluster().clone();
        let mut steps = Steps::start(self.0, context, Start::default(), None)?;
        while let Some(step) = steps.next()? {
            each(&step)?;
        }
        if cluster.stopping() { Err(Error::Stopped) } else { Ok(()) }
    }
}

/// Batches whose rows are pulled ahead.
const DEPTH: usize = 3;

#[derive(Default)]
struct Accumulator {
    auc: Auc,
    user_auc: UserAuc,
    log_loss: LogLoss,
    accuracy: Accuracy,
    rmse_of_probability: Rmse,
    rmse: Rmse,
    beyond_binary: bool,
}

impl Accumulator {
    fn add(&mut self, step: &Step, label: usize, logits: &[f32]) -> Result<()> {
        let batch = step.batch();
        let width = batch.labels.len() / batch.rows().max(1);
        for i in 0..batch.rows() {
            let (logit, wanted) = (logits[i * width + label], batch.labels[i * width + label]);
            if !logit.is_finite() {
                let rows = batch.describe_rows();
                return Err(Error::usage(format!(
                    "the model gives {logit} for a row among {rows}"
                )));
            }
            let weight = batch.weights.get(i).copied().unwrap_or(1.0);
            let probability = 1.0 / (1.0 + (-logit).exp());
            self.beyond_binary |= wanted != 0.0 && wanted != 1.0;
            self.auc.add(logit, wanted, weight);
            self.log_loss.add(logit, wanted, weight);
            self.accuracy.add(logit, wanted, weight);
            self.rmse_of_probability.add(probability, wanted, weight);
            self.rmse.add(logit, wanted, weight);
            if let Some(&user) = batch.users.get(i) {
                self.user_auc.add(user, logit, wanted, weight);
            }
        }
        Ok(())
    }

    fn scores(&self) -> Scores {
        if self.beyond_binary {
            return Scores { rmse: self.rmse.value(), ..Scores::default() };
        }
        Scores {
            auc: self.auc.value(),
            logloss: self.log_loss.value(),
            accuracy: self.accuracy.value(),
            user_auc: self.user_auc.value(),
            rmse: self.rmse_of_probability.value(),
        }
    }
}
