//! Keeps a [`JobState`] up to date through any member that answers.

use std::sync::Arc;
use std::time::Duration;

use downpour_core::id::JobId;
use downpour_core::view::{JobView, NodeView};
use downpour_proto::v1;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::state::JobState;
use crate::{Coordinators, Error};

/// A watch that was just begun is not left because somebody is impatient.
const PATIENCE: Duration = Duration::from_secs(1);

/// The newest state of a job, and a way to say that it looks old.
#[derive(Clone, Debug)]
pub(crate) struct Watched {
    state: Arc<watch::Sender<Arc<JobState>>>,
    nudge: Arc<Notify>,
}

impl Watched {
    pub(crate) fn new(state: JobState) -> Self {
        let (state, _) = watch::channel(Arc::new(state));
        Watched { state: Arc::new(state), nudge: Arc::new(Notify::new()) }
    }

    pub(crate) fn now(&self) -> Arc<JobState> {
        self.state.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<JobState>> {
        self.state.subscribe()
    }

    /// Changes the state; `change` says whether it did.
    pub(crate) fn update(&self, change: impl FnOnce(&mut JobState) -> bool) {
        self.state.send_if_modified(|state| change(Arc::make_mut(state)));
    }

    /// What this state says does not work: ask another member.
    pub(crate) fn nudge(&self) {
        self.nudge.notify_one();
    }

    /// Follows the job until this is dropped. Survives every failure: the state is then as old as the last answer, and the data plane goes on
    /// with it.
    pub(crate) async fn follow(self, coordinators: Coordinators) {
        let job = self.now().view.job;
        let (mut turn, mut attempt) = (0, 0);
        loop {
            let begun = Instant::now();
            match self.follow_one(&coordinators, job, turn).await {
                Ok(()) => {}
                Err(problem) => tracing::debug!(%job, problem, "watch ended"),
            }
            turn += 1;
            attempt = if begun.elapsed() > PATIENCE { 0 } else { attempt + 1 };
            tokio::time::sleep(coordinators.stream_backoff(attempt)).await;
        }
    }

    async fn follow_one(
        &self,
        coordinators: &Coordinators,
        job: JobId,
        turn: usize,
    ) -> Result<(), String> {
        let mut member = coordinators.any_member(turn).map_err(|error| error.to_string())?;
        let begun = Instant::now();
        let impatient = async {
            tokio::time::sleep_until(begun + PATIENCE).await;
            self.nudge.notified().await;
        };
        let follow = async {
            let stream = member.watch(v1::WatchRequest { job: job.0 }).await;
            let mut events = stream.map_err(|status| status.message().to_owned())?.into_inner();
            while let Some(event) =
                events.message().await.map_err(|status| status.message().to_owned())?
            {
                coordinators.learn(event.coordinators.clone(), event.coordinators_version);
                let event = Event::read(event).map_err(|error| error.to_string())?;
                self.update(|state| event.apply(state));
            }
            Ok(())
        };
        tokio::select! {
            ended = follow => ended,
            () = impatient => Err("left for another member".into()),
        }
    }
}

struct Event {
    version: u64,
    whole: bool,
    jobs: Vec<JobView>,
    deleted: Vec<JobId>,
    nodes: Vec<NodeView>,
}

impl Event {
    fn read(event: v1::WatchEvent) -> Result<Self, Error> {
        Ok(Event {
            version: event.version,
            whole: event.whole,
            jobs: event.jobs.into_iter().map(JobView::try_from).collect::<Result<_, _>>()?,
            deleted: event.deleted_jobs.into_iter().map(JobId).collect(),
            nodes: event.nodes.into_iter().map(NodeView::try_from).collect::<Result<_, _>>()?,
        })
    }

    /// True when it says something new. A member that is behind is not listened to until it has caught up.
    fn apply(self, state: &mut JobState) -> bool {
        if self.version < state.version {
            return false;
        }
        let job = state.view.job;
        let gone = self.deleted.contains(&job)
            || (self.whole && self.jobs.iter().all(|view| view.job != job));
        // A member may not have heard of a job that was just created; once a version is known that holds it, absence means deletion.
        let deleted = gone && !state.deleted && (state.version > 0 || !self.whole);
        let mut news = deleted;
        state.deleted |= deleted;
        if !gone {
            news |= self.version > state.version;
            state.version = self.version;
        }
        for view in self.jobs {
            news |= state.learn_view(view);
        }
        for node in self.nodes {
            news |= state.learn_node(node);
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::{node, state, view};

    fn event(version: u64, whole: bool, jobs: Vec<JobView>) -> Event {
        Event { version, whole, jobs, deleted: Vec::new(), nodes: Vec::new() }
    }

    #[test]
    fn a_member_that_is_behind_is_not_listened_to() {
        let mut state = state();
        assert!(event(10, true, vec![view(5)]).apply(&mut state));
        assert!(!event(9, true, vec![view(6)]).apply(&mut state));
        assert!(!event(9, true, Vec::new()).apply(&mut state));
        assert_eq!((state.version, state.view.version, state.deleted), (10, 5, false));
        event(11, false, vec![view(4)]).apply(&mut state);
        assert_eq!((state.version, state.view.version), (11, 5), "an older view");
        event(12, false, vec![view(7)]).apply(&mut state);
        assert_eq!(state.view.version, 7);
    }

    #[test]
    fn a_job_is_deleted_by_name_or_by_its_absence_from_what_is_newer() {
        let mut fresh = state();
        assert!(!event(3, true, Vec::new()).apply(&mut fresh), "not heard of it yet");
        assert!(!fresh.deleted);
        event(4, true, vec![view(2)]).apply(&mut fresh);
        assert!(event(5, true, Vec::new()).apply(&mut fresh));
        assert!(fresh.deleted);
        let mut named = state();
        let job = named.view.job;
        assert!(Event { deleted: vec![job], ..event(1, false, Vec::new()) }.apply(&mut named));
        assert!(named.deleted);
    }

    #[test]
    fn servers_only_get_newer() {
        let mut state = state();
        let with =
            |life, alive| Event { nodes: vec![node(1, life, alive)], ..event(1, false, vec![]) };
        assert!(with(20, true).apply(&mut state));
        assert!(!with(19, true).apply(&mut state));
        assert!(with(20, false).apply(&mut state));
        assert!(!with(20, true).apply(&mut state), "the dead stay dead");
        assert!(with(21, true).apply(&mut state));
    }
}
