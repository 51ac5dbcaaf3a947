//! On the leader: checkpoints begin when they are due, and get their manifest when every shard is stored (docs/protocol.md 8).

use std::collections::BTreeMap;
use std::sync::Arc;
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
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::command::{BeginCheckpoint, Body, ERROR_BYTES_MAX, EndCheckpoint, RestoreJob};
use crate::liveness::Liveness;
use crate::raft::{Error as RaftError, Handle};
use crate::state::checkpoints::{checkpoints_in_use, epoch_after, missing};
use crate::state::{Cluster, Job};

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
pub async fn run(handle: Handle, liveness: Arc<Mutex<Liveness>>, stop: CancellationToken) {
    // By this process: who leads after it looks itself.
    let mut discarded = BTreeMap::new();
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
            let clock = liveness.lock().clock(&handle.cluster(), job);
            if let Err(error) = look_after(&handle, job, clock).await {
                warn!(%job, %error, "a checkpoint does not go on");
            }
            if let Err(error) = discard_failed(&handle.cluster(), job, &mut discarded).await {
                warn!(%job, %error, "what is left of a checkpoint that failed is not deleted");
            }
        }
    }
}

async fn look_after(handle: &Handle, id: JobId, clock: u64) -> Result<(), Failure> {
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
        }
        return Ok(());
    }
    if let Some(schedule) = &job.checkpoints.schedule
        && !job.view.variables.is_empty()
        && is_due(&job.checkpoints, schedule, now_ms, clock)
    {
        let nonce = mix64(now_ms ^ id.0 << 48 ^ cluster.version << 20) as u32;
        let incremental = schedule.full_every > 1;
        begin(handle, id, Asked { uri: "", incremental, nonce, clock }).await?;
    }
    Ok(())
}

/// Whether enough time or steps have passed since the last whole one began.
fn is_due(
    checkpoints: &v1::JobCheckpoints,
    schedule: &v1::CheckpointSchedule,
    now_ms: u64,
    clock: u64,
) -> bool {
    let whole = checkpoints.whole.as_ref();
    let failed_ms = checkpoints.failed.as_ref().map_or(0, |failed| failed.ended_ms);
    // A clock is as high as some worker says: at the highest number there is, nothing has passed since.
    let passed = |now: u64, began: u64, every: u64| {
        every > 0 && now.checked_sub(began).is_some_and(|since| since >= every)
    };
    let by_time = passed(now_ms, whole.map_or(0, |whole| whole.created_ms), schedule.every_ms);
    let by_steps = passed(clock, whole.map_or(0, |whole| whole.clock), schedule.every_steps);
    // The leader at which it failed may have had another time.
    (by_time || by_steps) && now_ms.abs_diff(failed_ms) >= FAILED_PAUSE.as_millis() as u64
}

/// A checkpoint that is to begin.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Empty: where the schedule says.
    pub uri: &'a str,
    /// Only what changed since the last one.
    pub incremental: bool,
    /// Of this wish.
    pub nonce: u32,
    /// Steps of the furthest worker now.
    pub clock: u64,
}

/// Commits that a checkpoint begins, and returns its name and how many it builds on. Asked again with the same `nonce`, it is the one that began then.
///
/// # Errors
/// The place cannot be used, or another one is being taken.
pub async fn begin(
    handle: &Handle,
    id: JobId,
    asked: Asked<'_>,
) -> Result<(CheckpointName, u32), Failure> {
    let Asked { uri, incremental, nonce, clock } = asked;
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
    let begin = BeginCheckpoint { job: id.0, order: Some(order), created_ms, chain, clock };
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
            return end(handle, job, format!("what it builds on: {error}")).await;
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

/// The files of the checkpoint that failed last, and its manifest: a leader may have written that before the checkpoint was given up, or be about to, and what is listed is
/// what trainings begin from. Whoever leads does it once; what is older was swept.
async fn discard_failed(
    cluster: &Cluster,
    id: JobId,
    discarded: &mut BTreeMap<JobId, String>,
) -> Result<(), StoreError> {
    discarded.retain(|job, _| cluster.jobs.contains_key(job));
    let Some(job) = cluster.job(id) else { return Ok(()) };
    let Some(failed) = &job.checkpoints.failed else { return Ok(()) };
    let Ok(name) = CheckpointName::new(failed.checkpoint.as_str()) else { return Ok(()) };
    let of = &job.view.spec.name;
    let old = unix_ms().saturating_sub(failed.created_ms) > SWEEP_AGE.as_millis() as u64;
    if old || discarded.get(&id) == Some(&failed.checkpoint) {
        return Ok(());
    }
    if !checkpoints_in_use(cluster, &failed.uri, of).contains(&name) {
        let catalog = Catalog::new(open(&failed.uri, Access::Write).await?);
        catalog.discard(of, &name).await?;
    }
    discarded.insert(id, failed.checkpoint.clone());
    Ok(())
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
    let v1::RestoreJobRequest { uri, job, checkpoint, name, replace, replicas, if_version } =
        request;
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
        if_version,
        ledger: manifest.ledger.as_ref().map(Into::into),
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

#[cfg(test)]
mod tests {
    use downpour_checkpoint::manifest::Manifest;
    use downpour_core::spec::JobSpec;

    use super::*;
    use crate::command::{Command, Registration};
    use crate::state::State;

    /// A job with a checkpoint that failed after a leader had written its manifest.
    fn with_failed(uri: &str, created_ms: u64) -> (State, Manifest) {
        let (mut state, mut index) = (State::default(), 0);
        let mut apply = |command| {
            index += 1;
            state.apply(index, command).expect("allowed");
        };
        apply(Command::RegisterServer(Registration {
            name: "ps-0".into(),
            address: "host:1".into(),
            zone: String::new(),
            request_id: "1".into(),
            origin: String::new(),
            exclusive_name: false,
            isolation_ms: 0,
        }));
        let spec = JobSpec { name: "ctr".into(), shards: 1, replicas: 1, min_in_sync: 1, seed: 1 };
        apply(Command::CreateJob(spec));
        let name = CheckpointName::at(created_ms, 7).to_string();
        let order = v1::CheckpointOrder {
            uri: uri.into(),
            checkpoint: name.clone(),
            newer_than: Vec::new(),
        };
        let (order, chain) = (Some(order), Vec::new());
        let begin = BeginCheckpoint { job: 1, order, created_ms, chain, clock: 0 };
        apply(Body::BeginCheckpoint(begin).try_into().expect("valid"));
        let saved = v1::ShardSaved { shard: 0, epoch: 1, lsn: 1 << 40, ..Default::default() };
        apply(Command::ShardsSaved(JobId(1), name.clone(), vec![saved]));
        let manifest = state.cluster().job(JobId(1)).and_then(Job::manifest).expect("all stored");
        let end = EndCheckpoint { job: 1, checkpoint: name, error: "given up".into(), ended_ms: 1 };
        let end = Body::EndCheckpoint(end).try_into().expect("valid");
        state.apply(index + 1, end).expect("allowed");
        (state, manifest)
    }

    #[test]
    fn one_is_due_after_so_much_time_or_so_many_steps_since_the_last_began() {
        let ended =
            |created_ms, clock| v1::EndedCheckpoint { created_ms, clock, ..Default::default() };
        let checkpoints =
            v1::JobCheckpoints { whole: Some(ended(50_000, 300)), ..Default::default() };
        let due = |every_ms, every_steps, now_ms, clock| {
            let schedule = v1::CheckpointSchedule { every_ms, every_steps, ..Default::default() };
            is_due(&checkpoints, &schedule, now_ms, clock)
        };
        assert!(!due(0, 100, 900_000, 399) && due(0, 100, 50_001, 400));
        assert!(!due(1000, 0, 50_999, 9000) && due(1000, 0, 51_000, 300));
        assert!(due(1000, 100, 51_000, 300) && due(1000, 100, 50_001, 400));
        assert!(!due(0, 100, 900_000, 0), "no server has reported to this leader yet");
        // The first one, and one after one that failed.
        let schedule = v1::CheckpointSchedule { every_steps: 100, ..Default::default() };
        let mut none = v1::JobCheckpoints::default();
        assert!(!is_due(&none, &schedule, 50_000, 99) && is_due(&none, &schedule, 50_000, 100));
        none.failed = Some(v1::EndedCheckpoint { ended_ms: 45_000, ..Default::default() });
        assert!(!is_due(&none, &schedule, 54_999, 100) && is_due(&none, &schedule, 55_000, 100));
        assert!(
            is_due(&none, &schedule, 35_000, 100),
            "it failed at a leader whose time was ahead"
        );
    }

    #[test]
    fn a_clock_as_high_as_there_is_makes_one_checkpoint_due_and_no_storm() {
        let schedule = v1::CheckpointSchedule { every_steps: 100, ..Default::default() };
        let mut checkpoints = v1::JobCheckpoints::default();
        for (clock, again) in [(u64::MAX - 50, u64::MAX), (u64::MAX, u64::MAX)] {
            checkpoints.whole = None;
            assert!(is_due(&checkpoints, &schedule, 50_000, clock));
            checkpoints.whole = Some(v1::EndedCheckpoint { clock, ..Default::default() });
            assert!(!is_due(&checkpoints, &schedule, 50_000, again));
        }
    }

    #[tokio::test]
    async fn a_checkpoint_that_was_given_up_is_not_listed_even_if_its_manifest_is_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let uri = format!("file://{}", folder.path().display());
        let catalog = Catalog::new(open(&uri, Access::Write).await.expect("a place"));
        let (state, manifest) = with_failed(&uri, unix_ms());
        let listed = async || catalog.list("ctr").await.expect("readable").len();
        let mut discarded = BTreeMap::new();
        catalog.create_manifest(&manifest).await.expect("the first leader writes it");
        assert_eq!(listed().await, 1);
        let discard = discard_failed(state.cluster(), JobId(1), &mut discarded);
        discard.await.expect("deleted");
        assert_eq!(listed().await, 0);
        // One that had slept.
        let late = catalog.create_manifest(&manifest).await;
        assert!(matches!(late, Err(StoreError::Missing(_))), "{late:?}");
        assert_eq!(listed().await, 0);
        assert_eq!(discarded[&JobId(1)], manifest.checkpoint.as_str(), "once");
    }
}
