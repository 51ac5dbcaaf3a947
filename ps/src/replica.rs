//! Other servers replicate to this one; over the `Replica` service they fence it, fetch from it and copy to it.

use std::pin::Pin;
use std::sync::Arc;

use downpour_core::id::{Epoch, JobId, Lsn, ServerRef, ShardId};
use downpour_proto::transport::MESSAGE_BYTES_TARGET;
use downpour_proto::v1::replica_server::Replica;
use downpour_proto::{Invalid, convert, v1};
use futures::{Stream, stream};
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::hosted::ShardKey;
use crate::life::Life;
use crate::membership::Current;
use crate::pace::Pace;
use crate::receive;
use crate::record::Record;
use crate::service::meant_for;
use crate::shard::{Ack, Check, Contact, Declined, Incoming};

/// Answers other servers.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) current: Current,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    fn life(&self, incarnation: u64) -> Result<Arc<Life>, Status> {
        addressed(&self.current, incarnation)
    }
}

/// The life that a message is meant for. Others may hear of a registration before this process does: a life that may be about to begin is not over.
fn addressed(current: &Current, incarnation: u64) -> Result<Arc<Life>, Status> {
    let life = current.load_full().filter(|life| life.me.incarnation.0 >= incarnation);
    let life = life.ok_or_else(|| {
        Status::unavailable(format!("incarnation {incarnation} does not live here yet"))
    })?;
    if meant_for(Some(&life), incarnation) {
        return Ok(life);
    }
    Err(Status::failed_precondition(format!(
        "incarnation {incarnation} does not live here any more"
    )))
}

#[tonic::async_trait]
impl Replica for Service {
    type FetchLogStream = Replies<v1::FetchLogReply>;

    async fn fence(
        &self,
        request: Request<v1::FenceRequest>,
    ) -> Result<Response<v1::FenceReply>, Status> {
        let request = request.into_inner();
        let life = self.life(request.incarnation)?;
        let candidate = convert::server("candidate", request.candidate)?;
        let epoch = epoch(request.epoch)?;
        let key = ShardKey { job: JobId(request.job), shard: ShardId(request.shard) };
        let Some(hosted) = life.hosted(key) else {
            return Ok(Response::new(v1::FenceReply { not_ready: true, ..Default::default() }));
        };
        let fenced = life.with(&hosted, |shard| shard.fence(epoch, candidate));
        info!(job = %key.job, shard = %key.shard, %epoch, %candidate, last = %fenced.last, "fenced");
        Ok(Response::new(v1::FenceReply {
            epoch: fenced.epoch.0,
            last_lsn: fenced.last.0,
            not_ready: fenced.not_ready,
        }))
    }

    async fn copy(
        &self,
        request: Request<Streaming<v1::CopyRequest>>,
    ) -> Result<Response<v1::CopyReply>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.head);
        let head = first.ok_or_else(|| Invalid::new("head", "is not given"))?;
        let life = self.life(head.incarnation)?;
        let over = || Status::failed_precondition("this incarnation is over");
        let copying = life.token.run_until_cancelled(receive::copy(&life, head, requests));
        let last = copying.await.ok_or_else(over)??;
        Ok(Response::new(v1::CopyReply { last_lsn: last.0 }))
    }

    async fn fetch_log(
        &self,
        request: Request<v1::FetchLogRequest>,
    ) -> Result<Response<Self::FetchLogStream>, Status> {
        let request = request.into_inner();
        let life = self.life(request.incarnation)?;
        let epoch = epoch(request.epoch)?;
        let key = ShardKey { job: JobId(request.job), shard: ShardId(request.shard) };
        let missing = || Status::not_found(format!("shard {} is not here", key.shard));
        let hosted = life.hosted(key).ok_or_else(missing)?;
        let after = Lsn(request.after_lsn);
        let replies = stream::try_unfold(after, move |after| {
            let fetched = hosted.shard.lock().fetch(epoch, after, MESSAGE_BYTES_TARGET);
            async move {
                let records = fetched.map_err(|e| Status::out_of_range(e.to_string()))?;
                let Some(last) = records.last().map(|record| record.lsn) else { return Ok(None) };
                let records = records.iter().map(|record| (&**record).into()).collect();
                Ok(Some((v1::FetchLogReply { records }, last)))
            }
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn last_round(
        &self,
        request: Request<v1::LastRoundRequest>,
    ) -> Result<Response<v1::LastRoundReply>, Status> {
        let request = request.into_inner();
        let life = self.life(request.incarnation)?;
        let deciding = life.decided_here(JobId(request.job), epoch(request.epoch)?);
        let over = || Status::failed_precondition("this incarnation is over");
        match life.token.run_until_cancelled(deciding).await.ok_or_else(over)? {
            Ok(round) => Ok(Response::new(v1::LastRoundReply { round: Some((&round).into()) })),
            Err(Declined::Redirect(_)) => Err(Status::failed_precondition("it is not here")),
            Err(Declined::Retry(reason)) => Err(Status::unavailable(reason.as_str_name())),
        }
    }
}

/// Follows records as they came in one message. It is answered before the next is read: a connection is the order of the log.
///
/// # Errors
/// Another incarnation is meant, or nobody says whose records they are.
pub(crate) async fn take(
    current: &Current,
    request: v1::ReplicateRequest,
) -> Result<v1::ReplicateReply, Status> {
    let life = addressed(current, request.incarnation)?;
    let source = convert::server("source", request.source)?;
    let mut shards = Vec::with_capacity(request.shards.len());
    let mut pace = Pace::start();
    for shard in request.shards {
        shards.push(replicate(&life, source, life.lease.contact(), shard));
        pace.rest().await;
    }
    Ok(v1::ReplicateReply { shards })
}

pub(crate) fn replicate(
    life: &Arc<Life>,
    source: ServerRef,
    contact: Contact,
    shard: v1::ShardRecords,
) -> v1::ShardAck {
    let key = ShardKey { job: JobId(shard.job), shard: ShardId(shard.shard) };
    let ack = |ack: Ack| v1::ShardAck {
        job: key.job.0,
        shard: key.shard.0,
        epoch: ack.epoch.0,
        last_lsn: ack.last.0,
        not_ready: ack.not_ready,
        differs: ack.differs,
    };
    let unknown = Ack { epoch: Epoch(0), last: Lsn::ZERO, not_ready: true, differs: false };
    let Some(hosted) = life.hosted(key) else { return ack(unknown) };
    let records = shard.records.into_iter().map(Record::try_from).collect::<Result<Vec<_>, _>>();
    let incoming = records.and_then(|records| {
        let check = shard.check.map(|check| Check { lsn: Lsn(check.lsn), digest: check.digest });
        let (epoch, commit) = (epoch(shard.epoch)?, Lsn(shard.commit_lsn));
        Ok(Incoming { epoch, source, commit, records, check })
    });
    let incoming = match incoming {
        Ok(incoming) => incoming,
        Err(invalid) => {
            warn!(job = %key.job, shard = %key.shard, %source, %invalid, "records cannot be read");
            return ack(unknown);
        }
    };
    let (answer, followed) = life.with(&hosted, |shard| shard.replicate(incoming, contact));
    if let Err(problem) = followed {
        warn!(job = %key.job, shard = %key.shard, %source, %problem, "records cannot be applied");
    }
    ack(answer)
}

fn epoch(epoch: u64) -> Result<Epoch, Invalid> {
    if epoch == 0 || Epoch(epoch) > Lsn::EPOCH_MAX {
        return Err(Invalid::new("epoch", "is out of range"));
    }
    Ok(Epoch(epoch))
}
