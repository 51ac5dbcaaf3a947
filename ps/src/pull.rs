//! Answers pulls.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use downpour_core::id::{Epoch, JobId, Lsn, ShardId, VariableId};
use downpour_proto::tensor::{KEY_BYTES, Keys};
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::v1::pull_part_reply::Result as PullResult;
use downpour_proto::{Invalid, v1, validate};
use tonic::Status;

use crate::hosted::ShardKey;
use crate::life::Life;
use crate::pace::Pace;
use crate::reply::pull_declined;
use crate::service::meant_for;
use crate::shard::{Declined, Redirect};
use crate::state::{CannotPull, ShardState};

/// Keys that are looked up under one hold of a shard's lock.
const KEYS_AT_ONCE: usize = 2048;
/// Memory for the values of one reply, taken at once: more than clients ask for in one message, but for large parts.
const USUAL_BYTES: usize = 512 << 10;
/// Room in a reply for what is not values.
const OVERHEAD_BYTES: usize = 1 << 20;

/// Answers one pull. The values are cut off `out`, which takes its memory back once they are sent: keep it between pulls.
///
/// # Errors
/// The request is malformed, or its reply would be larger than a message.
pub(crate) async fn answer(
    life: Option<&Arc<Life>>,
    request: v1::PullRequest,
    out: &mut BytesMut,
) -> Result<v1::PullReply, Status> {
    validate::pull_request(&request)?;
    let Some(life) = life.filter(|_| meant_for(life, request.incarnation)) else {
        let redirect = |key| life.map_or(Redirect::UNKNOWN, |life| life.another_life(key));
        let parts = request.parts.iter().map(|part| v1::PullPartReply {
            shard: part.shard,
            result: Some(PullResult::Redirect(
                redirect(ShardKey { job: JobId(request.job), shard: ShardId(part.shard) }).into(),
            )),
        });
        return Ok(v1::PullReply { parts: parts.collect() });
    };
    out.clear();
    out.reserve(USUAL_BYTES);
    let mut room = MESSAGE_BYTES_MAX - OVERHEAD_BYTES;
    let mut parts = Vec::with_capacity(request.parts.len());
    let mut pace = Pace::start();
    for part in request.parts {
        let shard = part.shard;
        let key = ShardKey { job: JobId(request.job), shard: ShardId(shard) };
        let result = match pull_part(life, key, part, out, &mut room, &mut pace).await {
            Ok(pulled) => PullResult::Pulled(pulled),
            Err(NotPulled::Declined(declined)) => pull_declined(declined),
            Err(NotPulled::Invalid(invalid)) => return Err(invalid.into()),
        };
        parts.push(v1::PullPartReply { shard, result: Some(result) });
        pace.rest().await;
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
    out: &mut BytesMut,
    room: &mut usize,
    pace: &mut Pace,
) -> Result<v1::PulledPart, NotPulled> {
    let hosted = life.hosted(key).ok_or_else(|| life.elsewhere(key))?;
    let read = |read: &mut dyn FnMut(&ShardState) -> Result<bool, NotPulled>| {
        let shard = hosted.shard.lock();
        read(shard.read(Epoch(part.epoch), life.lease.contact())?)
    };
    let (mut pulled, mut rows) = (v1::PulledPart::default(), Rows::new(&part.rows));
    // A part of usual size is read under one hold of the lock.
    let mut done = read(&mut |state| {
        (pulled.lsn, pulled.clock) = (state.last().0, state.clock());
        for wanted in &part.dense {
            pulled.dense.push(pull_dense(state, wanted, out, room)?);
        }
        rows.reserve(state, out, room)?;
        rows.pull_some(state, out)
    })?;
    let named: usize = part.rows.iter().map(|rows| rows.keys.len() / KEY_BYTES).sum();
    hosted.pulled_rows.fetch_add(named as u64, Ordering::Relaxed);
    while !done {
        pace.rest().await;
        done = read(&mut |state| rows.pull_some(state, out))?;
    }
    pulled.rows = rows.finish(out);
    Ok(pulled)
}

fn pull_dense(
    state: &ShardState,
    wanted: &v1::PullDense,
    out: &mut BytesMut,
    room: &mut usize,
) -> Result<v1::PulledDense, NotPulled> {
    let (id, have) = (VariableId(wanted.variable), Lsn(wanted.have_lsn));
    let bytes = state.dense_bytes(id, have)?;
    take_room("parts.dense", room, bytes)?;
    out.reserve(bytes);
    let blocks = state.pull_dense(id, have, out)?;
    Ok(v1::PulledDense {
        blocks: blocks.numbers,
        values: out.split().freeze(),
        uninitialized: blocks.uninitialized,
    })
}

/// The rows of a part on their way into one buffer.
struct Rows<'a> {
    wanted: &'a [v1::PullRows],
    /// Which of `wanted` is next, and how many bytes of its keys were looked up.
    next: usize,
    offset: usize,
    /// Where the values of each of `wanted` end.
    ends: Vec<usize>,
}

impl<'a> Rows<'a> {
    fn new(wanted: &'a [v1::PullRows]) -> Self {
        let ends = Vec::with_capacity(wanted.len());
        Rows { wanted, next: 0, offset: 0, ends }
    }

    fn reserve(
        &self,
        state: &ShardState,
        out: &mut BytesMut,
        room: &mut usize,
    ) -> Result<(), NotPulled> {
        let mut bytes = 0usize;
        for wanted in self.wanted {
            let count = wanted.keys.len() / KEY_BYTES;
            let row_bytes = state.row_bytes(VariableId(wanted.variable))?;
            take_room("parts.rows.keys", room, count.saturating_mul(row_bytes))?;
            bytes += count * row_bytes;
        }
        out.reserve(bytes);
        Ok(())
    }

    /// Looks up the next [`KEYS_AT_ONCE`] keys. True when there are no more.
    fn pull_some(&mut self, state: &ShardState, out: &mut BytesMut) -> Result<bool, NotPulled> {
        let mut budget = KEYS_AT_ONCE * KEY_BYTES;
        while let Some(wanted) = self.wanted.get(self.next) {
            if budget == 0 {
                return Ok(false);
            }
            let rest = &wanted.keys[self.offset..];
            let keys = &rest[..rest.len().min(budget)];
            let id = VariableId(wanted.variable);
            state.pull_rows(id, Keys::trusted(keys), out)?;
            (budget, self.offset) = (budget - keys.len(), self.offset + keys.len());
            if self.offset == wanted.keys.len() {
                self.ends.push(out.len());
                (self.next, self.offset) = (self.next + 1, 0);
            }
        }
        Ok(true)
    }

    fn finish(self, out: &mut BytesMut) -> Vec<Bytes> {
        let values = out.split().freeze();
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| values.slice(start..end)).collect()
    }
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
