//! The runtime inside a blocking client: whoever waits for an answer also does the network's work, on the same thread.
//!
//! Waking a thread on another core costs more than most requests (docs/performance.md), so there is no network thread that callers hand their
//! requests to. When nobody has called for a while, a relief thread takes the runtime over: sessions are renewed, pushes are sent again. The
//! next caller takes it back.
// tidy: not simulated: the blocking face, which owns a runtime; a simulation has one of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Notify;

use crate::Error;

/// Without a call for this long, at most twice this long, the relief thread takes over.
const RELIEF_AFTER: Duration = Duration::from_millis(5);

/// A runtime that its callers drive.
pub(crate) struct Driver {
    /// Given until drop.
    runtime: Option<Arc<Runtime>>,
    shared: Arc<Shared>,
    relief: Option<JoinHandle<()>>,
}

/// Who is where. Sequentially consistent: a caller says that it is there and then looks whether the relief drives; the relief says that it
/// drives and then looks whether a caller is there. At least one of them sees the other.
#[derive(Default)]
struct Shared {
    callers: AtomicUsize,
    calls: AtomicU64,
    relieved: AtomicBool,
    over: AtomicBool,
    arrived: Notify,
}

impl Driver {
    /// # Errors
    /// Called inside a runtime, or the system has no thread or descriptor left.
    pub(crate) fn start() -> Result<Self, Error> {
        if Handle::try_current().is_ok() {
            return Err(Error::InsideRuntime);
        }
        let failed = |error: std::io::Error| Error::Runtime(error.to_string());
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (runtime, shared) = (Arc::new(runtime), Arc::new(Shared::default()));
        let relief = {
            let (runtime, shared) = (Arc::clone(&runtime), Arc::clone(&shared));
            let named = thread::Builder::new().name("downpour-relief".into());
            named.spawn(move || shared.relieve(&runtime)).map_err(failed)?
        };
        Ok(Driver { runtime: Some(runtime), shared, relief: Some(relief) })
    }

    /// Runs a future to its end on this thread, and everything else that the runtime has to do meanwhile.
    ///
    /// # Errors
    /// The future's, or that the call comes from inside a runtime.
    pub(crate) fn block_on<T>(
        &self,
        future: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let runtime = self.runtime.as_ref().filter(|_| Handle::try_current().is_err());
        let runtime = runtime.ok_or(Error::InsideRuntime)?;
        let _present = Present::new(&self.shared);
        runtime.block_on(future)
    }

    /// Where tasks are spawned that outlive a call.
    pub(crate) fn handle(&self) -> Option<&Handle> {
        self.runtime.as_ref().map(|runtime| runtime.handle())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.over.store(true, SeqCst);
        self.shared.arrived.notify_one();
        if let Some(relief) = self.relief.take() {
            relief.thread().unpark();
            // It panics only if a task of the runtime did in a way that tokio does not catch.
            _ = relief.join();
        }
        // Plainly dropped, it would wait, and panic where somebody drops it in an async context.
        if let Some(runtime) = self.runtime.take().and_then(Arc::into_inner) {
            runtime.shutdown_background();
        }
    }
}

/// A caller, counted while it is in a call.
struct Present<'a>(&'a Shared);

impl<'a> Present<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.callers.fetch_add(1, SeqCst);
        shared.calls.fetch_add(1, SeqCst);
        if shared.relieved.load(SeqCst) {
            shared.arrived.notify_one();
        }
        Present(shared)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.0.callers.fetch_sub(1, SeqCst);
    }
}

impl Shared {
    fn relieve(&self, runtime: &Runtime) {
        let mut seen = self.calls.load(SeqCst);
        while !self.over.load(SeqCst) {
            thread::park_timeout(RELIEF_AFTER);
            let calls = self.calls.load(SeqCst);
            if calls == seen {
                self.relieved.store(true, SeqCst);
                runtime.block_on(async {
                    while self.callers.load(SeqCst) == 0 && !self.over.load(SeqCst) {
                        self.arrived.notified().await;
                    }
                });
                self.relieved.store(false, SeqCst);
            }
            seen = calls;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn tasks_go_on_while_nobody_calls_and_while_somebody_does() {
        let driver = Driver::start().expect("a driver");
        let (ticks, ticked) = mpsc::channel();
        driver
            .block_on(async {
                tokio::spawn(async move {
                    while ticks.send(()).is_ok() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                });
                Ok(())
            })
            .expect("a call");
        for _ in 0..20 {
            ticked.recv_timeout(PATIENCE).expect("the relief drives");
        }
        for _ in 0..20 {
            let tick = driver.block_on(async {
                let tick = async {
                    while ticked.try_recv().is_err() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                };
                Ok(tokio::time::timeout(PATIENCE, tick).await)
            });
            tick.expect("a call").expect("the caller drives");
        }
        ticked.recv_timeout(PATIENCE).expect("the relief drives again");
    }

    #[test]
    fn callers_of_several_threads_take_turns() {
        let driver = Arc::new(Driver::start().expect("a driver"));
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let driver = Arc::clone(&driver);
                thread::spawn(move || {
                    for _ in 0..200 {
                        let same = driver.block_on(async {
                            tokio::task::yield_now().await;
                            Ok(number)
                        });
                        assert_eq!(same.expect("a call"), number);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    }

    #[tokio::test]
    async fn a_call_inside_a_runtime_is_refused() {
        assert!(matches!(Driver::start().map(drop), Err(Error::InsideRuntime)));
    }
}
