//! A parameter server: every optimizer is "add the gradient", rows begin at zero.

use std::pin::Pin;

use downpour_core::cells::{Refusal, RefusalReason, Verdict};
use downpour_core::id::{Lsn, ServerRef, SessionId, ShardId, VariableId};
use downpour_core::spec::{Shape, dense_blocks_on};
use downpour_core::tensor_bytes::{all_finite, floats};
use downpour_proto::tensor::{Keys, put_floats};
use downpour_proto::v1::shard_server::Shard;
use downpour_proto::v1::*;
use downpour_proto::{v1, validate};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::{Cluster, State};

#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) server: ServerRef,
    pub(crate) cluster: Cluster,
}

#[tonic::async_trait]
impl Shard for Server {
    type PushStream = Pin<Box<dyn Stream<Item = Result<PushReply, Status>> + Send>>;

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<PullReply>, Status> {
        let request = request.into_inner();
        validate::pull_request(&request)?;
        if request.incarnation != self.server.incarnation.0 {
            return Err(Status::failed_precondition("for another life"));
        }
        let mut state = self.cluster.state.lock();
        state.pulls += 1;
        let mut moved = false;
        let parts = request.parts.iter().map(|part| {
            let sides = state.chances.move_shard;
            if state.roll(sides) {
                state.move_shard(part.shard);
                moved = true;
            }
            let sides = state.chances.retry;
            let result = if state.roll(sides) {
                pull_part_reply::Result::Retry(Retry { reason: RetryReason::NotReady.into() })
            } else {
                match redirect(&state, self.server, part.shard, part.epoch) {
                    Some(redirect) if !state.stale_pulls => {
                        pull_part_reply::Result::Redirect(redirect)
                    }
                    _ => pull_part_reply::Result::Pulled(pull(&mut state, part)),
                }
            };
            PullPartReply { shard: part.shard, result: Some(result) }
        });
        let parts = parts.collect();
        drop(state);
        if moved {
            self.cluster.changed();
        }
        Ok(Response::new(PullReply { parts }))
    }

    async fn push(
        &self,
        requests: Request<Streaming<PushRequest>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        let mut requests = requests.into_inner();
        let (server, cluster) = (self.server, self.cluster.clone());
        let (replies, stream) = tokio::sync::mpsc::channel(64);
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let reply = handle(&cluster, server, &request);
                let end = reply.is_err();
                if cluster.state.lock().hold_replies {
                    continue;
                }
                if replies.send(reply).await.is_err() || end {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream).map(|reply| reply))))
    }
}

/// The answer to one request, or the end of its stream.
pub(crate) fn handle(
    cluster: &Cluster,
    server: ServerRef,
    request: &PushRequest,
) -> Result<PushReply, Status> {
    validate::push_request(request)?;
    if request.incarnation != server.incarnation.0 {
        return Err(Status::failed_precondition("for another life"));
    }
    let mut state = cluster.state.lock();
    let chances = state.chances;
    if state.roll(chances.break_before) {
        return Err(Status::unavailable("broke before"));
    }
    let moved = state.roll(chances.move_shard);
    if moved {
        state.move_shard(request.parts[0].shard);
    }
    let parts = request.parts.iter().map(|part| PushPartReply {
        shard: part.shard,
        sequence: part.sequence,
        result: Some(take(&mut state, server, request, part)),
    });
    let parts = parts.collect();
    let broken = state.roll(chances.break_after);
    drop(state);
    if moved {
        cluster.changed();
    }
    if broken {
        return Err(Status::unavailable("broke after"));
    }
    Ok(PushReply { request: request.request, parts })
}

fn redirect(state: &State, server: ServerRef, shard: u32, epoch: u64) -> Option<Redirect> {
    let route = state.view.as_ref()?.route(ShardId(shard))?;
    (route.primary != Some(server) || route.epoch.0 != epoch)
        .then(|| Redirect { epoch: route.epoch.0, primary: route.primary.map(Into::into) })
}

fn take(
    state: &mut State,
    server: ServerRef,
    request: &PushRequest,
    part: &PushPart,
) -> push_part_reply::Result {
    use push_part_reply::Result;
    let view = state.view.as_ref().map_or(0, |view| view.version);
    let sides = state.chances.retry;
    if request.view_version > view || state.roll(sides) {
        return Result::Retry(Retry { reason: RetryReason::NotReady.into() });
    }
    if let Some(reason) = state.retry_all {
        return Result::Retry(Retry { reason: reason.into() });
    }
    if let Some(redirect) = redirect(state, server, part.shard, part.epoch) {
        return Result::Redirect(redirect);
    }
    let shard = &state.shards[part.shard as usize];
    let session = SessionId(request.session);
    match shard.cells.check(session, part.sequence) {
        Verdict::Repeat { lsn, refusal } => Result::Done(v1::PushOutcome {
            lsn: lsn.0,
            repeated: true,
            refusal: refusal.map(Into::into),
            stale_clocks: None,
        }),
        Verdict::Gap { expected } => Result::Gap(Gap { expected, numbering: 0 }),
        Verdict::Closed => Result::SessionClosed(SessionClosed {}),
        Verdict::Apply => {
            let refusal = part.updates.iter().find_map(|update| refusal(state, update));
            if refusal.is_none() {
                part.updates.iter().for_each(|update| apply(state, part.shard, update));
            }
            let epoch = downpour_core::id::Epoch(part.epoch);
            let shard = &mut state.shards[part.shard as usize];
            shard.lsn = shard.lsn.next_in(epoch);
            shard.cells.record(session, part.sequence, shard.lsn, refusal);
            let (lsn, refusal) = (shard.lsn.0, refusal.map(Into::into));
            Result::Done(v1::PushOutcome { lsn, refusal, ..Default::default() })
        }
    }
}

fn refusal(state: &State, update: &Update) -> Option<Refusal> {
    let refuse = |reason| Some(Refusal { reason, variable: VariableId(update.variable) });
    if state.spec(update.variable).is_none() {
        return refuse(RefusalReason::UnknownVariable);
    }
    let tensor = match update.body.as_ref()? {
        update::Body::Rows(rows) => &rows.gradients,
        update::Body::Gradients(dense) | update::Body::Values(dense) => &dense.values,
        update::Body::Contribution(_) => return None,
    };
    if all_finite(tensor) { None } else { refuse(RefusalReason::NotFinite) }
}

fn apply(state: &mut State, shard: u32, update: &Update) {
    let Some(spec) = state.spec(update.variable) else { return };
    let shard = &mut state.shards[shard as usize];
    let next = Lsn(shard.lsn.0 + 1);
    match (update.body.as_ref(), &spec.shape) {
        (Some(update::Body::Rows(rows)), Shape::Table(table)) => {
            let dim = table.dim as usize;
            let gradients: Vec<f32> = floats(&rows.gradients).collect();
            let keys = Keys::trusted(&rows.keys);
            for (key, gradient) in keys.iter().zip(gradients.chunks_exact(dim)) {
                let row =
                    shard.rows.entry((update.variable, key)).or_insert_with(|| vec![0.0; dim]);
                row.iter_mut().zip(gradient).for_each(|(value, g)| *value += g);
            }
        }
        (Some(update::Body::Gradients(sent) | update::Body::Values(sent)), Shape::Dense(dense)) => {
            let first = matches!(update.body, Some(update::Body::Values(_)));
            let mut values = floats(&sent.values);
            for &block in &sent.blocks {
                let new: Vec<f32> = values.by_ref().take(dense.block_len(block)).collect();
                let known = shard.blocks.get_mut(&(update.variable, block));
                match known {
                    Some(_) if first => {}
                    Some((lsn, value)) => {
                        value.iter_mut().zip(&new).for_each(|(value, g)| *value += g);
                        *lsn = next;
                    }
                    None => {
                        shard.blocks.insert((update.variable, block), (next, new));
                    }
                }
            }
        }
        _ => {}
    }
}

fn pull(state: &mut State, part: &PullPart) -> PulledPart {
    let mut pulled = PulledPart::default();
    for rows in &part.rows {
        let Some(Shape::Table(table)) = state.spec(rows.variable).map(|spec| spec.shape) else {
            continue;
        };
        let mut out = bytes::BytesMut::new();
        let shard = &state.shards[part.shard as usize];
        for key in Keys::trusted(&rows.keys).iter() {
            let zeros = vec![0.0; table.dim as usize];
            put_floats(&mut out, shard.rows.get(&(rows.variable, key)).unwrap_or(&zeros));
        }
        pulled.rows.push(out.freeze());
    }
    for dense in &part.dense {
        let Some(spec) = state.spec(dense.variable) else { continue };
        let mut out = bytes::BytesMut::new();
        let mut answer = PulledDense::default();
        for block in dense_blocks_on(&spec, ShardId(part.shard), super::SHARDS) {
            match state.shards[part.shard as usize].blocks.get(&(dense.variable, block)) {
                Some((lsn, values)) if lsn.0 > dense.have_lsn => {
                    answer.blocks.push(block);
                    put_floats(&mut out, values);
                }
                Some(_) => {}
                None => answer.uninitialized += 1,
            }
        }
        state.dense_blocks_sent += answer.blocks.len();
        answer.values = out.freeze();
        pulled.dense.push(answer);
    }
    pulled.lsn = state.shards[part.shard as usize].lsn.0;
    pulled
}
