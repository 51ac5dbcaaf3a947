//! The gRPC service: decode, ask the [`Handle`], encode. What a request means is decided in [`crate::state`].

mod behind;
mod cluster;
mod ledger;
mod operator;
pub(crate) mod status;
pub mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use downpour_checkpoint::Error as StoreError;
use downpour_core::id::{JobId, ServerRef, ShardId};
use downpour_core::spec::check_range;
use downpour_core::view::JobView;
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::v1;
use downpour_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use downpour_proto::v1::operator_server::OperatorServer;
use downpour_proto::{Invalid, convert};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Response, Status};
use tracing::info;

use crate::command::{self, Body, COMMAND_BYTES_MAX, SessionList};
use crate::liveness::Liveness;
use crate::placer::Placer;
use crate::raft::Handle;
use crate::raft::peers::Group;
use crate::scribe::{self, Failure};
use crate::state::{Cluster, Life, Reply};
use behind::Behind;
use status::mismatch;

/// Stretches of rolled back pushes that a renewal may name.
const ROLLED_BACK_MAX: u64 = 64;
/// Largest request, for what its many small parts take once they are decoded is many times more. The largest there are: commands, and
/// heartbeats with some 30 bytes for each shard that a server leads.
const REQUEST_BYTES_MAX: usize = 2 * COMMAND_BYTES_MAX;

/// What servers and clients are told of time.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Servers heartbeat this often.
    pub heartbeat_ms: u64,
    /// An answered heartbeat is a lease of this.
    pub lease_ms: u64,
    /// Sessions not renewed for this are closed.
    pub session_timeout_ms: u64,
    /// Servers that register and are then cut off for this acknowledge nothing more; 0: no bound.
    pub isolation_ms: u64,
}

/// The service of one member.
#[derive(Clone, Debug)]
pub struct Service {
    handle: Handle,
    liveness: Arc<Mutex<Liveness>>,
    group: Group,
    placer: Placer,
    times: Times,
    stop: CancellationToken,
}

type Answer<T> = Result<Response<T>, Status>;
/// A service that refuses whoever knows more of the group than this member.
type UpToDate<S> = InterceptedService<S, Behind>;

impl Service {
    /// Both to be added to a gRPC server. Their streams end when `stop` is cancelled.
    #[must_use]
    pub fn servers(
        handle: Handle,
        liveness: Arc<Mutex<Liveness>>,
        group: Group,
        placer: Placer,
        times: Times,
        stop: CancellationToken,
    ) -> (UpToDate<CoordinatorServer<Service>>, UpToDate<OperatorServer<Service>>) {
        let behind = Behind(handle.clone());
        let service = Service { handle, liveness, group, placer, times, stop };
        let operator = OperatorServer::new(service.clone())
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let coordinator = CoordinatorServer::new(service)
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let operator = InterceptedService::new(operator, behind.clone());
        (InterceptedService::new(coordinator, behind), operator)
    }

    async fn propose(&self, body: Body) -> Result<Reply, Status> {
        self.handle.propose(body).await.map_err(|error| self.status(error))
    }

    async fn read(&self) -> Result<Arc<Cluster>, Status> {
        self.handle.read().await.map_err(|error| self.status(error))
    }

    fn view(&self, job: JobId) -> Result<(Arc<Cluster>, JobView), Status> {
        let cluster = self.handle.cluster();
        let view = cluster.job(job).map(|job| job.view.clone());
        let view = view.ok_or_else(|| Status::not_found(format!("job {job} was deleted")))?;
        Ok((cluster, view))
    }

    /// A second server under a name in use would end the first one's life, which would then end the second's: neither would keep a shard.
    /// A server that restarts elsewhere waits until its old life is judged; at its old address it surely is the same one.
    async fn check_name_is_free(&self, request: &v1::RegisterServerRequest) -> Result<(), Status> {
        let cluster = self.read().await?;
        let mut alive = cluster.nodes.values().map(|node| &node.view).filter(|view| view.alive);
        let named = alive.find(|view| view.name == request.name);
        match named.filter(|view| view.address != request.address) {
            Some(view) => Err(Status::unavailable(format!(
                "{} is alive at {}: stop it, or register under another name",
                view.name, view.address
            ))),
            None => Ok(()),
        }
    }

    /// No lease is longer than what is committed: that long everybody waits who waits for leases to end, also a leader whose option is lower.
    fn lease_ms(&self, cluster: &Cluster) -> u64 {
        shorter(self.times.lease_ms, cluster.lease_ms)
    }

    /// Whether all of these are heard within two heartbeats from now, on the leader. Who is stopped or gone is not.
    async fn hears_all(&self, servers: &[v1::ServerRef]) -> bool {
        let arrived = Instant::now();
        let servers = servers.iter().filter_map(|server| ServerRef::try_from(*server).ok());
        let servers: Vec<ServerRef> = servers.collect();
        let patience = Duration::from_millis(2 * self.times.heartbeat_ms);
        let mut looks = tokio::time::interval(patience / 20);
        let cluster = self.handle.cluster();
        if servers.iter().any(|server| cluster.life(*server) != Life::Alive) {
            return false;
        }
        while self.handle.status().leads() && arrived.elapsed() <= patience {
            looks.tick().await;
            let liveness = self.liveness.lock();
            if servers.iter().all(|server| liveness.heard_since(*server, arrived)) {
                return true;
            }
        }
        false
    }

    /// Whether `server` may go on as it is. One that was judged dead while it holds what nobody else has may.
    async fn admit(&self, cluster: &Cluster, server: ServerRef) -> Result<bool, Status> {
        match cluster.life(server) {
            Life::Alive => Ok(true),
            Life::Judged if cluster.holds_shards(server) => {
                self.propose(Body::Revive(server.into())).await?;
                info!(%server, "a server that was judged dead is heard again");
                Ok(true)
            }
            Life::Judged | Life::Over => Ok(false),
        }
    }
}

/// Of a leader's option and what is committed. Nothing is, where no server has registered since leases are: then the option counts, or nobody alone would have a lease.
fn shorter(option_ms: u64, committed_ms: u64) -> u64 {
    if committed_ms == 0 { option_ms } else { option_ms.min(committed_ms) }
}

impl Service {
    fn failure(&self, failure: Failure) -> Status {
        match failure {
            Failure::Raft(error) => self.status(error),
            Failure::NoJob(_) | Failure::Store(StoreError::Missing(_)) => {
                Status::not_found(failure.to_string())
            }
            Failure::Invalid(_) | Failure::Store(StoreError::Uri { .. }) => {
                Status::invalid_argument(failure.to_string())
            }
            Failure::Store(_) | Failure::Incomplete(..) => {
                Status::failed_precondition(failure.to_string())
            }
        }
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    type WatchStream = watch::Events;

    async fn register_server(
        &self,
        request: Request<v1::RegisterServerRequest>,
    ) -> Answer<v1::RegisterServerReply> {
        let mut request = request.into_inner();
        self.check_name_is_free(&request).await?;
        (request.isolation_ms, request.lease_ms) = (self.times.isolation_ms, self.times.lease_ms);
        let reply = self.propose(Body::RegisterServer(request)).await?;
        let Reply::Registered(server) = reply else { return Err(mismatch(&reply)) };
        // As committed: it may have been asked for before, at a leader with other options.
        let cluster = self.handle.cluster();
        let node = cluster.nodes.get(&server.node).filter(|node| node.view.server == server);
        let over = || Status::unavailable(format!("{server} was replaced at once"));
        let isolation_ms = node.ok_or_else(over)?.isolation_ms;
        self.liveness.lock().hear(server, Instant::now());
        info!(%server, "registered");
        let heartbeat_ms = self.times.heartbeat_ms;
        let server = Some(server.into());
        Ok(Response::new(v1::RegisterServerReply { server, heartbeat_ms, isolation_ms }))
    }

    /// The lease is safe because leadership was confirmed after the request arrived: nobody else can have given away before that what
    /// the server holds alone.
    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Answer<v1::HeartbeatReply> {
        let arrived = Instant::now();
        let v1::HeartbeatRequest { server, reports, load } = request.into_inner();
        let server = convert::server("server", server)?;
        let cluster = self.read().await?;
        // Before it is revived, or the silence before this would count again at once.
        self.liveness.lock().hear(server, arrived);
        if !self.admit(&cluster, server).await? {
            return Ok(Response::new(v1::HeartbeatReply { lease_ms: 0, fenced: true }));
        }
        let mut liveness = self.liveness.lock();
        let exists = |report: &v1::ShardReport| {
            let job = cluster.job(JobId(report.job));
            let route = job.and_then(|job| job.view.route(ShardId(report.shard)));
            // Nobody can have begun a tenure that was not committed: it would count for ever.
            route.is_some_and(|route| report.epoch <= route.epoch.0)
        };
        for report in reports.into_iter().filter(exists) {
            liveness.report(report);
        }
        if let Some(load) = load {
            liveness.take_load(server, load);
        }
        let lease_ms = self.lease_ms(&cluster);
        Ok(Response::new(v1::HeartbeatReply { lease_ms, fenced: false }))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<watch::Events> {
        if !self.handle.status().ready {
            return Err(Status::unavailable("this member does not know the cluster's state yet"));
        }
        let job = Some(request.into_inner().job).filter(|&job| job != 0).map(JobId);
        let events =
            watch::events(self.handle.watch_cluster(), job, self.group.clone(), self.stop.clone());
        Ok(Response::new(events))
    }

    async fn change_in_sync(
        &self,
        request: Request<v1::ChangeInSyncRequest>,
    ) -> Answer<v1::ChangeInSyncReply> {
        let request = request.into_inner();
        let (job, shard) = (request.job, ShardId(request.shard));
        let primary = convert::server("primary", request.primary)?;
        let cut_off = request.unreachable && self.hears_all(&request.remove).await;
        let change = if cut_off { Body::ReplacePrimary } else { Body::ChangeInSync };
        let reply = self.propose(change(request)).await?;
        let Reply::InSync { changed, route } = reply else { return Err(mismatch(&reply)) };
        info!(job, %shard, changed, epoch = %route.epoch, set = ?route.in_sync, "in-sync set");
        // Committed after the request arrived: that confirms leadership as a ReadIndex does.
        let cluster = self.handle.cluster();
        let heard = cluster.life(primary) == Life::Alive;
        Ok(Response::new(v1::ChangeInSyncReply {
            changed,
            route: Some(convert::shard_route(shard, &route)),
            lease_ms: if heard { self.lease_ms(&cluster) } else { 0 },
        }))
    }

    async fn create_job(
        &self,
        request: Request<v1::CreateJobRequest>,
    ) -> Answer<v1::CreateJobReply> {
        let reply = self.propose(Body::CreateJob(request.into_inner())).await?;
        let Reply::Created { job, created } = reply else { return Err(mismatch(&reply)) };
        let (_, view) = self.view(job)?;
        info!(%job, name = view.spec.name, created, "job");
        Ok(Response::new(v1::CreateJobReply { view: Some((&view).into()), created }))
    }

    async fn delete_job(
        &self,
        request: Request<v1::DeleteJobRequest>,
    ) -> Answer<v1::DeleteJobReply> {
        let request = request.into_inner();
        self.propose(Body::DeleteJob(request)).await?;
        info!(job = request.job, "job deleted");
        Ok(Response::new(v1::DeleteJobReply {}))
    }

    async fn define_variables(
        &self,
        request: Request<v1::DefineVariablesRequest>,
    ) -> Answer<v1::DefineVariablesReply> {
        let reply = self.propose(Body::DefineVariables(request.into_inner())).await?;
        let Reply::Defined { variables, version } = reply else { return Err(mismatch(&reply)) };
        let variables = variables.iter().map(|defined| v1::DefinedVariable {
            variable: Some((&defined.variable).into()),
            initializer: defined.initializer.map_or(0, |session| session.0),
            initialized: defined.initialized,
        });
        Ok(Response::new(v1::DefineVariablesReply { variables: variables.collect(), version }))
    }

    async fn mark_initialized(
        &self,
        request: Request<v1::MarkInitializedRequest>,
    ) -> Answer<v1::MarkInitializedReply> {
        self.propose(Body::MarkInitialized(request.into_inner())).await?;
        Ok(Response::new(v1::MarkInitializedReply {}))
    }

    async fn label_job(&self, request: Request<v1::LabelJobRequest>) -> Answer<v1::LabelJobReply> {
        let reply = self.propose(Body::LabelJob(request.into_inner())).await?;
        let Reply::Labelled { changed, value } = reply else { return Err(mismatch(&reply)) };
        Ok(Response::new(v1::LabelJobReply { changed, value }))
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Answer<v1::OpenSessionReply> {
        let request = request.into_inner();
        let (job, name) = (JobId(request.job), request.name.clone());
        let reply = self.propose(Body::OpenSession(request)).await?;
        let Reply::Opened(session) = reply else { return Err(mismatch(&reply)) };
        self.liveness.lock().renew(job, session, None, Instant::now());
        info!(%job, %session, name, "session opened");
        let (cluster, view) = self.view(job)?;
        Ok(Response::new(v1::OpenSessionReply {
            session: session.0,
            timeout_ms: self.times.session_timeout_ms,
            view: Some((&view).into()),
            nodes: cluster.nodes.values().map(|node| (&node.view).into()).collect(),
        }))
    }

    async fn renew_session(
        &self,
        request: Request<v1::RenewSessionRequest>,
    ) -> Answer<v1::RenewSessionReply> {
        let arrived = Instant::now();
        let request = request.into_inner();
        let (job, session) = (command::job(request.job)?, command::session(request.session)?);
        let lost = request.progress.as_ref().map_or(0, |progress| progress.rolled_back.len());
        let few = check_range("progress.rolled_back", lost as u64, 0, ROLLED_BACK_MAX);
        few.map_err(Invalid::from)?;
        let cluster = self.read().await?;
        let open = cluster.job(job).is_some_and(|job| job.sessions.contains_key(&session));
        if open {
            self.liveness.lock().renew(job, session, request.progress, arrived);
        }
        Ok(Response::new(v1::RenewSessionReply { open }))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Answer<v1::CloseSessionReply> {
        let request = request.into_inner();
        self.propose(Body::CloseSessions(SessionList { sessions: vec![request] })).await?;
        info!(job = request.job, session = request.session, "session closed");
        Ok(Response::new(v1::CloseSessionReply {}))
    }

    async fn create_checkpoint(
        &self,
        request: Request<v1::CreateCheckpointRequest>,
    ) -> Answer<v1::CreateCheckpointReply> {
        let v1::CreateCheckpointRequest { job, uri, incremental, request_id } =
            request.into_inner();
        let (job, request_id) = (command::job(job)?, command::request_id(request_id)?);
        let nonce = crc32fast::hash(request_id.as_bytes());
        let clock = self.liveness.lock().clock(&self.handle.cluster(), job);
        let asked = scribe::Asked { uri: &uri, incremental, nonce, clock };
        let begun = scribe::begin(&self.handle, job, asked).await;
        let (checkpoint, chain) = begun.map_err(|failure| self.failure(failure))?;
        Ok(Response::new(v1::CreateCheckpointReply { checkpoint: checkpoint.to_string(), chain }))
    }

    async fn report_saved(
        &self,
        request: Request<v1::ReportSavedRequest>,
    ) -> Answer<v1::ReportSavedReply> {
        self.propose(Body::ShardsSaved(request.into_inner())).await?;
        Ok(Response::new(v1::ReportSavedReply {}))
    }

    async fn schedule_checkpoints(
        &self,
        request: Request<v1::ScheduleCheckpointsRequest>,
    ) -> Answer<v1::ScheduleCheckpointsReply> {
        self.propose(Body::ScheduleCheckpoints(request.into_inner())).await?;
        Ok(Response::new(v1::ScheduleCheckpointsReply {}))
    }

    async fn restore_job(
        &self,
        request: Request<v1::RestoreJobRequest>,
    ) -> Answer<v1::RestoreJobReply> {
        // Who does not lead need not look.
        self.read().await?;
        let restoring = scribe::restore(&self.handle, request.into_inner()).await;
        let (restore, checkpoint) = restoring.map_err(|failure| self.failure(failure))?;
        let reply = self.propose(Body::RestoreJob(restore)).await?;
        let Reply::Created { job, .. } = reply else { return Err(mismatch(&reply)) };
        info!(%job, %checkpoint, "job begins from a checkpoint");
        Ok(Response::new(v1::RestoreJobReply { job: job.0, checkpoint: checkpoint.to_string() }))
    }

    async fn define_ledger(
        &self,
        request: Request<v1::DefineLedgerRequest>,
    ) -> Answer<v1::DefineLedgerReply> {
        self.define_ledger(request.into_inner()).await.map(Response::new)
    }

    async fn advance_ledger(
        &self,
        request: Request<v1::AdvanceLedgerRequest>,
    ) -> Answer<v1::AdvanceLedgerReply> {
        self.advance_ledger(request.into_inner()).await.map(Response::new)
    }

    async fn get_cluster(
        &self,
        _request: Request<v1::GetClusterRequest>,
    ) -> Answer<v1::GetClusterReply> {
        let cluster = self.read().await?;
        Ok(Response::new(self.cluster_reply(&cluster)))
    }
}

#[cfg(test)]
mod tests {
    use super::shorter;

    #[test]
    fn a_lease_is_no_longer_than_what_is_committed_once_something_is() {
        assert_eq!(shorter(10_000, 0), 10_000, "all servers registered at an earlier version");
        assert_eq!([shorter(10_000, 20_000), shorter(10_000, 5_000)], [10_000, 5_000]);
    }
}
