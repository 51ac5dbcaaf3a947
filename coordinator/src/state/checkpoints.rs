//! Checkpoints of jobs: that one begins, which shards are stored, how it ended; and jobs that begin from one (docs/protocol.md 8).

use std::sync::Arc;

use downpour_checkpoint::manifest::{Manifest, ShardEntry};
use downpour_checkpoint::name::CheckpointName;
use downpour_core::cells::ClosedSessions;
use downpour_core::checkpoint::Orders;
use downpour_core::consistency::Consistency;
use downpour_core::id::{Epoch, JobId, Lsn, SessionId, ShardId, VariableId};
use downpour_core::ledger::Ledger;
use downpour_core::placement;
use downpour_core::routing::ShardRoute;
use downpour_core::spec::{Shape, Variable};
use downpour_core::view::JobView;
use downpour_proto::v1;

use super::deletions::Filed;
use super::jobs::check_version;
use super::lost::Back;
use super::size::{JOB_BYTES, SHARD_BYTES, VARIABLE_BYTES, label_bytes, ledger_bytes};
use super::{Dense, Job, Outcome, Refused, Reply, State};
use crate::command::{CheckpointEnd, CheckpointStart, Restoring};

/// Upper bound of what the file of a shard takes in a snapshot.
pub(super) const SAVED_BYTES: usize = 96;
/// Upper bound of what the number of a variable takes there.
const INITIALIZED_BYTES: usize = 8;

impl State {
    pub(super) fn begin_checkpoint(&mut self, start: CheckpointStart) -> Outcome {
        let CheckpointStart { job: id, order, created_ms, chain, clock } = start;
        let job = self.job(id)?;
        let shards = job.view.spec.shards as usize;
        if let Some(open) = &job.view.orders.checkpoint {
            let problem = format!("checkpoint {} of job {id} is being taken", open.checkpoint);
            return Err(Refused::Conflict(problem));
        }
        if !order.newer_than.is_empty() && order.newer_than.len() != shards {
            let problem = format!("newer_than: give one for each of the {shards} shards, or none");
            return Err(Refused::FailedPrecondition(problem));
        }
        let name = job.view.spec.name.as_str();
        self.check_deletions(chain.iter().map(|base| Filed::new(&order.uri, name, base)))?;
        let labels: usize = job.labels.iter().map(|(key, value)| label_bytes(key, value)).sum();
        let tasks = self.captured_ledger_bytes(id);
        let modes = (job.view.consistency != Consistency::default())
            .then(|| v1::Consistency::from(&job.view.consistency));
        let modes_bytes = modes.as_ref().map_or(0, prost::Message::encoded_len);
        self.check_room(
            shards * SAVED_BYTES
                + job.dense.len() * INITIALIZED_BYTES
                + labels
                + tasks
                + modes_bytes,
        )?;
        let ledger = self.captured_ledger(id);
        let version = self.cluster.version;
        let job = self.job_mut(id);
        let initialized = job.dense.iter().filter(|(_, dense)| dense.initialized);
        let label =
            |(key, value): (&String, &String)| v1::Label { key: key.clone(), value: value.clone() };
        job.checkpoints.open = Some(v1::OpenCheckpoint {
            order: Some((&order).into()),
            created_ms,
            chain,
            saved: Vec::new(),
            initialized: initialized.map(|(variable, _)| variable.0).collect(),
            labels: job.labels.iter().map(label).collect(),
            clock,
            ledger,
            consistency: modes,
        });
        job.view.orders.checkpoint = Some(order);
        job.view.version = version;
        Ok(Reply::Done)
    }

    /// The first file of a shard counts; a report that comes too late, or from a primary that was replaced, changes nothing.
    pub(super) fn shards_saved(
        &mut self,
        id: JobId,
        checkpoint: &str,
        reports: Vec<v1::ShardSaved>,
    ) -> Outcome {
        let job = self.job(id)?;
        if job.view.orders.checkpoint.as_ref().is_none_or(|open| open.checkpoint != checkpoint) {
            return Ok(Reply::Done);
        }
        let job = self.job_mut(id);
        let routes = &job.view.shards;
        let Some(open) = &mut job.checkpoints.open else { return Ok(Reply::Done) };
        for report in reports {
            let epoch = routes.get(report.shard as usize).map(|route| route.epoch.0);
            let place = open.saved.binary_search_by_key(&report.shard, |saved| saved.shard);
            if let (Err(place), true) = (place, epoch == Some(report.epoch)) {
                open.saved.insert(place, report);
            }
        }
        Ok(Reply::Done)
    }

    pub(super) fn end_checkpoint(&mut self, end: CheckpointEnd) -> Outcome {
        let version = self.cluster.version;
        let job = self.job(end.job)?;
        if job.view.orders.checkpoint.as_ref().is_none_or(|open| open.checkpoint != end.checkpoint)
        {
            return Ok(Reply::Done);
        }
        let job = self.job_mut(end.job);
        job.view.version = version;
        match end.error.is_empty() {
            true => _ = job.end_checkpoint(String::new(), Some(end.ended_ms)),
            false => self.give_up_checkpoint(end.job, &end.error, Some(end.ended_ms)),
        }
        Ok(Reply::Done)
    }

    pub(super) fn schedule_checkpoints(
        &mut self,
        id: JobId,
        schedule: v1::CheckpointSchedule,
    ) -> Outcome {
        self.job(id)?;
        self.job_mut(id).checkpoints.schedule =
            Some(schedule).filter(|one| one.every_ms > 0 || one.every_steps > 0);
        Ok(Reply::Done)
    }

    /// A job whose primaries load their shards from files before they serve. They are alone in their sets; other members are copied from them.
    pub(super) fn restore_job(&mut self, restoring: Restoring) -> Outcome {
        let Restoring {
            spec,
            variables,
            initialized,
            labels,
            high_water,
            order,
            replace,
            if_version,
            ledger,
            consistency,
        } = restoring;
        let same = self.cluster.jobs.values().find(|job| job.view.spec.name == spec.name);
        if let Some(job) = same {
            let (view, began) = (&job.view, &job.view.orders.restore);
            // A client that lost the answer asks again. Once somebody has worked with the job, or a shard of it is lost, it is to be as it was in the checkpoint.
            let untouched = job.sessions.is_empty()
                && view.sessions.high_water == high_water
                && view.shards.iter().all(|route| route.primary.is_some());
            if began.as_ref() == Some(&order) && view.spec == spec && (untouched || !replace) {
                return Ok(Reply::Created { job: view.job, created: false });
            }
            if !replace {
                return Err(Refused::AlreadyExists(format!(
                    "job {:?} exists: restore under another name, or ask for it to be replaced",
                    spec.name
                )));
            }
            check_version(job, if_version)?;
        }
        let replaced = same.map(|job| job.view.job);
        self.check_pinned(&Filed::new(&order.uri, &*order.job, &*order.checkpoint))?;
        let shards = spec.shards as usize;
        let tasks = ledger.as_ref().map_or(0, |ledger| ledger_bytes(ledger.plan()));
        self.check_room(
            JOB_BYTES + shards * SHARD_BYTES + variables.len() * VARIABLE_BYTES + tasks,
        )?;
        let plan = placement::place(&self.cluster.candidates(), spec.shards, 1)?;
        if let Some(id) = replaced {
            self.give_up_checkpoint(id, "the job was replaced", None);
            self.cluster.jobs.remove(&id);
            self.set_ledger(id, None);
        }
        self.last.job += 1;
        self.last.session = self.last.session.max(high_water);
        let id = JobId(self.last.job);
        let route = |servers: Vec<_>| ShardRoute {
            epoch: order.epoch,
            primary: servers.first().copied(),
            in_sync: servers,
            ..first_route()
        };
        let dense = |variable: &Variable| {
            let initialized = initialized.contains(&variable.id);
            (variable.id, Dense { initializer: SessionId(0), initialized })
        };
        let is_dense = |variable: &&Variable| matches!(variable.spec.shape, Shape::Dense(_));
        let job = Job {
            dense: variables.iter().filter(is_dense).map(dense).collect(),
            view: JobView {
                job: id,
                spec,
                version: self.cluster.version,
                variables,
                shards: plan.into_iter().map(route).collect(),
                sessions: ClosedSessions { high_water, open: [].into() },
                orders: Orders { restore: Some(order), ..Orders::default() },
                consistency,
            },
            labels,
            sessions: [].into(),
            checkpoints: v1::JobCheckpoints::default(),
            back: Back::default(),
        };
        self.cluster.jobs.insert(id, Arc::new(job));
        self.set_ledger(id, ledger);
        Ok(Reply::Created { job: id, created: true })
    }
}

fn first_route() -> ShardRoute {
    ShardRoute {
        epoch: Epoch(1),
        set_version: 1,
        primary: None,
        in_sync: Vec::new(),
        joining: None,
        moving: None,
    }
}

impl Job {
    /// The open checkpoint, if there is one, is whole, or has failed with `error`.
    pub(super) fn end_checkpoint(&mut self, error: String, ended_ms: Option<u64>) -> Option<Filed> {
        let (open, order) = self.checkpoints.open.take().zip(self.view.orders.checkpoint.take())?;
        let filed = Filed::new(&order.uri, &*self.view.spec.name, &*order.checkpoint);
        let ended = v1::EndedCheckpoint {
            uri: order.uri,
            checkpoint: order.checkpoint,
            created_ms: open.created_ms,
            ended_ms: ended_ms.unwrap_or(open.created_ms),
            bytes: open.saved.iter().map(|saved| saved.bytes).sum(),
            error,
            chain: open.chain.len() as u32,
            clock: open.clock,
            tasks_done: open.ledger.map_or(0, |ledger| ledger.tasks_done),
        };
        let place = match ended.error.is_empty() {
            true => &mut self.checkpoints.whole,
            false => &mut self.checkpoints.failed,
        };
        *place = Some(ended);
        Some(filed)
    }

    /// Place, job and name of the newest checkpoint of this very job, or of the one that it began from.
    #[must_use]
    pub fn newest_checkpoint(&self) -> Option<(&str, &str, &str)> {
        let whole = self.checkpoints.whole.as_ref().map(|whole| {
            (whole.uri.as_str(), self.view.spec.name.as_str(), whole.checkpoint.as_str())
        });
        let began = self.view.orders.restore.as_ref();
        whole.or_else(|| began.map(|order| (&*order.uri, &*order.job, &*order.checkpoint)))
    }

    /// A dense variable that has first values now and that had none when a checkpoint began: those that had are `initialized`.
    #[must_use]
    pub fn initialized_since(&self, initialized: &[VariableId]) -> Option<&str> {
        let since = |(id, dense): (&VariableId, &Dense)| {
            (dense.initialized && !initialized.contains(id)).then_some(*id)
        };
        let id = self.dense.iter().find_map(since)?;
        let variable = self.view.variables.iter().find(|variable| variable.id == id)?;
        Some(&variable.spec.name)
    }

    /// Who was to give dense variables their first values, and has not said that all are there, is not to say so: who defines the variable next gives them (again).
    pub(super) fn forget_initializers(&mut self) {
        for dense in self.dense.values_mut().filter(|dense| !dense.initialized) {
            dense.initializer = SessionId(0);
        }
    }

    /// What the manifest of the open checkpoint says, when every shard is stored.
    #[must_use]
    pub fn manifest(&self) -> Option<Manifest> {
        let open = self.checkpoints.open.as_ref()?;
        let order = self.view.orders.checkpoint.as_ref()?;
        if open.saved.len() != self.view.shards.len() {
            return None;
        }
        let name = |name: &String| CheckpointName::new(name.as_str()).ok();
        let entry = |saved: &v1::ShardSaved| ShardEntry {
            lsn: Lsn(saved.lsn),
            newer_than: Lsn(saved.newer_than),
            attempt: saved.attempt,
            bytes: saved.bytes,
            crc32: saved.crc32,
            rows: saved.rows,
            blocks: saved.blocks,
        };
        let open_sessions = self.sessions.keys().map(|session| session.0);
        let closed = &self.view.sessions;
        Some(Manifest {
            checkpoint: name(&order.checkpoint)?,
            created_ms: open.created_ms,
            job: self.view.spec.clone(),
            variables: self.view.variables.clone(),
            // When it began: of what got its first values since, some shards were cut before.
            initialized: open.initialized.iter().copied().map(VariableId).collect(),
            labels: open.labels.iter().cloned().map(|label| (label.key, label.value)).collect(),
            sessions: ClosedSessions {
                high_water: open_sessions.max().unwrap_or(0).max(closed.high_water),
                open: self.sessions.keys().copied().collect(),
            },
            chain: open.chain.iter().map(name).collect::<Option<_>>()?,
            files: open.saved.iter().map(entry).collect(),
            ledger: open.ledger.clone().and_then(|ledger| Ledger::try_from(ledger).ok()),
            consistency: open.consistency.clone().unwrap_or_default().try_into().ok()?,
        })
    }

    /// The checkpoint that began with `nonce`, if it is the one that is being taken or that ended last.
    #[must_use]
    pub fn begun(&self, nonce: u32) -> Option<(CheckpointName, u32)> {
        let v1::JobCheckpoints { open, whole, failed, .. } = &self.checkpoints;
        let ended = [whole, failed].into_iter().flatten();
        let ended = ended.map(|ended| (&ended.checkpoint, ended.chain));
        let open = open
            .iter()
            .filter_map(|open| Some((&open.order.as_ref()?.checkpoint, open.chain.len() as u32)));
        let named =
            |(name, chain): (&String, u32)| Some((CheckpointName::new(name.as_str()).ok()?, chain));
        ended.chain(open).filter_map(named).find(|(name, _)| name.nonce() == Some(nonce))
    }

    /// The last whole checkpoint that increments may build on, in this place: one of this very job, or the one that it began from.
    #[must_use]
    pub fn base(&self, uri: &str) -> Option<&str> {
        let whole = self.checkpoints.whole.as_ref().filter(|whole| whole.uri == uri);
        let began = || {
            let order = self.view.orders.restore.as_ref();
            order.filter(|order| order.uri == uri && order.job == self.view.spec.name)
        };
        (whole.map(|whole| whole.checkpoint.as_str()))
            .or_else(|| began().map(|order| order.checkpoint.as_str()))
    }
}

/// The epoch in which a restored job begins: after all that its checkpoint has seen, so that no LSN comes twice.
#[must_use]
pub fn epoch_after(manifest: &Manifest) -> Epoch {
    let seen = manifest.files.iter().map(|file| file.lsn.epoch().0).max();
    Epoch(seen.unwrap_or(0) + 1)
}

/// Shards that are not stored yet.
#[must_use]
pub fn missing(open: &v1::OpenCheckpoint, shards: u32) -> Vec<ShardId> {
    let saved = |shard: &u32| open.saved.binary_search_by_key(shard, |one| one.shard).is_ok();
    (0..shards).filter(|shard| !saved(shard)).map(ShardId).collect()
}
