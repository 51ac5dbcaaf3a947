//! How a process ends: a token says *start to stop*, tracked tasks say *everyone has stopped*, a deadline bounds the wait.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

/// The end of a process, and everything that must have ended before it. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tracker: TaskTracker,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    next_task: AtomicU64,
    running: Mutex<BTreeMap<u64, String>>,
    failure: Mutex<Option<anyhow::Error>>,
}

impl Shutdown {
    /// A root that nothing has cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancelled when the process is to stop. Every loop and every streaming handler selects on it.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// SIGTERM or SIGINT cancels the token; a second one exits at once with the status of a process that the signal killed.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let token = self.token();
        tokio::spawn(async move {
            loop {
                let (name, status) = tokio::select! {
                    _ = terminate.recv() => ("SIGTERM", 128 + 15),
                    _ = interrupt.recv() => ("SIGINT", 128 + 2),
                };
                if token.is_cancelled() {
                    warn!(signal = name, "second signal: exit at once");
                    std::process::exit(status);
                }
                info!(signal = name, "stopping");
                token.cancel();
            }
        });
        Ok(())
    }

    /// Runs a task that the process waits for when it stops. The name is for people, who read it when the task is late.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: impl Into<String>,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        let entry = Entry::new(self.shared.clone(), name.into());
        self.tracker.spawn(async move {
            let _entry = entry;
            task.await
        })
    }

    /// As [`spawn`](Self::spawn), for a task without which the process is worth nothing: its error or panic stops the process, with
    /// the error as its reason.
    pub fn spawn_critical(
        &self,
        name: impl Into<String>,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let name = name.into();
        let this = self.clone();
        let running = self.spawn(name.clone(), task);
        self.tracker.spawn(async move {
            match running.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => this.fail(error.context(name)),
                Err(panicked) => this.fail(anyhow::Error::new(panicked).context(name)),
            }
        });
    }

    /// Stops the process with this error as its reason; the first one counts.
    pub fn fail(&self, reason: anyhow::Error) {
        error!(error = format!("{reason:#}"), "stopping because of an error");
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        self.token.cancel();
    }

    /// Waits for the token, then up to `deadline` for all tasks. An error if a task failed or did not end.
    pub async fn finish(self, deadline: Duration) -> anyhow::Result<()> {
        self.token.cancelled().await;
        self.tracker.close();
        let ended = tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok();
        if let Some(failure) =
            self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            return Err(failure);
        }
        let running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
        let late: Vec<&str> = running.values().map(String::as_str).collect();
        anyhow::ensure!(ended, "did not stop within {deadline:?}: {}", late.join(", "));
        Ok(())
    }
}

/// Lists a task for as long as it runs, panics and aborts included.
struct Entry {
    shared: Arc<Shared>,
    id: u64,
}

impl Entry {
    fn new(shared: Arc<Shared>, name: String) -> Self {
        let id = shared.next_task.fetch_add(1, Ordering::Relaxed);
        shared.running.lock().unwrap_or_else(PoisonError::into_inner).insert(id, name);
        Self { shared, id }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn finish_waits_for_tracked_tasks() {
        let shutdown = Shutdown::new();
        let token = shutdown.token();
        let task = shutdown.spawn("polite", async move {
            token.cancelled().await;
            tokio::task::yield_now().await;
            7
        });
        shutdown.token().cancel();
        shutdown.finish(DEADLINE).await.expect("clean");
        assert!(task.is_finished());
        assert_eq!(task.await.expect("no panic"), 7);
    }

    #[tokio::test]
    async fn an_error_of_a_critical_task_stops_the_process_and_is_its_reason() {
        let shutdown = Shutdown::new();
        shutdown.spawn_critical("raft", async { anyhow::bail!("disk full") });
        let error = shutdown.finish(DEADLINE).await.expect_err("failed");
        assert_eq!(format!("{error:#}"), "raft: disk full");
    }

    #[tokio::test]
    async fn a_panic_of_a_critical_task_stops_the_process() {
        let shutdown = Shutdown::new();
        shutdown.spawn_critical("raft", async { panic!("boom") });
        let error = shutdown.finish(DEADLINE).await.expect_err("failed");
        assert!(format!("{error:#}").contains("boom"), "{error:#}");
    }

    #[tokio::test]
    async fn a_task_that_does_not_end_is_named_at_the_deadline() {
        let shutdown = Shutdown::new();
        shutdown.spawn("stubborn", std::future::pending::<()>());
        shutdown.token().cancel();
        let error = shutdown.finish(Duration::from_millis(1)).await.expect_err("late");
        assert!(error.to_string().ends_with(": stubborn"), "{error}");
    }
}
