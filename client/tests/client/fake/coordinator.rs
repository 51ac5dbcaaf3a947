//! A member of the coordinator group.

use std::pin::Pin;

use downpour_core::id::{SessionId, VariableId};
use downpour_core::spec::{JobSpec, Variable, VariableSpec};
use downpour_proto::v1::coordinator_server::Coordinator;
use downpour_proto::v1::*;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::{Cluster, Manner};

pub(crate) struct Member {
    pub(crate) member: usize,
    pub(crate) cluster: Cluster,
}

/// Every checkpoint is called so, and is whole at once.
const CHECKPOINT: &str = "1";

type Answer<T> = Result<Response<T>, Status>;

fn answer<T>(message: T) -> Answer<T> {
    Ok(Response::new(message))
}

impl Member {
    /// Only the leader goes on; others answer as they are told to.
    async fn lead(&self) -> Result<(), Status> {
        let (manner, leader, members) = {
            let mut state = self.cluster.state.lock();
            state.calls[self.member] += 1;
            (state.manners[self.member], state.leader, state.members.clone())
        };
        let hint = match manner {
            Manner::Usual | Manner::Mute if leader == self.member => return Ok(()),
            Manner::Usual | Manner::Mute => Some(leader),
            Manner::Misleads(other) => Some(other),
            Manner::Leaderless => None,
            Manner::Hangs => std::future::pending().await,
        };
        let mut status = Status::unavailable("not the leader");
        if let Some(hint) = hint {
            let address = members[hint].parse().expect("an address is metadata");
            status.metadata_mut().insert("downpour-leader", address);
        }
        Err(status)
    }

    fn event(&self, version: u64) -> WatchEvent {
        let state = self.cluster.state.lock();
        WatchEvent {
            version,
            whole: true,
            jobs: state.view.iter().map(Into::into).collect(),
            deleted_jobs: Vec::new(),
            nodes: state.nodes.values().map(Into::into).collect(),
            ..WatchEvent::default()
        }
    }
}

#[tonic::async_trait]
impl Coordinator for Member {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchEvent, Status>> + Send>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        {
            let mut state = self.cluster.state.lock();
            state.watched = self.member;
            if !matches!(state.manners[self.member], Manner::Usual | Manner::Mute) {
                return Err(Status::unavailable("told to"));
            }
        }
        let mut versions = self.cluster.version.subscribe();
        versions.mark_changed();
        let (events, stream) = tokio::sync::mpsc::channel(4);
        let member = Member { member: self.member, cluster: self.cluster.clone() };
        tokio::spawn(async move {
            while versions.changed().await.is_ok() {
                let manner = member.cluster.state.lock().manners[member.member];
                match manner {
                    Manner::Usual => {}
                    Manner::Mute => continue,
                    _ => return,
                }
                let version = *versions.borrow_and_update();
                if events.send(Ok(member.event(version))).await.is_err() {
                    return;
                }
            }
        });
        answer(Box::pin(ReceiverStream::new(stream).map(|event| event)))
    }

    async fn create_job(&self, request: Request<CreateJobRequest>) -> Answer<CreateJobReply> {
        self.lead().await?;
        let spec = request.into_inner().spec.ok_or_else(|| Status::invalid_argument("spec"))?;
        let spec = JobSpec::try_from(spec)?;
        let mut state = self.cluster.state.lock();
        let created = state.view.is_none();
        let view = state.create(&spec);
        if view.spec != spec {
            return Err(Status::already_exists("another job of this name"));
        }
        answer(CreateJobReply { view: Some(view.into()), created })
    }

    async fn define_variables(
        &self,
        request: Request<DefineVariablesRequest>,
    ) -> Answer<DefineVariablesReply> {
        self.lead().await?;
        let request = request.into_inner();
        let reply = {
            let mut state = self.cluster.state.lock();
            let state = &mut *state;
            let view = state.view.as_mut().ok_or_else(|| Status::not_found("job"))?;
            let mut variables = Vec::new();
            for spec in request.variables {
                let spec = VariableSpec::try_from(spec)?;
                let known = view.variables.iter().find(|known| known.spec.name == spec.name);
                let variable = match known {
                    Some(known) if known.spec == spec => known.clone(),
                    Some(_) => return Err(Status::already_exists(spec.name)),
                    None => {
                        let id = VariableId(view.variables.len() as u32 + 1);
                        view.variables.push(Variable { id, spec });
                        view.variables[id.0 as usize - 1].clone()
                    }
                };
                let id = variable.id.0;
                let first = state.initializers.entry(id).or_insert(SessionId(request.session));
                let initializer = first.0;
                let initialized = state.initialized.contains(&id);
                let variable = Some((&variable).into());
                variables.push(DefinedVariable { variable, initializer, initialized });
            }
            view.version += 1;
            DefineVariablesReply { variables, version: view.version }
        };
        self.cluster.changed();
        answer(reply)
    }

    async fn mark_initialized(
        &self,
        request: Request<MarkInitializedRequest>,
    ) -> Answer<MarkInitializedReply> {
        self.lead().await?;
        self.cluster.state.lock().initialized.extend(request.into_inner().variables);
        answer(MarkInitializedReply {})
    }

    async fn open_session(&self, request: Request<OpenSessionRequest>) -> Answer<OpenSessionReply> {
        self.lead().await?;
        let mut state = self.cluster.state.lock();
        let view = state.view.as_ref().filter(|view| view.job.0 == request.get_ref().job);
        let view = Some(view.ok_or_else(|| Status::not_found("job"))?.into());
        state.sessions += 1;
        let nodes = state.nodes.values().map(Into::into).collect();
        answer(OpenSessionReply { session: state.sessions, timeout_ms: 400, view, nodes })
    }

    async fn renew_session(
        &self,
        request: Request<RenewSessionRequest>,
    ) -> Answer<RenewSessionReply> {
        self.lead().await?;
        let session = SessionId(request.into_inner().session);
        let open = !self.cluster.state.lock().closed.contains(&session);
        answer(RenewSessionReply { open })
    }

    async fn close_session(
        &self,
        request: Request<CloseSessionRequest>,
    ) -> Answer<CloseSessionReply> {
        self.lead().await?;
        self.cluster.close_session(SessionId(request.into_inner().session));
        answer(CloseSessionReply {})
    }

    async fn get_cluster(&self, _: Request<GetClusterRequest>) -> Answer<GetClusterReply> {
        self.lead().await?;
        let state = self.cluster.state.lock();
        let whole = EndedCheckpoint { checkpoint: CHECKPOINT.into(), ..Default::default() };
        let checkpoints = JobCheckpoints { whole: Some(whole), ..JobCheckpoints::default() };
        let jobs = state.view.iter().map(|view| JobStatus {
            view: Some(view.into()),
            checkpoints: Some(checkpoints.clone()),
            ..JobStatus::default()
        });
        answer(GetClusterReply { jobs: jobs.collect(), ..GetClusterReply::default() })
    }

    async fn register_server(
        &self,
        _: Request<RegisterServerRequest>,
    ) -> Answer<RegisterServerReply> {
        Err(Status::unimplemented("not played"))
    }

    async fn heartbeat(&self, _: Request<HeartbeatRequest>) -> Answer<HeartbeatReply> {
        Err(Status::unimplemented("not played"))
    }

    async fn change_in_sync(&self, _: Request<ChangeInSyncRequest>) -> Answer<ChangeInSyncReply> {
        Err(Status::unimplemented("not played"))
    }

    async fn delete_job(&self, _: Request<DeleteJobRequest>) -> Answer<DeleteJobReply> {
        self.lead().await?;
        self.cluster.state.lock().view = None;
        self.cluster.changed();
        answer(DeleteJobReply {})
    }

    async fn label_job(&self, _: Request<LabelJobRequest>) -> Answer<LabelJobReply> {
        Err(Status::unimplemented("not played"))
    }

    async fn create_checkpoint(
        &self,
        _: Request<CreateCheckpointRequest>,
    ) -> Answer<CreateCheckpointReply> {
        self.lead().await?;
        let mut state = self.cluster.state.lock();
        state.checkpoints_asked += 1;
        if state.checkpoints_in_the_way > 0 {
            state.checkpoints_in_the_way -= 1;
            return Err(Status::aborted("another one is being taken"));
        }
        answer(CreateCheckpointReply { checkpoint: CHECKPOINT.into(), chain: 0 })
    }

    async fn report_saved(&self, _: Request<ReportSavedRequest>) -> Answer<ReportSavedReply> {
        Err(Status::unimplemented("not played"))
    }

    async fn schedule_checkpoints(
        &self,
        _: Request<ScheduleCheckpointsRequest>,
    ) -> Answer<ScheduleCheckpointsReply> {
        Err(Status::unimplemented("not played"))
    }

    async fn restore_job(&self, _: Request<RestoreJobRequest>) -> Answer<RestoreJobReply> {
        Err(Status::unimplemented("not played"))
    }

    async fn define_ledger(&self, _: Request<DefineLedgerRequest>) -> Answer<DefineLedgerReply> {
        Err(Status::unimplemented("not played"))
    }

    async fn advance_ledger(&self, _: Request<AdvanceLedgerRequest>) -> Answer<AdvanceLedgerReply> {
        Err(Status::unimplemented("not played"))
    }
}
