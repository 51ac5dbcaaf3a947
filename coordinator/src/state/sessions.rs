//! Sessions: their numbers rise for ever, over all jobs (protocol 1.4).

use downpour_core::checkpoint::Orders;
use downpour_core::id::{JobId, SessionId};

use super::requests::Remembered;
use super::size::SESSION_BYTES;
use super::{Outcome, Refused, Reply, Session, State};
use crate::command::Opening;

/// Most open sessions of a job.
const SESSIONS_MAX: usize = 16_384;

impl State {
    /// The job's view does not change: a session that no primary has heard of is above the high water and therefore not closed.
    pub(super) fn open_session(&mut self, job: JobId, opening: Opening) -> Outcome {
        let Opening { name, kind, request_id } = opening;
        let request = format!("open {job} {request_id}");
        if let Some(&Remembered::Session(session)) = self.requests.find(&request) {
            return Ok(Reply::Opened(session));
        }
        if self.job(job)?.sessions.len() == SESSIONS_MAX {
            let problem = format!("job {job} already has {SESSIONS_MAX} open sessions");
            return Err(Refused::FailedPrecondition(problem));
        }
        self.check_room(SESSION_BYTES)?;
        self.last.session += 1;
        let session = SessionId(self.last.session);
        self.job_mut(job).sessions.insert(session, Session { name, kind });
        self.requests.remember(request, Remembered::Session(session));
        Ok(Reply::Opened(session))
    }

    /// Closing twice is closing once.
    pub(super) fn close_sessions(&mut self, sessions: &[(JobId, SessionId)]) -> Outcome {
        let version = self.cluster.version;
        for &(id, session) in sessions {
            if !self.cluster.job(id).is_some_and(|job| job.sessions.contains_key(&session)) {
                continue;
            }
            self.give_back(id, session);
            let job = self.job_mut(id);
            job.sessions.remove(&session);
            let closed = &mut job.view.sessions;
            closed.high_water = closed.high_water.max(session.0);
            let below = ..=SessionId(closed.high_water);
            closed.open = job.sessions.range(below).map(|(&open, _)| open).collect();
            job.view.version = version;
        }
        Ok(Reply::Done)
    }

    /// Its worker is told that it was an operator. What was closed before is as closed as it can be.
    pub(super) fn evict_session(&mut self, id: JobId, session: SessionId) -> Outcome {
        let job = self.job(id)?;
        if session.0 > self.last.session {
            return Err(Refused::NotFound(format!("there never was a session {session}")));
        }
        let Some(Session { name, .. }) = job.sessions.get(&session) else {
            return Ok(Reply::Changed(false));
        };
        let (name, of) = (name.clone(), job.view.spec.name.clone());
        let evicted = &mut self.job_mut(id).view.orders.evicted;
        if evicted.len() == Orders::EVICTED_MAX {
            evicted.remove(0);
        }
        evicted.push(session);
        self.tell("worker", format!("{name} (session {session} of job {of}) is evicted"));
        self.close_sessions(&[(id, session)])?;
        Ok(Reply::Changed(true))
    }
}
