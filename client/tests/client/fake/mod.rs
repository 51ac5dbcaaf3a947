//! A whole cluster in the process of the test: members over real gRPC, servers over gRPC and frames, one shared state behind them, faults on demand.
//!
//! Replication is played as perfect: the state of a shard belongs to the cluster, and only its primary may use it.

mod clock;
mod coordinator;
mod frames;
mod shard;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use downpour_core::cells::{ClosedSessions, SessionCells};
use downpour_core::clocks::Board;
use downpour_core::id::{Epoch, Incarnation, JobId, Lsn, NodeId, ServerRef, SessionId};
use downpour_core::mix::mix64;
use downpour_core::routing::ShardRoute;
use downpour_core::spec::{JobSpec, VariableSpec};
use downpour_core::view::{JobView, NodeView};
use downpour_proto::transport;
use downpour_proto::v1::clock_server::ClockServer;
use downpour_proto::v1::coordinator_server::CoordinatorServer;
use downpour_proto::v1::shard_server::ShardServer;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;

/// Shards of the fake job.
pub(crate) const SHARDS: u32 = 8;

/// Faults that come by themselves, each with a chance of one in so many; 0 is never.
#[derive(Clone, Copy, Default)]
pub(crate) struct Chances {
    pub(crate) seed: u64,
    /// A part is refused for the moment.
    pub(crate) retry: u64,
    /// The stream ends before a request is handled.
    pub(crate) break_before: u64,
    /// The stream ends after a request was handled: the reply is lost.
    pub(crate) break_after: u64,
    /// The shard moves to the next server under a new epoch.
    pub(crate) move_shard: u64,
}

/// What members do with calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// The leader answers, others name it.
    Usual,
    /// Refuses without a hint.
    Leaderless,
    /// Takes the call and never answers.
    Hangs,
    /// Leads or follows as usual, but its watches fall silent.
    Mute,
    /// Names another member as leader, always.
    Misleads(usize),
}

pub(crate) struct State {
    pub(crate) view: Option<JobView>,
    pub(crate) nodes: BTreeMap<NodeId, NodeView>,
    pub(crate) members: Vec<String>,
    pub(crate) manners: Vec<Manner>,
    pub(crate) leader: usize,
    /// The member that was asked for a watch last.
    pub(crate) watched: usize,
    /// How often each member was called.
    pub(crate) calls: Vec<u64>,
    pub(crate) sessions: u64,
    pub(crate) closed: BTreeSet<SessionId>,
    pub(crate) initializers: BTreeMap<u32, SessionId>,
    pub(crate) initialized: BTreeSet<u32>,
    pub(crate) shards: Vec<ShardState>,
    pub(crate) board: Board,
    pub(crate) chances: Chances,
    pub(crate) dice: u64,
    /// Every push is refused with this.
    pub(crate) retry_all: Option<downpour_proto::v1::RetryReason>,
    /// Pushes are taken but not answered.
    pub(crate) hold_replies: bool,
    /// Pulls are answered by whoever is asked, whatever epoch is named.
    pub(crate) stale_pulls: bool,
    /// Dense blocks sent in answers.
    pub(crate) dense_blocks_sent: usize,
    /// Messages with pulls.
    pub(crate) pulls: usize,
    /// So often a checkpoint is being taken when another is asked for, and has ended at the next look.
    pub(crate) checkpoints_in_the_way: u32,
    /// How often one was asked for.
    pub(crate) checkpoints_asked: u32,
}

#[derive(Default)]
pub(crate) struct ShardState {
    pub(crate) cells: SessionCells,
    pub(crate) lsn: Lsn,
    pub(crate) rows: BTreeMap<(u32, u64), Vec<f32>>,
    /// With the LSN of the last update.
    pub(crate) blocks: BTreeMap<(u32, u32), (Lsn, Vec<f32>)>,
}

/// The cluster; ends with the test's runtime.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) state: Arc<Mutex<State>>,
    version: Arc<watch::Sender<u64>>,
}

impl Cluster {
    pub(crate) async fn start(members: usize, servers: u32) -> Cluster {
        let state = State {
            view: None,
            nodes: BTreeMap::new(),
            members: Vec::new(),
            manners: vec![Manner::Usual; members],
            leader: 0,
            watched: 0,
            calls: vec![0; members],
            sessions: 0,
            closed: BTreeSet::new(),
            initializers: BTreeMap::new(),
            initialized: BTreeSet::new(),
            shards: (0..SHARDS).map(|_| ShardState::default()).collect(),
            board: Board::default(),
            chances: Chances::default(),
            dice: 0,
            retry_all: None,
            hold_replies: false,
            stale_pulls: false,
            dense_blocks_sent: 0,
            pulls: 0,
            checkpoints_in_the_way: 0,
            checkpoints_asked: 0,
        };
        let version = Arc::new(watch::Sender::new(1));
        let cluster = Cluster { state: Arc::new(Mutex::new(state)), version };
        for member in 0..members {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
            let address = listener.local_addr().expect("an address").to_string();
            cluster.state.lock().members.push(address);
            let service = coordinator::Member { member, cluster: cluster.clone() };
            let server = transport::server_builder().add_service(CoordinatorServer::new(service));
            tokio::spawn(server.serve_with_incoming(transport::incoming(listener)));
        }
        for node in 1..=servers {
            cluster.add_server(node).await;
        }
        cluster
    }

    /// A server joins, or comes back with a new life.
    pub(crate) async fn add_server(&self, node: u32) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("an address").to_string();
        let node = NodeId(node);
        let server = {
            let mut state = self.state.lock();
            let life = state.nodes.get(&node).map_or(0, |known| known.server.incarnation.0);
            let incarnation = Incarnation(life + u64::from(node.0) * 100);
            let server = ServerRef { node, incarnation };
            let name = format!("ps-{node}");
            let view = NodeView {
                name,
                server,
                address,
                zone: String::new(),
                alive: true,
                admission: downpour_core::view::Admission::Open,
            };
            state.nodes.insert(node, view);
            server
        };
        let service = shard::Server { server, cluster: self.clone() };
        let (grpc, accepted) = tokio::sync::mpsc::channel(8);
        tokio::spawn(frames::accept(listener, service.clone(), grpc));
        let clocks = ClockServer::new(service.clone());
        let service = ShardServer::new(service)
            .max_decoding_message_size(transport::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(transport::MESSAGE_BYTES_MAX);
        let server = transport::server_builder().add_service(service).add_service(clocks);
        tokio::spawn(server.serve_with_incoming(ReceiverStream::new(accepted)));
        self.changed();
    }

    /// The members' addresses.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.state.lock().members.clone()
    }

    /// Tells watchers.
    pub(crate) fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    /// Changes the view and tells watchers.
    pub(crate) fn change_view(&self, change: impl FnOnce(&mut JobView)) {
        if let Some(view) = &mut self.state.lock().view {
            change(view);
            view.version += 1;
        }
        self.changed();
    }

    /// Ends a session as the coordinators do when it is not renewed.
    pub(crate) fn close_session(&self, session: SessionId) {
        self.state.lock().close(session);
        self.changed();
    }
}

impl State {
    /// True with a chance of one in `sides`.
    pub(crate) fn roll(&mut self, sides: u64) -> bool {
        self.dice += 1;
        sides != 0 && mix64(self.chances.seed ^ self.dice).is_multiple_of(sides)
    }

    /// To the next server under a new epoch.
    pub(crate) fn move_shard(&mut self, shard: u32) {
        let servers: Vec<ServerRef> = self.nodes.values().map(|node| node.server).collect();
        let Some(view) = &mut self.view else { return };
        let route = &mut view.shards[shard as usize];
        let at = servers.iter().position(|server| Some(*server) == route.primary);
        let next = servers[at.map_or(0, |at| (at + 1) % servers.len())];
        *route = ShardRoute {
            epoch: Epoch(route.epoch.0 + 1),
            set_version: route.set_version + 1,
            primary: Some(next),
            in_sync: vec![next],
            joining: None,
            moving: None,
        };
        view.version += 1;
    }

    pub(crate) fn close(&mut self, session: SessionId) {
        self.closed.insert(session);
        let open = (1..=self.sessions).map(SessionId);
        let open = open.filter(|session| !self.closed.contains(session)).collect();
        let closed = ClosedSessions { high_water: self.sessions, open };
        for shard in &mut self.shards {
            shard.cells.close(closed.clone());
        }
        if let Some(view) = &mut self.view {
            view.sessions = closed;
            view.version += 1;
        }
    }

    /// Creates the job unless it is there.
    pub(crate) fn create(&mut self, spec: &JobSpec) -> &JobView {
        let servers: Vec<ServerRef> = self.nodes.values().map(|node| node.server).collect();
        self.view.get_or_insert_with(|| JobView {
            job: JobId(1),
            spec: spec.clone(),
            version: 1,
            variables: Vec::new(),
            shards: (0..spec.shards as usize)
                .map(|shard| ShardRoute {
                    epoch: Epoch(1),
                    set_version: 1,
                    primary: Some(servers[shard % servers.len()]),
                    in_sync: vec![servers[shard % servers.len()]],
                    joining: None,
                    moving: None,
                })
                .collect(),
            sessions: ClosedSessions::default(),
            orders: downpour_core::checkpoint::Orders::default(),
            consistency: downpour_core::consistency::Consistency::default(),
        })
    }

    pub(crate) fn spec(&self, variable: u32) -> Option<VariableSpec> {
        let view = self.view.as_ref()?;
        view.variable(downpour_core::id::VariableId(variable)).map(|known| known.spec.clone())
    }
}

/// The fake job.
pub(crate) fn job() -> JobSpec {
    JobSpec { name: "job".into(), shards: SHARDS, replicas: 1, min_in_sync: 1, seed: 1 }
}

/// Waits for a condition; the test fails when it does not come true.
pub(crate) async fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within(what, wait).await;
}

/// Waits until the state fulfils a condition; the test fails when it does not.
pub(crate) async fn wait_for_state(
    session: &downpour_client::Session,
    what: &str,
    condition: impl Fn(&downpour_client::JobState) -> bool,
) {
    let mut watch = session.watch();
    within(what, watch.wait_for(|state| condition(state))).await.expect("the session lives");
}

pub(crate) async fn within<T>(what: &str, wait: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(20);
    tokio::time::timeout(limit, wait)
        .await
        .unwrap_or_else(|_| panic!("not within {limit:?}: {what}"))
}
