//! Who was heard, and when: volatile, on the leader alone. Time comes in as a parameter.
//!
//! A leader begins with nothing and gives everybody a full timeout from its election, and again after it was itself paused:
//! silence counts only while somebody listened.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use downpour_core::id::{JobId, ServerRef, SessionId, ShardId};
use downpour_proto::v1;

use crate::state::Cluster;

/// How long silence is borne.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Of a server.
    pub failure: Duration,
    /// Of a server that refuses connections.
    pub suspicion: Duration,
    /// Of a session.
    pub session: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Liveness {
    /// Term of the leadership that these were heard in; None: this member does not lead.
    term: Option<u64>,
    /// Since when somebody listened without a pause.
    since: Instant,
    checked: Instant,
    servers: BTreeMap<ServerRef, Instant>,
    /// Those that were really heard: to the others silence is only not counted yet.
    heard: BTreeMap<ServerRef, Instant>,
    sessions: BTreeMap<SessionId, Renewal>,
    reports: BTreeMap<(JobId, ShardId), v1::ShardReport>,
    loads: BTreeMap<ServerRef, v1::NodeLoad>,
}

#[derive(Debug)]
struct Renewal {
    job: JobId,
    at: Instant,
    progress: Option<v1::WorkerProgress>,
}

impl Liveness {
    /// Nobody was heard.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Liveness {
            term: None,
            since: now,
            checked: now,
            servers: BTreeMap::new(),
            heard: BTreeMap::new(),
            sessions: BTreeMap::new(),
            reports: BTreeMap::new(),
            loads: BTreeMap::new(),
        }
    }

    /// Tells in which term this member leads, if it does. A change forgets everything.
    pub fn lead(&mut self, term: Option<u64>, now: Instant) {
        if self.term != term {
            *self = Liveness { term, ..Liveness::new(now) };
        }
    }

    /// A server was heard.
    pub fn hear(&mut self, server: ServerRef, now: Instant) {
        self.servers.insert(server, now);
        self.heard.insert(server, now);
    }

    /// Whether a server was heard after `since`.
    #[must_use]
    pub fn heard_since(&self, server: ServerRef, since: Instant) -> bool {
        self.heard.get(&server).is_some_and(|heard| *heard > since)
    }

    /// A primary said what it holds of a shard. One that has just begun has no rates yet: those of the one before it hold until then.
    pub fn report(&mut self, mut report: v1::ShardReport) {
        let key = (JobId(report.job), ShardId(report.shard));
        if let Some(before) = self.reports.get(&key) {
            if before.epoch > report.epoch {
                return;
            }
            if before.epoch < report.epoch && report.rows_per_s == 0.0 {
                report.rows_per_s = before.rows_per_s;
                report.pull_rows_per_s = before.pull_rows_per_s;
                report.log_bytes_per_s = before.log_bytes_per_s;
            }
        }
        self.reports.insert(key, report);
    }

    /// A server said how it is as a whole.
    pub fn take_load(&mut self, server: ServerRef, load: v1::NodeLoad) {
        self.loads.insert(server, load);
    }

    /// What a server last said of itself.
    #[must_use]
    pub fn load(&self, server: ServerRef) -> Option<v1::NodeLoad> {
        self.loads.get(&server).copied()
    }

    /// A session was renewed.
    pub fn renew(
        &mut self,
        job: JobId,
        session: SessionId,
        progress: Option<v1::WorkerProgress>,
        now: Instant,
    ) {
        // A server that asks whether a session is open says nothing of it.
        let progress = progress.or_else(|| self.progress(session));
        self.sessions.insert(session, Renewal { job, at: now, progress });
    }

    /// What the session last said of itself.
    #[must_use]
    pub fn progress(&self, session: SessionId) -> Option<v1::WorkerProgress> {
        self.sessions.get(&session)?.progress.clone()
    }

    /// What the newest primary that said anything last said of the shard: right after a change it is the one before, and the shard is not without load for that.
    #[must_use]
    pub fn last_report(&self, job: JobId, shard: ShardId) -> Option<v1::ShardReport> {
        self.reports.get(&(job, shard)).copied()
    }

    /// Steps of the furthest worker of the job, as far as the primaries of its shards have said.
    #[must_use]
    pub fn clock(&self, cluster: &Cluster, job: JobId) -> u64 {
        let shards = cluster.job(job).map_or(&[][..], |job| &job.view.shards);
        let reports =
            (0..).map(ShardId).zip(shards).filter_map(|(shard, _)| self.last_report(job, shard));
        reports.map(|report| report.clock).max().unwrap_or(0)
    }

    /// Live servers that are late, whose death may show earlier than in silence: with their addresses.
    #[must_use]
    pub fn suspects(
        &self,
        cluster: &Cluster,
        timeouts: Timeouts,
        now: Instant,
    ) -> Vec<(ServerRef, String)> {
        let late = |server| {
            let heard = self.servers.get(server)?;
            Some(now - (*heard).max(self.since) > timeouts.suspicion)
        };
        let alive = cluster.nodes.values().filter(|node| node.view.alive);
        let late =
            alive.filter(|node| self.term.is_some() && late(&node.view.server) == Some(true));
        late.map(|node| (node.view.server, node.view.address.clone())).collect()
    }

    /// Live servers and open sessions that were silent for too long. Forgets what is not in the cluster any more.
    pub fn overdue(
        &mut self,
        cluster: &Cluster,
        timeouts: Timeouts,
        now: Instant,
    ) -> (Vec<ServerRef>, Vec<(JobId, SessionId)>) {
        // Half a timeout between two checks: this process did not run, and may have heard nobody for that reason.
        if now - self.checked > timeouts.failure / 2 {
            self.since = now;
        }
        self.checked = now;
        if self.term.is_none() {
            return (Vec::new(), Vec::new());
        }
        let newest = |server: &ServerRef| {
            cluster.nodes.get(&server.node).is_some_and(|node| node.view.server == *server)
        };
        self.servers.retain(|server, _| newest(server));
        self.heard.retain(|server, _| newest(server));
        self.loads.retain(|server, _| newest(server));
        let is_open = |job: JobId, session| {
            cluster.job(job).is_some_and(|job| job.sessions.contains_key(&session))
        };
        self.sessions.retain(|session, renewal| is_open(renewal.job, *session));
        self.reports.retain(|(job, _), _| cluster.jobs.contains_key(job));
        let since = self.since;
        let silent = |heard: Instant, timeout| now - heard.max(since) > timeout;
        let alive = cluster.nodes.values().filter(|node| node.view.alive);
        // Whoever is seen for the first time is heard now: it registered a moment ago, or this leader is new.
        let servers = alive
            .map(|node| node.view.server)
            .filter(|server| silent(*self.servers.entry(*server).or_insert(now), timeouts.failure));
        let servers = servers.collect();
        let sessions = cluster
            .jobs
            .iter()
            .flat_map(|(&job, state)| state.sessions.keys().map(move |&session| (job, session)));
        let closed = sessions.filter(|&(job, session)| {
            let fresh = Renewal { job, at: now, progress: None };
            silent(self.sessions.entry(session).or_insert(fresh).at, timeouts.session)
        });
        let closed = closed.collect();
        (servers, closed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use downpour_core::id::{Incarnation, NodeId};
    use downpour_core::view::NodeView;

    use super::*;
    use crate::state::Node;

    const TIMEOUTS: Timeouts = Timeouts {
        failure: Duration::from_millis(100),
        suspicion: Duration::from_millis(50),
        session: Duration::from_millis(1000),
    };
    const SERVER: ServerRef = ServerRef { node: NodeId(1), incarnation: Incarnation(1) };

    fn cluster() -> Cluster {
        let view = NodeView {
            name: "ps-0".into(),
            server: SERVER,
            address: "host:1".into(),
            zone: String::new(),
            alive: true,
            admission: downpour_core::view::Admission::Open,
        };
        let nodes = [(
            NodeId(1),
            Arc::new(Node { view, version: 1, origin: String::new(), isolation_ms: 0 }),
        )]
        .into();
        Cluster { version: 1, nodes, ..Cluster::default() }
    }

    /// Checks every 10 ms; gives the time of the first check that judged.
    fn judged_at(
        liveness: &mut Liveness,
        start: Instant,
        checks_ms: std::ops::Range<u64>,
    ) -> Option<u64> {
        checks_ms.step_by(10).find(|&ms| {
            let now = start + Duration::from_millis(ms);
            !liveness.overdue(&cluster(), TIMEOUTS, now).0.is_empty()
        })
    }

    #[test]
    fn a_silent_server_is_judged_after_the_timeout_and_a_heard_one_is_not() {
        let start = Instant::now();
        let mut liveness = Liveness::new(start);
        liveness.lead(Some(1), start);
        liveness.hear(SERVER, start + Duration::from_millis(50));
        assert_eq!(judged_at(&mut liveness, start, 0..1000), Some(160));
    }

    #[test]
    fn a_late_server_is_suspected_while_the_leader_listens() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut liveness = Liveness::new(start);
        let suspects = |liveness: &Liveness, now| liveness.suspects(&cluster(), TIMEOUTS, now);
        liveness.hear(SERVER, start);
        assert_eq!(suspects(&liveness, at(60)), [], "it does not lead");
        liveness.lead(Some(1), start);
        liveness.hear(SERVER, start);
        assert_eq!(suspects(&liveness, at(50)), []);
        assert_eq!(suspects(&liveness, at(60)), [(SERVER, "host:1".to_owned())]);
        // A pause of the leader is no silence of the server.
        liveness.overdue(&cluster(), TIMEOUTS, at(90));
        assert_eq!(suspects(&liveness, at(100)), []);
    }

    #[test]
    fn only_a_leader_judges() {
        let start = Instant::now();
        assert_eq!(judged_at(&mut Liveness::new(start), start, 0..1000), None);
    }

    #[test]
    fn a_new_leader_gives_everybody_a_full_timeout() {
        let start = Instant::now();
        let mut liveness = Liveness::new(start);
        liveness.lead(Some(1), start);
        assert_eq!(judged_at(&mut liveness, start, 0..90), None);
        liveness.lead(Some(2), start + Duration::from_millis(90));
        assert_eq!(judged_at(&mut liveness, start, 90..1000), Some(200));
    }

    #[test]
    fn a_server_that_registered_a_moment_ago_has_a_full_timeout() {
        let start = Instant::now();
        let mut liveness = Liveness::new(start);
        liveness.lead(Some(1), start);
        for ms in (0..500).step_by(10) {
            liveness.overdue(&Cluster::default(), TIMEOUTS, start + Duration::from_millis(ms));
        }
        assert_eq!(judged_at(&mut liveness, start, 500..1000), Some(610));
    }

    #[test]
    fn a_leader_that_was_paused_gives_everybody_a_full_timeout() {
        let start = Instant::now();
        let mut liveness = Liveness::new(start);
        liveness.lead(Some(1), start);
        assert_eq!(judged_at(&mut liveness, start, 0..50), None);
        assert_eq!(judged_at(&mut liveness, start, 5000..6000), Some(5110));
    }

    #[test]
    fn what_a_former_primary_said_counts_until_the_new_one_says_something() {
        let mut liveness = Liveness::new(Instant::now());
        let report = |epoch, rows, rows_per_s| v1::ShardReport {
            job: 1,
            shard: 2,
            epoch,
            rows,
            rows_per_s,
            ..Default::default()
        };
        let shown = |liveness: &Liveness| {
            let report = liveness.last_report(JobId(1), ShardId(2));
            report.map(|report| (report.epoch, report.rows, report.rows_per_s))
        };
        assert_eq!(shown(&liveness), None);
        liveness.report(report(1, 3, 10.0));
        assert_eq!(shown(&liveness), Some((1, 3, 10.0)));
        // Its first report has no rate yet.
        liveness.report(report(2, 4, 0.0));
        assert_eq!(shown(&liveness), Some((2, 4, 10.0)));
        liveness.report(report(2, 5, 20.0));
        liveness.report(report(1, 9, 90.0));
        assert_eq!(shown(&liveness), Some((2, 5, 20.0)), "a late word of the former one");
        liveness.report(report(2, 5, 0.0));
        assert_eq!(shown(&liveness), Some((2, 5, 0.0)), "nobody pushes any more");
    }
}
