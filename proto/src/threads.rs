//! Where work leaves the thread that it is on. A simulation of the whole stack (`--cfg downpour_sim`, docs/simulation.md) has one thread: there it is
//! a task like all others.
// tidy: not simulated: what a simulation replaces.

use std::io;

use tokio::sync::mpsc::{Receiver, Sender};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Runs what computes for long or waits for a disk on a thread of its own.
pub fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    #[cfg(not(downpour_sim))]
    let handle = tokio::task::spawn_blocking(work);
    #[cfg(downpour_sim)]
    let handle = tokio::spawn(async {
        // Long enough for something to happen meanwhile.
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        work()
    });
    handle
}

/// From [`blocking`] work to whoever waits for it. False: nobody does any more.
pub fn send<T>(queue: &Sender<T>, value: T) -> bool {
    #[cfg(not(downpour_sim))]
    let sent = queue.blocking_send(value).is_ok();
    // What is simulated is small enough for the queue: nothing would ever make room.
    #[cfg(downpour_sim)]
    let sent = queue.try_send(value).is_ok();
    sent
}

/// The other way: the next value, or none once all senders are gone.
pub fn receive<T>(queue: &mut Receiver<T>) -> Option<T> {
    #[cfg(not(downpour_sim))]
    let received = queue.blocking_recv();
    #[cfg(downpour_sim)]
    let received = queue.try_recv().ok();
    received
}

/// Runs a future that blocks on a thread of its own, to its end. Nothing arrives if it panicked.
///
/// # Errors
/// The system has no thread or no descriptor left.
pub fn dedicated<T: Send + 'static>(
    name: &str,
    future: impl Future<Output = T> + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (end, ended) = oneshot::channel();
    let run = async {
        // Nobody waits any more where the whole process is going down.
        _ = end.send(future.await);
    };
    #[cfg(not(downpour_sim))]
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        std::thread::Builder::new().name(name.into()).spawn(move || runtime.block_on(run))?;
    }
    #[cfg(downpour_sim)]
    {
        _ = (name, tokio::spawn(run));
    }
    Ok(ended)
}
