//! How a process comes to its job: it joins one that is alive, begins it again from a checkpoint, or starts it over. And how it leaves one that is trained: saved.

use std::time::{Duration, Instant};

use downpour_client::{Coordinators, Error, Refused};
use downpour_core::id::{JobId, SessionId};
use downpour_proto::v1;
use tokio::time::sleep;

/// Where checkpoints of a job go, and which are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoints {
    /// `file:///folder` or `s3://bucket/prefix`, as servers and coordinators reach it.
    pub to: String,
    /// From the beginning of one to the beginning of the next.
    pub every: Duration,
    /// All but so many are deleted; 0 keeps all.
    pub keep: u32,
}

/// Between two looks at something that takes time.
const LOOK: Duration = Duration::from_millis(200);
/// For coordinators and servers that were started anew to know of each other, and for lost shards to be set back to a checkpoint.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
/// For the shards of a job to be read from its checkpoint.
const LOADED_WITHIN: Duration = Duration::from_secs(15 * 60);
/// For a checkpoint.
const SAVED_WITHIN: Duration = Duration::from_secs(15 * 60);
/// For the other workers of a job to end, or for worker 0 to come, where a job is started over. Sessions of killed processes are over by then.
const OTHERS_WITHIN: Duration = Duration::from_secs(60);

/// What sessions of the worker of this number are called, so that workers find each other.
pub(crate) fn session_name(worker: usize) -> String {
    format!("worker-{worker}")
}

/// The label with the session of worker 0 that began the job anew: those who are told to do so too join it.
const STARTED_OVER: &str = "started-over";

/// Everything that the coordinators say of the job of this name.
pub(crate) async fn status(
    coordinators: &Coordinators,
    name: &str,
) -> Result<Option<v1::JobStatus>, Error> {
    let jobs = coordinators.cluster().await?.jobs;
    Ok(jobs.into_iter().find(|job| is_called(job, name)))
}

fn is_called(job: &v1::JobStatus, name: &str) -> bool {
    let spec = job.view.as_ref().and_then(|view| view.spec.as_ref());
    spec.is_some_and(|spec| spec.name == name)
}

/// The checkpoint that a job began from.
pub(crate) fn began_from(status: &v1::JobStatus) -> Option<(&str, &str)> {
    let order = status.view.as_ref()?.restore.as_ref()?;
    Some((&order.uri, &order.checkpoint))
}

/// Whether nothing of the job is left in the cluster.
fn is_lost(status: &v1::JobStatus) -> bool {
    let shards = status.view.as_ref().map_or(&[][..], |view| &view.shards);
    !shards.is_empty() && shards.iter().all(|route| route.lost)
}

fn version(status: &v1::JobStatus) -> u64 {
    status.view.as_ref().map_or(0, |view| view.version)
}

fn id(status: &v1::JobStatus) -> JobId {
    JobId(status.view.as_ref().map_or(0, |view| view.job))
}

/// Makes of a job that is not there, or not any more, what the newest whole checkpoint has. Whoever comes first does it; the others join, and so do those that are at work
/// on it (see [`began_again`]). Returns once the shards are loaded.
pub(crate) async fn restore(
    coordinators: &Coordinators,
    name: &str,
    uri: &str,
    replicas: Option<u32>,
) -> Result<(), Error> {
    loop {
        let lost = settled(coordinators, name, uri).await?;
        if lost.as_ref().is_some_and(|job| !is_lost(job)) {
            return loaded(coordinators, name).await;
        }
        // In one step, so that at no time there is no job; and not what has become of it since: its shards may have been set back.
        let request = v1::RestoreJobRequest {
            uri: uri.into(),
            job: name.into(),
            replicas: replicas.unwrap_or(0),
            replace: lost.is_some(),
            if_version: lost.as_ref().map_or(0, version),
            ..v1::RestoreJobRequest::default()
        };
        let begun = match coordinators.restore_job(&request).await {
            Err(Error::NotFound { .. }) => {
                tracing::debug!(job = name, uri, "no checkpoint yet: begins from nothing");
                let Some(lost) = &lost else { return Ok(()) };
                gone(coordinators.delete_job_if(id(lost), version(lost)).await)
            }
            begun => begun.map(drop),
        };
        match begun {
            Ok(()) | Err(Error::Refused { code: Refused::AlreadyExists, .. }) => {
                return loaded(coordinators, name).await;
            }
            Err(Error::Refused { code: Refused::Conflict, .. }) => sleep(LOOK).await,
            Err(error) => return Err(error),
        }
    }
}

/// Whether a job is gone, and another of its name has begun from a checkpoint: every shard was lost, and whoever came next had it begin again.
pub(crate) async fn began_again(
    coordinators: &Coordinators,
    name: &str,
    job: JobId,
) -> Result<bool, Error> {
    let now = status(coordinators, name).await?;
    Ok(now.is_some_and(|now| id(&now) != job && began_from(&now).is_some()))
}

/// The job, once each of its shards has a primary that lives, or all are lost: after everything was started anew under the old names, some servers are not known yet,
/// and others count as alive that are gone.
async fn settled(
    coordinators: &Coordinators,
    name: &str,
    uri: &str,
) -> Result<Option<v1::JobStatus>, Error> {
    let started = Instant::now();
    loop {
        let cluster = coordinators.cluster().await?;
        let Some(job) = { cluster.jobs }.into_iter().find(|job| is_called(job, name)) else {
            return Ok(None);
        };
        let shards = job.view.as_ref().map_or(&[][..], |view| &view.shards);
        let lives = |route: &&v1::ShardRoute| {
            let primary = route.primary.as_ref();
            let is_it = |node: &v1::NodeView| {
                primary.is_some_and(|one| {
                    (one.node, one.incarnation) == (node.node, node.incarnation) && node.alive
                })
            };
            cluster.nodes.iter().any(is_it)
        };
        if is_lost(&job) || shards.iter().all(|route| lives(&route)) {
            return Ok(Some(job));
        }
        if started.elapsed() > SETTLED_WITHIN {
            let lost: Vec<u32> =
                { shards.iter() }.filter(|route| route.lost).map(|r| r.shard).collect();
            if lost.is_empty() {
                // Who was their primary may come back.
                return Ok(Some(job));
            }
            let last = format!(
                "shards {lost:?} of job {name:?} are lost, others are not; `psctl checkpoint restore {uri} {name} --replace` takes all of them back to the \
                 newest checkpoint, --fresh starts over"
            );
            return Err(Error::Deadline { what: "join the job", within: SETTLED_WITHIN, last });
        }
        sleep(LOOK).await;
    }
}

/// Waits until the shards of a job that began from a checkpoint are read.
async fn loaded(coordinators: &Coordinators, name: &str) -> Result<(), Error> {
    let started = Instant::now();
    let mut told = started;
    loop {
        let Some(job) = status(coordinators, name).await? else { return Ok(()) };
        let Some((uri, checkpoint)) = began_from(&job) else { return Ok(()) };
        let shards = job.view.as_ref().map_or(0, |view| view.shards.len());
        let loaded = job.reports.iter().filter(|report| report.last_lsn > 0).count();
        if loaded == shards || is_lost(&job) {
            return Ok(());
        }
        let last = format!(
            "{loaded} of {shards} shards are loaded from checkpoint {checkpoint} in {uri}; the servers' logs say what the others wait for"
        );
        if started.elapsed() > LOADED_WITHIN {
            return Err(Error::Deadline { what: "restore job", within: LOADED_WITHIN, last });
        }
        if told.elapsed() > Duration::from_secs(10) {
            tracing::info!("{last}");
            told = Instant::now();
        }
        sleep(LOOK).await;
    }
}

/// Deletes the job, whatever is left of it. Worker 0 does it, once no other works with it; the others come when worker 0 is there.
pub(crate) async fn start_over(
    coordinators: &Coordinators,
    name: &str,
    worker: usize,
) -> Result<(), Error> {
    let deadline = Instant::now() + OTHERS_WITHIN;
    let mut told = false;
    loop {
        let job = status(coordinators, name).await?;
        let last = match (&job, worker) {
            (None, 0) => return Ok(()),
            (Some(job), 0) => {
                let others = workers(job).filter(|other| *other != session_name(0));
                let others: Vec<&str> = others.collect();
                if others.is_empty() || is_lost(job) {
                    return gone(coordinators.delete_job(id(job)).await);
                }
                format!("still at work on it: {}; end them first", others.join(", "))
            }
            (Some(job), _) if workers(job).any(|other| other == session_name(0)) => {
                let began = job.labels.get(STARTED_OVER);
                if job.sessions.iter().any(|one| Some(&one.session.to_string()) == began) {
                    return Ok(());
                }
                "worker 0 works with the job as it was; leave out --fresh to go on with it".into()
            }
            (_, _) => "worker 0 did not start it".into(),
        };
        if Instant::now() > deadline {
            let what = "start the job over";
            return Err(Error::Deadline { what, within: OTHERS_WITHIN, last });
        }
        if !told {
            tracing::info!(job = name, "waits to start over: {last}");
            told = true;
        }
        sleep(LOOK).await;
    }
}

/// Worker 0 has begun the job anew: the others may join it.
pub(crate) async fn started_over(
    coordinators: &Coordinators,
    job: JobId,
    session: SessionId,
) -> Result<(), Error> {
    let session = session.to_string();
    coordinators.label_job(job, STARTED_OVER, &session, None).await.map(drop)
}

/// Takes a checkpoint of a job and waits until it is whole: its name. What is asked for while another is being taken begins after that.
pub(crate) async fn save(
    coordinators: &Coordinators,
    job: JobId,
    uri: &str,
) -> Result<String, Error> {
    let ended = coordinators.take_checkpoint(job, uri, true, SAVED_WITHIN).await?;
    if ended.error.is_empty() {
        return Ok(ended.checkpoint);
    }
    let message = format!("checkpoint {} failed: {}", ended.checkpoint, ended.error);
    Err(Error::Refused { what: "save the job", code: Refused::Other, message })
}

/// Names of the workers that are members of a job.
fn workers(job: &v1::JobStatus) -> impl Iterator<Item = &str> {
    let worker = v1::SessionKind::Worker;
    job.sessions.iter().filter(move |one| one.kind() == worker).map(|one| one.name.as_str())
}

/// Somebody else may have deleted it.
fn gone(deleted: Result<(), Error>) -> Result<(), Error> {
    match deleted {
        Err(Error::NotFound { .. }) => Ok(()),
        other => other,
    }
}
