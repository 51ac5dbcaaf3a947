//! The tasks of jobs' data: who holds which (docs/protocol.md 7.2). What is done with them, [`Ledger`] decides; here is which one, and when it begins and ends.

use std::sync::Arc;

use downpour_core::id::{JobId, SessionId};
use downpour_core::ledger::{Advance, Ledger, Plan};
use downpour_proto::v1;
use prost::Message as _;

use super::size::ledger_bytes;
use super::{Job, Outcome, Refused, Reply, State};

impl State {
    /// An equal plan joins. Another one begins where nothing of the old one is left to do, or nothing was done.
    pub(super) fn define_ledger(&mut self, id: JobId, session: SessionId, plan: Plan) -> Outcome {
        check_worker(self.job(id)?, session)?;
        if let Some(ledger) = self.cluster.ledgers.get_mut(&id) {
            let differences = ledger.plan().differences(&plan);
            if differences.is_empty() {
                if plan.passes > ledger.plan().passes {
                    Arc::make_mut(ledger).extend(plan.passes);
                }
                return Ok(Reply::Done);
            }
            if !ledger.is_over() && !ledger.is_untouched() {
                let (pass, passes) = (ledger.pass() + 1, ledger.plan().passes);
                return Err(Refused::AlreadyExists(format!(
                    "the job is in pass {pass} of {passes} over other rows: {}",
                    differences.join("; ")
                )));
            }
        }
        self.check_room(ledger_bytes(&plan))?;
        self.set_ledger(id, Some(Ledger::new(plan, 0)));
        Ok(Reply::Done)
    }

    /// What is asked of another ledger than the job's changes nothing.
    pub(super) fn advance_ledger(
        &mut self,
        id: JobId,
        session: SessionId,
        generation: u64,
        request: &Advance,
    ) -> Outcome {
        check_worker(self.job(id)?, session)?;
        let ledger = self.cluster.ledgers.get_mut(&id);
        if let Some(ledger) = ledger.filter(|ledger| ledger.generation() == generation) {
            Arc::make_mut(ledger).advance(session, request);
        }
        Ok(Reply::Done)
    }

    /// A job begins with these tasks, none of them held, or goes back to them.
    pub(super) fn set_ledger(&mut self, id: JobId, ledger: Option<Ledger>) {
        let generation = self.cluster.version;
        let ledger = ledger.map(|ledger| Arc::new(ledger.without_holders(generation)));
        match ledger {
            Some(ledger) => self.cluster.ledgers.insert(id, ledger),
            None => self.cluster.ledgers.remove(&id),
        };
    }

    /// What a session that ends held is for others.
    pub(super) fn give_back(&mut self, id: JobId, session: SessionId) {
        let ledger = self.cluster.ledgers.get_mut(&id);
        if let Some(ledger) = ledger.filter(|ledger| ledger.holder(session).is_some()) {
            Arc::make_mut(ledger).give_back(session);
        }
    }

    /// As a checkpoint that begins now holds it.
    pub(super) fn captured_ledger(&self, id: JobId) -> Option<v1::LedgerRecord> {
        let ledger = self.cluster.ledgers.get(&id)?;
        Some((&ledger.without_holders(0)).into())
    }

    pub(super) fn captured_ledger_bytes(&self, id: JobId) -> usize {
        self.captured_ledger(id).map_or(0, |ledger| ledger.encoded_len())
    }
}

fn check_worker(job: &Job, session: SessionId) -> Result<(), Refused> {
    match job.sessions.get(&session) {
        Some(open) if open.kind == v1::SessionKind::Worker => Ok(()),
        Some(_) => {
            let problem = format!("session {session} is not a worker's: it trains nothing");
            Err(Refused::FailedPrecondition(problem))
        }
        None => {
            let problem = format!("job {} has no open session {session}", job.view.job);
            Err(Refused::NotFound(problem))
        }
    }
}
