//! Calls about checkpoints.

use std::time::Duration;

use downpour_core::id::JobId;
use downpour_proto::v1;
use tokio::time::{Instant, sleep};

use crate::{Coordinators, Error};

/// Between two looks at something that takes time.
const LOOK: Duration = Duration::from_millis(100);

impl Coordinators {
    /// Begins a checkpoint. An empty `uri` is that of the job's schedule.
    ///
    /// # Errors
    /// Another one is being taken, or the place cannot be used.
    pub async fn create_checkpoint(
        &self,
        job: JobId,
        uri: &str,
        incremental: bool,
    ) -> Result<v1::CreateCheckpointReply, Error> {
        let request = v1::CreateCheckpointRequest {
            job: job.0,
            uri: uri.into(),
            incremental,
            request_id: self.request_id(),
        };
        self.call("create checkpoint", |mut member| {
            let request = request.clone();
            async move { member.create_checkpoint(request).await }
        })
        .await
    }

    /// What a job's checkpoints are, with the number of shards that the open one has stored.
    ///
    /// # Errors
    /// There is no such job.
    pub async fn checkpoints(&self, job: JobId) -> Result<(v1::JobCheckpoints, u32), Error> {
        let cluster = self.cluster().await?;
        let is_it =
            |status: &v1::JobStatus| status.view.as_ref().is_some_and(|view| view.job == job.0);
        let missing = || Error::NotFound { what: "find job", message: format!("no job {job}") };
        let status = cluster.jobs.into_iter().find(is_it).ok_or_else(missing)?;
        Ok((status.checkpoints.unwrap_or_default(), status.saved_shards))
    }

    /// Waits until a checkpoint ended, and says how. `progress` is told how many shards are stored.
    ///
    /// # Errors
    /// It did not end within `patience`, or the job was deleted.
    pub async fn checkpoint_ended(
        &self,
        job: JobId,
        checkpoint: &str,
        patience: Duration,
        mut progress: impl FnMut(u32),
    ) -> Result<v1::EndedCheckpoint, Error> {
        let deadline = Instant::now() + patience;
        loop {
            let (checkpoints, saved) = self.checkpoints(job).await?;
            progress(saved);
            let mut ended = [checkpoints.whole, checkpoints.failed].into_iter().flatten();
            if let Some(ended) = ended.find(|ended| ended.checkpoint == checkpoint) {
                return Ok(ended);
            }
            if Instant::now() > deadline {
                let last =
                    format!("checkpoint {checkpoint} is not whole, {saved} shards are stored");
                let what = "wait for a checkpoint";
                return Err(Error::Deadline { what, within: patience, last });
            }
            sleep(LOOK).await;
        }
    }

    /// Sets when checkpoints of a job begin by themselves. `every_ms` 0: never.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn schedule_checkpoints(
        &self,
        job: JobId,
        schedule: v1::CheckpointSchedule,
    ) -> Result<(), Error> {
        let request = v1::ScheduleCheckpointsRequest { job: job.0, schedule: Some(schedule) };
        self.call("schedule checkpoints", |mut member| {
            let request = request.clone();
            async move { member.schedule_checkpoints(request).await }
        })
        .await
        .map(drop)
    }

    /// A new job with the state of a checkpoint; its shards serve when they are loaded.
    ///
    /// # Errors
    /// There is no such checkpoint, or a job of the name exists.
    pub async fn restore_job(
        &self,
        request: &v1::RestoreJobRequest,
    ) -> Result<v1::RestoreJobReply, Error> {
        self.call("restore job", |mut member| {
            let request = request.clone();
            async move { member.restore_job(request).await }
        })
        .await
    }
}
