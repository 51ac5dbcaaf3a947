//! Takes pushes: what arrives on a stream is applied in its order and answered in its order, each request when all its parts have an outcome.

use std::sync::Arc;
use std::time::Instant;

use downpour_core::id::{Epoch, JobId, SessionId, ShardId};
use downpour_proto::v1::RetryReason;
use downpour_proto::v1::push_part_reply::Result as PushResult;
use downpour_proto::{Invalid, v1, validate};
use futures::{Stream, StreamExt};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::hosted::{Hosted, ShardKey};
use crate::life::{Life, Process};
use crate::membership::Current;
use crate::pace::Pace;
use crate::record::{Push, Update, fits_message};
use crate::reply::{outcome, push_declined, push_done};
use crate::round_room::RoundRoom;
use crate::service::meant_for;
use crate::shard::{Basis, Declined, Pushed, Redirect, Ticket};

/// Serves one stream. Requests that wait for the backups are bounded: beyond, the stream is not read, and HTTP/2 slows the client down.
pub(crate) fn serve(
    process: Arc<Process>,
    current: Current,
    mut requests: Streaming<v1::PushRequest>,
) -> impl Stream<Item = Result<v1::PushReply, Status>> {
    let (sender, receiver) = mpsc::channel(process.config.push_requests_max);
    let token = process.shutdown.token();
    let stop = token.clone();
    let shell = Arc::clone(&process);
    process.shutdown.spawn("push stream", async move {
        let reading = async {
            while let Some(request) = requests.message().await.transpose() {
                let taken = match request {
                    Ok(request) => take(&shell, &current, request).await,
                    Err(status) => Err(status),
                };
                let broken = taken.is_err();
                if sender.send(taken).await.is_err() || broken {
                    return;
                }
            }
        };
        stop.run_until_cancelled(reading).await;
    });
    ReceiverStream::new(receiver)
        .then(move |taken| {
            let process = Arc::clone(&process);
            async move { Ok(taken?.settle(&process).await) }
        })
        .take_until(token.cancelled_owned())
}

/// A request whose parts were all looked at.
#[derive(Debug)]
pub(crate) struct Taken {
    request: u64,
    arrived: Instant,
    parts: Vec<TakenPart>,
}

#[derive(Debug)]
struct TakenPart {
    shard: u32,
    sequence: u64,
    state: PartState,
}

#[derive(Debug)]
enum PartState {
    Over(PushResult),
    Waits(Arc<Life>, Arc<Hosted>, Ticket),
}

/// Applies what is to be applied of one request.
///
/// # Errors
/// The request is malformed: the stream ends, for what follows would be a gap.
pub(crate) async fn take(
    process: &Process,
    current: &Current,
    request: v1::PushRequest,
) -> Result<Taken, Status> {
    let arrived = Instant::now();
    validate::push_request(&request)?;
    request.parts.iter().try_for_each(fits_message)?;
    process.metrics.pushed_bytes.inc_by(request.encoded_len() as u64);
    let life = current.load_full();
    let mut taken = Taken { request: request.request, arrived, parts: Vec::new() };
    let header = Header {
        job: JobId(request.job),
        session: SessionId(request.session),
        clock: request.clock,
        view_version: request.view_version,
        for_this_life: meant_for(life.as_ref(), request.incarnation),
    };
    let mut pace = Pace::start();
    for part in request.parts {
        let (shard, sequence) = (part.shard, part.sequence);
        let state = header.take_part(life.as_ref(), part)?;
        taken.parts.push(TakenPart { shard, sequence, state });
        pace.rest().await;
    }
    process.metrics.apply_seconds.observe(arrived.elapsed().as_secs_f64());
    Ok(taken)
}

/// What the parts of a request share.
struct Header {
    job: JobId,
    session: SessionId,
    clock: u64,
    view_version: u64,
    for_this_life: bool,
}

impl Header {
    fn take_part(
        &self,
        life: Option<&Arc<Life>>,
        part: v1::PushPart,
    ) -> Result<PartState, Invalid> {
        let key = ShardKey { job: self.job, shard: ShardId(part.shard) };
        let declined = |declined| Ok(PartState::Over(push_declined(declined)));
        let Some(life) = life else {
            return declined(Declined::Redirect(Redirect::UNKNOWN));
        };
        if !self.for_this_life {
            return declined(Declined::Redirect(life.another_life(key)));
        }
        let Some(hosted) = life.hosted(key) else { return declined(life.elsewhere(key)) };
        if life.log_is_full() {
            return declined(Declined::Retry(RetryReason::Overloaded));
        }
        let updates = part.updates.into_iter().map(Update::unresolved);
        let mut push = Push {
            session: self.session,
            sequence: part.sequence,
            clock: self.clock,
            refusal: None,
            updates: updates.collect::<Result<_, _>>()?,
        };
        match life.round_room(key.job, &push) {
            RoundRoom::Enough => {}
            RoundRoom::Later => return declined(Declined::Retry(RetryReason::Overloaded)),
            RoundRoom::Never(refusal) => push.refusal = Some(refusal),
        }
        let basis = Basis {
            epoch: Epoch(part.epoch),
            numbering: Epoch(part.numbering),
            view_version: self.view_version,
            read: part.read.map(Into::into),
        };
        let contact = life.lease.contact();
        let room = life.process.memory.room();
        let pushed = life.with(&hosted, |shard| shard.push(basis, push, contact, room));
        Ok(match pushed {
            Pushed::Logged(ticket) => {
                if let Some(staleness) = ticket.staleness {
                    life.measured(&hosted, staleness);
                }
                PartState::Waits(Arc::clone(life), hosted, ticket)
            }
            Pushed::Declined(declined) => PartState::Over(push_declined(declined)),
            Pushed::Gap { expected, numbering } => {
                PartState::Over(PushResult::Gap(v1::Gap { expected, numbering: numbering.0 }))
            }
            Pushed::SessionClosed => {
                PartState::Over(PushResult::SessionClosed(v1::SessionClosed {}))
            }
        })
    }
}

impl Taken {
    /// Waits for the members, part by part, and makes the reply.
    pub(crate) async fn settle(self, process: &Process) -> v1::PushReply {
        let mut parts = Vec::with_capacity(self.parts.len());
        for TakenPart { shard, sequence, state } in self.parts {
            let result = match state {
                PartState::Over(result) => result,
                PartState::Waits(life, hosted, ticket) => {
                    let settled = hosted.settled(&ticket, || life.lease.contact()).await;
                    settled.map_or_else(push_declined, |()| push_done(&ticket))
                }
            };
            process.metrics.parts.with_label_values(&[outcome(&result)]).inc();
            parts.push(v1::PushPartReply { shard, sequence, result: Some(result) });
        }
        process.metrics.push_seconds.observe(self.arrived.elapsed().as_secs_f64());
        v1::PushReply { request: self.request, parts }
    }
}
