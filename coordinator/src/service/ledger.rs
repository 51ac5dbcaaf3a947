//! Tasks of a job's data, asked for by its workers.

use std::sync::Arc;
use std::time::Duration;

use downpour_core::id::{JobId, SessionId};
use downpour_core::ledger::{Advance, Ledger};
use downpour_proto::v1;
use tonic::Status;

use super::Service;
use crate::command::{self, Body};
use crate::state::Cluster;

impl Service {
    pub(super) async fn define_ledger(
        &self,
        request: v1::DefineLedgerRequest,
    ) -> Result<v1::DefineLedgerReply, Status> {
        let job = command::job(request.job)?;
        self.propose(Body::DefineLedger(request)).await?;
        let cluster = self.handle.cluster();
        let ledger = cluster.ledgers.get(&job).map(|ledger| ledger.as_ref().into());
        Ok(v1::DefineLedgerReply { ledger })
    }

    /// What would change nothing is not proposed: it is read, and waits for a while until there is something to tell.
    pub(super) async fn advance_ledger(
        &self,
        request: v1::AdvanceLedgerRequest,
    ) -> Result<v1::AdvanceLedgerReply, Status> {
        let (job, session) = (command::job(request.job)?, command::session(request.session)?);
        let advance = Advance::try_from(request.clone())?;
        let asked = Asked { job, session, generation: request.generation, advance };
        let wait = Duration::from_millis(request.wait_ms);
        if asked.news(&self.handle.cluster()) == News::None {
            let cluster = self.read().await?;
            if asked.news(&cluster) == News::None && !wait.is_zero() {
                self.wait_for_news(&asked, wait).await;
            }
        }
        if asked.news(&self.handle.cluster()) != News::ToCommit {
            self.read().await?;
        }
        // Also where only a member that is behind saw nothing to note: the worker takes what it told as noted.
        if asked.news(&self.handle.cluster()) == News::ToCommit {
            self.propose(Body::AdvanceLedger(request)).await?;
        }
        Ok(asked.answer(&self.handle.cluster()))
    }

    async fn wait_for_news(&self, asked: &Asked, wait: Duration) {
        let mut changes = self.handle.watch_cluster();
        let mut seen: Option<Arc<Ledger>> = None;
        let news = changes.wait_for(|cluster| {
            // Most commands are about something else.
            let now = cluster.ledgers.get(&asked.job);
            let same = now.zip(seen.as_ref()).is_some_and(|(now, seen)| Arc::ptr_eq(now, seen));
            seen = now.cloned();
            !(same && asked.is_open(cluster)) && asked.news(cluster) != News::None
        });
        tokio::select! {
            _ = news => {}
            () = tokio::time::sleep(wait) => {}
            () = self.stop.cancelled() => {}
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum News {
    /// Nothing would change.
    None,
    /// Something would, or the session is over, which the command says.
    ToCommit,
    /// All is done, or this is not the ledger that the worker knows.
    ToTell,
}

struct Asked {
    job: JobId,
    session: SessionId,
    generation: u64,
    advance: Advance,
}

impl Asked {
    fn is_open(&self, cluster: &Cluster) -> bool {
        cluster.job(self.job).is_some_and(|job| job.sessions.contains_key(&self.session))
    }

    fn news(&self, cluster: &Cluster) -> News {
        let ledger = cluster.ledgers.get(&self.job);
        match ledger.filter(|ledger| ledger.generation() == self.generation) {
            _ if !self.is_open(cluster) => News::ToCommit,
            None => News::ToTell,
            Some(ledger) if ledger.would_change(self.session, &self.advance) => News::ToCommit,
            Some(ledger) if ledger.is_over() => News::ToTell,
            Some(_) => News::None,
        }
    }

    fn answer(&self, cluster: &Cluster) -> v1::AdvanceLedgerReply {
        let Some(ledger) = cluster.ledgers.get(&self.job) else {
            return v1::AdvanceLedgerReply::default();
        };
        let holder = ledger.holder(self.session);
        v1::AdvanceLedgerReply {
            started: holder.map_or_else(Vec::new, |one| one.started.iter().copied().collect()),
            ahead: holder.map_or_else(Vec::new, |one| one.ahead.iter().copied().collect()),
            slow: ledger.is_slow(self.session),
            ledger: Some(ledger.as_ref().into()),
        }
    }
}
