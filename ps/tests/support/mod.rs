//! A coordinator that does what the test says, and servers in this process.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use downpour_node::process::Node;
use downpour_proto::transport::{MESSAGE_BYTES_MAX, channel, incoming, server_builder};
use downpour_proto::v1;
use downpour_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use downpour_proto::v1::shard_client::ShardClient;
use downpour_ps::Config;
use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::WatchStream;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

const DEADLINE: Duration = Duration::from_secs(30);
/// Sessions that were ever opened, the highest number.
pub(crate) const SESSIONS: u64 = 9;

/// Everything that is committed: told to every watcher whole, at every change.
#[derive(Debug)]
pub(crate) struct Script {
    truth: watch::Sender<v1::WatchEvent>,
    /// Incarnations that heartbeats of are answered with "fenced".
    fenced: watch::Sender<u64>,
    pub(crate) address: String,
}

impl Script {
    /// A coordinator that listens.
    pub(crate) async fn start() -> Arc<Script> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let truth =
            watch::Sender::new(v1::WatchEvent { version: 1, whole: true, ..Default::default() });
        let script = Arc::new(Script { truth, fenced: watch::Sender::new(0), address });
        let service = CoordinatorServer::new(Service(Arc::clone(&script)));
        tokio::spawn(server_builder().add_service(service).serve_with_incoming(incoming(listener)));
        script
    }

    /// Commits something.
    pub(crate) fn commit<T>(&self, change: impl FnOnce(&mut v1::WatchEvent) -> T) -> T {
        let mut result = None;
        self.truth.send_modify(|event| {
            event.version += 1;
            result = Some(change(event));
            let version = event.version;
            event.jobs.iter_mut().for_each(|job| job.version = version);
        });
        result.expect("it ran")
    }

    /// Changes the route of every shard of the job.
    pub(crate) fn reroute(&self, change: impl Fn(&mut v1::ShardRoute)) {
        self.commit(|event| {
            for route in &mut event.jobs[0].shards {
                route.set_version += 1;
                change(route);
            }
        });
    }

    /// From now on this incarnation is told that it is over.
    pub(crate) fn fence(&self, server: v1::ServerRef) {
        self.fenced.send_replace(server.incarnation);
    }

    /// Gives a server a new incarnation.
    pub(crate) fn register(&self, name: &str, address: &str) -> v1::ServerRef {
        self.commit(|event| {
            let known = event.nodes.iter().find(|node| node.name == name).map(|node| node.node);
            let node = known.unwrap_or(event.nodes.len() as u32 + 1);
            let incarnation = event.version;
            event.nodes.retain(|view| view.node != node);
            event.nodes.push(v1::NodeView {
                node,
                name: name.into(),
                incarnation,
                address: address.into(),
                zone: String::new(),
                alive: true,
                admission: 0,
            });
            v1::ServerRef { node, incarnation }
        })
    }

    /// Where a server listens.
    pub(crate) fn address_of(&self, server: v1::ServerRef) -> String {
        let event = self.truth.borrow();
        let node = event.nodes.iter().find(|node| node.node == server.node);
        node.expect("registered").address.clone()
    }

    /// The committed state.
    pub(crate) fn now(&self) -> v1::WatchEvent {
        self.truth.borrow().clone()
    }

    /// The newest life of a server.
    pub(crate) fn server(&self, name: &str) -> Option<v1::ServerRef> {
        let event = self.truth.borrow();
        let node = event.nodes.iter().find(|node| node.name == name)?;
        Some(v1::ServerRef { node: node.node, incarnation: node.incarnation })
    }
}

struct Service(Arc<Script>);

#[tonic::async_trait]
impl Coordinator for Service {
    async fn register_server(
        &self,
        request: Request<v1::RegisterServerRequest>,
    ) -> Result<Response<v1::RegisterServerReply>, Status> {
        let request = request.into_inner();
        let server = self.0.register(&request.name, &request.address);
        Ok(Response::new(v1::RegisterServerReply {
            server: Some(server),
            heartbeat_ms: 20,
            isolation_ms: 0,
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatReply>, Status> {
        let server = request.into_inner().server.unwrap_or_default();
        let fenced = *self.0.fenced.borrow() == server.incarnation;
        Ok(Response::new(v1::HeartbeatReply { lease_ms: 10_000, fenced }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchEvent, Status>> + Send>>;

    async fn watch(
        &self,
        _: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let events = WatchStream::new(self.0.truth.subscribe()).map(Ok);
        Ok(Response::new(Box::pin(events)))
    }

    async fn change_in_sync(
        &self,
        request: Request<v1::ChangeInSyncRequest>,
    ) -> Result<Response<v1::ChangeInSyncReply>, Status> {
        let request = request.into_inner();
        let (changed, route) = self.0.commit(|event| {
            let route = &mut event.jobs[0].shards[request.shard as usize];
            let current = route.epoch == request.epoch
                && route.set_version == request.set_version
                && route.primary == request.primary;
            if current {
                route.set_version += 1;
                route.in_sync.retain(|member| !request.remove.contains(member));
            }
            (current, route.clone())
        });
        let reply = v1::ChangeInSyncReply { changed, route: Some(route), lease_ms: 10_000 };
        Ok(Response::new(reply))
    }

    async fn create_job(
        &self,
        _: Request<v1::CreateJobRequest>,
    ) -> Result<Response<v1::CreateJobReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn delete_job(
        &self,
        _: Request<v1::DeleteJobRequest>,
    ) -> Result<Response<v1::DeleteJobReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn define_variables(
        &self,
        _: Request<v1::DefineVariablesRequest>,
    ) -> Result<Response<v1::DefineVariablesReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn mark_initialized(
        &self,
        _: Request<v1::MarkInitializedRequest>,
    ) -> Result<Response<v1::MarkInitializedReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn label_job(
        &self,
        _: Request<v1::LabelJobRequest>,
    ) -> Result<Response<v1::LabelJobReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn create_checkpoint(
        &self,
        _: Request<v1::CreateCheckpointRequest>,
    ) -> Result<Response<v1::CreateCheckpointReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn report_saved(
        &self,
        _: Request<v1::ReportSavedRequest>,
    ) -> Result<Response<v1::ReportSavedReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn schedule_checkpoints(
        &self,
        _: Request<v1::ScheduleCheckpointsRequest>,
    ) -> Result<Response<v1::ScheduleCheckpointsReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn restore_job(
        &self,
        _: Request<v1::RestoreJobRequest>,
    ) -> Result<Response<v1::RestoreJobReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn open_session(
        &self,
        _: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn renew_session(
        &self,
        request: Request<v1::RenewSessionRequest>,
    ) -> Result<Response<v1::RenewSessionReply>, Status> {
        let open = request.into_inner().session <= SESSIONS;
        Ok(Response::new(v1::RenewSessionReply { open }))
    }

    async fn close_session(
        &self,
        _: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn get_cluster(
        &self,
        _: Request<v1::GetClusterRequest>,
    ) -> Result<Response<v1::GetClusterReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn define_ledger(
        &self,
        _: Request<v1::DefineLedgerRequest>,
    ) -> Result<Response<v1::DefineLedgerReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn advance_ledger(
        &self,
        _: Request<v1::AdvanceLedgerRequest>,
    ) -> Result<Response<v1::AdvanceLedgerReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }
}

/// A server in this process.
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) node: Node,
    running: JoinHandle<anyhow::Result<()>>,
    client: ShardClient<Channel>,
}

impl Server {
    pub(crate) async fn start(script: &Script, name: &str) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let config = Config {
            name: name.into(),
            coordinators: vec![script.address.clone()],
            backup_timeout_ms: 300,
            ..Config::default()
        };
        let node = Node::default();
        let running = tokio::spawn(downpour_ps::run(config, listener, node.clone()));
        let client = ShardClient::new(channel(&address).expect("host and port"))
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        wait_for("registration", || script.server(name)).await;
        Server { name: name.into(), node, running, client }
    }

    /// Ends it like a process that was killed: nothing is handed over.
    pub(crate) async fn kill(self) {
        self.node.shutdown.token().cancel();
        self.running.await.expect("no panic").expect("a clean end");
    }

    pub(crate) fn client(&self) -> ShardClient<Channel> {
        self.client.clone()
    }
}

/// Waits until `look` sees something.
pub(crate) async fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(seen) = look() {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, looking).await.unwrap_or_else(|_| panic!("no {what}"))
}
