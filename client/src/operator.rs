//! Calls of operators: where shards are.

use downpour_core::consistency::{Consistency, Mode};
use downpour_core::id::{JobId, NodeId, SessionId, VariableId};
use downpour_core::view::Admission;
use downpour_proto::group::Connection;
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::v1;
use downpour_proto::v1::operator_client::OperatorClient;

use crate::{Coordinators, Error};

fn operator(connection: Connection) -> OperatorClient<Connection> {
    OperatorClient::new(connection)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

impl Coordinators {
    /// Where shards should go by what is measured: those of one job, or of all. Changes nothing.
    ///
    /// # Errors
    /// There is no such job.
    pub async fn plan_placement(
        &self,
        job: Option<JobId>,
    ) -> Result<v1::PlanPlacementReply, Error> {
        self.plan(v1::PlanPlacementRequest { job: job.map_or(0, |job| job.0), drain: 0 }).await
    }

    /// What would move if a server were drained. Changes nothing.
    ///
    /// # Errors
    /// There is no such server.
    pub async fn plan_drain(&self, node: NodeId) -> Result<v1::PlanPlacementReply, Error> {
        self.plan(v1::PlanPlacementRequest { job: 0, drain: node.0 }).await
    }

    async fn plan(
        &self,
        request: v1::PlanPlacementRequest,
    ) -> Result<v1::PlanPlacementReply, Error> {
        self.call_over("plan the placement", |channel| async move {
            operator(channel).plan_placement(request).await
        })
        .await
    }

    /// Begins moves, changes primaries, undoes moves. Says of each why it was passed over, if it was.
    ///
    /// # Errors
    /// It was one alone, and cannot be; or some changed meanwhile.
    pub async fn place_shards(
        &self,
        placements: Vec<v1::ShardPlacement>,
    ) -> Result<Vec<String>, Error> {
        let request = v1::PlaceShardsRequest { placements };
        let reply = self
            .call_over("place shards", |channel| {
                let request = request.clone();
                async move { operator(channel).place_shards(request).await }
            })
            .await?;
        Ok(reply.problems)
    }

    /// Says whether a server is given copies.
    ///
    /// # Errors
    /// There is no such server.
    pub async fn admit_node(&self, node: NodeId, admission: Admission) -> Result<(), Error> {
        let admission = v1::Admission::from(admission).into();
        let request = v1::AdmitNodeRequest { node: node.0, admission };
        self.call_over("admit the node", |channel| async move {
            operator(channel).admit_node(request).await
        })
        .await
        .map(drop)
    }

    /// Forgets a server that is gone and holds nothing.
    ///
    /// # Errors
    /// It lives, or holds shards.
    pub async fn remove_node(&self, node: NodeId) -> Result<(), Error> {
        let request = v1::RemoveNodeRequest { node: node.0 };
        self.call_over("remove the node", |channel| async move {
            operator(channel).remove_node(request).await
        })
        .await
        .map(drop)
    }

    /// What was decided of late, oldest first.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn events(&self) -> Result<Vec<v1::ClusterEvent>, Error> {
        let reply = self
            .call_over("read the events", |channel| async move {
                operator(channel).get_events(v1::GetEventsRequest {}).await
            })
            .await?;
        Ok(reply.events)
    }

    /// Adds a member to the group (number 0: the next), or says whether it could be. Gives its number, and false where it is a member already.
    ///
    /// # Errors
    /// It cannot be added now.
    pub async fn add_coordinator(
        &self,
        request: v1::AddCoordinatorRequest,
    ) -> Result<v1::AddCoordinatorReply, Error> {
        self.call_over("add the coordinator", |channel| {
            let request = request.clone();
            async move { operator(channel).add_coordinator(request).await }
        })
        .await
    }

    /// Removes a member from the group, or says whether it could be. False: it is none any more.
    ///
    /// # Errors
    /// It cannot be removed now.
    pub async fn remove_coordinator(
        &self,
        request: v1::RemoveCoordinatorRequest,
    ) -> Result<bool, Error> {
        let reply = self
            .call_over("remove the coordinator", |channel| async move {
                operator(channel).remove_coordinator(request).await
            })
            .await?;
        Ok(reply.removed)
    }

    /// Has another member lead (0: whoever is furthest), unless somebody else than `from` does already. Gives who leads.
    ///
    /// # Errors
    /// It cannot.
    pub async fn transfer_leader(&self, from: u64, to: u64) -> Result<u64, Error> {
        let request = v1::TransferLeaderRequest { from, to };
        let reply = self
            .call_over("hand over leadership", |channel| async move {
                operator(channel).transfer_leader(request).await
            })
            .await?;
        Ok(reply.leader)
    }

    /// Has the workers of a job hold before their next step, or go on. False: it was so before.
    ///
    /// # Errors
    /// There is no such job.
    pub async fn pause_job(&self, job: JobId, paused: bool) -> Result<bool, Error> {
        let request = v1::PauseJobRequest { job: job.0, paused };
        let reply = self
            .call_over("pause the job", |channel| async move {
                operator(channel).pause_job(request).await
            })
            .await?;
        Ok(reply.changed)
    }

    /// Closes a session for good; its worker ends with [`Error::Evicted`]. False: it was closed before.
    ///
    /// # Errors
    /// There is no such job, or never was such a session.
    pub async fn evict_session(&self, job: JobId, session: SessionId) -> Result<bool, Error> {
        let request = v1::EvictSessionRequest { job: job.0, session: session.0 };
        let reply = self
            .call_over("evict the session", |channel| async move {
                operator(channel).evict_session(request).await
            })
            .await?;
        Ok(reply.evicted)
    }

    /// Says how far the workers of a job may drift apart. Gives the version of the job's view that has it.
    ///
    /// # Errors
    /// There is no such job or variable.
    pub async fn set_consistency(
        &self,
        job: JobId,
        consistency: &Consistency,
    ) -> Result<u64, Error> {
        let all = v1::set_consistency_request::Change::All(consistency.into());
        self.change_consistency(job, all).await
    }

    /// The same for one variable; the others stay as they are.
    ///
    /// # Errors
    /// There is no such job or variable.
    pub async fn set_mode(
        &self,
        job: JobId,
        variable: VariableId,
        mode: Mode,
    ) -> Result<u64, Error> {
        let of = v1::VariableMode { variable: variable.0, mode: Some(mode.into()) };
        self.change_consistency(job, v1::set_consistency_request::Change::Variable(of)).await
    }

    async fn change_consistency(
        &self,
        job: JobId,
        change: v1::set_consistency_request::Change,
    ) -> Result<u64, Error> {
        let request = v1::SetConsistencyRequest { job: job.0, change: Some(change) };
        let reply = self
            .call_over("set the consistency", |channel| {
                let request = request.clone();
                async move { operator(channel).set_consistency(request).await }
            })
            .await?;
        Ok(reply.version)
    }
}
