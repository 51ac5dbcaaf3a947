//! What `/metrics` shows of a coordinator.

use downpour_node::metrics::{Histogram, IntCounter, IntGauge, Metrics, Registry};

use crate::raft::Status;
use crate::state::Cluster;

/// Of the driver.
#[derive(Clone, Debug)]
pub struct RaftMetrics {
    term: IntGauge,
    leads: IntGauge,
    commit: IntGauge,
    applied: IntGauge,
    /// Changes that this member appended as leader.
    pub proposals: IntCounter,
    /// Snapshots that this member took.
    pub snapshots: IntCounter,
    /// Writing a change of the log until it is durable.
    pub persist_seconds: Histogram,
}

impl RaftMetrics {
    /// Registers them.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        let metrics = Metrics::new(registry);
        RaftMetrics {
            term: metrics.gauge("downpour_coordinator_raft_term", "Term of Raft"),
            leads: metrics.gauge("downpour_coordinator_raft_leads", "1 on the leader, else 0"),
            commit: metrics.gauge("downpour_coordinator_raft_commit", "Index that is committed"),
            applied: metrics.gauge("downpour_coordinator_raft_applied", "Index that is applied"),
            proposals: metrics.counter(
                "downpour_coordinator_raft_proposals_total",
                "Changes that this member appended as leader",
            ),
            snapshots: metrics.counter(
                "downpour_coordinator_raft_snapshots_total",
                "Snapshots that this member took",
            ),
            persist_seconds: metrics.latency(
                "downpour_coordinator_raft_persist_seconds",
                "Writing a change of the log until it survives a power cut",
            ),
        }
    }

    /// Takes over how the member stands.
    pub fn observe(&self, status: &Status) {
        self.term.set(status.term as i64);
        self.leads.set(status.leads().into());
        self.commit.set(status.commit as i64);
        self.applied.set(status.applied as i64);
    }
}

/// Of the state, as this member has it.
#[derive(Clone, Debug)]
pub struct ClusterMetrics {
    servers: IntGauge,
    servers_dead: IntGauge,
    jobs: IntGauge,
    sessions: IntGauge,
    shards: IntGauge,
    shards_lost: IntGauge,
    shards_short: IntGauge,
    /// Servers that this member judged dead as leader.
    pub judged: IntCounter,
    /// Members that this member wished for as leader, for shards that lack one.
    pub joins: IntCounter,
    /// Sessions that this member closed as leader because they were not renewed.
    pub expired: IntCounter,
}

impl ClusterMetrics {
    /// Registers them.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        let metrics = Metrics::new(registry);
        let gauge = |name, help| metrics.gauge(&format!("downpour_coordinator_{name}"), help);
        let counter = |name, help| metrics.counter(&format!("downpour_coordinator_{name}"), help);
        ClusterMetrics {
            servers: gauge("servers", "Servers by name"),
            servers_dead: gauge("servers_dead", "Servers whose newest life was judged dead"),
            jobs: gauge("jobs", "Jobs"),
            sessions: gauge("sessions", "Open sessions of all jobs"),
            shards: gauge("shards", "Shards of all jobs"),
            shards_lost: gauge("shards_lost", "Shards of which every replica is gone"),
            shards_short: gauge(
                "shards_short",
                "Shards with fewer replicas in sync than their job wants",
            ),
            judged: counter("servers_judged_total", "Servers that this member judged dead"),
            joins: counter(
                "joins_planned_total",
                "Members that this member wished for, for shards that lack one",
            ),
            expired: counter(
                "sessions_expired_total",
                "Sessions closed because they were not renewed",
            ),
        }
    }

    /// Takes over the state.
    pub fn observe(&self, cluster: &Cluster) {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.servers.set(count(cluster.nodes.len()));
        self.servers_dead
            .set(count(cluster.nodes.values().filter(|node| !node.view.alive).count()));
        self.jobs.set(count(cluster.jobs.len()));
        self.sessions.set(count(cluster.jobs.values().map(|job| job.sessions.len()).sum()));
        let (mut shards, mut lost, mut short) = (0, 0, 0);
        for view in cluster.jobs.values().map(|job| &job.view) {
            let wanted = view.spec.replicas as usize;
            shards += view.shards.len();
            lost += view.shards.iter().filter(|route| route.lost()).count();
            short += view.shards.iter().filter(|route| route.in_sync.len() < wanted).count();
        }
        self.shards.set(count(shards));
        self.shards_lost.set(count(lost));
        self.shards_short.set(count(short));
    }
}
