//! The floor, over a bare socket.

use std::io::Read as _;

use anyhow::{Context as _, ensure};

use super::{DensePeer, SparsePeer, Worker};
use crate::dedup::HashSet;
use crate::floor::{PULL_DENSE, PULL_ROWS, PUSH_DENSE, PUSH_ROWS, Requests};
use crate::protocol::{Command, Inbox};

/// One connection.
pub(crate) struct Floor {
    requests: Requests,
    dim: usize,
    set: HashSet,
}

impl Floor {
    pub(crate) fn connect(address: &str, dim: usize) -> anyhow::Result<Self> {
        Ok(Self { requests: Requests::connect(address)?, dim, set: HashSet::new() })
    }

    fn read(&mut self, floats: &mut [f32]) -> anyhow::Result<()> {
        self.requests
            .stream
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
        self.requests.send(PULL_ROWS, keys, &[])?;
        self.read(rows)
    }

    fn push(&mut self, keys: &[u64], gradients: &[f32]) -> anyhow::Result<()> {
        self.requests.send(PUSH_ROWS, keys, gradients)?;
        self.requests.acknowledged()
    }
}

impl DensePeer for Floor {
    fn pull<'a>(&'a mut self, room: &'a mut [f32]) -> anyhow::Result<&'a [f32]> {
        self.requests.send(PULL_DENSE, &[], &[])?;
        self.read(room)?;
        Ok(room)
    }

    fn push(&mut self, gradient: &[f32]) -> anyhow::Result<()> {
        self.requests.send(PUSH_DENSE, &[], gradient)?;
        self.requests.acknowledged()
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
