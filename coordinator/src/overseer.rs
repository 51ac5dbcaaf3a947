//! Turns silence into commands, on the leader, has shards that lack members get them, and carries on with moves.
//!
//! A server that is late with its heartbeat and at whose address nobody listens is dead already: its system refuses connections to it. That is
//! asked twice, and does not wait for the failure timeout. A wrong judgement would cost a failover and nothing more: epochs fence.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use downpour_core::id::ServerRef;
use downpour_core::rebalance;
use downpour_proto::net::TcpStream;
use downpour_proto::v1;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::balance;
use crate::beside::Beside;
use crate::command::{Body, JoinEntry, JoinList, ServerList, SessionList};
use crate::liveness::{Liveness, Timeouts};
use crate::metrics::ClusterMetrics;
use crate::placer::Placer;
use crate::raft::Handle;
use crate::room::Room;
use crate::state::Cluster;
use crate::state::joins::{self, Limits};
use crate::state::moves::{self, Placement};

/// Checks this often within the shorter timeout.
const CHECKS_PER_TIMEOUT: u32 = 15;
const CHECK_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// For a connection to a suspect: a machine that says nothing must not hold up the checks.
const PROBE_TIMEOUT: Duration = Duration::from_millis(50);
/// Between the two connections to a suspect.
const PROBE_PAUSE: Duration = Duration::from_millis(20);
/// Most suspects that are asked at once.
const PROBES_MAX: usize = 256;
/// Most of a kind in one command; the rest follows at the next check.
const LIST_MAX: usize = 10_000;

/// Between two looks at load. Servers report every two seconds, and what they report lags.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Looks in a row at which there must be something to do before it is done.
const LOOKS: u32 = 3;

/// How shards move.
#[derive(Clone, Copy, Debug)]
pub struct Moves {
    /// What goes on at once.
    pub limits: Limits,
    /// What is done where load is uneven, if anything is.
    pub rebalancing: Option<rebalance::Options>,
}

/// When load was looked at, by this leader.
struct Looks {
    term: Option<u64>,
    last: Instant,
    /// At so many in a row there was something to do.
    uneven: u32,
}

impl Looks {
    /// What is to be done about uneven load now. Nothing while anything else goes on, nor until it has been so for a while.
    fn due(
        &mut self,
        (term, now): (Option<u64>, Instant),
        cluster: &Cluster,
        liveness: &Mutex<Liveness>,
        options: rebalance::Options,
    ) -> Vec<Placement> {
        if self.term != term {
            *self = Looks { term, last: now, uneven: 0 };
        }
        if now - self.last < LOOK_INTERVAL {
            return Vec::new();
        }
        self.last = now;
        let busy =
            cluster.routes().any(|(.., route)| route.moving.is_some() || route.joining.is_some());
        let planned = if busy {
            balance::Planned::default()
        } else {
            balance::plan(cluster, &liveness.lock(), None, options)
        };
        self.uneven = if planned.placements.is_empty() { 0 } else { self.uneven + 1 };
        if self.uneven < LOOKS {
            return Vec::new();
        }
        self.uneven = 0;
        planned.placements
    }
}

/// Judges until told to stop.
pub async fn run(
    (handle, placer): (Handle, Placer),
    liveness: Arc<Mutex<Liveness>>,
    timeouts: Timeouts,
    moving: Moves,
    metrics: ClusterMetrics,
    stop: CancellationToken,
) {
    let shorter = timeouts.failure.min(timeouts.session);
    let mut checks = tokio::time::interval((shorter / CHECKS_PER_TIMEOUT).max(CHECK_INTERVAL_MIN));
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut observed, mut planned) = (None, None);
    let mut tried = BTreeMap::new();
    let mut looks = Looks { term: None, last: Instant::now(), uneven: 0 };
    // It takes turns with operators, and judging must not wait for that.
    let mut placing = Beside::new();
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
            judge(&handle, dead, &metrics).await;
        }
        let gone = refusing(&handle, &liveness, timeouts).await;
        if !gone.is_empty() {
            warn!(servers = ?gone, "judging servers dead: late, and connections are refused");
            judge(&handle, gone, &metrics).await;
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
        let busy = placing.is_busy(&());
        if let (Some(options), Some(_), false) = (moving.rebalancing, leads, busy) {
            let placements = looks.due((leads, now), &cluster, &liveness, options);
            place(&mut placing, &placer, placements);
        }
        if leads.is_none()
            || planned.replace((leads, cluster.version)) == Some((leads, cluster.version))
        {
            continue;
        }
        let mut placements = moves::promotions(&cluster);
        let mut room = Room::new(&cluster, &liveness.lock());
        placements.extend(moves::evacuations(&cluster, &tried, &mut room));
        // What waits for room is looked at again: reports change without a commit.
        if !placements.is_empty() || room.refused() {
            planned = None;
        }
        if !placements.is_empty() {
            place(&mut placing, &placer, placements);
        }
        let cluster = handle.cluster();
        let mut room = Room::new(&cluster, &liveness.lock());
        let joins = joins::plan(&cluster, &tried, moving.limits, &mut room);
        if !joins.is_empty() || room.refused() {
            // Whether they were committed shows in the state.
            planned = None;
        }
        if !joins.is_empty() {
            info!(?joins, "shards lack members");
            metrics.joins.inc_by(joins.len() as u64);
            tried.retain(|(job, _), _| cluster.jobs.contains_key(job));
            tried.extend(joins.iter().map(|join| ((join.job, join.shard), join.server)));
            let joins = joins.into_iter().map(JoinEntry::from).collect();
            propose(&handle, Body::PlanJoins(JoinList { joins })).await;
        }
    }
}

/// Unless some are being placed: what is due is found again.
fn place(placing: &mut Beside<()>, placer: &Placer, placements: Vec<Placement>) {
    if placements.is_empty() || placing.is_busy(&()) {
        return;
    }
    info!(?placements, "shards are to be placed");
    let placements = placements.into_iter().map(v1::ShardPlacement::from).collect();
    let placer = placer.clone();
    placing.begin((), async move {
        if let Err(error) = placer.place(placements).await {
            debug!(%error, "shards are not placed yet");
        }
    });
}

async fn judge(handle: &Handle, dead: Vec<ServerRef>, metrics: &ClusterMetrics) {
    metrics.judged.inc_by(dead.len() as u64);
    let servers = dead.into_iter().take(LIST_MAX).map(v1::ServerRef::from).collect();
    propose(handle, Body::JudgeDead(ServerList { servers })).await;
}

/// Servers that are late, refuse two connections, and are still not heard.
async fn refusing(
    handle: &Handle,
    liveness: &Mutex<Liveness>,
    timeouts: Timeouts,
) -> Vec<ServerRef> {
    let suspects = || liveness.lock().suspects(&handle.cluster(), timeouts, Instant::now());
    let mut asked = JoinSet::new();
    for (server, address) in suspects().into_iter().take(PROBES_MAX) {
        asked.spawn(async move {
            let refused = refuses(&address).await && {
                tokio::time::sleep(PROBE_PAUSE).await;
                refuses(&address).await
            };
            refused.then_some(server)
        });
    }
    let mut refusing: Vec<ServerRef> = asked.join_all().await.into_iter().flatten().collect();
    if !refusing.is_empty() {
        let still = suspects();
        refusing.retain(|one| still.iter().any(|(server, _)| server == one));
    }
    refusing
}

async fn refuses(address: &str) -> bool {
    let connected = tokio::time::timeout(PROBE_TIMEOUT, TcpStream::connect(address)).await;
    matches!(connected, Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused)
}

/// Whether it was committed shows in the state: what is still overdue is proposed again.
async fn propose(handle: &Handle, body: Body) {
    if let Err(error) = handle.propose(body).await {
        debug!(%error, "a judgement was not committed");
    }
}

#[cfg(test)]
mod tests {
    use downpour_core::spec::JobSpec;

    use super::*;
    use crate::command::{Command, Registration};
    use crate::state::State;
    use crate::state::moves::Placing;

    const SHARDS: u32 = 8;
    const NEVER: [u64; 0] = [];
    const OPTIONS: rebalance::Options = balance::BY_ITSELF;

    /// Three servers and a job whose every shard has one copy, most of them on few servers once [`World::report`] has said so.
    struct World {
        state: State,
        index: u64,
        liveness: Mutex<Liveness>,
        start: Instant,
        looks: Looks,
    }

    impl World {
        fn new() -> Self {
            let start = Instant::now();
            let looks = Looks { term: None, last: start, uneven: 0 };
            let liveness = Mutex::new(Liveness::new(start));
            let mut world = Self { state: State::default(), index: 0, liveness, start, looks };
            for number in 0..3 {
                let name = format!("ps-{number}");
                let (address, zone) = ("host:1".into(), String::new());
                let registration = Registration {
                    request_id: name.clone(),
                    name,
                    address,
                    zone,
                    origin: String::new(),
                    exclusive_name: false,
                    isolation_ms: 0,
                    lease_ms: 0,
                };
                world.apply(Command::RegisterServer(registration));
            }
            let (replicas, min_in_sync) = (1, 1);
            let name = "ctr".into();
            world.apply(Command::CreateJob(JobSpec {
                name,
                shards: SHARDS,
                replicas,
                min_in_sync,
                seed: 1,
            }));
            world
        }

        fn apply(&mut self, command: Command) {
            self.index += 1;
            self.state.apply(self.index, command).expect("allowed");
        }

        /// Shards of node 1 have `hot` rows a second each, all others one hundred.
        fn report(&mut self, hot: f64) {
            let primaries: Vec<_> =
                self.state.cluster().routes().map(|(.., route)| route.primary).collect();
            for (shard, primary) in (0..).zip(primaries) {
                let primary = primary.expect("it lives");
                let rows_per_s = if primary.node.0 == 1 { hot } else { 100.0 };
                let report = v1::ShardReport { job: 1, shard, rows_per_s, ..Default::default() };
                self.liveness.lock().report(report);
            }
        }

        /// What is due `seconds` after the start.
        fn due(&mut self, term: u64, seconds: u64) -> Vec<Placement> {
            let now = self.start + Duration::from_secs(seconds);
            self.looks.due((Some(term), now), self.state.cluster(), &self.liveness, OPTIONS)
        }

        /// At which of the checks, one a second, something is due.
        fn due_at(&mut self, term: u64, seconds: std::ops::Range<u64>) -> Vec<u64> {
            seconds.filter(|&second| !self.due(term, second).is_empty()).collect()
        }
    }

    #[test]
    fn load_that_stays_uneven_is_spread_after_three_looks_and_not_again_before_three_more() {
        let mut world = World::new();
        world.report(1000.0);
        assert_eq!(world.due_at(1, 0..61), [30, 60]);
    }

    #[test]
    fn even_load_is_left_alone_and_a_peak_between_is_forgotten() {
        let mut world = World::new();
        world.report(100.0);
        assert_eq!(world.due_at(1, 0..61), NEVER);
        world.report(1000.0);
        assert_eq!(world.due_at(1, 61..81), NEVER, "two looks");
        world.report(100.0);
        assert_eq!(world.due_at(1, 81..91), NEVER);
        world.report(1000.0);
        assert_eq!(world.due_at(1, 91..121), [120]);
    }

    #[test]
    fn a_new_leader_looks_for_as_long_as_the_last_one() {
        let mut world = World::new();
        world.report(1000.0);
        assert_eq!(world.due_at(1, 0..30), NEVER);
        assert_eq!(world.due_at(2, 30..61), [60]);
    }

    #[test]
    fn nothing_is_due_while_a_copy_moves_and_the_looks_begin_anew_after_it() {
        let mut world = World::new();
        world.report(1000.0);
        let due: Vec<_> = (0..=30).flat_map(|second| world.due(1, second)).collect();
        let moves = due.iter().filter(|one| matches!(one.placing, Placing::Move(_)));
        assert!(moves.count() > 0, "{due:?}");
        world.apply(Command::Place(due.clone()));
        assert_eq!(world.due_at(1, 31..91), NEVER, "they are not done");
        // Called off: the load is as uneven as before.
        for one in due {
            let route =
                world.state.cluster().job(one.job).and_then(|job| job.view.route(one.shard));
            let route = route.expect("known");
            let (epoch, set_version) = (route.epoch, route.set_version);
            world.apply(Command::Place(vec![Placement {
                epoch,
                set_version,
                placing: Placing::Cancel,
                ..one
            }]));
        }
        assert_eq!(world.due_at(1, 91..121), [120]);
    }

    #[test]
    fn where_only_primaries_may_go_no_copy_moves() {
        let mut world = World::new();
        world.report(1000.0);
        let only = rebalance::Options { promotions_only: true, ..OPTIONS };
        for second in 0..61 {
            let now = world.start + Duration::from_secs(second);
            let due = world.looks.due((Some(1), now), world.state.cluster(), &world.liveness, only);
            // A shard of one copy has nowhere to go.
            assert_eq!(due, []);
        }
    }
}
