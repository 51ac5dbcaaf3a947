//! On the leader: checkpoints begin when they are due, and get their manifest when every shard is stored (docs/protocol.md 8).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use downpour_checkpoint::Error as StoreError;
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::manifest::{CHAIN_MAX, Manifest};
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::{Access, Store};
use downpour_core::id::JobId;
use downpour_core::mix::mix64;
use downpour_core::spec::JobSpec;
use downpour_proto::{threads, v1};
use thiserror::Error;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::command::{BeginCheckpoint, Body, ERROR_BYTES_MAX, EndCheckpoint, RestoreJob};
use crate::raft::{Error as RaftError, Handle};
use crate::state::Job;
use crate::state::checkpoints::{checkpoints_in_use, epoch_after, missing};

const ROUND: Duration = Duration::from_millis(200);
/// A checkpoint that is not whole by then is given up.
const CHECKPOINT_TIMEOUT: Duration = Duration::from_secs(900);
/// What is left of checkpoints that were deleted or given up goes when it is so old: nobody still writes to them.
const SWEEP_AGE: Duration = CHECKPOINT_TIMEOUT.saturating_mul(4);
/// After one that failed, the next that is due waits.
const FAILED_PAUSE: Duration = Duration::from_secs(10);

/// Why nothing began.
#[derive(Debug, Error)]
pub enum Failure {
    /// The place, or what is in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It was not committed.
    #[error(transparent)]
    Raft(#[from] RaftError),
    /// There is no such job.
    #[error("there is no job {0}")]
    NoJob(JobId),
    /// What is asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
}

/// Works while this member leads, until told to stop.
pub async fn run(handle: Handle, stop: CancellationToken) {
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = rounds.tick() => {}
            () = stop.cancelled() => return,
        }
        if !handle.status().leads() {
            continue;
        }
        let jobs: Vec<JobId> = handle.cluster().jobs.keys().copied().collect();
        for job in jobs {
            if let Err(error) = look_after(&handle, job).await {
                warn!(%job, %error, "a checkpoint does not go on");
            }
        }
    }
}

async fn look_after(handle: &Handle, id: JobId) -> Result<(), Failure> {
    let cluster = handle.cluster();
    let Some(job) = cluster.job(id) else { return Ok(()) };
    let now_ms = unix_ms();
    if let Some(open) = &job.checkpoints.open {
        if job.manifest().is_some() {
            return finish(handle, id).await;
        }
        if now_ms.saturating_sub(open.created_ms) > CHECKPOINT_TIMEOUT.as_millis() as u64 {
            let shards = missing(open, job.view.spec.shards);
            let error = format!("not stored in time: shards {shards:?}");
            end(handle, job, error).await?;
            discard(job).await?;
        }
        return Ok(());
    }
    let Some(schedule) = &job.checkpoints.schedule else { return Ok(()) };
    let began =
        |ended: &Option<v1::EndedCheckpoint>| ended.as_ref().map_or(0, |one| one.created_ms);
    let failed_ms = job.checkpoints.failed.as_ref().map_or(0, |failed| failed.ended_ms);
    let due_ms = began(&job.checkpoints.whole) + schedule.every_ms;
    if !job.view.variables.is_empty()
        && now_ms >= due_ms.max(failed_ms + FAILED_PAUSE.as_millis() as u64)
    {
        let nonce = mix64(now_ms ^ id.0 << 48 ^ cluster.version << 20) as u32;
        begin(handle, id, "", schedule.full_every > 1, nonce).await?;
    }
    Ok(())
}

/// Commits that a checkpoint begins, and returns its name and how many it builds on. Asked again with the same `nonce`, it is the one that began then.
///
/// # Errors
/// The place cannot be used, or another one is being taken.
pub async fn begin(
    handle: &Handle,
    id: JobId,
    uri: &str,
    incremental: bool,
    nonce: u32,
) -> Result<(CheckpointName, u32), Failure> {
    let cluster = handle.read().await?;
    let job = cluster.job(id).ok_or(Failure::NoJob(id))?;
    if let Some(begun) = job.begun(nonce) {
        return Ok(begun);
    }
    let schedule = job.checkpoints.schedule.clone().unwrap_or_default();
    let uri = if uri.is_empty() { schedule.uri.as_str() } else { uri };
    if uri.is_empty() {
        let problem = "uri: is not given, and the job has no schedule that names one".into();
        return Err(Failure::Invalid(problem));
    }
    if job.view.variables.is_empty() {
        let problem =
            format!("job {:?} has no variables yet: there is nothing to save", job.view.spec.name);
        return Err(Failure::Invalid(problem));
    }
    // Names tell which is newer, also where the clock of the leader before was ahead of this one.
    let before = [&job.checkpoints.whole, &job.checkpoints.failed].into_iter().flatten();
    let created_ms = before.map(|ended| ended.created_ms + 1).max().unwrap_or(0).max(unix_ms());
    let name = CheckpointName::at(created_ms, nonce);
    let catalog = Catalog::new(open(uri, Access::Write).await?);
    let mut order = v1::CheckpointOrder {
        uri: uri.into(),
        checkpoint: name.to_string(),
        newer_than: Vec::new(),
    };
    let mut chain = Vec::new();
    let chain_max = match schedule.full_every {
        0 | 1 => CHAIN_MAX,
        full_every => full_every as usize,
    };
    if incremental
        && let Some(base) = base(&catalog, job, uri).await?
        && base.chain.len() + 1 < chain_max
    {
        order.newer_than = base.files.iter().map(|file| file.lsn.0).collect();
        chain = base.chain.iter().chain([&base.checkpoint]).map(ToString::to_string).collect();
    }
    let length = chain.len() as u32;
    let begin = BeginCheckpoint { job: id.0, order: Some(order), created_ms, chain };
    handle.propose(Body::BeginCheckpoint(begin)).await?;
    info!(job = %id, checkpoint = %name, uri, builds_on = length, "checkpoint begins");
    Ok((name, length))
}

/// What an increment builds on. One that was deleted or is damaged is no base: a full checkpoint is taken then.
async fn base(catalog: &Catalog, job: &Job, uri: &str) -> Result<Option<Manifest>, StoreError> {
    let Some(base) = job.base(uri).and_then(|name| CheckpointName::new(name).ok()) else {
        return Ok(None);
    };
    match catalog.manifest(&job.view.spec.name, &base).await {
        Ok(manifest) => Ok(Some(manifest)),
        Err(StoreError::Missing(_) | StoreError::Structure { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes the manifest. Leadership is confirmed before, and a manifest that an earlier leader wrote is the same, so it is as good.
async fn finish(handle: &Handle, id: JobId) -> Result<(), Failure> {
    let cluster = handle.read().await?;
    let Some(job) = cluster.job(id) else { return Ok(()) };
    let (Some(manifest), Some(order)) = (job.manifest(), &job.view.orders.checkpoint) else {
        return Ok(());
    };
    let uri = &order.uri;
    let catalog = Catalog::new(open(uri, Access::Write).await?);
    // Somebody may have deleted what it builds on.
    match catalog.chain(manifest.clone()).await {
        Ok(_) => {}
        Err(error @ (StoreError::Missing(_) | StoreError::Structure { .. })) => {
            end(handle, job, format!("what it builds on: {error}")).await?;
            return Ok(discard(job).await?);
        }
        Err(error) => return Err(error.into()),
    }
    match catalog.create_manifest(&manifest).await {
        Ok(()) => {}
        Err(StoreError::Exists(_)) => {
            let found = catalog.manifest(&job.view.spec.name, &manifest.checkpoint).await?;
            if found.files != manifest.files {
                let error = format!("{} has a manifest of other files", manifest.checkpoint);
                end(handle, job, error).await?;
                return Ok(());
            }
        }
        Err(StoreError::Missing(_)) => {
            end(handle, job, format!("{} was deleted", manifest.checkpoint)).await?;
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    }
    end(handle, job, String::new()).await?;
    // It may have been given up meanwhile, and shards been set back to the one before: that one is not to be deleted then.
    let cluster = handle.read().await?;
    let Some(job) = cluster.job(id) else { return Ok(()) };
    if job
        .checkpoints
        .whole
        .as_ref()
        .is_none_or(|whole| manifest.checkpoint.as_str() != whole.checkpoint)
    {
        return Ok(());
    }
    let (bytes, rows) = (manifest.bytes(), manifest.rows());
    info!(job = %id, checkpoint = %manifest.checkpoint, bytes, rows, "checkpoint is whole");
    let schedule = job.checkpoints.schedule.as_ref().filter(|one| one.uri == *uri);
    if let Some(schedule) = schedule.filter(|one| one.keep > 0) {
        let name = &job.view.spec.name;
        let used = checkpoints_in_use(&cluster, uri, name);
        let kept = catalog.keep(name, schedule.keep as usize, &used).await?;
        for name in &kept.deleted {
            info!(job = %id, checkpoint = %name, "checkpoint deleted: newer ones are kept");
        }
        let long_ago =
            CheckpointName::at(unix_ms().saturating_sub(SWEEP_AGE.as_millis() as u64), 0);
        let before = kept.kept.first().map_or(&long_ago, |oldest| oldest.min(&long_ago));
        catalog.sweep(name, before).await?;
    }
    Ok(())
}

/// The files of a checkpoint that was given up: nobody will ever list them.
async fn discard(job: &Job) -> Result<(), StoreError> {
    let Some(order) = &job.view.orders.checkpoint else { return Ok(()) };
    let Ok(name) = CheckpointName::new(order.checkpoint.as_str()) else { return Ok(()) };
    let catalog = Catalog::new(open(&order.uri, Access::Write).await?);
    catalog.discard(&job.view.spec.name, &name).await
}

async fn end(handle: &Handle, job: &Job, mut error: String) -> Result<(), Failure> {
    let Some(order) = &job.view.orders.checkpoint else { return Ok(()) };
    let id = job.view.job;
    if !error.is_empty() {
        warn!(job = %id, checkpoint = order.checkpoint, error, "checkpoint failed");
    }
    while error.len() > ERROR_BYTES_MAX {
        error.pop();
    }
    let checkpoint = order.checkpoint.clone();
    let end = EndCheckpoint { job: id.0, checkpoint, error, ended_ms: unix_ms() };
    handle.propose(Body::EndCheckpoint(end)).await?;
    Ok(())
}

/// The command that makes a job of a checkpoint, which is read up to its manifests: servers prove the files.
///
/// # Errors
/// There is no such checkpoint, or what it builds on is not there.
pub async fn restore(
    request: v1::RestoreJobRequest,
) -> Result<(RestoreJob, CheckpointName), Failure> {
    let v1::RestoreJobRequest { uri, job, checkpoint, name, replace, replicas } = request;
    let catalog = Catalog::new(open(&uri, Access::Read).await?);
    let manifest = if checkpoint.is_empty() {
        catalog.latest(&job).await?
    } else {
        let name = CheckpointName::new(checkpoint);
        let name = name.map_err(|bad| Failure::Invalid(bad.to_string()))?;
        catalog.manifest(&job, &name).await?
    };
    let chain = catalog.chain(manifest).await?;
    let Some(manifest) = chain.last() else {
        return Err(Failure::Invalid("chain: is empty".into()));
    };
    let mut spec = JobSpec { ..manifest.job.clone() };
    if !name.is_empty() {
        spec.name = name;
    }
    if replicas > 0 {
        spec.replicas = replicas;
        spec.min_in_sync = spec.min_in_sync.min(replicas);
    }
    let order = v1::RestoreOrder {
        uri,
        job,
        checkpoint: manifest.checkpoint.to_string(),
        epoch: epoch_after(manifest).0,
    };
    let command = RestoreJob {
        spec: Some((&spec).into()),
        variables: manifest.variables.iter().map(Into::into).collect(),
        initialized: manifest.initialized.iter().map(|variable| variable.0).collect(),
        labels: manifest.labels.clone(),
        high_water: manifest.sessions.high_water,
        order: Some(order),
        replace,
    };
    Ok((command, manifest.checkpoint.clone()))
}

/// Looks at the disk, or reads certificates.
pub(crate) async fn open(uri: &str, access: Access) -> Result<Store, StoreError> {
    let uri = uri.to_owned();
    let name = uri.clone();
    let opened = threads::blocking(move || Store::open(&uri, access)).await;
    opened.map_err(|error| StoreError::Io { object: name, source: std::io::Error::other(error) })?
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
