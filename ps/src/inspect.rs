//! What a simulation sees of the servers in its process without asking them over the network (docs/simulation.md).

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use downpour_core::id::{Epoch, JobId, Lsn, ServerRef, ShardId};
use parking_lot::Mutex;

use crate::life::Life;
use crate::membership::Current;
use crate::shard::Role;

static SERVERS: Mutex<BTreeMap<String, Weak<ArcSwapOption<Life>>>> = Mutex::new(BTreeMap::new());

/// One replica of a shard.
#[derive(Clone, Copy, Debug)]
pub struct Replica {
    /// Where.
    pub server: ServerRef,
    /// Of which job.
    pub job: JobId,
    /// Of which shard.
    pub shard: ShardId,
    /// The highest it has seen.
    pub epoch: Epoch,
    /// It is the primary, and serves.
    pub serves: bool,
    /// The last record.
    pub last: Lsn,
    /// Of everything, in its canonical encoding.
    pub digest: u64,
}

pub(crate) fn register(name: &str, current: &Current) {
    SERVERS.lock().insert(name.to_owned(), Arc::downgrade(current));
}

/// Calls `see` with every replica of every server, in their order.
fn each(mut see: impl FnMut(&Life, &crate::hosted::Hosted)) {
    for server in SERVERS.lock().values() {
        let Some(life) = server.upgrade().and_then(|current| current.load_full()) else { continue };
        let mut all = life.all();
        all.sort_by_key(|hosted| hosted.key);
        all.iter().for_each(|hosted| see(&life, hosted));
    }
}

/// Who serves which shard, in which epoch.
#[must_use]
pub fn serving() -> Vec<(JobId, ShardId, Epoch, ServerRef)> {
    let mut serving = Vec::new();
    each(|life, hosted| {
        let shard = hosted.shard.lock();
        if matches!(shard.role(), Role::Primary(_)) {
            serving.push((hosted.key.job, hosted.key.shard, shard.epoch(), life.me));
        }
    });
    serving
}

/// Who could acknowledge what its members have, as far as it knows itself.
#[must_use]
pub fn acknowledging() -> Vec<(JobId, ShardId, Epoch, ServerRef)> {
    let mut found = Vec::new();
    each(|life, hosted| {
        let shard = hosted.shard.lock();
        let epoch = shard.epoch();
        if shard.read(epoch, life.lease.contact()).is_ok() {
            found.push((hosted.key.job, hosted.key.shard, epoch, life.me));
        }
    });
    found
}

/// All replicas of all servers.
#[must_use]
pub fn replicas() -> Vec<Replica> {
    let mut replicas = Vec::new();
    each(|life, hosted| {
        let shard = hosted.shard.lock();
        replicas.push(Replica {
            server: life.me,
            job: hosted.key.job,
            shard: hosted.key.shard,
            epoch: shard.epoch(),
            serves: matches!(shard.role(), Role::Primary(_)),
            last: shard.last(),
            digest: shard.state().digest(),
        });
    });
    replicas
}
