//! The encoding of the whole state.

use std::collections::BTreeMap;
use std::sync::Arc;

use downpour_core::id::{JobId, ServerRef, SessionId, ShardId, VariableId};
use downpour_core::ledger::Ledger;
use downpour_core::view::{JobView, NodeView};
use downpour_proto::{Invalid, v1};
use prost::Message;

use super::deletions::DeletionsRecord;
use super::lost::Back;
use super::members::{Members, MembersRecord};
use super::requests::{Remembered, Requests};
use super::{Cluster, Counters, Dense, Event, Job, Node, Session, State};

#[derive(Clone, PartialEq, Message)]
struct Snapshot {
    #[prost(uint64, tag = "1")]
    version: u64,
    #[prost(uint32, tag = "2")]
    last_node: u32,
    #[prost(uint64, tag = "3")]
    last_incarnation: u64,
    #[prost(uint64, tag = "4")]
    last_job: u64,
    #[prost(uint64, tag = "5")]
    last_session: u64,
    #[prost(message, repeated, tag = "6")]
    nodes: Vec<NodeRecord>,
    #[prost(message, repeated, tag = "7")]
    jobs: Vec<JobRecord>,
    #[prost(message, repeated, tag = "8")]
    requests: Vec<RequestRecord>,
    #[prost(message, repeated, tag = "9")]
    events: Vec<v1::ClusterEvent>,
    #[prost(uint64, tag = "10")]
    now_ms: u64,
    #[prost(message, optional, tag = "80")]
    members: Option<MembersRecord>,
    #[prost(message, repeated, tag = "60")]
    ledgers: Vec<LedgerOfJob>,
    #[prost(uint64, tag = "100")]
    lease_ms: u64,
    #[prost(message, optional, tag = "101")]
    deletions: Option<DeletionsRecord>,
}

#[derive(Clone, PartialEq, Message)]
struct LedgerOfJob {
    #[prost(uint64, tag = "1")]
    job: u64,
    #[prost(message, optional, tag = "2")]
    ledger: Option<v1::LedgerRecord>,
}

impl From<&Event> for v1::ClusterEvent {
    fn from(event: &Event) -> Self {
        let Event { version, at_ms, kind, text } = event.clone();
        v1::ClusterEvent { version, at_ms, kind, text }
    }
}

#[derive(Clone, PartialEq, Message)]
struct NodeRecord {
    #[prost(message, optional, tag = "1")]
    view: Option<v1::NodeView>,
    #[prost(uint64, tag = "2")]
    version: u64,
    #[prost(string, tag = "3")]
    origin: String,
    #[prost(uint64, tag = "4")]
    isolation_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
struct JobRecord {
    #[prost(message, optional, tag = "1")]
    view: Option<v1::JobView>,
    #[prost(btree_map = "string, string", tag = "2")]
    labels: BTreeMap<String, String>,
    #[prost(message, repeated, tag = "3")]
    sessions: Vec<v1::SessionView>,
    #[prost(message, repeated, tag = "4")]
    dense: Vec<DenseRecord>,
    #[prost(message, optional, tag = "5")]
    checkpoints: Option<v1::JobCheckpoints>,
    /// See [`Back`].
    #[prost(string, tag = "100")]
    back_to: String,
    #[prost(uint32, repeated, tag = "101")]
    back: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct DenseRecord {
    #[prost(uint32, tag = "1")]
    variable: u32,
    #[prost(uint64, tag = "2")]
    initializer: u64,
    #[prost(bool, tag = "3")]
    initialized: bool,
}

#[derive(Clone, PartialEq, Message)]
struct RequestRecord {
    #[prost(string, tag = "1")]
    request: String,
    /// Given for RegisterServer.
    #[prost(message, optional, tag = "2")]
    server: Option<v1::ServerRef>,
    /// Given for OpenSession.
    #[prost(uint64, tag = "3")]
    session: u64,
}

impl State {
    /// Everything, encoded.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        let node = |node: &Arc<Node>| NodeRecord {
            view: Some((&node.view).into()),
            version: node.version,
            origin: node.origin.clone(),
            isolation_ms: node.isolation_ms,
        };
        let ledger = |(job, ledger): (&JobId, &Arc<Ledger>)| LedgerOfJob {
            job: job.0,
            ledger: Some(ledger.as_ref().into()),
        };
        let snapshot = Snapshot {
            version: self.cluster.version,
            last_node: self.last.node,
            last_incarnation: self.last.incarnation,
            last_job: self.last.job,
            last_session: self.last.session,
            nodes: self.cluster.nodes.values().map(node).collect(),
            jobs: self.cluster.jobs.values().map(|job| job.as_ref().into()).collect(),
            requests: self
                .requests
                .iter()
                .map(|(request, answer)| record(request, answer))
                .collect(),
            events: self.cluster.events.iter().map(Into::into).collect(),
            now_ms: self.now_ms,
            members: (self.cluster.members.version > 0)
                .then(|| self.cluster.members.as_ref().into()),
            ledgers: self.cluster.ledgers.iter().map(ledger).collect(),
            lease_ms: self.cluster.lease_ms,
            deletions: Some(self.cluster.deletions.as_ref().into()),
        };
        snapshot.encode_to_vec()
    }

    /// The state that [`State::snapshot`] encoded.
    ///
    /// # Errors
    /// The bytes are not such a state.
    pub fn restore(bytes: &[u8]) -> Result<State, Invalid> {
        let snapshot =
            Snapshot::decode(bytes).map_err(|error| Invalid::new("snapshot", error.to_string()))?;
        let (version, lease_ms) = (snapshot.version, snapshot.lease_ms);
        let deletions = Arc::new(snapshot.deletions.unwrap_or_default().into());
        let mut cluster = Cluster { version, lease_ms, deletions, ..Cluster::default() };
        for record in snapshot.nodes {
            let view: NodeView = given("snapshot.nodes.view", record.view)?.try_into()?;
            let NodeRecord { version, origin, isolation_ms, .. } = record;
            let node = Node { view, version, origin, isolation_ms };
            cluster.nodes.insert(node.view.server.node, Arc::new(node));
        }
        for record in snapshot.jobs {
            let job = Job::try_from(record)?;
            cluster.jobs.insert(job.view.job, Arc::new(job));
        }
        for LedgerOfJob { job, ledger } in snapshot.ledgers {
            let ledger = Ledger::try_from(given("snapshot.ledgers.ledger", ledger)?)?;
            cluster.ledgers.insert(JobId(job), Arc::new(ledger));
        }
        let mut requests = Requests::default();
        for record in snapshot.requests {
            let answer = match record.server {
                Some(server) => Remembered::Server(ServerRef::try_from(server)?),
                None => Remembered::Session(SessionId(record.session)),
            };
            requests.remember(record.request, answer);
        }
        let last = Counters {
            node: snapshot.last_node,
            incarnation: snapshot.last_incarnation,
            job: snapshot.last_job,
            session: snapshot.last_session,
        };
        let event = |event: v1::ClusterEvent| {
            let v1::ClusterEvent { version, at_ms, kind, text } = event;
            Event { version, at_ms, kind, text }
        };
        cluster.events = Arc::new(snapshot.events.into_iter().map(event).collect());
        let members = snapshot.members.map(Members::try_from).transpose()?;
        cluster.members = Arc::new(members.unwrap_or_default());
        Ok(State { cluster, last, requests, now_ms: snapshot.now_ms })
    }
}

fn given<T>(field: &'static str, value: Option<T>) -> Result<T, Invalid> {
    value.ok_or_else(|| Invalid::new(field, "is not given"))
}

fn record(request: &str, answer: Remembered) -> RequestRecord {
    let request = request.to_owned();
    match answer {
        Remembered::Server(server) => {
            RequestRecord { request, server: Some(server.into()), session: 0 }
        }
        Remembered::Session(session) => RequestRecord { request, server: None, session: session.0 },
    }
}

impl From<&Job> for JobRecord {
    fn from(job: &Job) -> Self {
        let session = |(id, session): (&SessionId, &Session)| v1::SessionView {
            session: id.0,
            name: session.name.clone(),
            kind: session.kind.into(),
            ..v1::SessionView::default()
        };
        let dense = |(variable, dense): (&VariableId, &Dense)| DenseRecord {
            variable: variable.0,
            initializer: dense.initializer.0,
            initialized: dense.initialized,
        };
        JobRecord {
            view: Some((&job.view).into()),
            labels: job.labels.clone(),
            sessions: job.sessions.iter().map(session).collect(),
            dense: job.dense.iter().map(dense).collect(),
            checkpoints: Some(job.checkpoints.clone()),
            back_to: job.back.checkpoint.clone(),
            back: job.back.shards.iter().map(|shard| shard.0).collect(),
        }
    }
}

impl TryFrom<JobRecord> for Job {
    type Error = Invalid;

    fn try_from(record: JobRecord) -> Result<Self, Invalid> {
        let view: JobView = given("snapshot.jobs.view", record.view)?.try_into()?;
        let session = |session: v1::SessionView| {
            let kind = session.kind();
            (SessionId(session.session), Session { name: session.name, kind })
        };
        let dense = |dense: DenseRecord| {
            let initializer = SessionId(dense.initializer);
            (VariableId(dense.variable), Dense { initializer, initialized: dense.initialized })
        };
        Ok(Job {
            view,
            labels: record.labels,
            sessions: record.sessions.into_iter().map(session).collect(),
            dense: record.dense.into_iter().map(dense).collect(),
            checkpoints: record.checkpoints.unwrap_or_default(),
            back: Back {
                checkpoint: record.back_to,
                shards: record.back.into_iter().map(ShardId).collect(),
            },
        })
    }
}
