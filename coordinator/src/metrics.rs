//! What `/metrics` shows of a coordinator.

use downpour_node::metrics::{Histogram, IntCounter, IntGauge, Metrics, Registry};

use crate::raft::Status;

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
