//! Answers pulls.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use downpour_core::id::{Epoch, JobId, Lsn, ShardId, VariableId};
use downpour_proto::tensor::{KEY_BYTES, Keys};
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::v1::pull_part_reply::Result as PullResult;
use downpour_proto::{Invalid, v1, validate};
use tonic::Status;

use crate::hosted::{Hosted, ShardKey};
use crate::life::Life;
use crate::reply::pull_declined;
use crate::service::meant_for;
use crate::shard::{Declined, Redirect};
use crate::state::{CannotPull, ShardState};

/// Keys that are looked up under one hold of a shard's lock.
const KEYS_AT_ONCE: usize = 2048;
/// Room in a reply for what is not values.
const OVERHEAD_BYTES: usize = 1 << 20;

/// Answers one pull.
///
/// # Errors
/// The request is malformed, or its reply would be larger than a message.
pub(crate) async fn answer(
    life: Option<&Arc<Life>>,
    request: v1::PullRequest,
) -> Result<v1::PullReply, Status> {
    validate::pull_request(&request)?;
    let Some(life) = life.filter(|_| meant_for(life, request.incarnation)) else {
        let nowhere = |_| Redirect { epoch: Epoch(0), primary: None };
        let redirect = |key| life.map_or_else(|| nowhere(key), |life| life.another_life(key));
        let parts = request.parts.iter().map(|part| v1::PullPartReply {
            shard: part.shard,
            result: Some(PullResult::Redirect(
                redirect(ShardKey { job: JobId(request.job), shard: ShardId(part.shard) }).into(),
            )),
        });
        return Ok(v1::PullReply { parts: parts.collect() });
    };
    let mut room = MESSAGE_BYTES_MAX - OVERHEAD_BYTES;
    let mut parts = Vec::with_capacity(request.parts.len());
    for part in request.parts {
        let shard = part.shard;
        let key = ShardKey { job: JobId(request.job), shard: ShardId(shard) };
        let result = match pull_part(life, key, part, &mut room).await {
            Ok(pulled) => PullResult::Pulled(pulled),
            Err(NotPulled::Declined(declined)) => pull_declined(declined),
            Err(NotPulled::Invalid(invalid)) => return Err(invalid.into()),
        };
        parts.push(v1::PullPartReply { shard, result: Some(result) });
        tokio::task::consume_budget().await;
    }
    let bytes = MESSAGE_BYTES_MAX - OVERHEAD_BYTES - room;
    life.process.metrics.pulled_bytes.inc_by(bytes as u64);
    Ok(v1::PullReply { parts })
}

/// Why a part has no values.
enum NotPulled {
    Declined(Declined),
    Invalid(Invalid),
}

impl From<Declined> for NotPulled {
    fn from(declined: Declined) -> Self {
        NotPulled::Declined(declined)
    }
}

impl From<CannotPull> for NotPulled {
    fn from(cannot: CannotPull) -> Self {
        match cannot {
            // The client knows the variable from the coordinator, so this server will hear of it.
            CannotPull::Unknown(_) => Declined::Retry(v1::RetryReason::NotReady).into(),
            CannotPull::Misfit(_) => {
                NotPulled::Invalid(Invalid::new("parts.variable", cannot.to_string()))
            }
        }
    }
}

async fn pull_part(
    life: &Arc<Life>,
    key: ShardKey,
    part: v1::PullPart,
    room: &mut usize,
) -> Result<v1::PulledPart, NotPulled> {
    let hosted = life.hosted(key).ok_or_else(|| life.elsewhere(key))?;
    let reader = Reader { life, hosted: &hosted, epoch: Epoch(part.epoch) };
    // Everything small, and the room that the values need, under one hold of the lock.
    let (lsn, dense) = reader.read(|state| {
        let mut dense = Vec::with_capacity(part.dense.len());
        for wanted in &part.dense {
            let (id, have) = (VariableId(wanted.variable), Lsn(wanted.have_lsn));
            let bytes = state.dense_bytes(id, have)?;
            take_room("parts.dense", room, bytes)?;
            let mut values = BytesMut::with_capacity(bytes);
            let blocks = state.pull_dense(id, have, &mut values)?;
            dense.push(v1::PulledDense {
                blocks: blocks.numbers,
                values: values.freeze(),
                uninitialized: blocks.uninitialized,
            });
        }
        Ok((state.last(), dense))
    })?;
    let mut rows = Vec::with_capacity(part.rows.len());
    for wanted in &part.rows {
        rows.push(pull_rows(&reader, wanted, room).await?);
    }
    Ok(v1::PulledPart { lsn: lsn.0, rows, dense })
}

async fn pull_rows(
    reader: &Reader<'_>,
    wanted: &v1::PullRows,
    room: &mut usize,
) -> Result<Bytes, NotPulled> {
    let id = VariableId(wanted.variable);
    let row_bytes = reader.read(|state| Ok(state.row_bytes(id)?))?;
    let count = wanted.keys.len() / KEY_BYTES;
    let bytes = count.saturating_mul(row_bytes);
    take_room("parts.rows.keys", room, bytes)?;
    let mut values = BytesMut::with_capacity(bytes);
    for keys in wanted.keys.chunks(KEYS_AT_ONCE * KEY_BYTES) {
        reader.read(|state| Ok(state.pull_rows(id, Keys::trusted(keys), &mut values)?))?;
        tokio::task::consume_budget().await;
    }
    Ok(values.freeze())
}

fn take_room(field: &'static str, room: &mut usize, bytes: usize) -> Result<(), NotPulled> {
    *room = room.checked_sub(bytes).ok_or_else(|| {
        let problem = format!(
            "the reply would have more than {} bytes: pull less at once",
            MESSAGE_BYTES_MAX - OVERHEAD_BYTES
        );
        NotPulled::Invalid(Invalid::new(field, problem))
    })?;
    Ok(())
}

/// Reads a shard as the primary of one epoch.
struct Reader<'a> {
    life: &'a Arc<Life>,
    hosted: &'a Hosted,
    epoch: Epoch,
}

impl Reader<'_> {
    fn read<T>(
        &self,
        read: impl FnOnce(&ShardState) -> Result<T, NotPulled>,
    ) -> Result<T, NotPulled> {
        let shard = self.hosted.shard.lock();
        read(shard.read(self.epoch, self.life.lease.holds())?)
    }
}
