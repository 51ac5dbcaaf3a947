//! Turns silence into commands, on the leader, and has shards that lack members get them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use downpour_proto::v1;
use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::command::{Body, JoinEntry, JoinList, ServerList, SessionList};
use crate::liveness::{Liveness, Timeouts};
use crate::metrics::ClusterMetrics;
use crate::raft::Handle;
use crate::state::joins;

/// Checks this often within the shorter timeout.
const CHECKS_PER_TIMEOUT: u32 = 15;
const CHECK_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Most of a kind in one command; the rest follows at the next check.
const LIST_MAX: usize = 10_000;

/// Judges until told to stop.
pub async fn run(
    handle: Handle,
    liveness: Arc<Mutex<Liveness>>,
    timeouts: Timeouts,
    metrics: ClusterMetrics,
    stop: CancellationToken,
) {
    let shorter = timeouts.failure.min(timeouts.session);
    let mut checks = tokio::time::interval((shorter / CHECKS_PER_TIMEOUT).max(CHECK_INTERVAL_MIN));
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut observed, mut planned) = (None, None);
    let mut tried = BTreeMap::new();
    loop {
        tokio::select! {
            _ = checks.tick() => {}
            () = stop.cancelled() => return,
        }
        let (status, cluster) = (handle.status(), handle.cluster());
        if observed.replace(cluster.version) != Some(cluster.version) {
            metrics.observe(&cluster);
        }
        let now = Instant::now();
        let (dead, ended) = {
            let mut liveness = liveness.lock();
            liveness.lead(status.leads().then_some(status.term), now);
            liveness.overdue(&cluster, timeouts, now)
        };
        if !dead.is_empty() {
            warn!(servers = ?dead, "judging servers dead: not heard in time");
            metrics.judged.inc_by(dead.len() as u64);
            let servers = dead.into_iter().take(LIST_MAX).map(v1::ServerRef::from).collect();
            propose(&handle, Body::JudgeDead(ServerList { servers })).await;
        }
        if !ended.is_empty() {
            warn!(sessions = ?ended, "closing sessions: not renewed in time");
            metrics.expired.inc_by(ended.len() as u64);
            let sessions = ended
                .into_iter()
                .take(LIST_MAX)
                .map(|(job, session)| v1::CloseSessionRequest { job: job.0, session: session.0 });
            propose(&handle, Body::CloseSessions(SessionList { sessions: sessions.collect() }))
                .await;
        }
        let leads = status.leads().then_some(status.term);
        if leads.is_none()
            || planned.replace((leads, cluster.version)) == Some((leads, cluster.version))
        {
            continue;
        }
        let joins = joins::plan(&cluster, &tried);
        if !joins.is_empty() {
            // Whether they were committed shows in the state.
            planned = None;
            info!(?joins, "shards lack members");
            metrics.joins.inc_by(joins.len() as u64);
            tried.retain(|(job, _), _| cluster.jobs.contains_key(job));
            tried.extend(joins.iter().map(|join| ((join.job, join.shard), join.server)));
            let joins = joins.into_iter().map(JoinEntry::from).collect();
            propose(&handle, Body::PlanJoins(JoinList { joins })).await;
        }
    }
}

/// Whether it was committed shows in the state: what is still overdue is proposed again.
async fn propose(handle: &Handle, body: Body) {
    if let Err(error) = handle.propose(body).await {
        debug!(%error, "a judgement was not committed");
    }
}
