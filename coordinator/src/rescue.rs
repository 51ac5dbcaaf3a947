//! On the leader: shards whose last copy is gone go on from the newest checkpoint of their job (docs/protocol.md 8.5).
//!
//! Never before a lease has passed: until then a primary that nobody hears may acknowledge pushes. Where the last copy may only be unreachable, it is waited for, for as
//! long as the operator says.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::Access;
use downpour_core::id::JobId;
use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::beside::Beside;
use crate::command::{AgainEntry, Body, SetBackShards};
use crate::raft::Handle;
use crate::scribe::{Failure, open};
use crate::state::Cluster;
use crate::state::checkpoints::epoch_after;
use crate::state::lost::{Last, Lost, lost, place};

const ROUND: Duration = Duration::from_millis(500);

/// How long what is lost is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Of servers, now; another leader may have given longer ones.
    pub lease: Duration,
    /// On top of the lease, for a last copy that may only be unreachable. None: for ever.
    pub unreachable: Option<Duration>,
}

impl Patience {
    /// How long a shard is waited for from the moment when this leader found it lost. None: for ever.
    ///
    /// The last copy stops by itself when it was cut off for its bound, which began before it was judged; the lease on top is the margin for clocks that run differently. A server
    /// that registered when there was no bound may go on for ever, whatever the option is now.
    fn with(self, last: Option<Last>, cluster: &Cluster) -> Option<Duration> {
        let lease = self.lease.max(Duration::from_millis(cluster.lease_ms));
        let Some(last) = last else { return Some(lease) };
        let bound = Duration::from_millis(last.isolation_ms);
        let unreachable = self.unreachable.filter(|_| !bound.is_zero())?;
        Some(unreachable.max(bound) + lease)
    }
}

/// Works while this member leads, until told to stop.
pub async fn run(handle: Handle, patience: Patience, stop: CancellationToken) {
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Of this leadership: a new leader waits anew.
    let mut since: BTreeMap<Lost, Instant> = BTreeMap::new();
    let mut jobs = Beside::new();
    let told = Arc::new(Mutex::new(BTreeMap::new()));
    loop {
        tokio::select! {
            _ = rounds.tick() => {}
            () = stop.cancelled() => return,
        }
        if !handle.status().leads() {
            since.clear();
            continue;
        }
        let now = Instant::now();
        let cluster = handle.cluster();
        let found = lost(&cluster);
        since.retain(|lost, _| found.binary_search(lost).is_ok());
        let mut ripe: BTreeMap<JobId, Vec<Lost>> = BTreeMap::new();
        for lost in found {
            let waited = now.duration_since(*since.entry(lost).or_insert(now));
            if patience.with(lost.last, &cluster).is_some_and(|long_enough| waited >= long_enough) {
                ripe.entry(lost.job).or_default().push(lost);
            }
        }
        told.lock().retain(|job, _| ripe.contains_key(job));
        for (job, lost) in ripe {
            let (handle, told) = (handle.clone(), told.clone());
            jobs.begin(job, async move {
                let Err(error) = set_back(&handle, job, &lost).await else { return };
                let error = error.to_string();
                if told.lock().get(&job) != Some(&error) {
                    warn!(%job, shards = lost.len(), error, "lost shards cannot go on from a checkpoint");
                    told.lock().insert(job, error);
                }
            });
        }
    }
}

async fn set_back(handle: &Handle, id: JobId, shards: &[Lost]) -> Result<(), Failure> {
    let cluster = handle.read().await?;
    let job = cluster.job(id).ok_or(Failure::NoJob(id))?;
    let spec = &job.view.spec;
    let Some((uri, of, checkpoint)) = job.newest_checkpoint() else {
        let problem = format!("job {:?} has no checkpoint: delete it, or restore one", spec.name);
        return Err(Failure::Invalid(problem));
    };
    let catalog = Catalog::new(open(uri, Access::Read).await?);
    let name = CheckpointName::new(checkpoint).map_err(|bad| Failure::Invalid(bad.to_string()))?;
    let chain = catalog.chain(catalog.manifest(of, &name).await?).await?;
    let Some(manifest) = chain.last() else {
        return Err(Failure::Invalid("chain: is empty".into()));
    };
    if manifest.job.shards != spec.shards || manifest.job.seed != spec.seed {
        let problem = format!("{name} is of a job with other shards, or another seed");
        return Err(Failure::Invalid(problem));
    }
    if let Some(missing) = job.initialized_since(&manifest.initialized) {
        let problem = format!(
            "dense variable {missing:?} got its first values after {name} began: restore the job as a whole"
        );
        return Err(Failure::Invalid(problem));
    }
    let again = place(&cluster, shards);
    if again.is_empty() {
        return Err(Failure::Invalid("no live server has room for them".into()));
    }
    warn!(job = %id, shards = again.len(), checkpoint = %name, uri,
        "every copy of these shards is gone: they go on from a checkpoint, and what was pushed since is rolled back");
    let command = SetBackShards {
        job: id.0,
        uri: uri.into(),
        of: of.into(),
        checkpoint: checkpoint.into(),
        epoch_min: epoch_after(manifest).0,
        shards: again.into_iter().map(AgainEntry::from).collect(),
        labels: manifest.labels.clone(),
        initialized: manifest.initialized.iter().map(|variable| variable.0).collect(),
        ledger: manifest.ledger.as_ref().map(Into::into),
    };
    handle.propose(Body::SetBack(command)).await?;
    info!(job = %id, "set back");
    Ok(())
}

#[cfg(test)]
mod tests {
    use downpour_core::id::{Incarnation, NodeId, ServerRef};

    use super::*;

    #[test]
    fn an_unreachable_copy_is_waited_for_until_it_has_stopped_by_itself_and_for_ever_where_it_never_does()
     {
        let seconds = Duration::from_secs;
        let server = ServerRef { node: NodeId(1), incarnation: Incarnation(1) };
        let bound = |isolation_ms| Some(Last { server, judged: 7, isolation_ms });
        let patience = |unreachable| Patience { lease: seconds(10), unreachable };
        let after = patience(Some(seconds(60)));
        let mut cluster = Cluster::default();
        assert_eq!(after.with(None, &cluster), Some(seconds(10)), "known to be gone");
        assert_eq!(after.with(bound(60_000), &cluster), Some(seconds(70)));
        assert_eq!(
            after.with(bound(90_000), &cluster),
            Some(seconds(100)),
            "the option was longer when it registered"
        );
        assert_eq!(
            after.with(bound(1_000), &cluster),
            Some(seconds(70)),
            "the operator wants it waited for"
        );
        assert_eq!(after.with(bound(0), &cluster), None, "the option was off when it registered");
        assert_eq!(patience(None).with(bound(60_000), &cluster), None);
        // Another leader gave longer leases.
        cluster.lease_ms = 15_000;
        assert_eq!(after.with(None, &cluster), Some(seconds(15)));
        assert_eq!(after.with(bound(60_000), &cluster), Some(seconds(75)));
    }
}
