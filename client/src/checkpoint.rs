//! Calls about checkpoints.

use std::time::Duration;

use downpour_core::id::JobId;
use downpour_proto::v1;
use tokio::time::{Instant, sleep};

use crate::{Coordinators, Error, Refused};

/// Between two looks at something that takes time.
const LOOK: Duration = Duration::from_millis(100);

impl Coordinators {
    /// Begins a checkpoint. An empty `uri` is that of the job's schedule.
    ///
    /// # Errors
    /// Another one is being taken ([`Refused::Conflict`](crate::Refused::Conflict)), or the place cannot be used.
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

    /// Takes a checkpoint, after the one that is being taken if there is one, and waits until it ended, for `patience` each: see [`Coordinators::checkpoint_ended`].
    ///
    /// # Errors
    /// It cannot begin, did not end in time, or the job was deleted.
    pub async fn take_checkpoint(
        &self,
        job: JobId,
        uri: &str,
        incremental: bool,
        patience: Duration,
    ) -> Result<v1::EndedCheckpoint, Error> {
        let deadline = Instant::now() + patience;
        let begun = loop {
            match self.create_checkpoint(job, uri, incremental).await {
                Err(Error::Refused { code: Refused::Conflict, .. })
                    if Instant::now() < deadline =>
                {
                    sleep(LOOK).await;
                }
                begun => break begun?,
            }
        };
        self.checkpoint_ended(job, &begun.checkpoint, patience, |_| ()).await
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

    /// Waits until a checkpoint ended, and says how; or how a later one did, where others came after it between two looks. `progress` is told how many shards are stored.
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
            if let Some(ended) = ended(checkpoints, checkpoint) {
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

/// How the checkpoint of this name ended. Only the last whole one and the last that failed are known; where one that began later is whole, it has what this one would have.
fn ended(checkpoints: v1::JobCheckpoints, name: &str) -> Option<v1::EndedCheckpoint> {
    let v1::JobCheckpoints { whole, failed, .. } = checkpoints;
    // One is taken at a time, and names are in the order of time.
    let whole = whole.filter(|whole| *whole.checkpoint >= *name);
    let failed = failed.filter(|failed| *failed.checkpoint >= *name);
    match (whole, failed) {
        (Some(_), Some(failed)) if failed.checkpoint == name => Some(failed),
        // Without a whole one since, this one failed too.
        (whole, failed) => whole.or(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_that_others_followed_between_two_looks_has_ended() {
        let ended_as = |whole: &str, failed: &str| {
            let ended = |checkpoint: &str, error: &str| {
                let (checkpoint, error) = (checkpoint.to_owned(), error.to_owned());
                let ended = v1::EndedCheckpoint { checkpoint, error, ..Default::default() };
                Some(ended).filter(|ended| !ended.checkpoint.is_empty())
            };
            let (whole, failed) = (ended(whole, ""), ended(failed, "full"));
            let checkpoints = v1::JobCheckpoints { whole, failed, ..Default::default() };
            super::ended(checkpoints, "5").map(|ended| (ended.checkpoint, ended.error.is_empty()))
        };
        let is = |name: &str, whole| Some((name.to_owned(), whole));
        assert_eq!(ended_as("", ""), None);
        assert_eq!(ended_as("4", "3"), None, "both are older");
        assert_eq!(ended_as("5", "4"), is("5", true));
        assert_eq!(ended_as("4", "5"), is("5", false));
        assert_eq!(ended_as("6", "5"), is("5", false), "as it was asked for");
        assert_eq!(ended_as("5", "6"), is("5", true));
        assert_eq!(ended_as("6", "4"), is("6", true));
        assert_eq!(ended_as("4", "6"), is("6", false));
    }
}
