//! A server that was started for one job ends with it.

use std::borrow::Borrow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use downpour_core::view::JobView;
use tokio::time::MissedTickBehavior;
use tracing::info;

use crate::life::{Life, Process};
use crate::membership::Current;

const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Stops the process when the job of this name was there and is gone, and nothing of another job is held. A job that is started over is gone for a moment.
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
        if job.is_over(
            is_there(&life.views(), &life),
            life.all().is_empty(),
            Instant::now(),
            patience,
        ) {
            info!(job = name, "gone, and this server with it");
            return process.shutdown.token().cancel();
        }
    }
}

/// Whether the job that this server is for is among them.
pub(crate) fn is_there(views: &[impl Borrow<JobView>], life: &Life) -> bool {
    let name = &life.process.config.for_job;
    views.iter().any(|view| view.borrow().spec.name == *name)
}

#[derive(Debug, Default)]
struct Job {
    seen: bool,
    gone: Option<Instant>,
}

impl Job {
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
}
