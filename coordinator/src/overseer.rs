//! Turns silence into commands, on the leader.

use std::sync::Arc;
use std::time::{Duration, Instant};

use downpour_proto::v1;
use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::command::{Body, ServerList, SessionList};
use crate::liveness::{Liveness, Timeouts};
use crate::raft::Handle;

/// Checks this often within the shorter timeout.
const CHECKS_PER_TIMEOUT: u32 = 15;
const CHECK_INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Judges until told to stop.
pub async fn run(
    handle: Handle,
    liveness: Arc<Mutex<Liveness>>,
    timeouts: Timeouts,
    stop: CancellationToken,
) {
    let shorter = timeouts.failure.min(timeouts.session);
    let mut checks = tokio::time::interval((shorter / CHECKS_PER_TIMEOUT).max(CHECK_INTERVAL_MIN));
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut status = handle.watch_status();
    loop {
        tokio::select! {
            _ = checks.tick() => {}
            Ok(()) = status.changed() => {}
            () = stop.cancelled() => return,
        }
        let status = status.borrow_and_update().clone();
        let now = Instant::now();
        let (dead, ended) = {
            let mut liveness = liveness.lock();
            liveness.lead(status.leads().then_some(status.term), now);
            liveness.overdue(&handle.cluster(), timeouts, now)
        };
        if !dead.is_empty() {
            warn!(servers = ?dead, "judging servers dead: not heard in time");
            let servers = dead.into_iter().map(v1::ServerRef::from).collect();
            propose(&handle, Body::JudgeDead(ServerList { servers })).await;
        }
        if !ended.is_empty() {
            warn!(sessions = ?ended, "closing sessions: not renewed in time");
            let sessions = ended
                .into_iter()
                .map(|(job, session)| v1::CloseSessionRequest { job: job.0, session: session.0 });
            propose(&handle, Body::CloseSessions(SessionList { sessions: sessions.collect() }))
                .await;
        }
    }
}

/// Whether it was committed shows in the state: what is still overdue is proposed again.
async fn propose(handle: &Handle, body: Body) {
    if let Err(error) = handle.propose(body).await {
        debug!(%error, "a judgement was not committed");
    }
}
