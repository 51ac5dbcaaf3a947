//! The `Clock` service: sessions tell shard 0 how far they are and wait for each other there, and bring the ends of rounds to all shards.

use std::sync::Arc;
use std::time::Duration;

use downpour_core::clocks::Round;
use downpour_core::id::{Epoch, JobId, SessionId, ShardId};
use downpour_proto::clock::{advance_request, end_round_request};
use downpour_proto::v1;
use downpour_proto::v1::advance_reply::Result as AdvanceResult;
use downpour_proto::v1::clock_server::Clock;
use downpour_proto::v1::round_part_reply::Result as RoundResult;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::hosted::{Hosted, ShardKey};
use crate::life::Life;
use crate::membership::Current;
use crate::service::meant_for;
use crate::shard::{Advanced, CLOCK_SHARD, Declined, Redirect, Standing, Ticket, Told};

/// Answers workers.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) current: Current,
    /// Cancelled when the process stops.
    pub(crate) stop: CancellationToken,
}

#[tonic::async_trait]
impl Clock for Service {
    async fn advance(
        &self,
        request: Request<v1::AdvanceRequest>,
    ) -> Result<Response<v1::AdvanceReply>, Status> {
        let request = request.into_inner();
        advance_request(&request)?;
        let key = ShardKey { job: JobId(request.job), shard: CLOCK_SHARD };
        let result = match self.hosted(key, request.incarnation) {
            Ok((life, hosted)) => {
                let stopping = || Status::unavailable("the server stops");
                let advancing = advance(&life, &hosted, &request);
                let told = self.stop.run_until_cancelled(advancing).await;
                told.ok_or_else(stopping)?
            }
            Err(declined) => advance_declined(declined),
        };
        Ok(Response::new(v1::AdvanceReply { result: Some(result) }))
    }

    async fn end_round(
        &self,
        request: Request<v1::EndRoundRequest>,
    ) -> Result<Response<v1::EndRoundReply>, Status> {
        let request = request.into_inner();
        let round = end_round_request(&request)?;
        let job = JobId(request.job);
        // First all are applied, then all are waited for: their members work at the same time.
        let begun: Vec<_> = request
            .parts
            .iter()
            .map(|part| {
                let key = ShardKey { job, shard: ShardId(part.shard) };
                let (life, hosted) = self.hosted(key, request.incarnation)?;
                let ticket = end_round(&life, &hosted, Epoch(part.epoch), round.clone())?;
                Ok((life, hosted, ticket))
            })
            .collect();
        let mut parts = Vec::with_capacity(begun.len());
        for (part, begun) in request.parts.iter().zip(begun) {
            let ended = match begun {
                Ok((life, hosted, ticket)) => {
                    hosted.settled(&ticket, || life.lease.contact()).await
                }
                Err(declined) => Err(declined),
            };
            let result = match ended {
                Ok(()) => RoundResult::Done(true),
                Err(Declined::Redirect(redirect)) => RoundResult::Redirect(redirect.into()),
                Err(Declined::Retry(reason)) => {
                    RoundResult::Retry(v1::Retry { reason: reason.into() })
                }
            };
            parts.push(v1::RoundPartReply { shard: part.shard, result: Some(result) });
        }
        Ok(Response::new(v1::EndRoundReply { parts }))
    }
}

impl Service {
    fn hosted(
        &self,
        key: ShardKey,
        incarnation: u64,
    ) -> Result<(Arc<Life>, Arc<Hosted>), Declined> {
        let life = self.current.load_full();
        let Some(life) = life else { return Err(Declined::Redirect(Redirect::UNKNOWN)) };
        if !meant_for(Some(&life), incarnation) {
            return Err(Declined::Redirect(life.another_life(key)));
        }
        match life.hosted(key) {
            Some(hosted) => Ok((life, hosted)),
            None => Err(life.elsewhere(key)),
        }
    }
}

fn end_round(
    life: &Arc<Life>,
    hosted: &Arc<Hosted>,
    epoch: Epoch,
    round: Round,
) -> Result<Ticket, Declined> {
    let contact = life.lease.contact();
    life.with(hosted, |shard| shard.end_round(epoch, round, contact))
}

/// Takes note of what a session tells, and waits until it may go on or its patience is over. What is answered, every in-sync member has.
async fn advance(
    life: &Arc<Life>,
    hosted: &Arc<Hosted>,
    request: &v1::AdvanceRequest,
) -> AdvanceResult {
    let until = Instant::now() + Duration::from_millis(request.wait_ms.into());
    let session = SessionId(request.session);
    let v1::AdvanceRequest { epoch, view_version, clock, contributes, leaves, .. } = *request;
    let mut told = Some(Told { clock, contributes, leaves });
    let mut others = hosted.clocks.subscribe();
    loop {
        others.mark_unchanged();
        let contact = life.lease.contact();
        let basis = (Epoch(epoch), view_version);
        let advanced = life.with(hosted, |shard| match told.take() {
            Some(told) => shard.advance(basis, session, told, contact),
            None => shard.look(basis.0, session, contact),
        });
        let (ticket, standing) = match advanced {
            Advanced::Seated(ticket, standing) => (ticket, standing),
            Advanced::Declined(declined) => return advance_declined(declined),
            Advanced::SessionClosed => {
                return AdvanceResult::SessionClosed(v1::SessionClosed {});
            }
        };
        if let Err(declined) = hosted.settled(&ticket, || life.lease.contact()).await {
            return advance_declined(declined);
        }
        if standing.may_begin || leaves || timeout_at(until, others.changed()).await.is_err() {
            return AdvanceResult::Seated(seated(standing));
        }
    }
}

fn seated(standing: Standing) -> v1::Seated {
    let Standing { may_begin, clock, floor, counted, last_round, consistency, may_leave } =
        standing;
    v1::Seated {
        may_begin,
        clock,
        floor,
        counted,
        last_round: Some((&last_round).into()),
        consistency: Some((&consistency).into()),
        may_leave,
    }
}

fn advance_declined(declined: Declined) -> AdvanceResult {
    match declined {
        Declined::Redirect(redirect) => AdvanceResult::Redirect(redirect.into()),
        Declined::Retry(reason) => AdvanceResult::Retry(v1::Retry { reason: reason.into() }),
    }
}
