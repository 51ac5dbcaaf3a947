//! What operators ask: it is checked one by one, so that each refusal says why.

use std::collections::BTreeMap;
use std::time::Duration;

use downpour_core::id::{JobId, NodeId};
use downpour_core::spec::check_range;
use downpour_proto::v1::operator_server::Operator;
use downpour_proto::{Invalid, v1};
use tonic::{Request, Response, Status};
use tracing::info;

use super::{Answer, Service, mismatch};
use crate::balance;
use crate::command::{Body, check_address};
use crate::raft::{Wish, WishKind};
use crate::room::Room;
use crate::state::moves::{self, Placement, Placing};
use crate::state::{Cluster, Reply};

/// For another member to take over; it has the log already, or nearly.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(2);

#[tonic::async_trait]
impl Operator for Service {
    async fn plan_placement(
        &self,
        request: Request<v1::PlanPlacementRequest>,
    ) -> Answer<v1::PlanPlacementReply> {
        let v1::PlanPlacementRequest { job, drain } = request.into_inner();
        let job = Some(job).filter(|job| *job != 0).map(JobId);
        let cluster = self.read().await?;
        if drain != 0 {
            let node = NodeId(drain);
            let drained = cluster.drained(node);
            let drained =
                drained.ok_or_else(|| Status::not_found(format!("there is no node {node}")))?;
            let mut room = Room::new(&drained, &self.liveness.lock());
            let placements = moves::evacuations(&drained, &BTreeMap::new(), &mut room)
                .into_iter()
                .map(Into::into)
                .collect();
            return Ok(Response::new(v1::PlanPlacementReply { placements, shares: Vec::new() }));
        }
        if let Some(missing) = job.filter(|job| !cluster.jobs.contains_key(job)) {
            return Err(Status::not_found(format!("there is no job {missing}")));
        }
        let planned = balance::plan(&cluster, &self.liveness.lock(), job, balance::BY_HAND);
        let shares = planned.shares.into_iter().map(|(server, before, after)| v1::ServerShare {
            server: Some(server.into()),
            before,
            after,
        });
        Ok(Response::new(v1::PlanPlacementReply {
            shares: shares.collect(),
            placements: planned.placements.into_iter().map(Into::into).collect(),
        }))
    }

    async fn place_shards(
        &self,
        request: Request<v1::PlaceShardsRequest>,
    ) -> Answer<v1::PlaceShardsReply> {
        let request = request.into_inner();
        let cluster = self.read().await?;
        let placements = request.placements.iter().cloned().map(Placement::try_from);
        let placements = placements.collect::<Result<Vec<_>, _>>()?;
        let mut room = Room::new(&cluster, &self.liveness.lock());
        let checked =
            placements.iter().map(|one| check(&cluster, one).within(&mut room, &cluster, one));
        let checked: Vec<_> = checked.collect();
        if let [Check::Impossible(problem)] = checked.as_slice() {
            return Err(Status::failed_precondition(problem.clone()));
        }
        let due = request.placements.into_iter().zip(&checked);
        let due: Vec<_> =
            due.filter(|(_, check)| **check == Check::Due).map(|(one, _)| one).collect();
        self.placer.place(due).await.map_err(|error| self.status(error))?;
        // Of those that were passed over, for something changed meanwhile, the state now says it.
        let cluster = self.handle.cluster();
        let problem = |(placement, before): (&Placement, Check)| match before {
            Check::Impossible(problem) => problem,
            Check::Done => String::new(),
            Check::Due => match check(&cluster, placement) {
                Check::Done => String::new(),
                Check::Due => "it was not made: ask again".into(),
                Check::Impossible(problem) => problem,
            },
        };
        let problems = placements.iter().zip(checked).map(problem).collect();
        Ok(Response::new(v1::PlaceShardsReply { problems }))
    }

    async fn admit_node(
        &self,
        request: Request<v1::AdmitNodeRequest>,
    ) -> Answer<v1::AdmitNodeReply> {
        self.propose(Body::Admit(request.into_inner())).await?;
        Ok(Response::new(v1::AdmitNodeReply {}))
    }

    async fn remove_node(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Answer<v1::RemoveNodeReply> {
        self.propose(Body::RemoveNode(request.into_inner())).await?;
        Ok(Response::new(v1::RemoveNodeReply {}))
    }

    async fn get_events(
        &self,
        _request: Request<v1::GetEventsRequest>,
    ) -> Answer<v1::GetEventsReply> {
        let cluster = self.read().await?;
        let events = cluster.events.iter().map(Into::into).collect();
        Ok(Response::new(v1::GetEventsReply { events }))
    }

    async fn set_consistency(
        &self,
        request: Request<v1::SetConsistencyRequest>,
    ) -> Answer<v1::SetConsistencyReply> {
        let request = request.into_inner();
        let job = request.job;
        let reply = self.propose(Body::SetConsistency(request)).await?;
        let Reply::Viewed(version) = reply else { return Err(mismatch(&reply)) };
        info!(job, version, "consistency");
        Ok(Response::new(v1::SetConsistencyReply { version }))
    }

    async fn add_coordinator(
        &self,
        request: Request<v1::AddCoordinatorRequest>,
    ) -> Answer<v1::AddCoordinatorReply> {
        let v1::AddCoordinatorRequest { id, address, dry_run } = request.into_inner();
        check_address("address", &address)?;
        let (id, added) = self.change_members(WishKind::Add(id, address), dry_run).await?;
        Ok(Response::new(v1::AddCoordinatorReply { id, added }))
    }

    async fn remove_coordinator(
        &self,
        request: Request<v1::RemoveCoordinatorRequest>,
    ) -> Answer<v1::RemoveCoordinatorReply> {
        let v1::RemoveCoordinatorRequest { id, dry_run } = request.into_inner();
        check_range("id", id, 1, u64::MAX).map_err(Invalid::from)?;
        let (_, removed) = self.change_members(WishKind::Remove(id), dry_run).await?;
        Ok(Response::new(v1::RemoveCoordinatorReply { removed }))
    }

    async fn pause_job(&self, request: Request<v1::PauseJobRequest>) -> Answer<v1::PauseJobReply> {
        let reply = self.propose(Body::PauseJob(request.into_inner())).await?;
        let Reply::Changed(changed) = reply else { return Err(mismatch(&reply)) };
        Ok(Response::new(v1::PauseJobReply { changed }))
    }

    async fn evict_session(
        &self,
        request: Request<v1::EvictSessionRequest>,
    ) -> Answer<v1::EvictSessionReply> {
        let reply = self.propose(Body::EvictSession(request.into_inner())).await?;
        let Reply::Changed(evicted) = reply else { return Err(mismatch(&reply)) };
        Ok(Response::new(v1::EvictSessionReply { evicted }))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Answer<v1::TransferLeaderReply> {
        let v1::TransferLeaderRequest { from, to } = request.into_inner();
        check_range("from", from, 1, u64::MAX).map_err(Invalid::from)?;
        let mut standing = self.handle.watch_status();
        let reply = self.handle.transfer_leader(from, to).await;
        let reply = reply.map_err(|error| self.status(error))?;
        let Reply::Member { id, changed } = reply else { return Err(mismatch(&reply)) };
        if !changed {
            return Ok(Response::new(v1::TransferLeaderReply { leader: id }));
        }
        let handed_over = standing.wait_for(|status| status.leader.is_some() && !status.leads());
        let leader = match tokio::time::timeout(TRANSFER_PATIENCE, handed_over).await {
            Ok(Ok(status)) => status.leader.unwrap_or(0),
            Ok(Err(_)) => return Err(Status::unavailable("this member is stopping")),
            Err(_) => {
                return Err(Status::unavailable(format!("member {id} did not take over in time")));
            }
        };
        Ok(Response::new(v1::TransferLeaderReply { leader }))
    }
}

impl Service {
    async fn change_members(&self, kind: WishKind, dry_run: bool) -> Result<(u64, bool), Status> {
        let reply = self.handle.change_members(Wish { kind, dry_run }).await;
        match reply.map_err(|error| self.status(error))? {
            Reply::Member { id, changed } => Ok((id, changed)),
            reply => Err(mismatch(&reply)),
        }
    }
}

/// How a placement stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Check {
    Due,
    /// It was made: this is a repeat, or somebody else asked for the same.
    Done,
    Impossible(String),
}

impl Check {
    /// What is due and goes to a server without room for it is not.
    fn within(self, room: &mut Room, cluster: &Cluster, placement: &Placement) -> Self {
        let Placement { job, shard, placing: Placing::Move(moving), .. } = *placement else {
            return self;
        };
        if self != Check::Due {
            return self;
        }
        match room.fits(moving.to, job, shard) {
            Ok(()) => {
                room.take(moving.to, job, shard);
                self
            }
            Err((free, bytes)) => Check::Impossible(format!(
                "{} has room for {free} bytes of copies, and shard {shard} takes {bytes}",
                cluster.name(moving.to)
            )),
        }
    }
}

fn check(cluster: &Cluster, placement: &Placement) -> Check {
    let Placement { job: id, shard, placing, .. } = placement;
    let Some(job) = cluster.job(*id) else {
        return Check::Impossible(format!("there is no job {id}"));
    };
    let name = &job.view.spec.name;
    let said = |problem: &str| Check::Impossible(format!("shard {shard} of job {name}: {problem}"));
    let Some(route) = job.view.route(*shard) else { return said("there is no such shard") };
    if (route.epoch, route.set_version) == (placement.epoch, placement.set_version) {
        return cluster.placed(route, *placing).map_or_else(|why| said(&why), |_| Check::Due);
    }
    let has = |server| route.in_sync.contains(&server);
    let done = match *placing {
        Placing::Move(moving) => {
            route.moving == Some(moving) || (has(moving.to) && !has(moving.from))
        }
        Placing::Promote(to) => route.primary == Some(to),
        Placing::Cancel => route.moving.is_none(),
    };
    if done { Check::Done } else { said("it has changed meanwhile: look again") }
}
