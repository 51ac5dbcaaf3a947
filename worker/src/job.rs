use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use downpour_client::{
    DenseTensor, Error as ClientError, Job as Wanted, JobState, PushBatch, Refused, RolledBack,
    Session, SessionKind, SessionOptions, Transport,
};
use downpour_core::id::VariableId;
use downpour_core::optimizer::OptimizerSpec;
use downpour_core::spec::{
    BLOCK_FLOATS_DEFAULT, DenseSpec, JobSpec, Shape, Variable, VariableSpec,
};
use downpour_proto::v1;
use tch::nn::VarStore;

use crate::begin::{self, Checkpoints};
use crate::dense::{DenseVariable, floats, variable_name};
use crate::describe;
use crate::features::Layout;
use crate::keys::{Bags, unique};
use crate::optimizer::Optimizers;
use crate::rows::{Gather, Leaf};
use crate::{
    Cluster, Error, EvaluateBuilder, Features, Report, Result, Schema, Source, Step, Table,
    TableHandle, TrainBuilder,
};

/// Which job to join, and what it shall be where it does not exist.
#[must_use = "call `open`"]
pub struct JobBuilder {
    cluster: Cluster,
    name: String,
    shards: Option<u32>,
    replicas: Option<u32>,
    min_in_sync: Option<u32>,
    seed: Option<u64>,
    must_exist: bool,
    checkpoints: Option<Checkpoints>,
    start_over: bool,
    worker: usize,
    session: SessionOptions,
}

/// For the last pushes of a process that was told to stop: with the rest of stopping within what Kubernetes allows.
const STOPPING_FLUSH: Duration = Duration::from_secs(5);

/// For the coordinators to say what lies behind an error.
const EXPLAINED_WITHIN: Duration = Duration::from_secs(5);

/// Each so-manieth scheduled checkpoint is full, those between hold what changed.
const FULL_EVERY: u32 = 10;

/// Where a user does not say.
const SHARDS_DEFAULT: u32 = 64;

impl JobBuilder {
    pub(crate) fn new(cluster: Cluster, name: &str) -> Self {
        let session = SessionOptions::worker(format!("{}:{}", host_name(), std::process::id()));
        Self {
            cluster,
            name: name.into(),
            shards: None,
            replicas: None,
            min_in_sync: None,
            seed: None,
            must_exist: false,
            checkpoints: None,
            start_over: false,
            worker: 0,
            session,
        }
    }

    /// Shards of every variable, 64 otherwise. Fixed for ever.
    pub fn shards(mut self, shards: u32) -> Self {
        self.shards = Some(shards);
        self
    }

    /// Copies of each shard, the primary included; 1 otherwise.
    pub fn replicas(mut self, replicas: u32) -> Self {
        self.replicas = Some(replicas);
        self
    }

    /// Copies that must be in sync for pushes to be accepted; 1 otherwise.
    pub fn min_in_sync(mut self, min_in_sync: u32) -> Self {
        self.min_in_sync = Some(min_in_sync);
        self
    }

    /// Seed of the values that rows begin with; 0 otherwise.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Joins only: a job that does not exist is an error.
    pub fn existing(mut self) -> Self {
        self.must_exist = true;
        self
    }

    /// What people see of this process in lists; otherwise its host and number.
    pub fn worker_name(mut self, name: impl Into<String>) -> Self {
        self.session.name = name.into();
        self
    }

    /// How long a pull, or the outcome of a push, may take before it is an error; 30 s otherwise.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.session.deadline = deadline;
        self
    }

    /// How pulls and pushes travel; frames on plain TCP otherwise.
    pub fn transport(mut self, transport: Transport) -> Self {
        self.session.transport = transport;
        self
    }

    /// This process evaluates and does not train.
    pub fn evaluator(mut self) -> Self {
        self.session.kind = SessionKind::Evaluator;
        self
    }

    /// Keeps checkpoints of the job while a training that is [shared](TrainBuilder::shared) runs, and begins the job from the newest
    /// whole one where the cluster does not have it, or has lost every shard of it.
    pub fn checkpoints(mut self, checkpoints: Checkpoints) -> Self {
        self.checkpoints = Some(checkpoints);
        self
    }

    /// Deletes what there is of the job and begins from nothing; checkpoints are not read, and stay. Worker 0 of several does it once the
    /// others have ended, and the others join it.
    pub fn start_over(mut self) -> Self {
        self.start_over = true;
        self
    }

    /// This is the worker of this number, from 0, and called `worker-<number>` in lists.
    pub fn worker(mut self, index: usize) -> Self {
        self.worker = index;
        self.worker_name(begin::session_name(index))
    }

    /// Creates the job, or joins it. What was said of it must agree with the job that exists.
    pub fn open(self) -> Result<Job> {
        let (coordinators, options) = (self.cluster.coordinators(), self.session.clone());
        let session = self.cluster.block_on(async {
            match (self.start_over, &self.checkpoints) {
                (true, _) => {
                    begin::start_over(coordinators, &self.name, self.worker).await?;
                }
                (false, Some(checkpoints)) => {
                    let to = &checkpoints.to;
                    begin::restore(coordinators, &self.name, to, self.replicas).await?;
                }
                (false, None) => {}
            }
            let known = match coordinators.job(&self.name).await {
                Ok(view) => Some(view.spec),
                Err(downpour_client::Error::NotFound { .. }) if !self.must_exist => None,
                Err(error) => return Err(error),
            };
            let wanted = Wanted::Create(self.spec(known));
            let session = match Session::open(coordinators, &wanted, options.clone()).await {
                // Somebody had the job begin again between two steps of this.
                Err(ClientError::NotFound { .. }) => {
                    Session::open(coordinators, &wanted, options).await?
                }
                opened => opened?,
            };
            if self.start_over && self.worker == 0 {
                begin::started_over(coordinators, session.job(), session.id()).await?;
            }
            Ok::<_, ClientError>(session)
        })??;
        let inner = Inner {
            cluster: self.cluster.clone(),
            session,
            checkpoints: self.checkpoints,
            bound: Mutex::default(),
            open_steps: Arc::default(),
            turns: Arc::default(),
        };
        Ok(Job { inner: Arc::new(inner) })
    }

    /// What was said, and for the rest what the job is or else the defaults.
    fn spec(&self, known: Option<JobSpec>) -> JobSpec {
        let known = known.unwrap_or_else(|| JobSpec {
            name: self.name.clone(),
            shards: SHARDS_DEFAULT,
            replicas: 1,
            min_in_sync: 1,
            seed: 0,
        });
        JobSpec {
            shards: self.shards.unwrap_or(known.shards),
            replicas: self.replicas.unwrap_or(known.replicas),
            min_in_sync: self.min_in_sync.unwrap_or(known.min_in_sync),
            seed: self.seed.unwrap_or(known.seed),
            name: known.name,
        }
    }
}

/// A job that this process is a member of. Cheap to clone; all clones are one session.
#[derive(Clone)]
pub struct Job {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Cluster,
    session: Session,
    checkpoints: Option<Checkpoints>,
    bound: Mutex<Bound>,
    /// Steps of training that were given out and are not finished.
    open_steps: Arc<AtomicUsize>,
    /// Requests for tasks, of all loops.
    turns: Arc<AtomicU64>,
}

/// What this process has told the SDK of the job.
#[derive(Default)]
struct Bound {
    dense: Vec<DenseVariable>,
    /// Of the tables.
    optimizers: Vec<OptimizerSpec>,
    /// Of the last training, for [`Job::evaluate`].
    layout: Option<Arc<Layout>>,
}

impl Job {
    /// Defines a table, or checks that the job's table of this name is the same.
    pub fn table(&self, name: &str, table: Table) -> Result<TableHandle> {
        let spec = table.spec(name);
        let (dim, optimizer) = (dim_of(&spec), spec.optimizer);
        let defined = self.cluster().block_on(self.session().define(&[spec]))??;
        let [defined] = defined.as_slice() else {
            return Err(Error::usage("the cluster answered for another number of variables"));
        };
        let mut bound = self.bound();
        if !bound.optimizers.contains(&optimizer) {
            bound.optimizers.push(optimizer);
        }
        let id = defined.variable.id;
        Ok(TableHandle::new(name, dim, id, self.session().arrangement(id)?))
    }

    /// Binds every trainable tensor of a VarStore to a dense variable `prefix/name`. The first worker's values win; every other
    /// worker's tensors are overwritten with them before this returns. Frozen tensors and buffers (running means, say) stay local.
    ///
    /// Later values are pulled with each step and written in [`Steps::next`](crate::Steps::next) only.
    pub fn dense(
        &self,
        prefix: &str,
        vars: &VarStore,
        optimizer: impl Into<OptimizerSpec>,
    ) -> Result<()> {
        let optimizer = optimizer.into();
        let tensors = trainable(prefix, vars)?;
        let specs: Vec<VariableSpec> = tensors
            .iter()
            .map(|(name, tensor)| VariableSpec {
                name: name.clone(),
                optimizer,
                shape: Shape::Dense(DenseSpec {
                    shape: shape_of(tensor),
                    block_floats: BLOCK_FLOATS_DEFAULT,
                }),
            })
            .collect();
        let first: Vec<Vec<f32>> =
            tensors.iter().map(|(_, tensor)| floats(tensor)).collect::<Result<_>>()?;
        let values = self.cluster().block_on(self.agree_on_first_values(&specs, &first))??;
        self.bind(tensors, values, Some(optimizer))
    }

    /// A table that the job has, whatever its optimizer.
    pub fn existing_table(&self, name: &str) -> Result<TableHandle> {
        let state = self.session().state();
        match state.variable_named(name) {
            Some(Variable { id, spec }) if dim_of(spec) > 0 => {
                Ok(TableHandle::new(name, dim_of(spec), *id, self.session().arrangement(*id)?))
            }
            _ => Err(Error::usage(format!(
                "the job has no table {name:?}: {}",
                trained_differently(&state)
            ))),
        }
    }

    /// As [`Job::dense`], for variables that the job has, whatever their optimizer: for evaluation.
    pub fn existing_dense(&self, prefix: &str, vars: &VarStore) -> Result<()> {
        let tensors = trainable(prefix, vars)?;
        let state = self.session().state();
        let mut ids = Vec::new();
        for (name, tensor) in &tensors {
            match state.variable_named(name) {
                Some(Variable { id, spec: VariableSpec { shape: Shape::Dense(dense), .. } })
                    if dense.shape == shape_of(tensor) =>
                {
                    ids.push(*id);
                }
                _ => {
                    return Err(Error::usage(format!(
                        "the job has no dense variable {name:?} of shape {:?}: {}",
                        tensor.size(),
                        trained_differently(&state)
                    )));
                }
            }
        }
        let values = self.cluster().block_on(self.pull_dense(&ids))??;
        self.bind(tensors, values, None)
    }

    fn bind(
        &self,
        tensors: Vec<(String, tch::Tensor)>,
        values: Vec<(VariableId, Vec<f32>)>,
        optimizer: Option<OptimizerSpec>,
    ) -> Result<()> {
        let mut bound = self.bound();
        for ((name, tensor), (id, values)) in tensors.into_iter().zip(values) {
            let variable = DenseVariable { name, id, optimizer, tensor };
            variable.write(&values)?;
            bound.dense.retain(|other| other.id != id);
            bound.dense.push(variable);
        }
        Ok(())
    }

    /// Pushes the first values of those variables whose initializer this session is, and waits until all have theirs.
    async fn agree_on_first_values(
        &self,
        specs: &[VariableSpec],
        first: &[Vec<f32>],
    ) -> Result<Vec<(VariableId, Vec<f32>)>> {
        let session = self.session();
        // Asked again and again: when the initializer vanishes, the coordinators name another.
        let ids = loop {
            let defined = session.define(specs).await?;
            let ids: Vec<VariableId> = defined.iter().map(|one| one.variable.id).collect();
            if defined.iter().all(|one| one.initialized) {
                break ids;
            }
            let mine: Vec<DenseTensor> = (defined.iter().zip(first))
                .filter(|(one, _)| one.initializer && !one.initialized)
                .map(|(one, floats)| DenseTensor { variable: one.variable.id, floats })
                .collect();
            if mine.is_empty() {
                tokio::time::sleep(INITIALIZED_POLL).await;
                continue;
            }
            let mine_ids: Vec<VariableId> = mine.iter().map(|tensor| tensor.variable).collect();
            let batch = PushBatch { values: mine, ..PushBatch::default() };
            session.push(&batch).await?.await?.applied()?;
            match session.mark_initialized(&mine_ids).await {
                // A shard was set back to a checkpoint meanwhile: some of them may be gone.
                Err(ClientError::Refused { code: Refused::FailedPrecondition, .. }) => {
                    tokio::time::sleep(INITIALIZED_POLL).await;
                }
                marked => marked?,
            }
        };
        self.pull_dense(&ids).await
    }

    /// Values of these variables, in this order.
    async fn pull_dense(&self, ids: &[VariableId]) -> Result<Vec<(VariableId, Vec<f32>)>> {
        let mut cache = self.session().dense_cache(ids)?;
        self.session().pull(&mut [], Some(&mut cache)).await?;
        let values = |&id: &VariableId| match (cache.values(id), cache.uninitialized(id)) {
            (Some(values), Some(0)) => Ok((id, values.to_vec())),
            _ => Err(Error::usage(format!(
                "dense variable {id} has no first values: was the job trained?"
            ))),
        };
        ids.iter().map(values).collect()
    }

    /// A training loop over a dataset, to be configured and started.
    pub fn train(&self, source: impl Source, features: Features) -> TrainBuilder {
        TrainBuilder::new(self, source, features)
    }

    /// Metrics of a model on a dataset, with the features of this job's last training; creates no rows. `predict` returns logits
    /// (or, for labels other than 0 and 1, predictions) of the shape of [`Step::labels`].
    ///
    /// It writes the newest dense weights into the VarStore, so it is refused while a step of training is open.
    pub fn evaluate(
        &self,
        source: impl Source,
        predict: impl FnMut(&Step) -> Result<tch::Tensor>,
    ) -> Result<Report> {
        let Some(layout) = self.bound().layout.clone() else {
            return Err(Error::usage(
                "evaluate before a training of this job: name the features with `evaluation`",
            ));
        };
        EvaluateBuilder::with_layout(self, source, Ok(layout)).run(predict)
    }

    /// An evaluation with features of its own, to be configured and run.
    pub fn evaluation(&self, source: impl Source, features: Features) -> EvaluateBuilder {
        EvaluateBuilder::with_layout(self, source, features.layout().map(Arc::new))
    }

    /// Rows of a table as they are now, `[keys, dim]` in the order of the keys, without a step and without gradients.
    pub fn rows(&self, table: &TableHandle, keys: &[u64]) -> Result<tch::Tensor> {
        let (unique, mut positions) = unique(table.arrangement(), &[keys]);
        let values =
            self.cluster().block_on(crate::pipeline::lookup(self.session(), table, &unique))??;
        let rows = Leaf::new(unique, values, table.dim(), tch::Device::Cpu, false)?;
        rows.gather(&Gather::new(Bags::single(positions.remove(0)), None))
    }

    /// Leaves the job, once every push is acknowledged. The job and its model stay. Where the process was told to stop, it waits a few
    /// seconds only, and warns when it leaves pushes behind whose outcome is unknown.
    pub fn finish(&self) -> Result<()> {
        let within = if self.stopping() { STOPPING_FLUSH } else { Duration::MAX };
        self.cluster().block_on(async {
            match tokio::time::timeout(within, self.session().flush()).await {
                Ok(flushed) => flushed?,
                Err(_) => tracing::warn!(?within, "left before the last pushes had an outcome"),
            }
            self.session().close().await
        })??;
        Ok(())
    }

    /// Pushes of this process that were acknowledged and are lost all the same, with a log line for each stretch when it was found out: every copy of a shard died,
    /// and it went on from a checkpoint (docs/protocol.md 8.5).
    #[must_use]
    pub fn rolled_back(&self) -> Vec<RolledBack> {
        self.session().rolled_back()
    }

    /// Whether the job that this process joined is gone, and one of its name has begun from a checkpoint instead: every shard was lost, and a worker that came then, or an
    /// operator, had it begin again. What fails for that reason is as [`Error::SetBack`]: to open the job anew is to go on from there.
    #[must_use]
    pub fn began_again(&self) -> bool {
        let (coordinators, session) = (self.cluster().coordinators(), self.session());
        let coordinators = coordinators.clone().with_deadline(EXPLAINED_WITHIN);
        let name = session.state().view.spec.name.clone();
        let asked = begin::began_again(&coordinators, &name, session.job());
        matches!(self.cluster().block_on(asked), Ok(Ok(true)))
    }

    /// True once SIGTERM or Ctrl-C came: see [`Cluster::connect`].
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.cluster().stopping()
    }

    pub(crate) fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    pub(crate) fn session(&self) -> &Session {
        &self.inner.session
    }

    /// Has the job saved by itself, if checkpoints were asked for. An equal schedule stays as it is.
    pub(crate) fn schedule_checkpoints(&self) -> Result<()> {
        let Some(Checkpoints { to, every, keep }) = &self.inner.checkpoints else { return Ok(()) };
        let schedule = v1::CheckpointSchedule {
            uri: to.clone(),
            every_ms: every.as_millis().clamp(1, u64::MAX.into()) as u64,
            keep: *keep,
            full_every: FULL_EVERY,
            every_steps: 0,
        };
        let (coordinators, job) = (self.cluster().coordinators(), self.session().job());
        Ok(self.cluster().block_on(coordinators.schedule_checkpoints(job, schedule))??)
    }

    /// Keeps with the job what its model needs beside its variables to score raw rows elsewhere: the name of the model and its features. `psctl export`
    /// writes both out.
    pub fn describe(&self, model: &str, schema: &Schema) -> Result<()> {
        let (coordinators, session) = (self.cluster().coordinators(), self.session());
        let name = session.state().view.spec.name.clone();
        let write = describe::write(coordinators, (&name, session.job()), model, schema);
        self.cluster().block_on(write)?
    }

    /// Saves the job where its [checkpoints](JobBuilder::checkpoints) go, and waits until that is done: the name. `None` where no checkpoints were asked for.
    pub fn save(&self) -> Result<Option<String>> {
        let Some(Checkpoints { to, .. }) = &self.inner.checkpoints else { return Ok(None) };
        let (coordinators, session) = (self.cluster().coordinators(), self.session());
        let saved = self.cluster().block_on(begin::save(coordinators, session.job(), to))??;
        Ok(Some(saved))
    }

    pub(crate) fn open_steps(&self) -> &Arc<AtomicUsize> {
        &self.inner.open_steps
    }

    pub(crate) fn turns(&self) -> &Arc<AtomicU64> {
        &self.inner.turns
    }

    /// By number, as a pull brings them.
    pub(crate) fn dense_variables(&self) -> Vec<DenseVariable> {
        let mut dense: Vec<_> =
            self.bound().dense.iter().map(DenseVariable::shallow_clone).collect();
        dense.sort_by_key(|variable| variable.id);
        dense
    }

    pub(crate) fn remember(&self, layout: &Arc<Layout>) {
        self.bound().layout = Some(layout.clone());
    }

    pub(crate) fn optimizers(&self) -> Optimizers {
        let bound = self.bound();
        let dense = bound.dense.iter().filter_map(|variable| variable.optimizer).collect();
        Optimizers { tables: bound.optimizers.clone(), dense }
    }

    fn bound(&self) -> MutexGuard<'_, Bound> {
        self.inner.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often a worker asks whether another has pushed the first values.
const INITIALIZED_POLL: Duration = Duration::from_millis(50);

/// The trainable tensors of a VarStore under their names in the job, sorted.
fn trainable(prefix: &str, vars: &VarStore) -> Result<Vec<(String, tch::Tensor)>> {
    let mut tensors: Vec<(String, tch::Tensor)> = Vec::new();
    for (name, tensor) in vars.variables() {
        if tensor.requires_grad() {
            tensors.push((variable_name(prefix, &name)?, tensor));
        }
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    match tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        None => Ok(tensors),
        Some(pair) => {
            Err(Error::usage(format!("two tensors of the VarStore are called {:?}", pair[0].0)))
        }
    }
}

fn trained_differently(state: &JobState) -> String {
    let names: Vec<&str> = state.view.variables.iter().map(|v| v.spec.name.as_str()).collect();
    format!("give the model and schema that it was trained with; it has: {}", names.join(", "))
}

fn shape_of(tensor: &tch::Tensor) -> Vec<u64> {
    tensor.size().iter().map(|&size| size as u64).collect()
}

fn dim_of(spec: &VariableSpec) -> u32 {
    match &spec.shape {
        Shape::Table(table) => table.dim,
        Shape::Dense(_) => 0,
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
