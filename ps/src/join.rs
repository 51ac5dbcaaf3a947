//! Carries out what the state machine asks for when a shard is to get one more member: copies it, and has the member added.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use downpour_proto::v1;
use downpour_proto::v1::cut_piece::Piece;
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tracing::{info, warn};

use crate::hosted::Hosted;
use crate::life::Life;
use crate::shard::{Copy, Shard};

/// Bytes of a piece, about: the shard's lock is held for one.
const PIECE_BYTES: usize = if cfg!(downpour_sim) { 512 } else { 256 << 10 };
/// Pieces that wait for room in the connection.
const PIECES_MAX: usize = 2;
/// A server that takes no piece for this long, or does not answer the last one, is given up.
const STALL_MAX: Duration = Duration::from_secs(5);
/// Before a copy is begun again, times the attempts so far.
const PAUSE: Duration = Duration::from_millis(250);
const PAUSES_MAX: u32 = 20;
/// After so many attempts another server is asked for.
const ATTEMPTS_MAX: u32 = 5;
/// Between attempts to have a member added.
const PROPOSE_PAUSE: Duration = Duration::from_millis(50);

/// Copies the shard to who is joining, again and again until it is wanted no more, unless a task does so already.
pub(crate) fn copy(life: &Arc<Life>, hosted: &Arc<Hosted>) {
    if hosted.copying.swap(true, Ordering::AcqRel) {
        return;
    }
    let (owner, hosted) = (Arc::clone(life), Arc::clone(hosted));
    life.spawn("copy", async move {
        loop {
            copy_while_wanted(&owner, &hosted).await;
            hosted.copying.store(false, Ordering::Release);
            // A wish that came while this ended found the flag up.
            let wanted = hosted.shard.lock().wants_copy();
            if !wanted || hosted.copying.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    });
}

async fn copy_while_wanted(life: &Arc<Life>, hosted: &Arc<Hosted>) {
    loop {
        // Also after a copy that succeeded and came to nothing later.
        let attempts = hosted.copies.load(Ordering::Acquire);
        tokio::time::sleep(PAUSE * attempts.min(PAUSES_MAX)).await;
        let Some(copy) = life.with(hosted, Shard::begin_copy) else { return };
        hosted.copies.store(attempts + 1, Ordering::Release);
        let (job, shard, server) = (hosted.key.job, hosted.key.shard, copy.server);
        info!(%job, %shard, %server, epoch = %copy.epoch, "copying to a new member");
        match send(life, hosted, &copy).await {
            Ok(()) => {
                info!(%job, %shard, %server, "copied");
                life.with(hosted, |shard| shard.copied(copy.cut));
            }
            Err(status) => {
                warn!(%job, %shard, %server, %status, "a copy came to nothing");
                life.with(hosted, |shard| shard.drop_copy(copy.cut));
                if attempts + 1 >= ATTEMPTS_MAX {
                    hosted.copies.store(0, Ordering::Release);
                    life.remove_member(hosted, server);
                    tokio::time::sleep(PAUSE * ATTEMPTS_MAX).await;
                }
            }
        }
    }
}

async fn send(life: &Arc<Life>, hosted: &Hosted, copy: &Copy) -> Result<(), Status> {
    let unknown = || Status::unavailable("it is not known");
    let address = life.address(copy.server).ok_or_else(unknown)?;
    let mut client = life.replica(&address)?;
    let (pieces, receiver) = mpsc::channel(PIECES_MAX);
    let head = v1::CopyHead {
        source: Some(life.me.into()),
        incarnation: copy.server.incarnation.0,
        job: hosted.key.job.0,
        shard: hosted.key.shard.0,
        epoch: copy.epoch.0,
        set_version: copy.set_version,
        attempt: copy.cut.number(),
    };
    let head = v1::CopyRequest { head: Some(head), piece: None };
    let calling = client.copy(ReceiverStream::new(receiver));
    tokio::pin!(calling);
    let late = |_| Status::deadline_exceeded("it takes nothing");
    let sending = async {
        let closed = |_| Status::unavailable("the stream was closed");
        timeout(STALL_MAX, pieces.send(head)).await.map_err(late)?.map_err(closed)?;
        loop {
            let piece = hosted.shard.lock().read_cut(copy.cut, PIECE_BYTES);
            let piece = piece.map_err(|gone| Status::aborted(gone.to_string()))?;
            let end = matches!(piece, Piece::End(_));
            let piece = Some(v1::CutPiece { piece: Some(piece) });
            let request = v1::CopyRequest { head: None, piece };
            let bytes = request.encoded_len();
            life.process.metrics.copied_bytes.inc_by(bytes as u64);
            let presses = hosted.shard.lock().cuts_press();
            life.process.copies.spend(bytes, presses).await;
            timeout(STALL_MAX, pieces.send(request)).await.map_err(late)?.map_err(closed)?;
            if end {
                return Ok::<(), Status>(());
            }
        }
    };
    tokio::pin!(sending);
    tokio::select! {
        // Whatever it answers before the end, it does not want the rest.
        answered = &mut calling => {
            return Err(answered.err().unwrap_or_else(|| Status::internal("an answer came too soon")));
        }
        sent = &mut sending => sent?,
    }
    timeout(STALL_MAX, calling).await.map_err(late)?.map(drop)
}

/// Has who is joining added to the set, if a task does not do so already. Tries until the outcome is known.
pub(crate) fn propose(life: &Arc<Life>, hosted: &Arc<Hosted>) {
    if hosted.proposing.swap(true, Ordering::AcqRel) {
        return;
    }
    let (owner, hosted) = (Arc::clone(life), Arc::clone(hosted));
    life.spawn("add a member", async move {
        loop {
            propose_while_due(&owner, &hosted).await;
            hosted.proposing.store(false, Ordering::Release);
            let due = hosted.shard.lock().proposal().is_some();
            if !due || hosted.proposing.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    });
}

async fn propose_while_due(life: &Arc<Life>, hosted: &Arc<Hosted>) {
    loop {
        let Some(proposal) = life.with(hosted, Shard::proposal) else { return };
        let (job, shard, server) = (hosted.key.job, hosted.key.shard, proposal.server);
        let request = v1::ChangeInSyncRequest {
            job: job.0,
            shard: shard.0,
            epoch: proposal.epoch.0,
            set_version: proposal.set_version,
            primary: Some(life.me.into()),
            add: vec![server.into()],
            remove: Vec::new(),
            unreachable: false,
        };
        match life.change_in_sync(hosted, request).await {
            Ok(true) => {
                info!(%job, %shard, %server, "added to the in-sync set");
                life.process.metrics.added_members.inc();
                hosted.copies.store(0, Ordering::Release);
            }
            Ok(false) => {}
            Err(status) => {
                warn!(%job, %shard, %server, %status, "a member was not added");
                if status.code() == Code::FailedPrecondition {
                    // It will not be. The set of a newer version says so.
                    life.remove_member(hosted, server);
                }
                tokio::time::sleep(PROPOSE_PAUSE).await;
            }
        }
    }
}
