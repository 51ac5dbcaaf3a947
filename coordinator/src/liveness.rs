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
    sessions: BTreeMap<SessionId, Renewal>,
    reports: BTreeMap<(JobId, ShardId), (ServerRef, v1::ShardReport)>,
}

#[derive(Debug)]
struct Renewal {
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
            sessions: BTreeMap::new(),
            reports: BTreeMap::new(),
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
    }

    /// A server said what it holds of a shard.
    pub fn report(&mut self, server: ServerRef, report: v1::ShardReport) {
        self.reports.insert((JobId(report.job), ShardId(report.shard)), (server, report));
    }

    /// A session was renewed.
    pub fn renew(
        &mut self,
        session: SessionId,
        progress: Option<v1::WorkerProgress>,
        now: Instant,
    ) {
        self.sessions.insert(session, Renewal { at: now, progress });
    }

    /// What the session last said of itself.
    #[must_use]
    pub fn progress(&self, session: SessionId) -> Option<v1::WorkerProgress> {
        self.sessions.get(&session)?.progress
    }

    /// What `primary` last said of the shard.
    #[must_use]
    pub fn last_report(
        &self,
        job: JobId,
        shard: ShardId,
        primary: ServerRef,
    ) -> Option<v1::ShardReport> {
        let (server, report) = self.reports.get(&(job, shard))?;
        (*server == primary).then_some(*report)
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
        self.servers.retain(|server, _| {
            cluster.nodes.get(&server.node).is_some_and(|node| node.view.server == *server)
        });
        self.reports.retain(|(job, _), _| cluster.jobs.contains_key(job));
        let silent = |heard: Option<Instant>, timeout: Duration| {
            now - heard.map_or(self.since, |heard| heard.max(self.since)) > timeout
        };
        let alive = cluster.nodes.values().filter(|node| node.view.alive);
        let servers = alive.map(|node| node.view.server).filter(|server| {
            silent(self.servers.get(server).copied(), timeouts.failure)
        });
        let servers = servers.collect();
        let sessions = cluster.jobs.iter().flat_map(|(&id, job)| {
            job.sessions.keys().map(move |&session| (id, session))
        });
        let (closed, open): (Vec<_>, Vec<_>) = sessions.partition(|(_, session)| {
            silent(self.sessions.get(session).map(|renewal| renewal.at), timeouts.session)
        });
        if self.sessions.len() > open.len() {
            let open: std::collections::BTreeSet<_> = open.iter().map(|(_, one)| *one).collect();
            self.sessions.retain(|session, _| open.contains(session));
        }
        (servers, closed)
    }
}
