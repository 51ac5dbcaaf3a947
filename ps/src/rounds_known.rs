//! The ends of rounds, from where they are decided: whoever says that a round is over is only believed that shard 0 is to be asked.

use std::collections::HashMap;
use std::time::Duration;

use downpour_core::clocks::Round;
use downpour_core::id::{Epoch, JobId};
use downpour_proto::v1;
use downpour_proto::v1::RetryReason;
use parking_lot::Mutex;
use tokio::time::timeout;

use crate::hosted::ShardKey;
use crate::life::Life;
use crate::shard::{CLOCK_SHARD, Declined};

/// A server that does not say in time what it decided is asked again by whoever waits.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The last round of each job that its shard 0 told of.
#[derive(Debug, Default)]
pub(crate) struct RoundsKnown(Mutex<HashMap<JobId, Round>>);

impl RoundsKnown {
    pub(crate) fn forget(&self, job: JobId) {
        self.0.lock().remove(&job);
    }
}

impl Life {
    /// The round of a job that is said to be over, or a later one, as its shard 0 decided it.
    ///
    /// # Errors
    /// Shard 0 knows of no such round, or is not heard.
    pub(crate) async fn decided(&self, job: JobId, number: u64) -> Result<Round, Declined> {
        // Shard 0 may have been set back since it told of a later one: only this very round is believed.
        let known = self.rounds.0.lock().get(&job).filter(|known| known.number == number).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let decided = self.ask_for_round(job).await.filter(|decided| decided.number >= number);
        let decided = decided.ok_or(Declined::Retry(RetryReason::NotReady))?;
        self.rounds.0.lock().insert(job, decided.clone());
        Ok(decided)
    }

    async fn ask_for_round(&self, job: JobId) -> Option<Round> {
        let view = self.view(job)?;
        let route = view.route(CLOCK_SHARD)?;
        let primary = route.primary?;
        if primary == self.me {
            return self.decided_here(job, route.epoch).await.ok();
        }
        let mut client = self.replica(&self.address(primary)?).ok()?;
        let incarnation = primary.incarnation.0;
        let request = v1::LastRoundRequest { job: job.0, incarnation, epoch: route.epoch.0 };
        let reply = timeout(ANSWER_WITHIN, client.last_round(request)).await.ok()?.ok()?;
        reply.into_inner().round?.try_into().ok()
    }

    /// The last round that the shard 0 here decided, once every in-sync member has it.
    pub(crate) async fn decided_here(&self, job: JobId, epoch: Epoch) -> Result<Round, Declined> {
        let key = ShardKey { job, shard: CLOCK_SHARD };
        let hosted = self.hosted(key).ok_or_else(|| self.elsewhere(key))?;
        let (ticket, round) = hosted.shard.lock().decided(epoch, self.lease.contact())?;
        hosted.settled(&ticket, || self.lease.contact()).await?;
        Ok(round)
    }
}
