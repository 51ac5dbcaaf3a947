//! The floor: the least that can be called a parameter server. Blocking sockets, one thread for each connection, a flat array indexed by
//! id, no framing beyond 8 bytes.
//!
//! A ceiling, not a peer: ids are indices of an array that never grows, nothing is checked, numbered, logged or replicated, and two
//! connections that update one row at the same time may lose an update. What a server with all of that reaches is given as a share of this.
//!
//! A request is `operation: u32`, `count: u32` (little-endian), then for rows `count` ids (u64), then for pushes the floats. The answer is
//! the floats of a pull, or one byte when a push is applied.

mod server;
mod table;

pub(crate) use server::serve;

use crate::System;
use crate::child::Child;
use crate::clock;
use crate::protocol::{FloorServer, Peer, Role};

/// Reads rows.
pub(crate) const PULL_ROWS: u32 = 0;
/// Updates rows.
pub(crate) const PUSH_ROWS: u32 = 1;
/// Reads the dense tensor.
pub(crate) const PULL_DENSE: u32 = 2;
/// Updates the dense tensor.
pub(crate) const PUSH_DENSE: u32 = 3;

/// A floor server as a child process, to be measured.
pub struct Server {
    child: Child,
    address: String,
    check: Box<dyn FnMut() -> anyhow::Result<()>>,
}

impl Server {
    /// Starts one and waits until it listens. `check` ends waits early: see [`System::check`].
    ///
    /// # Errors
    /// It does not start.
    pub fn start(
        holds: FloorServer,
        check: impl FnMut() -> anyhow::Result<()> + 'static,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(holds.dim.is_multiple_of(4), "--dim: the floor wants a multiple of 4");
        let mut starting = Starting(Box::new(check));
        let (child, address) = Child::in_role("floor", &Role::Floor(holds), &mut starting)?;
        Ok(Self { child, address: address.unwrap_or_default(), check: starting.0 })
    }
}

impl System for Server {
    fn peer(&self) -> Peer {
        Peer::Floor { address: self.address.clone() }
    }

    fn check(&mut self) -> anyhow::Result<()> {
        (self.check)()
    }

    fn cpu_s(&self) -> Option<f64> {
        clock::cpu_s(self.child.pid())
    }
}

/// A server that has no address yet.
struct Starting(Box<dyn FnMut() -> anyhow::Result<()>>);

impl System for Starting {
    fn peer(&self) -> Peer {
        Peer::Floor { address: String::new() }
    }

    fn check(&mut self) -> anyhow::Result<()> {
        (self.0)()
    }

    fn cpu_s(&self) -> Option<f64> {
        None
    }
}
