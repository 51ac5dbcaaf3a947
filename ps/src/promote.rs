//! Carries out a promotion (docs/protocol.md 5): asks, fetches, waits, and has silent members removed. What comes next is the state machine's to say.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use downpour_core::id::{Epoch, Lsn, ServerRef};
use downpour_proto::v1;
use futures::future::join_all;
use tonic::{Code, Status};
use tracing::{info, warn};

use crate::hosted::Hosted;
use crate::life::Life;
use crate::link::refused;
use crate::record::Record;
use crate::shard::{Fenced, Promotion};

/// Between attempts.
const PAUSE: Duration = Duration::from_millis(20);
/// A member that answers but has not heard of the shard yet gets this many times as long as a silent one.
const PATIENCE: u32 = 10;

/// Starts a task for the promotion of a shard, unless there is one.
pub(crate) fn start(life: &Arc<Life>, hosted: &Arc<Hosted>) {
    if hosted.promoting.swap(true, Ordering::AcqRel) {
        return;
    }
    let (owner, hosted) = (Arc::clone(life), Arc::clone(hosted));
    life.spawn("promote", async move {
        loop {
            Driver { life: &owner, hosted: &hosted, silent: BTreeMap::new() }.run().await;
            hosted.promoting.store(false, Ordering::Release);
            // A promotion that began while this one ended found the flag up.
            let over = hosted.shard.lock().promotion() == Promotion::Over;
            if over || hosted.promoting.swap(true, Ordering::AcqRel) {
                break;
            }
        }
    });
}

struct Driver<'a> {
    life: &'a Arc<Life>,
    hosted: &'a Arc<Hosted>,
    /// Since when a member has not given the answer that is waited for.
    silent: BTreeMap<ServerRef, Instant>,
}

/// How a member took a fence.
enum Answer {
    Fenced(Fenced),
    /// It will never answer.
    Gone,
    Silent,
}

impl Driver<'_> {
    async fn run(&mut self) {
        let mut changed = self.hosted.changed.subscribe();
        loop {
            let (epoch, step) = {
                let shard = self.hosted.shard.lock();
                (shard.epoch(), shard.promotion())
            };
            let done = match step {
                Promotion::Over => return,
                Promotion::Fence(members) => self.fence(epoch, members).await,
                Promotion::Fetch { from, after } => self.fetch(epoch, from, after).await,
                // The links carry it, and the keeper removes who does not acknowledge.
                Promotion::Level(_) => false,
            };
            if !done {
                let _ = tokio::time::timeout(PAUSE, changed.changed()).await;
            }
        }
    }

    /// True if there was progress.
    async fn fence(&mut self, epoch: Epoch, members: Vec<ServerRef>) -> bool {
        let asked = members.iter().map(|&member| self.ask(epoch, member));
        let answers = join_all(asked).await;
        let mut progress = false;
        for (member, answer) in members.into_iter().zip(answers) {
            let since = *self.silent.entry(member).or_insert_with(Instant::now);
            let patience = Duration::from_millis(self.life.process.config.backup_timeout_ms);
            let give_up = match answer {
                Answer::Fenced(fenced) if fenced.not_ready => since.elapsed() > patience * PATIENCE,
                Answer::Fenced(fenced) => {
                    self.silent.remove(&member);
                    let taken = self.life.with(self.hosted, |s| s.fenced(epoch, member, fenced));
                    progress |= taken.is_ok();
                    taken.is_err()
                }
                Answer::Gone => true,
                Answer::Silent => since.elapsed() > patience,
            };
            if give_up {
                warn!(job = %self.hosted.key.job, shard = %self.hosted.key.shard, %epoch, %member,
                    "a member cannot be fenced and is to be removed");
                self.life.remove_member(self.hosted, member);
            }
        }
        progress
    }

    async fn ask(&self, epoch: Epoch, member: ServerRef) -> Answer {
        let Some(address) = self.life.address(member) else {
            return if self.life.replaced(member) { Answer::Gone } else { Answer::Silent };
        };
        let request = v1::FenceRequest {
            job: self.hosted.key.job.0,
            shard: self.hosted.key.shard.0,
            epoch: epoch.0,
            candidate: Some(self.life.me.into()),
            incarnation: member.incarnation.0,
        };
        let timeout = Duration::from_millis(self.life.process.config.backup_timeout_ms);
        let asking = async { self.life.replica(&address)?.fence(request).await };
        match tokio::time::timeout(timeout, asking).await {
            Ok(Ok(reply)) => {
                let v1::FenceReply { epoch, last_lsn, not_ready } = reply.into_inner();
                Answer::Fenced(Fenced { epoch: Epoch(epoch), last: Lsn(last_lsn), not_ready })
            }
            Ok(Err(status)) if status.code() == Code::FailedPrecondition => Answer::Gone,
            Ok(Err(status))
                if refused(&status) && self.life.link(member, self.hosted.key).gone() =>
            {
                Answer::Gone
            }
            Ok(Err(_)) | Err(_) => Answer::Silent,
        }
    }

    /// True if there was progress.
    async fn fetch(&mut self, epoch: Epoch, from: ServerRef, after: Lsn) -> bool {
        let since = *self.silent.entry(from).or_insert_with(Instant::now);
        let patience = Duration::from_millis(self.life.process.config.backup_timeout_ms);
        let fetched = self.fetch_log(epoch, from, after, patience).await;
        let problem = match fetched {
            Ok(()) => {
                self.silent.remove(&from);
                let diverged = self.hosted.shard.lock().diverged();
                for stranger in diverged {
                    warn!(%stranger, "a member has another history and is to be removed");
                    self.life.remove_member(self.hosted, stranger.member);
                }
                return true;
            }
            Err(problem) => problem,
        };
        if since.elapsed() > patience {
            warn!(job = %self.hosted.key.job, shard = %self.hosted.key.shard, %epoch, %from, %problem,
                "a member's log cannot be fetched, and it is to be removed");
            self.life.remove_member(self.hosted, from);
        }
        false
    }

    async fn fetch_log(
        &self,
        epoch: Epoch,
        from: ServerRef,
        after: Lsn,
        patience: Duration,
    ) -> Result<(), Status> {
        let address =
            self.life.address(from).ok_or_else(|| Status::unavailable("it is not known"))?;
        let request = v1::FetchLogRequest {
            job: self.hosted.key.job.0,
            shard: self.hosted.key.shard.0,
            epoch: epoch.0,
            incarnation: from.incarnation.0,
            after_lsn: after.0,
        };
        let late = |_| Status::deadline_exceeded("it does not answer");
        let asking = async { self.life.replica(&address)?.fetch_log(request).await };
        let mut replies = tokio::time::timeout(patience, asking).await.map_err(late)??.into_inner();
        let mut count = 0;
        while let Some(reply) =
            tokio::time::timeout(patience, replies.message()).await.map_err(late)??
        {
            let records = reply.records.into_iter().map(Record::try_from);
            let records = records.collect::<Result<Vec<_>, _>>()?;
            count += records.len();
            let fetched = self.life.with(self.hosted, |shard| shard.fetched(epoch, records));
            fetched.map_err(|error| Status::data_loss(error.to_string()))?;
        }
        info!(job = %self.hosted.key.job, shard = %self.hosted.key.shard, %epoch, %from, count,
            "fetched what a member had");
        Ok(())
    }
}
