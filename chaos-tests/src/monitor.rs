//! What the committed state says while faults happen: epochs, in-sync sets, leaders.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use downpour_client::Coordinators;
use downpour_core::id::Epoch;
use downpour_core::view::JobView;
use downpour_proto::v1;
use tokio::task::JoinHandle;

const INTERVAL: Duration = Duration::from_millis(50);

/// Counts, over all states that were seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Terms of coordinators that had a leader, with who it was.
    leaders: BTreeMap<u64, u64>,
    epochs: Vec<Epoch>,
    /// Shards that came under another primary.
    pub promotions: u64,
    /// Shards that were seen in a lower epoch than before.
    pub epochs_regressed: u64,
    /// Shards whose in-sync set is smaller than the job wants, as last seen.
    pub short: usize,
    /// Shards without any copy, as last seen.
    pub lost: usize,
    /// Shards of which a copy moves, as last seen.
    pub moving: usize,
    /// A checkpoint is being taken, as last seen.
    pub checkpointing: bool,
    /// Servers that are known to live, as last seen.
    pub alive: usize,
    /// When the last state that was seen was asked for.
    pub asked: Option<Instant>,
}

impl Seen {
    fn cluster(&mut self, cluster: &v1::GetClusterReply, job: &str, asked: Instant) {
        for member in cluster.members.iter().filter(|member| member.leader) {
            self.leaders.insert(member.term, member.id);
        }
        self.alive = cluster.nodes.iter().filter(|node| node.alive).count();
        let views = cluster.jobs.iter().filter_map(|job| job.view.clone());
        let mut views = views.filter_map(|view| JobView::try_from(view).ok());
        if let Some(view) = views.find(|view| view.spec.name == job) {
            self.job(&view);
            self.asked = Some(asked);
        }
    }

    fn job(&mut self, view: &JobView) {
        self.epochs.resize(view.shards.len(), Epoch(1));
        for (known, route) in self.epochs.iter_mut().zip(&view.shards) {
            self.promotions += route.epoch.0.saturating_sub(known.0);
            self.epochs_regressed += u64::from(route.epoch < *known);
            *known = route.epoch.max(*known);
        }
        self.checkpointing = view.orders.checkpoint.is_some();
        let wanted = view.spec.replicas as usize;
        self.short = view.shards.iter().filter(|route| route.in_sync.len() < wanted).count();
        self.moving = view.shards.iter().filter(|route| route.moving.is_some()).count();
        self.lost = view.shards.iter().filter(|route| route.lost()).count();
    }

    /// Leaders of coordinators after the first: a later term is another leadership, even of the same member.
    #[must_use]
    pub fn leader_changes(&self) -> u64 {
        self.leaders.len().saturating_sub(1) as u64
    }
}

/// Asks again and again, until it is dropped.
#[derive(Debug)]
pub struct Monitor {
    seen: Arc<Mutex<Seen>>,
    asking: JoinHandle<()>,
}

impl Monitor {
    /// Watches the job of this name. Called on a runtime.
    #[must_use]
    pub fn start(coordinators: &Coordinators, job: &str) -> Self {
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let coordinators = coordinators.clone().with_deadline(Duration::from_secs(2));
        let (job, shared) = (job.to_owned(), seen.clone());
        let asking = tokio::spawn(async move {
            loop {
                // Without a leader there is no answer, and nothing to see.
                let asked = Instant::now();
                if let Ok(cluster) = coordinators.cluster().await {
                    lock(&shared).cluster(&cluster, &job, asked);
                }
                tokio::time::sleep(INTERVAL).await;
            }
        });
        Monitor { seen, asking }
    }

    /// So far.
    #[must_use]
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.asking.abort();
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use downpour_core::cells::ClosedSessions;
    use downpour_core::id::JobId;
    use downpour_core::routing::ShardRoute;

    use super::*;

    fn view(epochs: [u64; 2]) -> JobView {
        let route = |epoch| ShardRoute {
            epoch: Epoch(epoch),
            set_version: 1,
            primary: None,
            in_sync: Vec::new(),
            joining: None,
            moving: None,
        };
        JobView {
            job: JobId(1),
            spec: downpour_psctl::probe::job("watched", 2, 2),
            version: 1,
            variables: Vec::new(),
            shards: epochs.map(route).into(),
            sessions: ClosedSessions::default(),
            orders: downpour_core::checkpoint::Orders::default(),
            consistency: downpour_core::consistency::Consistency::default(),
        }
    }

    #[test]
    fn promotions_add_up_and_an_epoch_that_falls_is_counted() {
        let mut seen = Seen::default();
        seen.job(&view([1, 1]));
        seen.job(&view([3, 2]));
        assert_eq!((seen.promotions, seen.epochs_regressed), (3, 0));
        seen.job(&view([3, 1]));
        seen.job(&view([3, 2]));
        assert_eq!((seen.promotions, seen.epochs_regressed), (3, 1));
        assert_eq!((seen.short, seen.lost), (2, 2));
    }
}
