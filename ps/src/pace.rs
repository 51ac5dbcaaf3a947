//! Work on the threads that serve everybody, a millisecond at a time.

use std::time::{Duration, Instant};

/// Longest turn: heartbeats and other streams wait behind it.
const TURN_MAX: Duration = Duration::from_millis(1);

/// Lets other tasks run when this one had its turn.
#[derive(Debug)]
pub(crate) struct Pace {
    turn: Instant,
}

impl Pace {
    pub(crate) fn start() -> Self {
        Pace { turn: Instant::now() }
    }

    /// Call it between two pieces of work.
    pub(crate) async fn rest(&mut self) {
        if self.turn.elapsed() > TURN_MAX {
            tokio::task::yield_now().await;
            self.turn = Instant::now();
        }
    }
}
