use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use downpour_client::Coordinators;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use crate::{Error, JobBuilder, Result};

/// A cluster that this process can reach. Cheap to clone; the runtime that does the network's work is inside.
///
/// Everything of this crate blocks its thread. Inside an async runtime it is refused with [`Error::InsideRuntime`].
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    runtime: Option<Runtime>,
    coordinators: Coordinators,
    stop: watch::Sender<bool>,
    /// The handler of signals is installed once, by the first loop.
    handles_signals: Mutex<bool>,
}

impl Cluster {
    /// `coordinators`: `host:port` of some or all, with commas between; `http://` in front is allowed.
    ///
    /// From the first training loop on, SIGTERM and Ctrl-C end loops (`next` answers `None`) and no longer the process; a second
    /// one ends the process.
    pub fn connect(coordinators: &str) -> Result<Self> {
        if tokio::runtime::Handle::try_current().is_ok() {
            return Err(Error::InsideRuntime);
        }
        let plain: Vec<&str> = coordinators
            .split(',')
            .map(|address| address.trim().trim_start_matches("http://").trim_end_matches('/'))
            .collect();
        let coordinators = Coordinators::parse(&plain.join(","))?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("downpour-network")
            .enable_all()
            .build()
            .map_err(Error::Runtime)?;
        // An address that nobody answers at is told now and not in the first step.
        runtime.block_on(coordinators.cluster())?;
        let (stop, _) = watch::channel(false);
        Ok(Self {
            inner: Arc::new(Inner {
                runtime: Some(runtime),
                coordinators,
                stop,
                handles_signals: Mutex::new(false),
            }),
        })
    }

    /// A job, to be created or joined.
    pub fn job(&self, name: &str) -> JobBuilder {
        JobBuilder::new(self.clone(), name)
    }

    pub(crate) fn coordinators(&self) -> &Coordinators {
        &self.inner.coordinators
    }

    /// Runs a future to its end on this thread.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        if tokio::runtime::Handle::try_current().is_ok() {
            return Err(Error::InsideRuntime);
        }
        Ok(self.runtime().block_on(future))
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        self.inner.runtime.as_ref().expect("it is taken only by drop")
    }

    /// True once SIGTERM or Ctrl-C came.
    #[must_use]
    pub fn stopping(&self) -> bool {
        *self.inner.stop.borrow()
    }

    /// Turns true when the process is told to stop. The first call installs the handler.
    pub(crate) fn stop(&self) -> Result<watch::Receiver<bool>> {
        use tokio::signal::unix::{SignalKind, signal};
        let receiver = self.inner.stop.subscribe();
        let mut handled = self.inner.handles_signals.lock().unwrap_or_else(PoisonError::into_inner);
        if *handled {
            return Ok(receiver);
        }
        let entered = self.runtime().enter();
        let mut terminate = signal(SignalKind::terminate()).map_err(Error::Runtime)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Runtime)?;
        drop(entered);
        *handled = true;
        let stop = self.inner.stop.clone();
        self.runtime().spawn(async move {
            for exit in [false, true] {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                if exit {
                    std::process::exit(EXIT_KILLED);
                }
                tracing::info!("stopping after this step; again to stop at once");
                stop.send_replace(true);
            }
        });
        Ok(receiver)
    }
}

/// Two workers often share a machine with the servers; the traffic of one needs no more.
const RUNTIME_THREADS: usize = 1;
/// 128 + SIGTERM, as a shell would say.
const EXIT_KILLED: i32 = 143;

impl Drop for Inner {
    fn drop(&mut self) {
        // A plain drop would wait for tasks, and would panic where somebody drops it in an async context.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
