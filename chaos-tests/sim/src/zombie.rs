//! A client whose push comes again after its session was closed: it must be refused, for ever (docs/protocol.md 1.4). No honest client does that, so
//! this one speaks frames itself.

use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use downpour_client::{Coordinators, SessionKind};
use downpour_core::id::{SessionId, ShardId};
use downpour_core::view::{JobView, NodeView};
use downpour_proto::frame::{self, Hello, Kind};
use downpour_proto::gather::Segments;
use downpour_proto::v1::push_part_reply::Result as Outcome;
use downpour_proto::{transport, v1};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::cluster::{self, SHARDS};
use crate::draw::Draw;
use crate::shared::{Phase, Shared, count};

const PROMISE: &str = "a closed session's pushes are refused";
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);
const ATTEMPTS_MAX: u32 = 50;

pub(crate) async fn haunt(shared: Rc<Shared>) -> turmoil::Result {
    let coordinators = cluster::coordinators();
    let mut draw = Draw::new(shared.seed, 300);
    shared.wait_for(Phase::Faults).await;
    while shared.phase.get() == Phase::Faults {
        if let Err(error) = live_and_come_back(&shared, &coordinators, &mut draw).await {
            tracing::info!("the zombie rests: {error:#}");
        }
        sleep(draw.millis(500, 4000)).await;
    }
    count(&shared.quiet);
    Ok(())
}

async fn live_and_come_back(
    shared: &Shared,
    coordinators: &Coordinators,
    draw: &mut Draw,
) -> Result<()> {
    let job = coordinators.job("probe").await?.job;
    let opened = coordinators.open_session(job, "zombie", SessionKind::Worker).await?;
    let session = SessionId(opened.session);
    let shard = ShardId(draw.below(SHARDS.into()) as u32);
    let pushed = push_until_said(coordinators, session, shard).await;
    sleep(draw.millis(0, 1500)).await;
    coordinators.close_session(job, session).await?;
    let pushed = pushed?;
    if !matches!(pushed, Outcome::Done(_)) {
        bail!("its push was answered by {pushed:?}");
    }
    sleep(draw.millis(0, 3000)).await;
    let again = push_until_said(coordinators, session, shard).await?;
    if let Outcome::Done(done) = again {
        shared.broken(PROMISE, format!("session {session}, shard {shard}: {done:?}"));
    }
    Ok(())
}

/// Pushes number 1 until somebody says what became of it.
async fn push_until_said(
    coordinators: &Coordinators,
    session: SessionId,
    shard: ShardId,
) -> Result<Outcome> {
    for _ in 0..ATTEMPTS_MAX {
        match push(coordinators, session, shard).await {
            Ok(said @ (Outcome::Done(_) | Outcome::SessionClosed(_))) => return Ok(said),
            said => tracing::debug!(?said, "the zombie asks again"),
        }
        sleep(PAUSE).await;
    }
    bail!("nobody answers")
}

async fn push(coordinators: &Coordinators, session: SessionId, shard: ShardId) -> Result<Outcome> {
    let state = coordinators.cluster().await?;
    let view = state.jobs.into_iter().find_map(|job| JobView::try_from(job.view?).ok());
    let view = view.context("no job")?;
    let route = view.route(shard).context("no shard")?;
    let primary = route.primary.context("no primary")?;
    let mut nodes = state.nodes.into_iter().filter_map(|node| NodeView::try_from(node).ok());
    let node = nodes.find(|node| node.server == primary).context("an unknown primary")?;
    let part = v1::PushPart {
        shard: shard.0,
        epoch: route.epoch.0,
        sequence: 1,
        ..v1::PushPart::default()
    };
    let request = v1::PushRequest {
        request: 1,
        job: view.job.0,
        session: session.0,
        incarnation: primary.incarnation.0,
        view_version: view.version,
        clock: 0,
        parts: vec![part],
    };
    timeout(ANSWER_TIMEOUT, exchange(&node.address, session, &request)).await?
}

async fn exchange(address: &str, session: SessionId, request: &v1::PushRequest) -> Result<Outcome> {
    let mut stream = transport::connect(address).await?;
    let mut segments = Segments::default();
    segments.raw(&Hello { session: session.0, lane: 0 }.to_bytes());
    segments.frame(Kind::Push, 1, request);
    stream.write_all_buf(segments.outgoing()).await?;
    let mut received = BytesMut::new();
    let frame = loop {
        match frame::take(&mut received)? {
            Ok(frame) => break frame,
            Err(_) if stream.read_buf(&mut received).await? > 0 => {}
            Err(_) => bail!("closed"),
        }
    };
    if frame.kind != Kind::Pushed {
        bail!("{:?}", frame.kind);
    }
    let reply = v1::PushReply::decode(frame.body)?;
    reply.parts.into_iter().next().and_then(|part| part.result).context("an empty answer")
}
