//! What waiting for each other costs and what it buys: workers of different speed train together under each consistency mode (docs/consistency.md).
//!
//! Each worker is a task with a session of its own. A step takes the time that the [`Stalls`] say, which the worker sleeps: what is measured is who waits for whom,
//! and not the machine. [`Problem`] says what is learnt; its loss is taken from the cluster by somebody who does not train.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use downpour_client::{
    Clock, Coordinators, Job, Pulled, PushBatch, RowGradients, Session, SessionOptions, TableRows,
};
use downpour_core::consistency::Consistency;
use downpour_core::id::VariableId;
use downpour_core::init::Init;
use downpour_core::optimizer::{OptimizerSpec, Scaling, Sgd};
use downpour_core::spec::{JobSpec, Shape, TableSpec, VariableSpec};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::protocol::Peer;
use crate::random::{Zipf, normals, uniform};

/// Looks at the loss.
const LOOKS: u32 = 40;

/// Who is slow, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stalls {
    /// Nobody.
    None,
    /// One after the other, for so long each, `factor` times slower.
    Rotating {
        /// How long each.
        stall_ms: u64,
        /// From the beginning of one stall to that of the next one's.
        every_ms: u64,
        /// Times slower.
        factor: u32,
    },
    /// The last worker, `factor` times slower.
    One {
        /// Times slower.
        factor: u32,
    },
}

impl Stalls {
    /// How much longer a step of a worker takes that begins then.
    fn factor(self, worker: usize, workers: usize, since: Duration) -> u32 {
        match self {
            Stalls::Rotating { stall_ms, every_ms, factor } => {
                let (now, every) = (since.as_millis() as u64, every_ms.max(1));
                let turn = now / every % workers as u64 == worker as u64;
                if turn && now % every < stall_ms { factor } else { 1 }
            }
            Stalls::One { factor } if worker + 1 == workers => factor,
            Stalls::None | Stalls::One { .. } => 1,
        }
    }

    /// Steps that the workers' speeds add up to, if nobody waits and a step takes `step`.
    fn steps(self, workers: usize, step: Duration, seconds: f64) -> f64 {
        let full = seconds / step.as_secs_f64();
        let lost = |factor: u32| 1.0 - 1.0 / f64::from(factor.max(1));
        let all = workers as f64;
        match self {
            Stalls::None => full * all,
            Stalls::Rotating { stall_ms, every_ms, factor } => {
                let share = (stall_ms as f64 / every_ms.max(1) as f64).min(1.0);
                full * (all - share * lost(factor))
            }
            Stalls::One { factor } => full * (all - lost(factor)),
        }
    }
}

/// What is learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// Least squares: a sum of rows is a target, with noise. The optimum is known: the loss is the distance to it.
    Squares,
    /// Logistic regression on made clicks.
    Clicks,
}

/// Rows of the model.
const ROWS: u32 = 2_000;
/// Rows that a sample names.
const FIELDS: usize = 8;

impl Problem {
    fn scale(self) -> f64 {
        match self {
            Problem::Squares => 1.0,
            Problem::Clicks => 0.7,
        }
    }

    fn learning_rate(self) -> f32 {
        match self {
            Problem::Squares => 0.05,
            Problem::Clicks => 0.5,
        }
    }
}

/// The hidden model and where samples come from.
#[derive(Debug)]
struct Data {
    problem: Problem,
    weights: Vec<f64>,
    zipf: Zipf,
}

/// One sample: its rows and what it should be.
type Sample = ([u32; FIELDS], f64);

impl Data {
    fn new(problem: Problem) -> Self {
        let weights = normals(77, ROWS.into()).map(|weight| weight * problem.scale());
        Data { problem, weights: weights.collect(), zipf: Zipf::new(ROWS) }
    }

    fn sample(&self, seed: u64, number: u64) -> Sample {
        let first = number * FIELDS as u64;
        let row = |field: usize| {
            let rank = self.zipf.rank(uniform(seed, first + field as u64));
            // Each field has its own part of the rows.
            (rank / FIELDS as u32) * FIELDS as u32 + field as u32
        };
        let rows: [u32; FIELDS] = std::array::from_fn(row);
        let sum: f64 = rows.iter().map(|&row| self.weights[row as usize]).sum();
        let chance = uniform(seed + 1, number);
        let target = match self.problem {
            Problem::Squares => sum + (chance - 0.5),
            Problem::Clicks => f64::from(u8::from(chance < sigmoid(sum))),
        };
        (rows, target)
    }

    /// Loss of one sample and its slope.
    fn loss(&self, output: f64, target: f64) -> (f64, f64) {
        match self.problem {
            Problem::Squares => ((output - target).powi(2) / 2.0, output - target),
            Problem::Clicks => {
                let p = sigmoid(output).clamp(1e-9, 1.0 - 1e-9);
                (-(target * p.ln() + (1.0 - target) * (1.0 - p).ln()), p - target)
            }
        }
    }

    /// Loss on samples that nobody trains on.
    fn evaluate(&self, model: &[f32], samples: u64) -> f64 {
        let loss = |number| {
            let (rows, target) = self.sample(9_000, number);
            let output = rows.iter().map(|&row| f64::from(model[row as usize])).sum();
            self.loss(output, target).0
        };
        (0..samples).map(loss).sum::<f64>() / samples as f64
    }

    /// The least that the loss can be on them: that of the hidden model.
    fn optimum(&self, samples: u64) -> f64 {
        let hidden: Vec<f32> = self.weights.iter().map(|&weight| weight as f32).collect();
        self.evaluate(&hidden, samples)
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// One training.
#[derive(Clone, Debug)]
pub struct Setting {
    /// What is learnt.
    pub problem: Problem,
    /// As [`Consistency`] writes it.
    pub mode: String,
    /// Who is slow.
    pub stalls: Stalls,
    /// Workers.
    pub workers: usize,
    /// Samples of a step.
    pub batch: usize,
    /// How long a step computes.
    pub step: Duration,
    /// How long all train.
    pub duration: Duration,
    /// Times the problem's learning rate.
    pub lr_times: f32,
    /// What staleness does to it.
    pub scaling: Scaling,
}

/// How one training went.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was learnt.
    pub problem: Problem,
    /// The mode.
    pub mode: String,
    /// Who was slow.
    pub stalls: Stalls,
    /// Steps of each worker.
    pub steps: Vec<u64>,
    /// Steps that rounds dropped, of each worker.
    pub dropped: Vec<u64>,
    /// Steps a second that were not dropped.
    pub steps_s: f64,
    /// That the workers' speeds add up to, the time of pulls and pushes not counted.
    pub steps_s_max: f64,
    /// Share of the time that workers waited for others.
    pub idle: f64,
    /// How many steps a worker was ahead of the slowest when it began one: the mean and the most.
    pub ahead_mean: f64,
    /// The most.
    pub ahead_max: u64,
    /// How many steps the furthest worker went on between the pull and the push of a step, as shards knew it: the mean.
    pub stale_clocks: f64,
    /// The least that the loss can be.
    pub optimum: f64,
    /// Loss over time.
    pub looks: Vec<Look>,
}

/// The loss at a moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Look {
    /// Since the beginning.
    pub seconds: f64,
    /// Trained until then, but for those dropped.
    pub samples: u64,
    /// On samples that nobody trains on.
    pub loss: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Worked {
    steps: u64,
    dropped: u64,
    waited: Duration,
    ahead: u64,
    ahead_max: u64,
    stale_clocks: u64,
}

/// Trains in a job of its own, which is deleted at the end.
///
/// # Errors
/// The cluster does not answer.
pub async fn train(peer: &Peer, name: &str, setting: &Setting) -> anyhow::Result<Report> {
    let Peer::Cluster { coordinators, shards, replicas, transport, .. } = peer else {
        bail!("not a cluster: {peer:?}");
    };
    let coordinators = Coordinators::parse(coordinators)?;
    let (shards, replicas) = (*shards, *replicas);
    let spec = JobSpec { name: name.to_owned(), shards, replicas, min_in_sync: 1, seed: 1 };
    let transport = transport.parse()?;
    let open = async |who: &str, kind| {
        let options = SessionOptions { transport, kind, ..SessionOptions::worker(who) };
        Session::open(&coordinators, &Job::Create(spec.clone()), options).await
    };
    let looker = open("looker", downpour_client::SessionKind::Evaluator).await?;
    let consistency: Consistency = setting.mode.parse()?;
    coordinators.set_consistency(looker.job(), &consistency).await?;
    let variable = define(&looker, setting).await?;
    let data = Arc::new(Data::new(setting.problem));
    let mut sessions = Vec::new();
    for worker in 0..setting.workers {
        let session =
            open(&format!("worker-{worker}"), downpour_client::SessionKind::Worker).await?;
        define(&session, setting).await?;
        sessions.push(session);
    }
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for (index, session) in sessions.into_iter().enumerate() {
        let (data, setting) = (data.clone(), setting.clone());
        tasks.spawn(async move {
            (index, work(session, variable, &data, index, &setting, begun).await)
        });
    }
    let (samples, mut looks) = (2_000, Vec::new());
    let keys: Vec<u64> = (0..ROWS.into()).collect();
    for look in 0..=LOOKS {
        sleep_until(begun + setting.duration * look / LOOKS).await;
        let mut model = vec![0.0; keys.len()];
        looker.pull(&mut [TableRows { variable, keys: &keys, values: &mut model }], None).await?;
        let seconds = begun.elapsed().as_secs_f64();
        looks.push(Look { seconds, samples: 0, loss: data.evaluate(&model, samples) });
    }
    let mut worked = vec![Worked::default(); setting.workers];
    let mut steps_at: Vec<Vec<f64>> = vec![Vec::new(); setting.workers];
    while let Some(ended) = tasks.join_next().await {
        let (index, outcome) = ended.context("a worker broke")?;
        (worked[index], steps_at[index]) = outcome?;
    }
    looker.close().await?;
    coordinators.delete_job(looker.job()).await?;
    for look in &mut looks {
        let until = |times: &Vec<f64>| times.partition_point(|time| *time <= look.seconds);
        look.samples = steps_at.iter().map(until).sum::<usize>() as u64 * setting.batch as u64;
    }
    let seconds = setting.duration.as_secs_f64();
    let sum = |of: fn(&Worked) -> u64| worked.iter().map(of).sum::<u64>() as f64;
    let begun_steps = sum(|one| one.steps + one.dropped).max(1.0);
    let counted: usize =
        steps_at.iter().map(|times| times.partition_point(|time| *time <= seconds)).sum();
    let waited: Duration = worked.iter().map(|one| one.waited).sum();
    Ok(Report {
        problem: setting.problem,
        mode: setting.mode.clone(),
        stalls: setting.stalls,
        steps: worked.iter().map(|one| one.steps).collect(),
        dropped: worked.iter().map(|one| one.dropped).collect(),
        steps_s: counted as f64 / seconds,
        steps_s_max: setting.stalls.steps(setting.workers, setting.step, seconds) / seconds,
        idle: waited.as_secs_f64() / (seconds * setting.workers as f64),
        ahead_mean: sum(|one| one.ahead) / begun_steps,
        stale_clocks: sum(|one| one.stale_clocks) / begun_steps,
        ahead_max: worked.iter().map(|one| one.ahead_max).max().unwrap_or_default(),
        optimum: data.optimum(samples),
        looks,
    })
}

async fn define(session: &Session, setting: &Setting) -> anyhow::Result<VariableId> {
    let learning_rate = setting.problem.learning_rate() * setting.lr_times;
    let sgd = OptimizerSpec::Sgd(Sgd { learning_rate });
    let optimizer = OptimizerSpec { staleness: setting.scaling, ..sgd };
    let shape = Shape::Table(TableSpec::new(1, Init::Zeros, "rows"));
    let rows = VariableSpec { name: "rows".into(), optimizer, shape };
    let defined = session.define(&[rows]).await?;
    Ok(defined.first().context("no definition")?.variable.id)
}

/// Trains until the time is over. Gives when each step that counts was over.
async fn work(
    session: Session,
    variable: VariableId,
    data: &Data,
    index: usize,
    setting: &Setting,
    begun: Instant,
) -> anyhow::Result<(Worked, Vec<f64>)> {
    let (mut clock, mut worked, mut over) = (Clock::new(&session), Worked::default(), Vec::new());
    let (mut batches, mut steps) = (0u64, 0u64);
    loop {
        let granted = clock.begin().await?;
        match granted.counted {
            Some(true) => {
                worked.steps += 1;
                over.push(begun.elapsed().as_secs_f64());
            }
            Some(false) => worked.dropped += 1,
            None => {}
        }
        if begun.elapsed() >= setting.duration {
            break;
        }
        worked.ahead += granted.ahead;
        worked.ahead_max = worked.ahead_max.max(granted.ahead);
        let slow = setting.stalls.factor(index, setting.workers, begun.elapsed());
        let until = Instant::now() + setting.step * slow;
        let (pulled, keys, gradients) =
            step(&session, variable, data, index, batches, setting).await?;
        batches += 1;
        sleep(until.saturating_duration_since(Instant::now())).await;
        let round = granted.round(&session.state().view);
        let number = round.as_ref().map(|round| round.number);
        let rows = vec![RowGradients { variable, keys: &keys, gradients: &gradients }];
        let read = Some(Arc::new(pulled));
        let batch = PushBatch { clock: steps, rows, round, read, ..PushBatch::default() };
        let outcome = session.push(&batch).await?.await?;
        worked.stale_clocks += outcome.stale_clocks.unwrap_or_default();
        steps += 1;
        clock.finished(number, outcome.late());
        if !clock.awaits_round() {
            worked.steps += 1;
            over.push(begun.elapsed().as_secs_f64());
        }
    }
    worked.waited = clock.waited();
    clock.leave().await?;
    session.close().await?;
    Ok((worked, over))
}

/// Pulls what a batch needs, and gives its gradient.
async fn step(
    session: &Session,
    variable: VariableId,
    data: &Data,
    index: usize,
    batch: u64,
    setting: &Setting,
) -> anyhow::Result<(Pulled, Vec<u64>, Vec<f32>)> {
    let first = (batch * setting.workers as u64 + index as u64) * setting.batch as u64;
    let samples: Vec<Sample> =
        (first..first + setting.batch as u64).map(|number| data.sample(1_000, number)).collect();
    let mut keys: Vec<u64> =
        samples.iter().flat_map(|(rows, _)| rows.iter().map(|&row| u64::from(row))).collect();
    keys.sort_unstable();
    keys.dedup();
    let mut values = vec![0.0; keys.len()];
    let rows = TableRows { variable, keys: &keys, values: &mut values };
    let pulled = session.pull(&mut [rows], None).await?;
    let at = |row: u32| keys.binary_search(&u64::from(row)).unwrap_or_default();
    let mut gradients = vec![0.0f32; keys.len()];
    for (rows, target) in &samples {
        let output = rows.iter().map(|&row| f64::from(values[at(row)])).sum();
        let (_, slope) = data.loss(output, *target);
        for &row in rows {
            gradients[at(row)] += (slope / setting.batch as f64) as f32;
        }
    }
    Ok((pulled, keys, gradients))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slow_ones_take_turns_or_stay() {
        let rotating = Stalls::Rotating { stall_ms: 2000, every_ms: 4000, factor: 5 };
        let at =
            |ms| (0..4).map(|one| rotating.factor(one, 4, Duration::from_millis(ms))).collect();
        let factors: Vec<Vec<u32>> = vec![at(0), at(1999), at(2000), at(4000), at(16_000)];
        let [first, nobody, second] = [[5, 1, 1, 1], [1; 4], [1, 5, 1, 1]];
        assert_eq!(factors, [first, first, nobody, second, first]);
        let one = Stalls::One { factor: 5 };
        assert_eq!((one.factor(3, 4, Duration::ZERO), one.factor(0, 4, Duration::ZERO)), (5, 1));
        let second = Duration::from_secs(1);
        assert!((one.steps(4, second, 10.0) - 32.0).abs() < 1e-9);
        assert!((rotating.steps(4, second, 10.0) - 36.0).abs() < 1e-9);
    }

    #[test]
    fn the_hidden_model_is_the_best_there_is() {
        for problem in [Problem::Squares, Problem::Clicks] {
            let data = Data::new(problem);
            let best = data.optimum(2_000);
            assert!(best < data.evaluate(&[0.0; ROWS as usize], 2_000));
            let near: Vec<f32> = data.weights.iter().map(|&weight| weight as f32 + 0.3).collect();
            assert!(best < data.evaluate(&near, 2_000));
        }
    }
}
