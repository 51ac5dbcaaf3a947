//! Jobs: creating, deleting, their variables and labels.

use std::collections::BTreeMap;
use std::sync::Arc;

use downpour_core::cells::ClosedSessions;
use downpour_core::id::{Epoch, JobId, ServerRef, SessionId, VariableId};
use downpour_core::placement;
use downpour_core::routing::ShardRoute;
use downpour_core::spec::{JobSpec, Shape, Variable, VariableSpec};
use downpour_core::view::JobView;

use super::lost::Back;
use super::size::{JOB_BYTES, SHARD_BYTES, VARIABLE_BYTES, label_bytes};
use super::{Defined, Dense, Job, Outcome, Refused, Reply, State};
use crate::command::{COMMAND_BYTES_MAX, LabelChange};

/// Most jobs.
const JOBS_MAX: usize = 4096;
/// Most variables of a job.
const VARIABLES_MAX: usize = 4096;
/// Most blocks of all dense variables of a job: servers go through all of them when a variable is defined.
const BLOCKS_MAX: u64 = 4 << 20;
/// Most labels of a job.
const LABELS_MAX: usize = 256;
/// All labels of a job: they go back to a checkpoint's in one command.
const LABELS_BYTES_MAX: usize = COMMAND_BYTES_MAX / 2;

impl State {
    pub(super) fn create_job(&mut self, spec: JobSpec) -> Outcome {
        let jobs = &self.cluster.jobs;
        if let Some(job) = jobs.values().find(|job| job.view.spec.name == spec.name) {
            return if job.view.spec == spec {
                Ok(Reply::Created { job: job.view.job, created: false })
            } else {
                Err(Refused::AlreadyExists(difference(&job.view.spec, &spec)))
            };
        }
        if jobs.len() == JOBS_MAX {
            let problem = format!("a cluster has at most {JOBS_MAX} jobs");
            return Err(Refused::FailedPrecondition(problem));
        }
        self.check_room(JOB_BYTES + spec.shards as usize * SHARD_BYTES)?;
        let plan = placement::place(&self.cluster.candidates(), spec.shards, spec.replicas)?;
        self.last.job += 1;
        let job = JobId(self.last.job);
        let view = JobView {
            job,
            spec,
            version: self.cluster.version,
            variables: Vec::new(),
            shards: plan.into_iter().map(first_route).collect(),
            sessions: ClosedSessions::default(),
            orders: downpour_core::checkpoint::Orders::default(),
            consistency: downpour_core::consistency::Consistency::default(),
        };
        let job_state = Job {
            view,
            labels: BTreeMap::new(),
            sessions: BTreeMap::new(),
            checkpoints: downpour_proto::v1::JobCheckpoints::default(),
            dense: BTreeMap::new(),
            back: Back::default(),
        };
        self.cluster.jobs.insert(job, Arc::new(job_state));
        Ok(Reply::Created { job, created: true })
    }

    /// A job that was deleted before is as deleted as it can be.
    pub(super) fn delete_job(&mut self, job: JobId, if_version: Option<u64>) -> Outcome {
        if job.0 > self.last.job {
            return Err(Refused::NotFound(format!("there never was a job {job}")));
        }
        if let Some(known) = self.cluster.job(job) {
            check_version(known, if_version)?;
        }
        self.give_up_checkpoint(job, "the job was deleted", None);
        self.cluster.jobs.remove(&job);
        self.set_ledger(job, None);
        Ok(Reply::Done)
    }

    /// Whether its workers begin further steps.
    pub(super) fn pause_job(&mut self, id: JobId, paused: bool) -> Outcome {
        let version = self.cluster.version;
        let name = self.job(id)?.view.spec.name.clone();
        let view = &mut self.job_mut(id).view;
        let changed = view.orders.paused != paused;
        if changed {
            (view.orders.paused, view.version) = (paused, version);
            let what = if paused { "is paused: its workers hold" } else { "goes on" };
            self.tell("job", format!("job {name} {what}"));
        }
        Ok(Reply::Changed(changed))
    }

    pub(super) fn define(
        &mut self,
        id: JobId,
        session: SessionId,
        specs: Vec<VariableSpec>,
    ) -> Outcome {
        let version = self.cluster.version;
        let job = self.job(id)?;
        check_open(job, session)?;
        let mut variables = job.view.variables.clone();
        let mut numbers = Vec::with_capacity(specs.len());
        for spec in specs {
            let known = variables.iter().find(|variable| variable.spec.name == spec.name);
            numbers.push(match known {
                Some(variable) if variable.spec == spec => variable.id,
                Some(variable) => {
                    let problem = format!(
                        "variable {:?} of job {:?} is defined as {:?}, and not as {spec:?}",
                        spec.name, job.view.spec.name, variable.spec,
                    );
                    return Err(Refused::AlreadyExists(problem));
                }
                None if variables.len() == VARIABLES_MAX => {
                    let problem = format!("a job has at most {VARIABLES_MAX} variables");
                    return Err(Refused::FailedPrecondition(problem));
                }
                None => {
                    let variable = VariableId(variables.len() as u32 + 1);
                    variables.push(Variable { id: variable, spec });
                    variable
                }
            });
        }
        let more = variables.len() - job.view.variables.len();
        let blocks = variables.iter().map(|variable| blocks(&variable.spec)).sum::<u64>();
        if more > 0 && blocks > BLOCKS_MAX {
            return Err(Refused::FailedPrecondition(format!(
                "dense.block_floats: all dense variables of job {:?} would have {blocks} blocks, more than {BLOCKS_MAX}: \
                 take larger ones",
                job.view.spec.name
            )));
        }
        self.check_room(more * VARIABLE_BYTES)?;
        let job = self.job_mut(id);
        if variables.len() > job.view.variables.len() {
            job.view.variables = variables;
            job.view.version = version;
        }
        let defined = numbers.into_iter().map(|number| define_one(job, number, session)).collect();
        Ok(Reply::Defined { variables: defined, version: job.view.version })
    }

    pub(super) fn mark_initialized(
        &mut self,
        id: JobId,
        session: SessionId,
        variables: &[VariableId],
    ) -> Outcome {
        let job = self.job(id)?;
        for variable in variables {
            let Some(dense) = job.dense.get(variable) else {
                let problem = format!("job {id} has no dense variable {variable}");
                return Err(Refused::NotFound(problem));
            };
            if !dense.initialized && dense.initializer != session {
                return Err(Refused::FailedPrecondition(format!(
                    "variable {variable} is initialised by session {}, not {session}",
                    dense.initializer
                )));
            }
        }
        let job = self.job_mut(id);
        for variable in variables {
            job.dense.entry(*variable).and_modify(|dense| dense.initialized = true);
        }
        Ok(Reply::Done)
    }

    /// Compare-and-swap where `expected` is given.
    pub(super) fn label_job(&mut self, id: JobId, change: LabelChange) -> Outcome {
        let job = self.job(id)?;
        let now = job.labels.get(&change.key).cloned().unwrap_or_default();
        if change.expected.is_some_and(|expected| expected != now) {
            return Ok(Reply::Labelled { changed: false, value: now });
        }
        if now.is_empty() && !change.value.is_empty() && job.labels.len() == LABELS_MAX {
            let problem = format!("a job has at most {LABELS_MAX} labels");
            return Err(Refused::FailedPrecondition(problem));
        }
        let others = job.labels.iter().filter(|(key, _)| **key != change.key);
        let bytes: usize = others.map(|(key, value)| label_bytes(key, value)).sum();
        if !change.value.is_empty()
            && bytes + label_bytes(&change.key, &change.value) > LABELS_BYTES_MAX
        {
            let problem = format!("the labels of a job take at most {LABELS_BYTES_MAX} bytes");
            return Err(Refused::FailedPrecondition(problem));
        }
        self.check_room(label_bytes(&change.key, &change.value))?;
        if change.value != now {
            let labels = &mut self.job_mut(id).labels;
            if change.value.is_empty() {
                labels.remove(&change.key);
            } else {
                labels.insert(change.key, change.value.clone());
            }
        }
        Ok(Reply::Labelled { changed: true, value: change.value })
    }
}

fn blocks(spec: &VariableSpec) -> u64 {
    match &spec.shape {
        Shape::Dense(dense) => dense.blocks().into(),
        Shape::Table(_) => 0,
    }
}

fn check_open(job: &Job, session: SessionId) -> Result<(), Refused> {
    if job.sessions.contains_key(&session) {
        return Ok(());
    }
    Err(Refused::NotFound(format!("job {} has no open session {session}", job.view.job)))
}

/// A dense variable is initialised by the first session that defines it, and by the next one where that session ended too early.
fn define_one(job: &mut Job, number: VariableId, session: SessionId) -> Defined {
    let variable = job.view.variable(number).expect("was just defined").clone();
    if matches!(variable.spec.shape, Shape::Table(_)) {
        return Defined { variable, initializer: None, initialized: true };
    }
    let fresh = Dense { initializer: session, initialized: false };
    let dense = job.dense.entry(number).or_insert(fresh);
    if !dense.initialized && !job.sessions.contains_key(&dense.initializer) {
        dense.initializer = session;
    }
    Defined { variable, initializer: Some(dense.initializer), initialized: dense.initialized }
}

/// Whoever looked at the job and decided that it may go does not mean what it has become since: it may have been set back, and be trained again.
pub(super) fn check_version(job: &Job, if_version: Option<u64>) -> Result<(), Refused> {
    let JobView { version, spec, .. } = &job.view;
    if if_version.is_none_or(|seen| seen == *version) {
        return Ok(());
    }
    Err(Refused::Conflict(format!("job {:?} has changed meanwhile: look at it again", spec.name)))
}

/// Everybody is in sync: all are empty.
fn first_route(servers: Vec<ServerRef>) -> ShardRoute {
    let primary = servers.first().copied();
    let mut in_sync = servers;
    in_sync.sort_unstable();
    ShardRoute { epoch: Epoch(1), set_version: 1, primary, in_sync, joining: None, moving: None }
}

fn difference(is: &JobSpec, wanted: &JobSpec) -> String {
    let fields = [
        ("shards", u64::from(is.shards), u64::from(wanted.shards)),
        ("replicas", is.replicas.into(), wanted.replicas.into()),
        ("min_in_sync", is.min_in_sync.into(), wanted.min_in_sync.into()),
        ("seed", is.seed, wanted.seed),
    ];
    let differing = fields.iter().filter(|(_, is, wanted)| is != wanted);
    let differing: Vec<_> =
        differing.map(|(field, is, wanted)| format!("{field} is {is}, not {wanted}")).collect();
    format!("job {:?} exists: its {}", is.name, differing.join(", its "))
}
