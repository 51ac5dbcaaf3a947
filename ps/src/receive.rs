//! The other end of a copy: a cut becomes a replica that joins.

use std::sync::Arc;

use downpour_core::id::{Epoch, JobId, Lsn, ShardId};
use downpour_proto::{Invalid, convert, v1};
use futures::{Stream, StreamExt};
use tonic::Status;
use tracing::info;

use crate::cut::Loader;
use crate::hosted::{Hosted, ShardKey};
use crate::life::Life;
use crate::shard::Shard;
use crate::state::Identity;

/// Takes a copy piece by piece and hosts it.
///
/// # Errors
/// It is not wanted here, does not fit, or is not whole.
pub(crate) async fn copy(
    life: &Arc<Life>,
    head: v1::CopyHead,
    mut pieces: impl Stream<Item = Result<v1::CopyRequest, Status>> + Unpin,
) -> Result<Lsn, Status> {
    let source = convert::server("head.source", head.source)?;
    let key = ShardKey { job: JobId(head.job), shard: ShardId(head.shard) };
    if head.epoch == 0 || Epoch(head.epoch) > Lsn::EPOCH_MAX || head.set_version == 0 {
        return Err(Invalid::new("head.epoch", "or the version of the set is out of range").into());
    }
    let epoch = Epoch(head.epoch);
    let unknown = || Status::unavailable(format!("job {} was not heard of here", key.job));
    let view = life.view(key.job).ok_or_else(unknown)?;
    if view.route(key.shard).is_none() {
        return Err(Invalid::new("head.shard", "is not of the job").into());
    }
    life.clear_for_copy(key, epoch, head.attempt)?;
    info!(job = %key.job, shard = %key.shard, %epoch, %source, "taking a copy");
    let spec = &view.spec;
    let identity = Identity { shard: key.shard, shards: spec.shards, seed: spec.seed };
    let mut loader = Loader::new(identity);
    loop {
        let Some(request) = pieces.next().await else {
            return Err(Status::aborted("the copy ended too soon"));
        };
        let missing = || Invalid::new("piece", "is not given");
        let piece = request?.piece.and_then(|piece| piece.piece).ok_or_else(missing)?;
        if loader.take(piece)? {
            break;
        }
        if life.process.memory.is_full() {
            return Err(Status::resource_exhausted("the memory limit is reached"));
        }
    }
    let state = loader.finish()?;
    let last = state.last();
    if last.epoch() > epoch {
        return Err(Invalid::new("small.lsn", "is of a later epoch than the copy").into());
    }
    let log_bytes_max = life.process.config.shard_log_bytes_max;
    let tenure = (epoch, head.set_version);
    let shard = Shard::joining(life.me, log_bytes_max, view, state, tenure);
    let attempt = (epoch, head.attempt);
    life.install(Hosted::copied(key, shard, attempt), attempt)?;
    info!(job = %key.job, shard = %key.shard, %epoch, %last, "joining");
    Ok(last)
}
