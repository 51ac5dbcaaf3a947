//! Which checkpoints are to be deleted, and which one somebody is about to make a job of (docs/protocol.md 8.6).
//!
//! Whoever deletes, and whoever reads what it restores, may sleep between looking and acting. So both are decided in the log, where one comes before the other: what is *condemned* is
//! never used again, and what is used or *pinned* is never condemned. A job is made only of what is pinned still, so a pin may end at any time.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use downpour_core::id::JobId;
use prost::Message;

use super::{Cluster, Outcome, Refused, Reply, State};
use crate::command::deleting::Checkpoints;

/// More are not condemned for being old before these are gone.
const CONDEMNED_MAX: usize = 1024;
/// More are not condemned at all: no checkpoint begins that may have to be given up.
const CONDEMNED_AND_GIVEN_UP_MAX: usize = 2 * CONDEMNED_MAX;
/// Most that somebody is about to make a job of.
const PINS_MAX: usize = 64;
/// Nobody reads a manifest for so long.
const PIN_MS: u64 = 900_000;
/// Upper bound of what one takes in a snapshot, besides its texts.
const FILED_BYTES: usize = 32;

/// A checkpoint in its place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Filed {
    /// The place, as nobody else writes it otherwise.
    pub uri: String,
    /// Name of the job that it is of.
    pub job: String,
    /// Its name.
    pub checkpoint: String,
}

impl Filed {
    /// `uri` as anybody may write it.
    pub fn new(uri: &str, job: impl Into<String>, checkpoint: impl Into<String>) -> Self {
        Filed { uri: plain(uri), job: job.into(), checkpoint: checkpoint.into() }
    }
}

/// `file:///a//b/./` is `file:///a/b`: what is used there is not to be deleted here.
fn plain(uri: &str) -> String {
    let (scheme, path) = uri.split_once("://").unwrap_or(("", uri));
    let parts = path.split('/').filter(|part| !matches!(*part, "" | "."));
    let root = if path.starts_with('/') { "/" } else { "" };
    format!("{scheme}://{root}{}", parts.collect::<Vec<_>>().join("/"))
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deletions {
    /// To be deleted by whoever leads.
    pub condemned: BTreeSet<Filed>,
    /// The newest last, each with when it was pinned.
    pins: VecDeque<(Filed, u64)>,
}

impl Deletions {
    fn is_pinned(&self, filed: &Filed) -> bool {
        self.pins.iter().any(|(one, _)| one == filed)
    }

    pub(super) fn bytes_max(&self) -> usize {
        let pinned = self.pins.iter().map(|(filed, _)| filed);
        let texts = |one: &Filed| one.uri.len() + one.job.len() + one.checkpoint.len();
        self.condemned.iter().chain(pinned).map(|one| texts(one) + FILED_BYTES).sum()
    }
}

impl Cluster {
    /// The checkpoints that shards begin from, or would if they were lost; that one which is being taken builds on; and that somebody is about to make a job of.
    #[must_use]
    pub fn checkpoints_in_use(&self) -> BTreeSet<Filed> {
        let used = self.jobs.values().flat_map(|job| {
            let orders = &job.view.orders;
            let began = orders.restore.iter().map(|one| (&*one.uri, &*one.job, &*one.checkpoint));
            let back = orders.set_back.iter().map(|one| (&*one.uri, &*one.job, &*one.checkpoint));
            let open = job.checkpoints.open.iter().zip(&orders.checkpoint);
            let bases = open.flat_map(|(open, order)| {
                let name = job.view.spec.name.as_str();
                open.chain.iter().map(move |base| (&*order.uri, name, base.as_str()))
            });
            began.chain(back).chain(bases).chain(job.newest_checkpoint())
        });
        let used = used.map(|(uri, job, checkpoint)| Filed::new(uri, job, checkpoint));
        used.chain(self.deletions.pins.iter().map(|(filed, _)| filed.clone())).collect()
    }
}

impl State {
    /// Those that nothing needs are to be deleted: what is used is not, nor what it builds on.
    pub(super) fn condemn(&mut self, checkpoints: Checkpoints) -> Outcome {
        let now_ms = self.now_ms;
        let deletions = Arc::make_mut(&mut self.cluster.deletions);
        deletions.pins.retain(|(_, at_ms)| now_ms.saturating_sub(*at_ms) < PIN_MS);
        let mut needed = self.cluster.checkpoints_in_use();
        for (filed, chain) in &checkpoints {
            if needed.contains(filed) {
                needed.extend(chain.iter().cloned());
            }
        }
        let condemned = &mut Arc::make_mut(&mut self.cluster.deletions).condemned;
        for (filed, _) in checkpoints {
            if condemned.len() < CONDEMNED_MAX && !needed.contains(&filed) {
                condemned.insert(filed);
            }
        }
        Ok(Reply::Done)
    }

    /// What there is of one that will never be whole. A leader may have written its manifest, and somebody be using it.
    pub(super) fn condemn_given_up(&mut self, filed: Filed) {
        if !self.cluster.checkpoints_in_use().contains(&filed) {
            Arc::make_mut(&mut self.cluster.deletions).condemned.insert(filed);
        }
    }

    /// A job is to go on without the checkpoint that is being taken of it, or to go.
    pub(super) fn give_up_checkpoint(&mut self, id: JobId, error: &str, ended_ms: Option<u64>) {
        if self.cluster.job(id).is_some_and(|job| job.checkpoints.open.is_some())
            && let Some(filed) = self.job_mut(id).end_checkpoint(error.into(), ended_ms)
        {
            self.condemn_given_up(filed);
        }
    }

    /// Somebody is about to read its manifest, to make a job of it.
    pub(super) fn pin(&mut self, filed: Filed) -> Outcome {
        if self.cluster.deletions.condemned.contains(&filed) {
            let problem = format!("checkpoint {} is being deleted", filed.checkpoint);
            return Err(Refused::Later(problem));
        }
        let now_ms = self.now_ms;
        let pins = &mut Arc::make_mut(&mut self.cluster.deletions).pins;
        pins.retain(|(one, _)| *one != filed);
        if pins.len() == PINS_MAX {
            pins.pop_front();
        }
        pins.push_back((filed, now_ms));
        Ok(Reply::Done)
    }

    /// They are gone.
    pub(super) fn forget_condemned(&mut self, gone: &Checkpoints) -> Outcome {
        let condemned = &mut Arc::make_mut(&mut self.cluster.deletions).condemned;
        gone.iter().for_each(|(filed, _)| _ = condemned.remove(filed));
        Ok(Reply::Done)
    }

    /// Refuses to make a job of what may be deleted.
    pub(super) fn check_pinned(&self, filed: &Filed) -> Result<(), Refused> {
        if self.cluster.deletions.is_pinned(filed) {
            return Ok(());
        }
        let problem = format!("checkpoint {} may have been deleted meanwhile", filed.checkpoint);
        Err(Refused::Later(problem))
    }

    /// Refuses a checkpoint that builds on what is to be deleted, or where too many are left to be.
    pub(super) fn check_deletions(
        &self,
        mut bases: impl Iterator<Item = Filed>,
    ) -> Result<(), Refused> {
        let condemned = &self.cluster.deletions.condemned;
        if let Some(base) = bases.find(|base| condemned.contains(base)) {
            let problem = format!("checkpoint {}, on which it builds, is deleted", base.checkpoint);
            return Err(Refused::Later(problem));
        }
        if condemned.len() >= CONDEMNED_AND_GIVEN_UP_MAX {
            let count = condemned.len();
            let problem =
                format!("{count} checkpoints are to be deleted first: see the leader's log");
            return Err(Refused::Later(problem));
        }
        Ok(())
    }
}

/// See [`Filed`]; of a pin also when.
#[derive(Clone, PartialEq, Message)]
pub(super) struct FiledRecord {
    #[prost(string, tag = "1")]
    uri: String,
    #[prost(string, tag = "2")]
    job: String,
    #[prost(string, tag = "3")]
    checkpoint: String,
    #[prost(uint64, tag = "4")]
    at_ms: u64,
}

/// See [`Deletions`].
#[derive(Clone, PartialEq, Message)]
pub(super) struct DeletionsRecord {
    #[prost(message, repeated, tag = "1")]
    condemned: Vec<FiledRecord>,
    #[prost(message, repeated, tag = "2")]
    pins: Vec<FiledRecord>,
}

impl From<&Deletions> for DeletionsRecord {
    fn from(deletions: &Deletions) -> Self {
        let record = |filed: &Filed, at_ms| {
            let Filed { uri, job, checkpoint } = filed.clone();
            FiledRecord { uri, job, checkpoint, at_ms }
        };
        DeletionsRecord {
            condemned: deletions.condemned.iter().map(|filed| record(filed, 0)).collect(),
            pins: deletions.pins.iter().map(|(filed, at_ms)| record(filed, *at_ms)).collect(),
        }
    }
}

impl From<DeletionsRecord> for Deletions {
    fn from(record: DeletionsRecord) -> Self {
        let filed = |one: FiledRecord| (Filed::new(&one.uri, one.job, one.checkpoint), one.at_ms);
        Deletions {
            condemned: record.condemned.into_iter().map(|one| filed(one).0).collect(),
            pins: record.pins.into_iter().map(filed).collect(),
        }
    }
}
