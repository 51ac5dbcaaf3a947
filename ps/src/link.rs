//! The log on its way to one other server. The log is the queue: a link remembers which shards have something to send, and takes the
//! records from them when the connection has room.

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use downpour_core::id::{Epoch, JobId, Lsn, ServerRef, ShardId};
use downpour_proto::frame::{Frame, Hello, Kind, LANES, SERVER};
use downpour_proto::framed::{Connection, failure};
use downpour_proto::v1;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Notify;
use tonic::{Code, Status};
use tracing::{debug, error, info, warn};

use crate::hosted::{Hosted, ShardKey};
use crate::life::Life;
use crate::shard::{Ack, Room};

/// Size that messages aim at (docs/performance.md has the measurements).
const MESSAGE_BYTES: usize = 256 << 10;
/// No more is added to what waits for room in the connection beyond this.
const WAITING_BYTES_MAX: usize = 256 << 10;
/// Before a broken connection is made again, and before a member that was not ready is asked again.
const PAUSE: Duration = Duration::from_millis(25);
/// A connection that is refused for this long means that the process is gone.
const REFUSED_MAX: Duration = Duration::from_millis(200);

/// What a shard costs in a message beside its records, at most.
const SHARD_BYTES: usize = 64;

/// The way to one other server, for the shards of one lane.
#[derive(Debug)]
pub(crate) struct Link {
    peer: ServerRef,
    lane: u32,
    dirty: Mutex<Dirty>,
    wake: Notify,
    gone: AtomicBool,
}

/// The shards that have something to send, in turn: a busy one holds up no other.
#[derive(Debug)]
struct Dirty {
    keys: BTreeSet<ShardKey>,
    /// Where the next turn begins.
    turn: Bound<ShardKey>,
}

impl Default for Dirty {
    fn default() -> Self {
        Dirty { keys: BTreeSet::new(), turn: Bound::Unbounded }
    }
}

impl Dirty {
    fn next(&mut self) -> Option<ShardKey> {
        let later = self.keys.range((self.turn, Bound::Unbounded)).next();
        let key = later.or_else(|| self.keys.first()).copied()?;
        self.keys.remove(&key);
        self.turn = Bound::Excluded(key);
        Some(key)
    }

    /// The shard has more. One that had no room begins the next message, where it has all of it.
    fn put_back(&mut self, key: ShardKey, had_room: bool) {
        self.keys.insert(key);
        if !had_room {
            self.turn = Bound::Included(key);
        }
    }
}

impl Link {
    /// Starts the task of a link.
    pub(crate) fn start(life: &Arc<Life>, peer: ServerRef, lane: u32) -> Arc<Self> {
        let link = Arc::new(Link::new(peer, lane));
        let run = Arc::clone(&link).run(Arc::clone(life));
        let _inside = life.process.threads.enter(lane);
        life.spawn("replicate", run);
        link
    }

    fn new(peer: ServerRef, lane: u32) -> Self {
        let gone = AtomicBool::new(false);
        Link { peer, lane, dirty: Mutex::default(), wake: Notify::new(), gone }
    }

    /// The shard has something for the peer.
    pub(crate) fn mark(&self, key: ShardKey) {
        if self.dirty.lock().keys.insert(key) {
            self.wake.notify_one();
        }
    }

    /// The peer's process is known to be gone: waiting for it is useless.
    pub(crate) fn gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    async fn run(self: Arc<Self>, life: Arc<Life>) {
        let mut refused_since = None;
        loop {
            let ended = self.connect(&life).await;
            let refused = refused(&ended);
            if refused {
                refused_since.get_or_insert_with(Instant::now);
            } else {
                refused_since = None;
            }
            let long = refused_since.is_some_and(|since: Instant| since.elapsed() >= REFUSED_MAX);
            let replaced = life.replaced(self.peer) || ended.code() == Code::FailedPrecondition;
            if (long || replaced) && !self.gone.swap(true, Ordering::AcqRel) {
                info!(peer = %self.peer, status = %ended.message(), "peer is gone");
            }
            if self.gone() && !self.needed(&life) {
                return life.unlink(self.peer, self.lane);
            }
            debug!(peer = %self.peer, lane = self.lane, status = %ended, "replication ended");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Replicates over one connection until it breaks.
    async fn connect(&self, life: &Arc<Life>) -> Status {
        let Some(address) = life.address(self.peer) else {
            return Status::unavailable("the peer is not known");
        };
        let timeout = Duration::from_millis(life.process.config.backup_timeout_ms);
        match tokio::time::timeout(timeout, self.open(life, &address)).await {
            Ok(Ok(connection)) => {
                self.rewind(life);
                self.pump(life, connection).await
            }
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded("the peer does not answer"),
        }
    }

    /// A connection whose peer has answered.
    async fn open(&self, life: &Life, address: &str) -> Result<Connection, Status> {
        let hello = Hello { session: SERVER | u64::from(life.me.node.0), lane: self.lane };
        let mut connection = Connection::open(address, hello).await.map_err(broken)?;
        // An empty request first: a peer of another incarnation says so at once.
        connection.send(Kind::Replicate, 0, &self.request(life, Vec::new()));
        loop {
            connection.turn().await.map_err(broken)?;
            if let Some(frame) = connection.take()? {
                reply(frame)?;
                return Ok(connection);
            }
        }
    }

    async fn pump(&self, life: &Arc<Life>, mut connection: Connection) -> Status {
        let mut not_ready = BTreeSet::new();
        let mut again = tokio::time::interval(PAUSE);
        again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            while connection.waiting() < WAITING_BYTES_MAX {
                let shards = self.collect(life);
                if shards.is_empty() {
                    break;
                }
                connection.send(Kind::Replicate, 0, &self.request(life, shards));
            }
            tokio::select! {
                turned = connection.turn() => {
                    let taken = turned.map_err(broken).and_then(|()| {
                        while let Some(frame) = connection.take()? {
                            self.gone.store(false, Ordering::Release);
                            for ack in reply(frame)?.shards {
                                self.acknowledge(life, &ack, &mut not_ready);
                            }
                        }
                        Ok(())
                    });
                    if let Err(status) = taken {
                        return status;
                    }
                }
                () = self.wake.notified() => {}
                _ = again.tick(), if !not_ready.is_empty() => {
                    for key in std::mem::take(&mut not_ready) {
                        self.again(life, key);
                    }
                }
            }
        }
    }

    fn request(&self, life: &Life, shards: Vec<v1::ShardRecords>) -> v1::ReplicateRequest {
        v1::ReplicateRequest {
            source: Some(life.me.into()),
            incarnation: self.peer.incarnation.0,
            shards,
        }
    }

    /// What the next request carries: shards that have something, up to the size that streams best.
    fn collect(&self, life: &Arc<Life>) -> Vec<v1::ShardRecords> {
        let mut shards = Vec::new();
        let mut left = MESSAGE_BYTES;
        let mut full = false;
        while !full && left > 0 {
            let Some(key) = self.dirty.lock().next() else { break };
            let Some(hosted) = life.hosted(key) else { continue };
            let room = if shards.is_empty() { Room::Whole(left) } else { Room::Rest(left) };
            let Some(batch) = hosted.shard.lock().batch(self.peer, room) else { continue };
            if batch.more {
                self.dirty.lock().put_back(key, !batch.records.is_empty());
                full = true;
            }
            let bytes: usize = batch.records.iter().map(|record| record.bytes()).sum();
            left = left.saturating_sub(bytes + SHARD_BYTES);
            shards.push(v1::ShardRecords {
                job: key.job.0,
                shard: key.shard.0,
                epoch: batch.epoch.0,
                commit_lsn: batch.commit.0,
                check: batch
                    .check
                    .map(|check| v1::Check { lsn: check.lsn.0, digest: check.digest }),
                records: batch.records.iter().map(|record| (&**record).into()).collect(),
            });
        }
        shards
    }

    fn acknowledge(
        &self,
        life: &Arc<Life>,
        ack: &v1::ShardAck,
        not_ready: &mut BTreeSet<ShardKey>,
    ) {
        let key = ShardKey { job: JobId(ack.job), shard: ShardId(ack.shard) };
        let Some(hosted) = life.hosted(key) else { return };
        if ack.not_ready {
            not_ready.insert(key);
        }
        let ack = Ack {
            epoch: Epoch(ack.epoch),
            last: Lsn(ack.last_lsn),
            not_ready: ack.not_ready,
            differs: ack.differs,
        };
        if ack.differs && hosted.shard.lock().epoch() == ack.epoch {
            error!(job = %key.job, shard = %key.shard, member = %self.peer, last = %ack.last,
                "a member has other values than this primary and is to be removed");
            life.process.metrics.differing_members.inc();
            life.remove_member(&hosted, self.peer);
        }
        if let Err(diverged) = life.with(&hosted, |shard| shard.acked(self.peer, ack)) {
            warn!(job = %key.job, shard = %key.shard, %diverged, "a member has another history");
            life.remove_member(&hosted, self.peer);
        }
    }

    /// A new connection: everything that was not acknowledged is sent again.
    fn rewind(&self, life: &Arc<Life>) {
        for hosted in life.all().iter().filter(|hosted| lane_of(hosted.key) == self.lane) {
            self.again(life, hosted.key);
        }
    }

    fn again(&self, life: &Arc<Life>, key: ShardKey) {
        if let Some(hosted) = life.hosted(key) {
            life.with(&hosted, |shard| shard.rewind(self.peer));
        }
    }

    /// Whether some shard waits for the peer.
    fn needed(&self, life: &Arc<Life>) -> bool {
        let waits = |hosted: &Arc<Hosted>| {
            lane_of(hosted.key) == self.lane
                && hosted.shard.lock().peers().any(|(peer, _)| peer == self.peer)
        };
        life.all().iter().any(waits)
    }
}

/// Which link to a server a shard keeps to: its records stay in order.
pub(crate) fn lane_of(key: ShardKey) -> u32 {
    key.shard.0 % LANES
}

/// The answer to a request.
fn reply(Frame { kind, body, .. }: Frame) -> Result<v1::ReplicateReply, Status> {
    match kind {
        Kind::Replicated => {
            v1::ReplicateReply::decode(body).map_err(|error| Status::internal(error.to_string()))
        }
        Kind::Failed => Err(failure(body)),
        _ => Err(Status::internal("an answer that is none to records")),
    }
}

/// Keeps what the system said: see [`refused`].
fn broken(error: io::Error) -> Status {
    Status::from_error(error.into())
}

/// Whether nobody listens there.
pub(crate) fn refused(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.kind() == io::ErrorKind::ConnectionRefused;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use downpour_core::routing::shard_of;
    use downpour_core::view::JobView;
    use prost::Message;

    use super::*;
    use crate::hostile::serving;
    use crate::shard::tests::fixture::{
        changed, counting, promote, push, replica, route, server, view,
    };

    const SHARDS: u32 = 3;

    #[tokio::test]
    async fn a_record_larger_than_the_room_that_is_left_begins_the_next_message() {
        let (life, _) = serving();
        let three = changed(&view(2, route(2, 1, 1, &[1, 2])), |view| {
            view.job = JobId(2);
            view.spec.shards = SHARDS;
            view.shards = vec![view.shards[0].clone(); SHARDS as usize];
        });
        life.on_view(JobView::clone(&three));
        let key = |shard| ShardKey { job: JobId(2), shard: ShardId(shard) };
        let link = Link::new(server(2), 0);
        let salt = downpour_core::mix::salt("counts");
        let keys = |shard, count| -> Vec<u64> {
            let here = |key: &u64| shard_of(*key, salt, SHARDS) == ShardId(shard);
            (0..).filter(here).take(count).collect()
        };
        for shard in 0..SHARDS {
            let hosted = life.hosted(key(shard)).expect("here");
            let mut primary = hosted.shard.lock();
            promote(&mut primary, &mut [replica(server(2), &three)]);
            let count = if shard == 1 { MESSAGE_BYTES / 8 } else { 1 };
            push(&mut primary, counting(1, &keys(shard, count)));
            link.mark(key(shard));
        }
        let message = |link: &Link| {
            let shards = link.collect(&life);
            let counts = shards.iter().map(|records| (records.shard, records.records.len()));
            (counts.collect::<Vec<_>>(), link.request(&life, shards).encoded_len())
        };
        let (first, bytes) = message(&link);
        assert_eq!(first, [(0, 1), (1, 0)]);
        assert!(bytes <= MESSAGE_BYTES);
        // Also while a shard before it always has something.
        let hosted = life.hosted(key(0)).expect("here");
        push(&mut hosted.shard.lock(), counting(2, &keys(0, 1)));
        link.mark(key(0));
        assert_eq!(message(&link).0, [(1, 1)]);
        assert_eq!(message(&link).0, [(2, 1), (0, 1)]);
        assert_eq!(message(&link).0, []);
    }
}
