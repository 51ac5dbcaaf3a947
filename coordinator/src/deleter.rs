//! On the leader: checkpoints that are condemned are deleted, in each place beside the others (docs/protocol.md 8.6).
//!
//! What is condemned stays so until it is gone, so any leader may delete it, at any time, and more than one.

use std::collections::BTreeMap;
use std::time::Duration;

use downpour_checkpoint::Error as StoreError;
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::Access;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::beside::Beside;
use crate::command::Body;
use crate::command::deleting::{CHECKPOINTS_MAX, CheckpointList};
use crate::raft::Handle;
use crate::scribe::open;
use crate::state::Cluster;

const ROUND: Duration = Duration::from_millis(200);
/// A place that failed is left alone for so long.
const FAILED_PAUSE: Duration = Duration::from_secs(10);

/// What is to be deleted of one job in one place, the newest first: an increment before what it builds on.
type Condemned = BTreeMap<(String, String), Vec<CheckpointName>>;

/// Works while this member leads, until told to stop.
pub async fn run(handle: Handle, stop: CancellationToken) {
    let mut places = Beside::new();
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
        for ((uri, of), names) in condemned(&handle.cluster()) {
            let handle = handle.clone();
            places.begin((uri.clone(), of.clone()), async move {
                match delete(&uri, &of, &names).await {
                    Ok(()) => {
                        let gone = CheckpointList::of(&uri, &of, &names);
                        // Where this is not committed, it is found to be deleted once more.
                        _ = handle.propose(Body::Forget(gone)).await;
                    }
                    Err(error) => {
                        warn!(job = of, uri, %error, "what is left of checkpoints is not deleted");
                        tokio::time::sleep(FAILED_PAUSE).await;
                    }
                }
            });
        }
    }
}

fn condemned(cluster: &Cluster) -> Condemned {
    let mut condemned = Condemned::new();
    for one in cluster.deletions.condemned.iter().rev() {
        let names = condemned.entry((one.uri.clone(), one.job.clone())).or_default();
        if let Ok(name) = CheckpointName::new(one.checkpoint.as_str())
            && names.len() < CHECKPOINTS_MAX
        {
            names.push(name);
        }
    }
    condemned
}

async fn delete(uri: &str, of: &str, names: &[CheckpointName]) -> Result<(), StoreError> {
    let catalog = Catalog::new(open(uri, Access::Write).await?);
    let needed = catalog.delete_all(of, names).await?;
    for name in names {
        match needed.iter().find(|(one, _)| one == name) {
            None => info!(job = of, checkpoint = %name, "checkpoint deleted"),
            Some((_, by)) => {
                warn!(job = of, checkpoint = %name, %by, "checkpoint stays: another one builds on it");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Job;
    use crate::state::tests::Machine;
    use crate::state::tests::checkpoints::{begun, ended, saved};
    use downpour_core::id::JobId;

    #[tokio::test]
    async fn checkpoints_that_were_given_up_are_not_listed_even_if_their_manifests_are_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let uri = format!("file://{}", folder.path().display());
        let catalog = Catalog::new(open(&uri, Access::Write).await.expect("a place"));
        let listed = async || catalog.list("ctr").await.expect("readable").len();
        let (mut machine, _) = Machine::with_job(1, 1);
        let mut manifests = Vec::new();
        for name in ["a", "b"] {
            for command in [begun(&uri, name), saved(name, 1, 9)] {
                machine.apply(command).expect("allowed");
            }
            let manifest = machine.state.cluster().job(JobId(1)).and_then(Job::manifest);
            manifests.push(manifest.expect("all is stored"));
            machine.apply(ended(name, "given up")).expect("allowed");
        }
        catalog.create_manifest(&manifests[0]).await.expect("a leader writes it");
        assert_eq!(listed().await, 1);
        let condemned = condemned(machine.state.cluster());
        let names: Vec<&str> = condemned.values().flatten().map(CheckpointName::as_str).collect();
        assert_eq!(names, ["b", "a"], "the newest first");
        for ((uri, of), names) in &condemned {
            delete(uri, of, names).await.expect("deleted");
        }
        assert_eq!(listed().await, 0);
        // Leaders that had slept.
        for manifest in &manifests {
            let late = catalog.create_manifest(manifest).await;
            assert!(matches!(late, Err(StoreError::Missing(_))), "{late:?}");
        }
        assert_eq!(listed().await, 0);
    }
}
