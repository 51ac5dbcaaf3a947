//! The `Clock` service: sessions tell shard 0 how far they are and wait for each other there, and bring the ends of rounds to all shards.

use std::collections::BTreeSet;
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

/// A coordinator that does not say for this long whether there is a session is passed over.
const ASK_PATIENCE: Duration = Duration::from_secs(1);

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
        let deciding = self.decided(&request, job, round);
        let stopping = || Status::unavailable("the server stops");
        let decided = self.stop.run_until_cancelled(deciding).await.ok_or_else(stopping)?;
        // First all are applied, then all are waited for: their members work at the same time.
        let begun: Vec<_> = request
            .parts
            .iter()
            .map(|part| {
                let key = ShardKey { job, shard: ShardId(part.shard) };
                let (life, hosted) = self.hosted(key, request.incarnation)?;
                let ticket = end_round(&life, &hosted, Epoch(part.epoch), decided.clone()?)?;
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

    /// The round as shard 0 decided it, where a shard that is asked does not know of it: what the request says of its members is believed nowhere.
    async fn decided(
        &self,
        request: &v1::EndRoundRequest,
        job: JobId,
        round: Round,
    ) -> Result<Round, Declined> {
        let mut shards = request.parts.iter().map(|part| ShardId(part.shard));
        let behind = shards.find_map(|shard| {
            let (life, hosted) = self.hosted(ShardKey { job, shard }, request.incarnation).ok()?;
            let last = hosted.shard.lock().state().board().last_round().number;
            (last < round.number).then_some(life)
        });
        match behind {
            Some(life) => life.decided(job, round.number).await,
            None => Ok(Round { members: BTreeSet::new(), ..round }),
        }
    }
}

/// Whether a session has, or had, a seat here, or the coordinators know it: one that there never was would be waited for, and no committed decision would ever end it.
async fn is_one(
    life: &Arc<Life>,
    hosted: &Arc<Hosted>,
    session: SessionId,
) -> Result<bool, tonic::Status> {
    if hosted.shard.lock().state().board().knows(session) {
        return Ok(true);
    }
    let (job, session) = (hosted.key.job.0, session.0);
    let asked = life.process.coordinators.call(ASK_PATIENCE, |mut client| async move {
        let request = v1::RenewSessionRequest { job, session, progress: None };
        client.renew_session(request).await
    });
    Ok(asked.await?.into_inner().open)
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
    let v1::AdvanceRequest { epoch, view_version, clock, contributes, leaves, seat, .. } = *request;
    let mut told = Some(Told { clock, contributes, leaves, seat });
    let serves = hosted.shard.lock().look(Epoch(epoch), session, life.lease.contact());
    match serves {
        Advanced::Declined(declined) => return advance_declined(declined),
        Advanced::SessionClosed => return AdvanceResult::SessionClosed(v1::SessionClosed {}),
        Advanced::Seated(..) => {}
    }
    // Also for who leaves: that is remembered too.
    match is_one(life, hosted, session).await {
        Ok(true) => {}
        Ok(false) => return AdvanceResult::SessionClosed(v1::SessionClosed {}),
        Err(_) => return advance_declined(Declined::Retry(v1::RetryReason::NotReady)),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::tests::fixture::{SESSION, server};

    #[tokio::test]
    async fn a_session_that_nobody_vouches_for_gets_no_seat_and_one_that_is_known_needs_nobody() {
        let (life, _) = crate::hostile::serving();
        let hosted = life.all().pop().expect("shard 0");
        let request = |session| v1::AdvanceRequest {
            job: hosted.key.job.0,
            incarnation: server(1).incarnation.0,
            epoch: 1,
            session,
            view_version: 1,
            seat: 1,
            ..Default::default()
        };
        // No coordinator answers here.
        let not_ready = v1::Retry { reason: v1::RetryReason::NotReady.into() };
        let made_up = request(1 << 40);
        for leaves in [false, true] {
            let answer = advance(&life, &hosted, &v1::AdvanceRequest { leaves, ..made_up }).await;
            assert_eq!(answer, AdvanceResult::Retry(not_ready));
        }
        let board = hosted.shard.lock().state().board().clone();
        assert!(board.seats().is_empty() && board.left().is_empty());
        let told = Told { seat: 1, ..Told::default() };
        let contact = life.lease.contact();
        life.with(&hosted, |shard| shard.advance((Epoch(1), 1), SESSION, told, contact));
        let answer = advance(&life, &hosted, &request(SESSION.0)).await;
        assert!(matches!(answer, AdvanceResult::Seated(seated) if seated.may_begin));
        let leaves = v1::AdvanceRequest { leaves: true, ..request(SESSION.0) };
        advance(&life, &hosted, &leaves).await;
        assert!(hosted.shard.lock().state().board().seats().is_empty());
        let back = v1::AdvanceRequest { seat: 2, ..request(SESSION.0) };
        let answer = advance(&life, &hosted, &back).await;
        assert!(matches!(answer, AdvanceResult::Seated(_)), "it had a seat before");
    }

    #[tokio::test]
    async fn the_end_of_a_round_is_believed_from_shard_0_alone() {
        let (life, current) = crate::hostile::serving();
        let service = Service { current, stop: CancellationToken::new() };
        let hosted = life.all().pop().expect("shard 0");
        let job = hosted.key.job;
        let request = v1::EndRoundRequest {
            job: job.0,
            incarnation: server(1).incarnation.0,
            round: Some(v1::Round { number: 1, members: vec![SESSION.0] }),
            parts: vec![v1::RoundPart { shard: 0, epoch: 1 }],
        };
        let round = end_round_request(&request).expect("well formed");
        let not_ready = Declined::Retry(v1::RetryReason::NotReady);
        let decided = service.decided(&request, job, round.clone()).await;
        assert_eq!(decided, Err(not_ready), "nobody decided it");
        let view = crate::shard::tests::fixture::changed(&life.view(job).expect("known"), |view| {
            view.version += 1;
            view.consistency = "sync".parse().expect("a mode");
        });
        life.on_view(downpour_core::view::JobView::clone(&view));
        let tell = |session, clock| {
            let told = Told { clock, contributes: clock > 0, leaves: false, seat: 1 };
            let contact = life.lease.contact();
            let session = SessionId(session);
            life.with(&hosted, |shard| shard.advance((Epoch(1), 1), session, told, contact));
        };
        [(3, 0), (4, 0), (3, 1), (4, 1)]
            .into_iter()
            .for_each(|(session, clock)| tell(session, clock));
        let members = [SessionId(3), SessionId(4)].into();
        assert_eq!(life.decided(job, 1).await, Ok(Round { number: 1, members }));
        assert_eq!(life.decided(job, 2).await, Err(not_ready));
    }
}
