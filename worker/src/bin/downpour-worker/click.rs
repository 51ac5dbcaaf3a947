//! Workload E of `psctl bench train`: a click model on synthetic ids, one worker of it, written as a user of the SDK would write it.
//!
//! Before and after the timed part it talks with whoever started it, in lines: it prints `{"ready":true}` after its first batches and waits
//! for a line; at the end of its pass it prints when the timed part began and ended; worker 0 waits for another line and evaluates.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};
use downpour::{Adagrad, Cluster, Features, Init, Job, Pool, Result, Step, Table, Transport};
use serde_json::json;
use tch::nn::VarStore;
use tch::{Device, Kind, Reduction, Tensor};

use crate::click_data::{Clicks, FIELDS, Ids, NUMBERS, floats};

/// What `bench-click` takes.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// host:port of the coordinators, with commas between
    #[arg(long, value_name = "LIST")]
    coordinators: String,
    /// Name of the job
    #[arg(long)]
    job: String,
    /// Folder with e_train_*, e_test_* and e_mlp_init.f32
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Number of this worker, from 0
    #[arg(long, value_name = "INDEX")]
    worker: usize,
    /// Workers of the job
    #[arg(long, value_name = "COUNT")]
    workers: usize,
    /// One table in which an id is the same key in every field, one in which each field has keys of its own (and the rows of 26 tables), or 26 tables
    #[arg(long, value_enum, default_value_t = Tables::Fused)]
    tables: Tables,
    /// Steps in the pipeline
    #[arg(long, default_value_t = 2)]
    depth: usize,
    /// Batches of one pass, all workers together
    #[arg(long, default_value_t = 500)]
    batches: usize,
    /// Folder for metrics.jsonl, staleness among them
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// How pulls and pushes travel
    #[arg(long, value_enum, default_value_t = Wire::Framed)]
    transport: Wire,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tables {
    Fused,
    FusedApart,
    #[value(name = "26")]
    PerField,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Wire {
    Framed,
    Grpc,
}

const BATCH: usize = 1024;
/// Batches of each worker before the clock starts.
const WARM_UP: u64 = 10;
const DIM: i64 = 16;

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    tch::set_num_threads(1);
    let starter = Starter::listen();
    let cluster = Cluster::connect(&options.coordinators)?;
    let transport = match options.transport {
        Wire::Framed => Transport::Framed,
        Wire::Grpc => Transport::Grpc,
    };
    let job = cluster.job(&options.job).transport(transport).open()?;
    let vars = VarStore::new(Device::Cpu);
    let model = Model::new(&vars, &options.data)?;
    job.dense("net", &vars, Adagrad::lr(0.005))?;
    let features = features(&job, options.tables)?;
    let ids = match options.tables {
        Tables::Fused => Ids::List,
        Tables::FusedApart => Ids::ListOfApart,
        Tables::PerField => Ids::Columns,
    };
    let train = Clicks::open(&options.data, "train", ids, BATCH, options.batches)?;
    let train = train.share(options.worker, options.workers);
    let mut train =
        job.train(train, features.clone()).batch(BATCH).shuffle_rows(0).depth(options.depth);
    if let Some(out) = &options.out {
        train = train.out(out);
    }
    let mut steps = train.start()?;

    let (mut samples, mut started) = (0, None);
    while let Some(step) = steps.next()? {
        starter.is_there()?;
        if step.clock() == WARM_UP {
            say(&json!({"ready": true}))?;
            starter.wait_for_go()?;
            (samples, started) = (0, Some((unix_s()?, steps.waited())));
        }
        samples += step.len();
        let loss = model.forward(&step)?.f_binary_cross_entropy_with_logits::<Tensor>(
            &step.labels(),
            None,
            None,
            Reduction::Mean,
        )?;
        step.backward(&loss)?.push()?;
    }
    let (start_s, waited) = started.context("fewer batches than a worker warms up with")?;
    let wait_s = (steps.waited() - waited).as_secs_f64();
    let end_s = unix_s()?;
    say(&json!({"start_s": start_s, "end_s": end_s, "samples": samples, "wait_s": wait_s}))?;
    if options.worker == 0 {
        starter.wait_for_go()?;
        let test = Clicks::open(&options.data, "test", ids, BATCH, usize::MAX)?;
        let report = job.evaluation(test, features).run(|step| model.forward(step))?;
        say(&json!({"auc": report.auc, "logloss": report.logloss}))?;
    }
    job.finish()?;
    Ok(())
}

/// The ids are keys as they stand. Linear weights are the last float of a row and begin, as the rest, at normal values of deviation 0.01:
/// tables make rows as they are first pushed, by a function of the key, and load none from files.
fn features(job: &Job, tables: Tables) -> Result<Features> {
    let table = |name: &str| {
        let init = Init::Normal { mean: 0.0, std: 0.01 };
        job.table(name, Table::dim(DIM as u32 + 1).optimizer(Adagrad::lr(0.02)).init(init))
    };
    let numbers: Vec<String> = (0..NUMBERS).map(|i| format!("x{i}")).collect();
    let features = match tables {
        Tables::Fused | Tables::FusedApart => {
            Features::new().bag("ids", &table("ids")?, Pool::Padded).raw().max_len(FIELDS as u32)
        }
        Tables::PerField => (0..FIELDS).try_fold(Features::new(), |features, field| {
            let name = format!("id{field}");
            Ok::<_, downpour::Error>(features.one(&name, &table(&name)?).raw())
        })?,
    };
    Ok(features.dense(numbers.iter().map(String::as_str)).label("y"))
}

/// A factorization machine beside a perceptron of 429-256-128-1.
struct Model {
    weights: Vec<Tensor>,
    biases: Vec<Tensor>,
}

impl Model {
    fn new(vars: &VarStore, data: &Path) -> anyhow::Result<Self> {
        let root = vars.root();
        let path = data.join("e_mlp_init.f32");
        let first = floats(&path)?;
        let mut rest = first.as_slice();
        let mut take = |name: &str, shape: &[i64]| -> anyhow::Result<Tensor> {
            let count = shape.iter().product::<i64>() as usize;
            ensure!(rest.len() >= count, "{} ends within {name}", path.display());
            let (values, others) = rest.split_at(count);
            rest = others;
            Ok(root.var_copy(name, &Tensor::f_from_slice(values)?.f_view(shape)?))
        };
        let layers = [(FIELDS as i64 * DIM + NUMBERS as i64, 256), (256, 128), (128, 1)];
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (layer, (input, output)) in layers.into_iter().enumerate() {
            weights.push(take(&format!("w{layer}"), &[input, output])?);
            biases.push(take(&format!("b{layer}"), &[output])?);
        }
        biases.push(take("bias", &[1])?);
        ensure!(rest.is_empty(), "{} is longer than the model", path.display());
        Ok(Self { weights, biases })
    }

    /// Logits, `[batch]`.
    fn forward(&self, step: &Step) -> Result<Tensor> {
        let (mut vectors, mut linear) = (Vec::new(), Vec::new());
        for feature in 0..step.features().count() {
            let mut parts = step.split_rows_at(feature, &[DIM as usize, 1]).into_iter();
            vectors.extend(parts.next().map(|part| part.flatten(1, -1)));
            linear.extend(parts.next().map(|part| part.flatten(1, -1)));
        }
        let joined = |mut parts: Vec<Tensor>| match parts.len() {
            1 => Ok(parts.remove(0)),
            _ => Tensor::f_cat(&parts, 1),
        };
        let (vectors, linear) = (joined(vectors)?, joined(linear)?);

        let sums = vectors.f_view([-1, FIELDS as i64, DIM])?;
        let sums = sums.f_sum_dim_intlist(1, false, Kind::Float)?;
        // The gradient of a norm is one pass over the vectors; that of a sum of squares is three.
        let [sums, vector] = [&sums, &vectors].map(|x| x.f_norm_scalaropt_dim(2, [1], false));
        let pairs = sums?.f_square()?.f_sub(&vector?.f_square()?)?.f_mul_scalar(0.5)?;
        let mut hidden = Tensor::f_cat(&[&vectors, &step.dense()], 1)?;
        for (layer, (weights, bias)) in self.weights.iter().zip(&self.biases).enumerate() {
            hidden = bias.f_addmm(&hidden, weights)?;
            if layer + 1 < self.weights.len() {
                hidden = hidden.f_relu()?;
            }
        }
        let linear = linear.f_sum_dim_intlist(1, false, Kind::Float)?;
        let logits = hidden.f_squeeze_dim(1)?.f_add(&linear)?.f_add(&pairs)?;
        Ok(logits.f_add(&self.biases[self.weights.len()])?)
    }
}

fn say(value: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").and_then(|()| out.flush()).context("write to stdout")
}

/// Whoever started this process: it says when to go on, and when it is gone this process ends too.
struct Starter {
    lines: mpsc::Receiver<String>,
    gone: Arc<AtomicBool>,
}

impl Starter {
    fn listen() -> Self {
        let (send, lines) = mpsc::channel();
        let gone = Arc::new(AtomicBool::new(false));
        let over = gone.clone();
        std::thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(std::result::Result::ok) {
                _ = send.send(line);
            }
            over.store(true, Ordering::Relaxed);
        });
        Self { lines, gone }
    }

    fn wait_for_go(&self) -> anyhow::Result<()> {
        let line = self.lines.recv().context("stdin ended")?;
        ensure!(line.trim() == "go", "expected a line \"go\" on stdin, not {line:?}");
        Ok(())
    }

    fn is_there(&self) -> anyhow::Result<()> {
        ensure!(!self.gone.load(Ordering::Relaxed), "stdin ended: nobody waits for the result");
        Ok(())
    }
}

fn unix_s() -> anyhow::Result<f64> {
    let since: Duration = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(since.as_secs_f64())
}

impl downpour::Source for Clicks {
    fn open(self, _: &downpour::Schema) -> Result<Arc<dyn downpour::Dataset>> {
        Ok(Arc::new(self))
    }
}
