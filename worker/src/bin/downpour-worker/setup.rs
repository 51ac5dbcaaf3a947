//! From options to a job with its variables and a model on them.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use anyhow::Context as _;
use downpour::models::{self, Catalogue, Inputs, Kind, MatrixFactorisation, Model, Objective};
use downpour::{
    Cluster, Features, Init, Job, Paths, Result, RowFormat, Schema, Source, Table, TableHandle,
    device,
};
use tch::Device;
use tch::nn::VarStore;

use crate::options::{Options, needed, parsed};
use crate::train::explained;

/// What training and evaluation have in common.
pub(crate) struct Setup {
    pub(crate) job: Job,
    pub(crate) schema: Schema,
    pub(crate) tables: BTreeMap<String, TableHandle>,
    pub(crate) device: Device,
    pub(crate) learner: Learner,
}

/// The two kinds of models: those that predict labels and those that rank items.
pub(crate) enum Learner {
    Predicts { model: Box<dyn Model>, objective: Objective },
    Ranks(Box<MatrixFactorisation>),
}

/// Whether variables are defined, or must be there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Train,
    Evaluate,
}

/// What is known without the cluster.
struct Local {
    kind: Kind,
    schema: Schema,
    device: Device,
    vars: VarStore,
    predictor: Option<Box<dyn Model>>,
}

impl Local {
    fn new(options: &Options, data: &[String]) -> anyhow::Result<Self> {
        let kind = match (&options.model, &options.model_file) {
            (None, Some(_)) => Kind::Script,
            _ => Kind::named(needed(&options.model, "--model")?)?,
        };
        let schema = Schema::load(needed(&options.schema, "--schema")?)?;
        needed(&options.job, "--job")?;
        needed(&options.coordinators, "--coordinators")?;
        Paths::new(data).open(&schema)?;
        let device = parsed(&options.device, "--device", device::Choice::Cpu)?.device()?;
        tch::set_num_threads(options.threads.unwrap_or(1).max(1));
        // The first weights, and what dropout leaves out.
        tch::manual_seed(options.seed() as i64);
        let vars = VarStore::new(device);
        let predictor = match kind {
            Kind::MatrixFactorisation => None,
            _ => Some(predictor(kind, &vars, &schema, options)?),
        };
        Ok(Self { kind, schema, device, vars, predictor })
    }
}

impl Setup {
    /// Looks at everything that is local before it changes anything in the cluster; `data` are the files that will be read.
    pub(crate) fn new(
        options: &Options,
        purpose: Purpose,
        data: &[String],
    ) -> anyhow::Result<Self> {
        let local = Local::new(options, data)?;
        let cluster = Cluster::connect(needed(&options.coordinators, "--coordinators")?)?;
        let job = open(&cluster, needed(&options.job, "--job")?, options, purpose)?;
        Self::on(&job, local, options, purpose).map_err(|error| explained(&job, error))
    }

    fn on(job: &Job, local: Local, options: &Options, purpose: Purpose) -> anyhow::Result<Self> {
        let Local { kind, schema, device, vars, predictor } = local;
        let tables = tables(job, &schema, kind, options, purpose)?;
        let learner = match predictor {
            Some(model) => Learner::Predicts {
                model,
                objective: options.objective.map(Into::into).unwrap_or_default(),
            },
            None => Learner::Ranks(Box::new(factorisation(&schema, &tables, options)?)),
        };
        match purpose {
            Purpose::Train => {
                job.dense(DENSE, &vars, options.dense_optimizer()?)?;
                if options.worker_index.unwrap_or(0) == 0 {
                    job.describe(kind.name(), &schema)?;
                }
            }
            Purpose::Evaluate => job.existing_dense(DENSE, &vars)?,
        }
        Ok(Self { job: job.clone(), schema, tables, device, learner })
    }

    pub(crate) fn features(&self) -> Features {
        Features::from_schema(&self.schema, self.tables.clone())
    }

    /// Measures the model: a JSON object.
    pub(crate) fn evaluate(&self, data: &[String]) -> Result<serde_json::Value> {
        let report = match &self.learner {
            Learner::Predicts { model, .. } => {
                serde_json::to_value(self.evaluation(data).run(|step| model.forward(step, false))?)
            }
            Learner::Ranks(model) => {
                let test = Catalogue::read(Paths::new(data), &self.schema)?;
                serde_json::to_value(model.rank(&self.job, &test, &RANKED)?)
            }
        };
        report.map_err(|error| downpour::Error::Usage(error.to_string()))
    }

    fn evaluation(&self, data: &[String]) -> downpour::EvaluateBuilder {
        self.job.evaluation(Paths::new(data), self.features()).device(self.device)
    }

    /// What the model gives for each row, in the order of the files: a line of numbers each, as many as there are labels.
    pub(crate) fn scores(&self, data: &[String], mut out: impl Write) -> anyhow::Result<()> {
        let mut written: std::io::Result<()> = Ok(());
        self.evaluation(data).for_each(|step| {
            let scores = tch::no_grad(|| match &self.learner {
                Learner::Predicts { model, .. } => model.forward(step, false),
                Learner::Ranks(_) => Ok((step.rows_at(0) * step.rows_at(1)).sum_dim_intlist(
                    1,
                    false,
                    tch::Kind::Float,
                )),
            })?;
            let scores = scores.f_to_device(Device::Cpu)?.f_view([step.len() as i64, -1])?;
            for row in Vec::<Vec<f32>>::try_from(scores)? {
                let row: Vec<String> = row.iter().map(ToString::to_string).collect();
                if written.is_ok() {
                    written = writeln!(out, "{}", row.join(" "));
                }
            }
            Ok(())
        })?;
        written.and_then(|()| out.flush()).context("write the scores")
    }
}

/// Dense variables are called `net/…`.
const DENSE: &str = "net";
/// Lengths of the lists that a ranking is judged by.
const RANKED: [usize; 3] = [5, 10, 20];

fn predictor(
    kind: Kind,
    vars: &VarStore,
    schema: &Schema,
    options: &Options,
) -> Result<Box<dyn Model>> {
    let model_options = models::Options {
        hidden: options.hidden.clone().unwrap_or_else(|| vec![256, 128]),
        dropout: options.dropout.unwrap_or(0.0),
        model_file: options.model_file.clone(),
    };
    models::build(kind, vars, &Inputs::new(kind, schema)?, &model_options)
}

fn open(cluster: &Cluster, name: &str, options: &Options, purpose: Purpose) -> anyhow::Result<Job> {
    let mut builder =
        cluster.job(name).deadline(Duration::from_secs(options.deadline_s.unwrap_or(60)));
    if purpose == Purpose::Evaluate {
        return Ok(builder.existing().evaluator().worker_name("evaluate").open()?);
    }
    let worker = options.worker_index.unwrap_or(0);
    builder = builder.worker(worker);
    if let Some(checkpoints) = options.checkpoints()? {
        builder = builder.checkpoints(checkpoints);
    }
    if options.fresh {
        builder = builder.start_over();
    }
    if let Some(shards) = options.shards {
        builder = builder.shards(shards);
    }
    if let Some(replicas) = options.replicas {
        builder = builder.replicas(replicas);
    }
    if let Some(min_in_sync) = options.min_in_sync {
        builder = builder.min_in_sync(min_in_sync);
    }
    if let Some(seed) = options.seed {
        builder = builder.seed(seed);
    }
    Ok(builder.open()?)
}

fn tables(
    job: &Job,
    schema: &Schema,
    kind: Kind,
    options: &Options,
    purpose: Purpose,
) -> anyhow::Result<BTreeMap<String, TableHandle>> {
    if purpose == Purpose::Train {
        let init = Init::Normal { mean: 0.0, std: options.init_std.unwrap_or(0.01) };
        let row_format = options.row_format.map_or(RowFormat::F32, Into::into);
        let optimizer = options.table_optimizer()?;
        return Ok(kind.tables(job, schema, |dim| {
            Table::dim(dim).optimizer(optimizer).init(init).row_format(row_format)
        })?);
    }
    let found = schema.tables()?.into_iter().map(|(name, dim)| {
        let table = job.existing_table(name)?;
        let wanted = kind.table_dim(dim);
        if table.dim() != wanted {
            return Err(downpour::Error::Usage(format!(
                "table {name:?} of the job has rows of {} floats, and this model and schema need {wanted}: give the \
                 model and schema of the training",
                table.dim()
            )));
        }
        Ok((name.to_owned(), table))
    });
    Ok(found.collect::<Result<_>>()?)
}

fn factorisation(
    schema: &Schema,
    tables: &BTreeMap<String, TableHandle>,
    options: &Options,
) -> anyhow::Result<MatrixFactorisation> {
    let train = needed(&options.train, "--train")?;
    let seen = Catalogue::read(Paths::new(train), schema)?;
    let table = |feature: usize| tables[&schema.features()[feature].table].clone();
    let worker = options.worker_index.unwrap_or(0) as u64;
    let seed = options.seed().wrapping_add(worker << 32);
    Ok(MatrixFactorisation::new(table(0), table(1), seen, options.l2.unwrap_or(0.0), seed)?)
}
