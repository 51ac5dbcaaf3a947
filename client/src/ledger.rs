//! Calls of workers that share the tasks of their job's data.

use downpour_core::id::{JobId, SessionId};
use downpour_core::ledger::Plan;
use downpour_proto::v1;

use crate::{Coordinators, Error};

impl Coordinators {
    /// Says what data a worker is to train with the others of its job.
    ///
    /// # Errors
    /// "Already exists" where the job is in the midst of other data. See [`Coordinators::call`].
    pub async fn define_ledger(
        &self,
        job: JobId,
        session: SessionId,
        plan: &Plan,
    ) -> Result<v1::LedgerView, Error> {
        let (job, session) = (job.0, session.0);
        let request = v1::DefineLedgerRequest { job, session, plan: Some(plan.into()) };
        let reply = self
            .call("define the tasks", |mut member| {
                let request = request.clone();
                async move { member.define_ledger(request).await }
            })
            .await?;
        let problem = "ledger is not given".into();
        reply.ledger.ok_or_else(|| Error::Protocol { from: "the coordinator".into(), problem })
    }

    /// Tells what a worker did of its job's tasks, and asks for more.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn advance_ledger(
        &self,
        request: &v1::AdvanceLedgerRequest,
    ) -> Result<v1::AdvanceLedgerReply, Error> {
        self.call("ask for tasks", |mut member| {
            let request = request.clone();
            async move { member.advance_ledger(request).await }
        })
        .await
    }
}
