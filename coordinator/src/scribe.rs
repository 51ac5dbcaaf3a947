//! On the leader: checkpoints begin when they are due, and get their manifest when every shard is stored (docs/protocol.md 8).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use downpour_checkpoint::Error as StoreError;
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::manifest::{CHAIN_MAX, Manifest};
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::{Access, Store};
use downpour_core::id::JobId;
use downpour_core::ledger::Ledger;
use downpour_core::mix::mix64;
use downpour_core::spec::JobSpec;
use downpour_proto::{threads, v1};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::beside::Beside;
use crate::command::deleting::{CHECKPOINTS_MAX, CheckpointEntry, CheckpointList};
use crate::command::{BeginCheckpoint, Body, ERROR_BYTES_MAX, EndCheckpoint, RestoreJob};
use crate::liveness::Liveness;
use crate::raft::{Error as RaftError, Handle};
use crate::state::checkpoints::{epoch_after, missing};
use crate::state::deletions::Filed;
use crate::state::{Cluster, Job, Refused};

const ROUND: Duration = Duration::from_millis(200);
/// A checkpoint that is not whole by then is given up.
const CHECKPOINT_TIMEOUT: Duration = Duration::from_secs(900);
/// What is left of checkpoints that were deleted or given up goes when it is so old: nobody still writes to them.
const SWEEP_AGE: Duration = CHECKPOINT_TIMEOUT.saturating_mul(4);
/// For its manifest, where that took too long already.
const LAST_TRY: Duration = Duration::from_secs(60);
/// After an error, before the same is tried again.
const ERROR_PAUSE: Duration = Duration::from_secs(1);
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
    /// There is a checkpoint, but not all that it builds on.
    #[error("checkpoint {0} cannot be used: {1}")]
    Incomplete(CheckpointName, StoreError),
}

/// Works while this member leads, until told to stop.
pub async fn run(handle: Handle, liveness: Arc<Mutex<Liveness>>, stop: CancellationToken) {
    let (mut jobs, mut seen) = (Beside::new(), Seen::default());
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = rounds.tick() => {}
            () = stop.cancelled() => return,
        }
        if !handle.status().leads() {
            seen = Seen::default();
            continue;
        }
        let cluster = handle.cluster();
        seen.look(&cluster, Instant::now());
        for (&id, job) in &cluster.jobs {
            let clock = liveness.lock().clock(&cluster, id);
            let known = seen.known(id, Instant::now());
            let ledger = cluster.ledgers.get(&id).map(AsRef::as_ref);
            let Some(due) = due(job, ledger, (unix_ms(), known), clock) else { continue };
            let handle = handle.clone();
            jobs.begin(id, async move {
                if let Err(error) = carry_out(&handle, id, due, clock).await {
                    warn!(job = %id, %error, "a checkpoint does not go on");
                    tokio::time::sleep(ERROR_PAUSE).await;
                }
            });
        }
    }
}

/// For how long this leader has known of a job's checkpoints, by a clock that no other leader's time disturbs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    open: Duration,
    whole: Duration,
}

/// When this leader first saw each job's open checkpoint and its last whole one.
#[derive(Default)]
struct Seen(BTreeMap<JobId, [Option<(String, Instant)>; 2]>);

impl Seen {
    fn look(&mut self, cluster: &Cluster, now: Instant) {
        self.0.retain(|id, _| cluster.jobs.contains_key(id));
        for (&id, job) in &cluster.jobs {
            let open = job.view.orders.checkpoint.as_ref().map(|order| &order.checkpoint);
            let whole = job.checkpoints.whole.as_ref().map(|whole| &whole.checkpoint);
            for (seen, is) in self.0.entry(id).or_default().iter_mut().zip([open, whole]) {
                if seen.as_ref().map(|(name, _)| name) != is {
                    *seen = is.map(|name| (name.clone(), now));
                }
            }
        }
    }

    fn known(&self, id: JobId, now: Instant) -> Known {
        let known = |at: usize| {
            let (_, since) = self.0.get(&id)?[at].as_ref()?;
            Some(now.saturating_duration_since(*since))
        };
        Known { open: known(0).unwrap_or_default(), whole: known(1).unwrap_or_default() }
    }
}

/// What is to be done about a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// All of it is stored: its manifest, for the last time where it takes too long.
    Finish {
        late: bool,
    },
    /// It takes too long.
    GiveUp,
    Begin {
        incremental: bool,
    },
}

fn due(
    job: &Job,
    ledger: Option<&Ledger>,
    (now_ms, known): (u64, Known),
    clock: u64,
) -> Option<Due> {
    let checkpoints = &job.checkpoints;
    if checkpoints.open.is_some() {
        let late = known.open > CHECKPOINT_TIMEOUT;
        return match job.manifest().is_some() {
            true => Some(Due::Finish { late }),
            false => late.then_some(Due::GiveUp),
        };
    }
    let schedule = checkpoints.schedule.as_ref()?;
    let due = is_due(checkpoints, schedule, (now_ms, known.whole), clock)
        || is_last_due(job, ledger, now_ms);
    let begin = Due::Begin { incremental: schedule.full_every > 1 };
    (due && !job.view.variables.is_empty()).then_some(begin)
}

async fn carry_out(handle: &Handle, id: JobId, due: Due, clock: u64) -> Result<(), Failure> {
    let cluster = handle.cluster();
    let Some(job) = cluster.job(id) else { return Ok(()) };
    match due {
        Due::Finish { late } => match last_try(late, finish(handle, id)).await? {
            None => Ok(()),
            Some(error) => end(handle, job, format!("its manifest is not stored: {error}")).await,
        },
        Due::GiveUp => {
            let Some(open) = &job.checkpoints.open else { return Ok(()) };
            let shards = missing(open, job.view.spec.shards);
            end(handle, job, format!("not stored in time: shards {shards:?}")).await
        }
        Due::Begin { incremental } => {
            let nonce = mix64(unix_ms() ^ id.0 << 48 ^ cluster.version << 20) as u32;
            begin(handle, id, Asked { uri: "", incremental, nonce, clock }).await.map(drop)
        }
    }
}

/// A place that takes no manifest, or does not answer, holds up a job's checkpoints no longer than one that takes no files: then it says why.
async fn last_try(
    late: bool,
    finishing: impl Future<Output = Result<(), Failure>>,
) -> Result<Option<String>, Failure> {
    if !late {
        return finishing.await.map(|()| None);
    }
    match tokio::time::timeout(LAST_TRY, finishing).await {
        Ok(Err(Failure::Store(error))) => Ok(Some(error.to_string())),
        Ok(finished) => finished.map(|()| None),
        Err(_) => Ok(Some(format!("no answer within {LAST_TRY:?}"))),
    }
}

/// Whether enough time or steps have passed since the last whole one began. The leader at which it did may have had another time, ahead of this one's: then it counts for how long this
/// leader has known of it.
fn is_due(
    checkpoints: &v1::JobCheckpoints,
    schedule: &v1::CheckpointSchedule,
    (now_ms, known): (u64, Duration),
    clock: u64,
) -> bool {
    let whole = checkpoints.whole.as_ref();
    // A clock is as high as some worker says: at the highest number there is, nothing has passed since.
    let passed = |now: u64, began: u64, every: u64| {
        every > 0 && now.checked_sub(began).is_some_and(|since| since >= every)
    };
    let by_time = passed(now_ms, whole.map_or(0, |whole| whole.created_ms), schedule.every_ms)
        || passed(known.as_millis() as u64, 0, schedule.every_ms);
    let by_steps = passed(clock, whole.map_or(0, |whole| whole.clock), schedule.every_steps);
    (by_time || by_steps) && !failed_of_late(checkpoints, now_ms)
}

/// The leader at which it failed may have had another time.
fn failed_of_late(checkpoints: &v1::JobCheckpoints, now_ms: u64) -> bool {
    let failed_ms = checkpoints.failed.as_ref().map_or(0, |failed| failed.ended_ms);
    now_ms.abs_diff(failed_ms) < FAILED_PAUSE.as_millis() as u64
}

/// Whether all of the job's data is trained, the last checkpoint does not have all of it, and no worker is there any more who might see to that: the one that trained the last of it has
/// one taken, unless it dies.
fn is_last_due(job: &Job, ledger: Option<&Ledger>, now_ms: u64) -> bool {
    let trained = ledger.filter(|one| one.is_over() && one.finished_by().is_some());
    let saved = job.checkpoints.whole.as_ref().map_or(0, |whole| whole.tasks_done);
    let mut sessions = job.sessions.values();
    trained.is_some_and(|ledger| ledger.totals().tasks > saved)
        && sessions.all(|session| session.kind != v1::SessionKind::Worker)
        && !failed_of_late(&job.checkpoints, now_ms)
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

/// What an increment builds on. One that was deleted or is damaged, or builds on such a one, is no base: a full checkpoint is taken then.
async fn base(catalog: &Catalog, job: &Job, uri: &str) -> Result<Option<Manifest>, StoreError> {
    let Some(base) = job.base(uri).and_then(|name| CheckpointName::new(name).ok()) else {
        return Ok(None);
    };
    match catalog.base(&job.view.spec.name, &base).await {
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
            let found = catalog.manifest(&job.view.spec.name, &manifest.checkpoint).await;
            let other = match found {
                Ok(found) if found.files == manifest.files => None,
                Ok(_) => Some("has a manifest of other files".to_owned()),
                // By whoever marked it and went no further.
                Err(StoreError::Missing(_)) => Some("was deleted".to_owned()),
                Err(StoreError::Structure { .. }) => Some("has a damaged manifest".to_owned()),
                Err(error) => return Err(error.into()),
            };
            if let Some(what) = other {
                return end(handle, job, format!("{} {what}", manifest.checkpoint)).await;
            }
        }
        Err(StoreError::Missing(gone)) => {
            let error = format!("{} is none: {gone} was deleted", manifest.checkpoint);
            return end(handle, job, error).await;
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
        let sorted = catalog.sort(name, schedule.keep as usize, &used(&cluster, uri, name)).await?;
        condemn(handle, uri, name, sorted.surplus).await?;
        let long_ago =
            CheckpointName::at(unix_ms().saturating_sub(SWEEP_AGE.as_millis() as u64), 0);
        let before = sorted.kept.first().map_or(&long_ago, |oldest| oldest.min(&long_ago));
        catalog.sweep(name, before).await?;
    }
    Ok(())
}

/// The checkpoints of a job, in this place, that must stay.
fn used(cluster: &Cluster, uri: &str, name: &str) -> Vec<CheckpointName> {
    let here = Filed::new(uri, name, "");
    let used = cluster.checkpoints_in_use().into_iter();
    used.filter(|one| (&one.uri, &one.job) == (&here.uri, &here.job))
        .filter_map(|one| CheckpointName::new(one.checkpoint).ok())
        .collect()
}

/// Has what is too old deleted. Only now, in the log, is decided of each whether it is used.
async fn condemn(
    handle: &Handle,
    uri: &str,
    of: &str,
    surplus: Vec<Manifest>,
) -> Result<(), Failure> {
    let entry = |manifest: &Manifest| CheckpointEntry {
        name: manifest.checkpoint.to_string(),
        chain: manifest.chain.iter().map(ToString::to_string).collect(),
    };
    for some in surplus.chunks(CHECKPOINTS_MAX) {
        let checkpoints = some.iter().map(entry).collect();
        let list = CheckpointList { uri: uri.into(), of: of.into(), checkpoints };
        handle.propose(Body::Condemn(list)).await?;
    }
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

/// The command that makes a job of a checkpoint, which is read up to its manifests: servers prove the files. It is pinned before, so that what was read is still there when the command is
/// applied, or that is refused.
///
/// # Errors
/// There is no such checkpoint, or what it builds on is not there.
pub async fn restore(
    handle: &Handle,
    request: v1::RestoreJobRequest,
) -> Result<(RestoreJob, CheckpointName), Failure> {
    let v1::RestoreJobRequest { uri, job, checkpoint, name, replace, replicas, if_version } =
        request;
    // Whoever is told that there is no checkpoint may begin from nothing, and not where it is the place that is gone.
    let none = |error| match (error, newest_there(&handle.cluster(), &uri, &job)) {
        (gone @ StoreError::Missing(_), Some(known)) => Failure::Incomplete(known, gone),
        (error, _) => error.into(),
    };
    let catalog = Catalog::new(open(&uri, Access::Read).await.map_err(none)?);
    let newest = checkpoint.is_empty();
    let checkpoint = if newest {
        catalog.latest(&job).await.map_err(none)?.checkpoint
    } else {
        let name = CheckpointName::new(checkpoint);
        name.map_err(|bad| Failure::Invalid(bad.to_string()))?
    };
    handle.propose(Body::Pin(CheckpointList::of(&uri, &job, [&checkpoint]))).await?;
    let manifest = match catalog.manifest(&job, &checkpoint).await {
        Err(StoreError::Missing(gone)) if newest => {
            let problem = format!("{gone} was deleted meanwhile");
            return Err(RaftError::Refused(Refused::Later(problem)).into());
        }
        manifest => manifest?,
    };
    let chain = match catalog.chain(manifest).await {
        Err(gone @ StoreError::Missing(_)) => return Err(Failure::Incomplete(checkpoint, gone)),
        chain => chain?,
    };
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
        consistency: Some((&manifest.consistency).into()),
    };
    Ok((command, manifest.checkpoint.clone()))
}

/// The newest checkpoint of the job of this name, where it is in this place as far as is committed.
fn newest_there(cluster: &Cluster, uri: &str, name: &str) -> Option<CheckpointName> {
    let job = cluster.jobs.values().find(|job| job.view.spec.name == name)?;
    let (known, of, checkpoint) = job.newest_checkpoint()?;
    let here = Filed::new(uri, name, checkpoint) == Filed::new(known, of, checkpoint);
    here.then(|| CheckpointName::new(checkpoint).ok())?
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
    use super::*;
    use crate::state::tests::Machine;
    use crate::state::tests::checkpoints::{begun, ended, saved};
    use crate::state::tests::ledgers::{plan, wants};

    const JUST_SEEN: Duration = Duration::ZERO;

    #[test]
    fn a_leader_whose_time_is_behind_the_last_ones_counts_for_how_long_it_knows_a_checkpoint() {
        let whole = v1::EndedCheckpoint { created_ms: 9_000_000, ..Default::default() };
        let checkpoints = v1::JobCheckpoints { whole: Some(whole), ..Default::default() };
        let schedule = v1::CheckpointSchedule { every_ms: 1000, ..Default::default() };
        let due =
            |known| is_due(&checkpoints, &schedule, (50_000, Duration::from_millis(known)), 0);
        assert!(!due(999) && due(1000));

        let (mut machine, _) = Machine::with_job(1, 1);
        let mut seen = Seen::default();
        let start = Instant::now();
        let mut look = |machine: &Machine, s| {
            let now = start + Duration::from_secs(s);
            seen.look(machine.state.cluster(), now);
            let Known { open, whole } = seen.known(JobId(1), now);
            (open.as_secs(), whole.as_secs())
        };
        assert_eq!(look(&machine, 0), (0, 0));
        machine.apply(begun("file:///x", "a")).expect("allowed");
        assert_eq!((look(&machine, 5), look(&machine, 7)), ((0, 0), (2, 0)));
        machine.apply(saved("a", 1, 9)).expect("allowed");
        machine.apply(ended("a", "")).expect("allowed");
        assert_eq!((look(&machine, 9), look(&machine, 12)), ((0, 0), (0, 3)));
        machine.apply(begun("file:///x", "b")).expect("allowed");
        assert_eq!((look(&machine, 13), look(&machine, 14)), ((0, 4), (1, 5)));
    }

    #[tokio::test]
    async fn a_checkpoint_whose_manifest_cannot_be_stored_is_given_up_when_its_time_is_over() {
        let (mut machine, _) = Machine::with_job(1, 1);
        machine.apply(begun("file:///x", "a")).expect("allowed");
        let due = |machine: &Machine, open_s| {
            let known = Known { open: Duration::from_secs(open_s), whole: JUST_SEEN };
            due(machine.state.cluster().job(JobId(1)).expect("there"), None, (50_000, known), 0)
        };
        assert_eq!((due(&machine, 900), due(&machine, 901)), (None, Some(Due::GiveUp)));
        machine.apply(saved("a", 1, 9)).expect("allowed");
        let late = [900, 901].map(|open_s| due(&machine, open_s));
        assert_eq!(late, [false, true].map(|late| Some(Due::Finish { late })));

        let full = || async { Err(StoreError::Missing("room".into()).into()) };
        assert!(last_try(false, full()).await.is_err(), "it is tried again");
        let given_up = last_try(true, full()).await.expect("not again");
        assert!(given_up.is_some_and(|error| error.contains("room")));
        let done = last_try(true, async { Ok(()) }).await;
        assert_eq!(done.expect("stored"), None);
    }

    #[test]
    fn one_is_due_after_so_much_time_or_so_many_steps_since_the_last_began() {
        let ended =
            |created_ms, clock| v1::EndedCheckpoint { created_ms, clock, ..Default::default() };
        let checkpoints =
            v1::JobCheckpoints { whole: Some(ended(50_000, 300)), ..Default::default() };
        let due = |every_ms, every_steps, now_ms, clock| {
            let schedule = v1::CheckpointSchedule { every_ms, every_steps, ..Default::default() };
            is_due(&checkpoints, &schedule, (now_ms, JUST_SEEN), clock)
        };
        assert!(!due(0, 100, 900_000, 399) && due(0, 100, 50_001, 400));
        assert!(!due(1000, 0, 50_999, 9000) && due(1000, 0, 51_000, 300));
        assert!(due(1000, 100, 51_000, 300) && due(1000, 100, 50_001, 400));
        assert!(!due(0, 100, 900_000, 0), "no server has reported to this leader yet");
        // The first one, and one after one that failed.
        let schedule = v1::CheckpointSchedule { every_steps: 100, ..Default::default() };
        let mut none = v1::JobCheckpoints::default();
        let due = |none: &_, now_ms, clock| is_due(none, &schedule, (now_ms, JUST_SEEN), clock);
        assert!(!due(&none, 50_000, 99) && due(&none, 50_000, 100));
        none.failed = Some(v1::EndedCheckpoint { ended_ms: 45_000, ..Default::default() });
        assert!(!due(&none, 54_999, 100) && due(&none, 55_000, 100));
        assert!(due(&none, 35_000, 100), "it failed at a leader whose time was ahead");
    }

    #[test]
    fn what_was_trained_last_is_saved_also_where_nobody_is_left_who_would_ask_for_it() {
        let (mut machine, _) = Machine::with_job(1, 1);
        let worker = machine.open(JobId(1));
        machine.define_tasks(worker, plan(2, 1)).expect("allowed");
        let due = |machine: &Machine| {
            let cluster = machine.state.cluster();
            let job = cluster.job(JobId(1)).expect("it is there");
            is_last_due(job, cluster.ledgers.get(&JobId(1)).map(AsRef::as_ref), 50_000)
        };
        machine.advance(worker, wants(2, 0));
        machine.finish_task(worker, 0);
        let mut left = machine.clone();
        left.close(JobId(1), worker);
        assert!(!due(&left), "it is for others");
        machine.finish_task(worker, 1);
        assert!(!due(&machine), "it may be about to ask");
        let mut dead = machine.clone();
        dead.close(JobId(1), worker);
        assert!(due(&dead));
        // Whoever asked for it.
        for (name, error, still) in [("a", "no", true), ("b", "", false)] {
            dead.apply(begun("file:///x", name)).expect("allowed");
            dead.apply(ended(name, error)).expect("allowed");
            assert_eq!(due(&dead), still, "{name}");
        }
    }

    #[test]
    fn a_clock_as_high_as_there_is_makes_one_checkpoint_due_and_no_storm() {
        let schedule = v1::CheckpointSchedule { every_steps: 100, ..Default::default() };
        let mut checkpoints = v1::JobCheckpoints::default();
        for (clock, again) in [(u64::MAX - 50, u64::MAX), (u64::MAX, u64::MAX)] {
            checkpoints.whole = None;
            assert!(is_due(&checkpoints, &schedule, (50_000, JUST_SEEN), clock));
            checkpoints.whole = Some(v1::EndedCheckpoint { clock, ..Default::default() });
            assert!(!is_due(&checkpoints, &schedule, (50_000, JUST_SEEN), again));
        }
    }
}
