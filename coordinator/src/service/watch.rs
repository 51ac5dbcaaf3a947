//! What a watcher is told: the whole, then what changed since it was last told. Between two events anything may have happened; the watcher
//! sees the newest, and a slow one costs no memory because nothing is queued for it.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

use downpour_core::id::JobId;
use downpour_proto::v1;
use futures::Stream;
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::raft::peers::Group;
use crate::state::{Cluster, Job};

/// A stream of events.
pub type Events = Pin<Box<dyn Stream<Item = Result<v1::WatchEvent, Status>> + Send>>;

/// Events of one job and all nodes, or of everything. Ends when `stop` is cancelled or the member is gone.
#[must_use]
pub fn events(
    mut clusters: Receiver<Arc<Cluster>>,
    job: Option<JobId>,
    group: Group,
    stop: CancellationToken,
) -> Events {
    clusters.mark_changed();
    let watcher = (clusters, Told { job, group, version: None, jobs: BTreeSet::new() }, stop);
    Box::pin(futures::stream::unfold(watcher, async |(mut clusters, mut told, stop)| {
        loop {
            tokio::select! {
                changed = clusters.changed() => changed.ok()?,
                () = stop.cancelled() => return None,
            }
            let cluster = clusters.borrow_and_update().clone();
            if let Some(event) = told.tell(&cluster) {
                return Some((Ok(event), (clusters, told, stop)));
            }
        }
    }))
}

/// What a watcher was told.
struct Told {
    /// The only job that it wants.
    job: Option<JobId>,
    group: Group,
    /// None: nothing.
    version: Option<u64>,
    jobs: BTreeSet<JobId>,
}

impl Told {
    /// What the watcher lacks; None if nothing that it watches changed.
    fn tell(&mut self, cluster: &Cluster) -> Option<v1::WatchEvent> {
        let whole = self.version.is_none();
        let since = self.version.unwrap_or(0);
        let wanted = |id: &JobId| self.job.is_none_or(|job| job == *id);
        let jobs = cluster.jobs.iter().filter(|(id, _)| wanted(id));
        let (ids, jobs): (BTreeSet<JobId>, Vec<&Arc<Job>>) = jobs.unzip();
        let changed = jobs.into_iter().filter(|job| whole || job.view.version > since);
        let nodes = cluster.nodes.values().filter(|node| whole || node.version > since);
        let moved = cluster.members.version > since;
        let coordinators = match whole || moved {
            true => self.group.now(cluster).list.into_values().map(|one| one.address).collect(),
            false => Vec::new(),
        };
        let event = v1::WatchEvent {
            version: cluster.version,
            whole,
            jobs: changed.map(|job| (&job.view).into()).collect(),
            deleted_jobs: self.jobs.difference(&ids).map(|job| job.0).collect(),
            nodes: nodes.map(|node| (&node.view).into()).collect(),
            coordinators,
            coordinators_version: cluster.members.version,
        };
        self.version = Some(cluster.version);
        self.jobs = ids;
        let news = whole
            || moved
            || !(event.jobs.is_empty() && event.deleted_jobs.is_empty() && event.nodes.is_empty());
        news.then_some(event)
    }
}
