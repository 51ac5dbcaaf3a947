//! Threads that serve connections of frames, each with a runtime of its own: what arrives on a connection is read, applied and answered on one
//! thread. Waking a thread on another core costs more than most requests (docs/performance.md).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use downpour_node::shutdown::Shutdown;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle};

/// Hands connections out in turn.
#[derive(Debug)]
pub(crate) struct DataThreads {
    handles: Vec<Handle>,
    next: AtomicUsize,
    shutdown: Shutdown,
}

impl DataThreads {
    /// `count` threads that end some time after the process was told to stop.
    ///
    /// # Errors
    /// The system has no thread or no descriptor left.
    pub(crate) fn start(
        count: usize,
        shutdown: &Shutdown,
        linger: Duration,
    ) -> anyhow::Result<Self> {
        let mut handles = Vec::with_capacity(count);
        for number in 0..count {
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.context("make a runtime for a data thread")?;
            handles.push(runtime.handle().clone());
            let token = shutdown.token();
            let run = move || {
                runtime.block_on(async {
                    token.cancelled().await;
                    tokio::time::sleep(linger).await;
                });
            };
            let named = thread::Builder::new().name(format!("data-{number}"));
            named.spawn(run).context("start a data thread")?;
        }
        Ok(DataThreads { handles, next: AtomicUsize::new(0), shutdown: shutdown.clone() })
    }

    /// Runs `serve` with the connection on the next thread.
    ///
    /// # Errors
    /// The connection cannot be taken from the thread that accepted it.
    pub(crate) fn spawn<F: Future<Output = ()> + Send + 'static>(
        &self,
        stream: TcpStream,
        serve: impl FnOnce(TcpStream) -> F + Send + 'static,
    ) -> std::io::Result<()> {
        let stream = stream.into_std()?;
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.handles.len();
        let _inside = self.handles[turn].enter();
        let stream = TcpStream::from_std(stream)?;
        self.shutdown.spawn("connection", serve(stream));
        Ok(())
    }
}
