//! A server that was started for one job ends with it.

use std::borrow::Borrow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use downpour_core::id::ServerRef;
use downpour_core::view::JobView;
use downpour_proto::v1;
use tokio::time::MissedTickBehavior;
use tonic::Status;
use tracing::{info, warn};

use crate::life::{Life, Process};
use crate::membership::{self, Current};

const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Stops the process when the job of this name was there and is gone, and nothing of another job is held. A job that is started over is gone for a moment. The server is cordoned before it
/// goes, or the next job might just be placed here.
pub(crate) async fn run(process: Arc<Process>, current: Current) {
    let name = &process.config.for_job;
    let patience = Duration::from_millis(process.config.for_job_wait_ms);
    let mut job = Job::default();
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let life = current.load_full();
        // Who has not heard of all jobs yet knows nothing of this one.
        let Some(life) = life.filter(|life| life.heard_all.load(Ordering::Relaxed)) else {
            continue;
        };
        job.seen |= life.job_seen.load(Ordering::Relaxed);
        let there = is_there(&life.views(), &life);
        let stays = match job.due(there, life.all().is_empty(), Instant::now(), patience) {
            Due::Nothing => continue,
            Due::Open => Ok(true),
            Due::Leave => is_free_from_now_on(&life).await.map(|free| !free),
        };
        let opened = match stays {
            Ok(false) => {
                info!(job = name, "gone, and this server with it");
                return process.shutdown.token().cancel();
            }
            Ok(true) => membership::admit(&process, life.me, v1::Admission::Open).await,
            Err(status) => Err(status),
        };
        match opened {
            Ok(()) => {
                job.cordoned = false;
                info!(job = name, "not over: this server takes copies again");
            }
            Err(status) => warn!(%status, "not known whether this server may go"),
        }
    }
}

/// Whether it may go: from a moment on nothing is placed here any more, and nothing was before that.
async fn is_free_from_now_on(life: &Life) -> Result<bool, Status> {
    let process = &life.process;
    membership::admit(process, life.me, v1::Admission::Cordoned).await?;
    let asked = process.coordinators.call(membership::REGISTER_PATIENCE, |mut member| async move {
        Ok(member.get_cluster(v1::GetClusterRequest {}).await?.into_inner())
    });
    Ok(is_free(&asked.await?, life.me, &process.config.for_job))
}

/// Whether a server holds nothing and is to hold nothing, and there is no job of this name.
fn is_free(cluster: &v1::GetClusterReply, me: ServerRef, name: &str) -> bool {
    let me = v1::ServerRef::from(me);
    let mut views = cluster.jobs.iter().filter_map(|job| job.view.as_ref());
    let names = |route: &v1::ShardRoute| {
        let arrives = [route.joining, route.moving.and_then(|moving| moving.to)];
        // A later life of this one is the same process, which was given up meanwhile.
        let is_me = |one: v1::ServerRef| one.node == me.node && one.incarnation >= me.incarnation;
        route.in_sync.iter().copied().chain(arrives.into_iter().flatten()).any(is_me)
    };
    views.all(|view| {
        view.spec.as_ref().is_none_or(|spec| spec.name != name) && !view.shards.iter().any(names)
    })
}

/// Whether the job that this server is for is among them.
pub(crate) fn is_there(views: &[impl Borrow<JobView>], life: &Life) -> bool {
    let name = &life.process.config.for_job;
    views.iter().any(|view| view.borrow().spec.name == *name)
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    /// The server goes, if it may.
    Leave,
    /// It was to go, and is needed.
    Open,
}

#[derive(Debug, Default)]
struct Job {
    seen: bool,
    gone: Option<Instant>,
    /// The server may be cordoned: also where no answer to that came.
    cordoned: bool,
}

impl Job {
    fn due(&mut self, there: bool, empty: bool, now: Instant, patience: Duration) -> Due {
        match self.is_over(there, empty, now, patience) {
            true => {
                self.cordoned = true;
                Due::Leave
            }
            false if self.cordoned => Due::Open,
            false => Due::Nothing,
        }
    }

    fn is_over(&mut self, there: bool, empty: bool, now: Instant, patience: Duration) -> bool {
        self.seen |= there;
        if there || !self.seen {
            self.gone = None;
            return false;
        }
        let gone = *self.gone.get_or_insert(now);
        empty && now.duration_since(gone) >= patience
    }
}

#[cfg(test)]
mod tests {
    use downpour_core::id::{Incarnation, NodeId};

    use super::*;

    #[test]
    fn a_job_is_over_when_it_was_there_and_is_gone_for_good_and_nothing_else_is_held() {
        let (start, patience) = (Instant::now(), Duration::from_secs(3));
        let mut job = Job::default();
        let mut over =
            |there, empty, s| job.is_over(there, empty, start + Duration::from_secs(s), patience);
        assert!(!over(false, true, 0), "it was never there");
        assert!(!over(true, false, 9));
        assert!(!over(false, true, 10));
        assert!(!over(true, false, 12), "it was started over");
        assert!(!over(false, true, 13));
        assert!(!over(false, true, 15));
        assert!(!over(false, false, 16), "of another job there is something");
        assert!(over(false, true, 17));
    }

    #[test]
    fn a_server_that_was_cordoned_and_does_not_go_is_opened_however_long_that_takes() {
        let (start, patience) = (Instant::now(), Duration::from_secs(3));
        let mut job = Job::default();
        let due = |job: &mut Job, there, empty, s| {
            job.due(there, empty, start + Duration::from_secs(s), patience)
        };
        assert_eq!(due(&mut job, true, false, 0), Due::Nothing);
        assert_eq!(due(&mut job, false, true, 1), Due::Nothing);
        assert_eq!(due(&mut job, false, true, 4), Due::Leave);
        // No coordinator answered, and the job is there again.
        assert_eq!(due(&mut job, true, true, 5), Due::Open);
        assert_eq!(due(&mut job, true, true, 6), Due::Open, "that was not answered, either");
        job.cordoned = false;
        assert_eq!(due(&mut job, true, true, 7), Due::Nothing);
    }

    #[test]
    fn a_server_is_free_when_no_committed_route_names_it_and_its_job_is_not_there_again() {
        let server = |node| ServerRef { node: NodeId(node), incarnation: Incarnation(5) };
        let (me, other) = (server(1), server(2));
        let cluster = |name: &str, route: v1::ShardRoute| {
            let spec = Some(v1::JobSpec { name: name.into(), ..Default::default() });
            let view = Some(v1::JobView { spec, shards: vec![route], ..Default::default() });
            let jobs = vec![v1::JobStatus { view, ..Default::default() }];
            v1::GetClusterReply { jobs, ..Default::default() }
        };
        let route = |in_sync: ServerRef, joining: ServerRef, to: ServerRef| v1::ShardRoute {
            in_sync: vec![in_sync.into()],
            joining: Some(joining.into()),
            moving: Some(v1::ShardMove { from: None, to: Some(to.into()) }),
            ..Default::default()
        };
        let free = |name: &str, route| is_free(&cluster(name, route), me, "mine");
        assert!(free("next", route(other, other, other)));
        assert!(!free("mine", route(other, other, other)), "it was started over");
        for named in [route(me, other, other), route(other, me, other), route(other, other, me)] {
            assert!(!free("next", named));
        }
        let before = ServerRef { incarnation: Incarnation(4), ..me };
        assert!(free("next", route(before, other, other)), "an earlier life of this name");
        let after = ServerRef { incarnation: Incarnation(6), ..me };
        assert!(!free("next", route(after, other, other)), "it was given up, and registered anew");
    }
}
