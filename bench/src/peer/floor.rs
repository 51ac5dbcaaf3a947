//! The floor, over a bare socket.

use std::io::{IoSlice, Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, ensure};

use super::{DensePeer, SparsePeer, Worker};
use crate::dedup::HashSet;
use crate::floor::{PULL_DENSE, PULL_ROWS, PUSH_DENSE, PUSH_ROWS};
use crate::protocol::{Command, Inbox};

/// One connection.
pub(crate) struct Floor {
    stream: TcpStream,
    dim: usize,
    set: HashSet,
}

impl Floor {
    pub(crate) fn connect(address: &str, dim: usize) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).with_context(|| format!("connect {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, dim, set: HashSet::new() })
    }

    /// A request in one system call, if the socket takes it.
    fn ask(&mut self, operation: u32, keys: &[u64], floats: &[f32]) -> anyhow::Result<()> {
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

    fn acknowledged(&mut self) -> anyhow::Result<()> {
        self.stream.read_exact(&mut [0]).context("wait for the floor's acknowledgement")
    }

    fn read(&mut self, floats: &mut [f32]) -> anyhow::Result<()> {
        self.stream
            .read_exact(bytemuck::cast_slice_mut(floats))
            .context("read from the floor's server")
    }
}

impl SparsePeer for Floor {
    fn key(&self, id: u32) -> u64 {
        id.into()
    }

    fn begins_empty(&self) -> bool {
        false
    }

    fn unique(&mut self, ids: &[u32], keys: &mut Vec<u64>) {
        self.set.ids_of(ids, keys);
    }

    fn pull(&mut self, keys: &[u64], rows: &mut [f32]) -> anyhow::Result<()> {
        ensure!(rows.len() == keys.len() * self.dim, "rows of another size");
        self.ask(PULL_ROWS, keys, &[])?;
        self.read(rows)
    }

    fn push(&mut self, keys: &[u64], gradients: &[f32]) -> anyhow::Result<()> {
        self.ask(PUSH_ROWS, keys, gradients)?;
        self.acknowledged()
    }
}

impl DensePeer for Floor {
    fn pull<'a>(&'a mut self, room: &'a mut [f32]) -> anyhow::Result<&'a [f32]> {
        self.ask(PULL_DENSE, &[], &[])?;
        self.read(room)?;
        Ok(room)
    }

    fn push(&mut self, gradient: &[f32]) -> anyhow::Result<()> {
        self.ask(PUSH_DENSE, &[], gradient)?;
        self.acknowledged()
    }
}

impl Worker for Floor {
    fn next_command(&mut self, inbox: &mut Inbox) -> anyhow::Result<Option<Command>> {
        inbox.wait()
    }

    fn clean_up(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}
