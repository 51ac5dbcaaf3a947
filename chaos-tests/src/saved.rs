//! Checkpoints that are taken while faults happen: each one that is listed afterwards must be whole.

use std::time::Duration;

use anyhow::{Context, Result};
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::store::{Access, Store};
use downpour_checkpoint::write::Scratch;
use downpour_client::Coordinators;
use downpour_proto::v1;
use downpour_psctl::probe::wait_for;

use crate::cluster::{DEADLINE, TestCluster};

/// Often, so that faults meet one.
const EVERY: Duration = Duration::from_secs(2);
const KEPT: u32 = 4;
/// One full, then increments.
const FULL_EVERY: u32 = 3;

/// The checkpoints of one job.
#[derive(Debug)]
pub(crate) struct Saved {
    job: String,
    uri: String,
}

impl Saved {
    /// Has the coordinators take checkpoints of a job again and again.
    pub(crate) fn schedule(cluster: &TestCluster, job: &str) -> Result<Self> {
        let saved =
            Saved { job: job.into(), uri: format!("file://{}", cluster.checkpoints().display()) };
        cluster.runtime.block_on(saved.every(&cluster.coordinators, EVERY))?;
        Ok(saved)
    }

    async fn every(&self, coordinators: &Coordinators, every: Duration) -> Result<()> {
        let schedule = v1::CheckpointSchedule {
            uri: self.uri.clone(),
            every_ms: every.as_millis() as u64,
            keep: KEPT,
            full_every: FULL_EVERY,
            every_steps: 0,
        };
        let job = coordinators.job(&self.job).await?.job;
        coordinators.schedule_checkpoints(job, schedule).await.context("schedule checkpoints")
    }

    /// Ends the schedule and reads every byte of all checkpoints that are there; says how many.
    ///
    /// # Errors
    /// One that is listed is not whole, or the last one does not end.
    pub(crate) fn verify(&self, cluster: &TestCluster) -> Result<u64> {
        cluster.runtime.block_on(async {
            let coordinators = &cluster.coordinators;
            self.every(coordinators, Duration::ZERO).await?;
            let ended = || async {
                let view = coordinators.job(&self.job).await.ok()?;
                view.orders.checkpoint.is_none().then_some(())
            };
            wait_for("the last checkpoint to end", DEADLINE, ended).await?;
            let catalog = Catalog::new(Store::open(&self.uri, Access::Write)?);
            let listed = catalog.list(&self.job).await?;
            let count = listed.len() as u64;
            for (name, manifest) in listed {
                let whole = catalog.verify(manifest?, &Scratch::default(), |_| ()).await;
                whole.with_context(|| format!("checkpoint {name} is listed"))?;
            }
            Ok(count)
        })
    }
}
