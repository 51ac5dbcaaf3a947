//! The floor: the least that can be called a parameter server. Blocking sockets, one thread for each connection, a flat array indexed by
//! id, no framing beyond 8 bytes.
//!
//! A ceiling, not a peer: ids are indices of an array that never grows, nothing is checked, numbered, logged or replicated, and two
//! connections that update one row at the same time may lose an update. What a server with all of that reaches is given as a share of this.
//!
//! With a *backup* it is a raw relay: each push goes on to a second server, is applied meanwhile, and is acknowledged after the second one's acknowledgement.
//!
//! A request is `operation: u32`, `count: u32` (little-endian), then for rows `count` ids (u64), then for pushes the floats. The answer is
//! the floats of a pull, or one byte when a push is applied.

mod server;
mod table;

pub(crate) use server::serve;

use std::io::{IoSlice, Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, ensure};

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

/// A connection to a floor, as who asks has it.
pub(crate) struct Requests {
    pub(crate) stream: TcpStream,
}

impl Requests {
    pub(crate) fn connect(address: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).with_context(|| format!("connect {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream })
    }

    /// A request in one system call, if the socket takes it.
    pub(crate) fn send(
        &mut self,
        operation: u32,
        keys: &[u64],
        floats: &[f32],
    ) -> anyhow::Result<()> {
        let header = [operation.to_le(), (keys.len() as u32).to_le()];
        let slices: [&[u8]; 3] = [
            bytemuck::cast_slice(&header),
            bytemuck::cast_slice(keys),
            bytemuck::cast_slice(floats),
        ];
        let mut slices = slices.map(IoSlice::new);
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            let written = self.stream.write_vectored(left)?;
            ensure!(written > 0, "the floor's server is gone");
            IoSlice::advance_slices(&mut left, written);
        }
        Ok(())
    }

    pub(crate) fn acknowledged(&mut self) -> anyhow::Result<()> {
        self.stream.read_exact(&mut [0]).context("wait for the floor's acknowledgement")
    }
}

/// A floor server as a child process, to be measured.
pub struct Server {
    /// The one that workers talk to is the last; those before are its backups, each the next one's.
    children: Vec<Child>,
    address: String,
    check: Box<dyn FnMut() -> anyhow::Result<()>>,
}

impl Server {
    /// Starts one, with `backups` more behind it, and waits until all listen. `check` ends waits early: see [`System::check`].
    ///
    /// # Errors
    /// It does not start.
    pub fn start(
        holds: FloorServer,
        backups: usize,
        check: impl FnMut() -> anyhow::Result<()> + 'static,
    ) -> anyhow::Result<Self> {
        ensure!(holds.dim.is_multiple_of(4), "--dim: the floor wants a multiple of 4");
        let mut starting = Starting(Box::new(check));
        let (mut children, mut backup) = (Vec::new(), None);
        for _ in 0..=backups {
            let role = Role::Floor(FloorServer { backup: backup.take(), ..holds.clone() });
            let (child, address) = Child::in_role("floor", &role, &mut starting)?;
            children.push(child);
            backup = address;
        }
        Ok(Self { children, address: backup.unwrap_or_default(), check: starting.0 })
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
        self.children.iter().map(|child| clock::cpu_s(child.pid())).sum()
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
