//! Threads that serve connections of frames, each with a runtime of its own: what arrives on a connection is read, applied and answered on one
//! thread. Waking a thread on another core costs more than most requests (docs/performance.md).
// tidy: not simulated: in a simulation all runs on its one thread.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use downpour_node::shutdown::Shutdown;
use downpour_proto::frame::Hello;
use downpour_proto::net::{self, TcpStream};
use parking_lot::Mutex;
use tokio::runtime::{EnterGuard, Handle};

/// Hands connections out. Those of one session's lane are served by one thread: a worker's push changes the rows that it has just pulled, and finds
/// them in that core's cache. Its lanes are served by different threads, which share the work of one client.
#[derive(Clone, Debug)]
pub(crate) struct DataThreads {
    handles: Vec<Handle>,
    homes: Arc<Mutex<Homes>>,
    shutdown: Shutdown,
}

/// Which thread serves the first lane of which session.
#[derive(Debug)]
struct Homes {
    /// Thread, and how many connections it serves for the session.
    sessions: HashMap<u64, (usize, usize)>,
    /// Sessions of each thread.
    loads: Vec<usize>,
}

impl Homes {
    fn enter(&mut self, session: u64) -> usize {
        if let Some((thread, connections)) = self.sessions.get_mut(&session) {
            *connections += 1;
            return *thread;
        }
        let least = (0..self.loads.len()).min_by_key(|&thread| self.loads[thread]);
        let thread = least.unwrap_or(0);
        self.loads[thread] += 1;
        self.sessions.insert(session, (thread, 1));
        thread
    }

    fn leave(&mut self, session: u64) {
        let Some((thread, connections)) = self.sessions.get_mut(&session) else { return };
        *connections -= 1;
        if *connections == 0 {
            self.loads[*thread] -= 1;
            self.sessions.remove(&session);
        }
    }
}

/// A connection that is counted for its session.
struct Counted {
    homes: Arc<Mutex<Homes>>,
    session: u64,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.homes.lock().leave(self.session);
    }
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
            handles.push(start_one(number, shutdown, linger)?);
        }
        let homes = Homes { sessions: HashMap::new(), loads: vec![0; count] };
        Ok(DataThreads { handles, homes: Arc::new(Mutex::new(homes)), shutdown: shutdown.clone() })
    }

    /// Tasks that are spawned while the guard lives run on the thread of this number, of all that there are.
    pub(crate) fn enter(&self, number: u32) -> EnterGuard<'_> {
        self.handles[number as usize % self.handles.len()].enter()
    }

    /// Runs `serve` with a connection on the thread of its session and lane.
    ///
    /// # Errors
    /// The connection cannot be taken from the thread that accepted it.
    pub(crate) fn spawn<F: Future<Output = ()> + Send + 'static>(
        &self,
        hello: Hello,
        stream: TcpStream,
        serve: impl FnOnce(TcpStream) -> F + Send + 'static,
    ) -> std::io::Result<()> {
        let stream = net::detach(stream)?;
        let Hello { session, lane } = hello;
        let home = self.homes.lock().enter(session);
        let counted = Counted { homes: Arc::clone(&self.homes), session };
        let _inside = self.enter(lane.wrapping_add(home as u32));
        let stream = net::attach(stream)?;
        self.shutdown.spawn("connection", async move {
            let _counted = counted;
            serve(stream).await;
        });
        Ok(())
    }
}

#[cfg(not(downpour_sim))]
fn start_one(number: usize, shutdown: &Shutdown, linger: Duration) -> anyhow::Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("make a runtime for a data thread")?;
    let handle = runtime.handle().clone();
    let token = shutdown.token();
    let run = move || {
        runtime.block_on(async {
            token.cancelled().await;
            tokio::time::sleep(linger).await;
        });
    };
    let named = std::thread::Builder::new().name(format!("data-{number}"));
    named.spawn(run).context("start a data thread")?;
    Ok(handle)
}

/// A simulation has one thread.
#[cfg(downpour_sim)]
fn start_one(_: usize, _: &Shutdown, _: Duration) -> anyhow::Result<Handle> {
    Handle::try_current().context("inside a simulation")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_keeps_its_thread_and_new_ones_go_where_there_are_fewest() {
        let mut homes = Homes { sessions: HashMap::new(), loads: vec![0; 2] };
        assert_eq!([7, 7, 8, 8, 7].map(|session| homes.enter(session)), [0, 0, 1, 1, 0]);
        assert_eq!(homes.loads, [1, 1]);
        (0..3).for_each(|_| homes.leave(7));
        homes.leave(8);
        assert_eq!((homes.enter(9), homes.enter(8)), (0, 1));
        homes.leave(1);
        assert_eq!(homes.loads, [1, 1]);
    }
}
