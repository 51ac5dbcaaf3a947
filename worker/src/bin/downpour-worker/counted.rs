//! One worker of the scenario `workers` (`cargo xtask chaos`): a factorization machine on the clicks of `downpour-gen clicks --row-numbers`, and with each sample a row
//! that counts how often it was trained: zero at first, SGD at rate 1, and a loss whose gradient is 1.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use downpour::{Adagrad, Adam, Cluster, Features, Init, Paths, Result, Schema, Sgd, Step, Table};
use tch::nn::{self, Module as _, VarStore};
use tch::{Device, Kind, Reduction, Tensor};

/// What `count-clicks` takes.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// What this worker does
    #[arg(value_enum)]
    mode: Mode,
    /// Its name in lists
    #[arg(long)]
    name: String,
    /// host:port of the coordinators, with commas between
    #[arg(long, value_name = "LIST")]
    coordinators: String,
    /// Name of the job
    #[arg(long)]
    job: String,
    /// Folder that downpour-gen wrote
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Rows of a step
    #[arg(long)]
    batch: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// One pass, shared with the others
    Train,
    /// Say what the model is worth
    Evaluate,
}

const DIM: usize = 8;
const SHARDS: u32 = 16;

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    tch::set_num_threads(1);
    tch::manual_seed(1);
    let schema = Schema::load(options.data.join("schema.toml"))?;
    let cluster = Cluster::connect(&options.coordinators)?;
    let evaluates = options.mode == Mode::Evaluate;
    let builder = cluster.job(&options.job).worker_name(&options.name);
    let job = if evaluates { builder.existing().evaluator() } else { builder.shards(SHARDS) };
    let job = job.open()?;
    let vars = VarStore::new(Device::Cpu);
    let count = schema.numbers().len() as i64;
    let numbers = nn::linear(vars.root() / "numbers", count, 1, nn::LinearConfig::default());
    if evaluates {
        job.existing_dense("net", &vars)?;
    } else {
        job.dense("net", &vars, Adam::lr(0.005))?;
    }
    let tables = schema.tables()?.into_keys().map(|name| {
        let init = Init::Normal { mean: 0.0, std: 0.01 };
        // The last float is the linear weight.
        let table = Table::dim(DIM as u32 + 1).optimizer(Adagrad::lr(0.05)).init(init);
        let table = if evaluates { job.existing_table(name) } else { job.table(name, table) };
        Ok((name.to_owned(), table?))
    });
    let features = Features::from_schema(&schema, tables.collect::<Result<_>>()?);
    let forward = |step: &Step| forward(step, &numbers);
    let files = |pattern: &str| Paths::new([options.data.join(pattern).display().to_string()]);
    if evaluates {
        let report = job.evaluation(files("test.parquet"), features).run(forward)?;
        let report = serde_json::to_string(&report)?;
        writeln!(std::io::stdout(), "{report}").context("write to stdout")?;
        return Ok(job.finish()?);
    }
    let samples = Table::dim(1).optimizer(Sgd::lr(1.0)).init(Init::Zeros);
    let features = features.one("row", &job.table("samples", samples)?).raw();
    let train = job.train(files("train-*.parquet"), features).batch(options.batch);
    let mut steps = train.depth(2).shuffle_rows(4 * options.batch).shared().start()?;
    while let Some(step) = steps.next()? {
        let loss = forward(&step)?.f_binary_cross_entropy_with_logits::<Tensor>(
            &step.labels(),
            None,
            None,
            Reduction::Mean,
        )?;
        let counted = step.rows("row").f_sum(Kind::Float)?;
        step.backward(&loss.f_add(&counted)?)?.push()?;
    }
    steps.finish()?;
    drop(steps);
    Ok(job.finish()?)
}

/// Logits, `[batch]`.
fn forward(step: &Step, numbers: &nn::Linear) -> Result<Tensor> {
    let fields = step.features().filter(|name| *name != "row");
    let rows: Vec<Tensor> = fields.map(|field| step.rows(field)).collect();
    let rows = Tensor::f_stack(&rows, 1)?;
    let vectors = rows.f_narrow(2, 0, DIM as i64)?;
    let sum = |x: &Tensor, dim: i64| x.f_sum_dim_intlist(dim, false, Kind::Float);
    let pairs = sum(&vectors, 1)?.f_square()?.f_sub(&sum(&vectors.f_square()?, 1)?)?;
    let linear = sum(&rows.f_narrow(2, DIM as i64, 1)?, 1)?.f_squeeze_dim(1)?;
    let numbers = numbers.forward(&step.dense()).f_squeeze_dim(1)?;
    Ok(sum(&pairs, 1)?.f_mul_scalar(0.5)?.f_add(&linear)?.f_add(&numbers)?)
}
