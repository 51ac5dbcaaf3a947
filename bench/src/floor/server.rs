//! The floor's server.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context as _, ensure};

use super::table::{QUAD, Table};
use super::{PULL_DENSE, PULL_ROWS, PUSH_DENSE, PUSH_ROWS, Requests};
use crate::protocol::{Answer, FloorServer, Inbox, say};
use crate::workload::LEARNING_RATE;

/// Floats of a gradient that are read at once.
const CHUNK_FLOATS: usize = 65_536;

struct Parameters {
    table: Table,
    dense: RwLock<Vec<f32>>,
    /// Where pushes go on to.
    backup: Option<String>,
}

/// Serves until the parent wants no more.
pub(crate) fn serve(holds: FloorServer, inbox: &mut Inbox) -> anyhow::Result<()> {
    let parameters = Arc::new(Parameters {
        table: Table::new(holds.rows, holds.dim),
        dense: RwLock::new(vec![0.0; holds.dense_floats]),
        backup: holds.backup,
    });
    let listener = TcpListener::bind("127.0.0.1:0").context("listen on loopback")?;
    let address = listener.local_addr()?.to_string();
    std::thread::Builder::new().name("accept".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let parameters = parameters.clone();
            std::thread::spawn(move || {
                // A connection ends when its worker does, in the middle of a request or not.
                let _ = connection(stream, &parameters);
            });
        }
    })?;
    say(&Answer::Ready { address: Some(address) })?;
    // It is told nothing more: this is the end.
    inbox.wait::<()>().map(drop)
}

fn connection(mut stream: TcpStream, parameters: &Parameters) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let Parameters { table, dense, backup } = parameters;
    let mut backup = backup.as_deref().map(Requests::connect).transpose()?;
    let mut ids: Vec<u64> = Vec::new();
    let mut quads: Vec<[f32; QUAD]> = Vec::new();
    let mut chunk = vec![0.0f32; CHUNK_FLOATS];
    loop {
        let mut header = [0u32; 2];
        stream.read_exact(bytemuck::cast_slice_mut(&mut header))?;
        let (operation, count) = (u32::from_le(header[0]), u32::from_le(header[1]) as usize);
        match operation {
            PULL_ROWS | PUSH_ROWS => {
                ids.resize(count, 0);
                quads.resize(count * table.row_quads(), [0.0; QUAD]);
                stream.read_exact(bytemuck::cast_slice_mut(&mut ids))?;
                if operation == PULL_ROWS {
                    table.pull(&ids, &mut quads);
                    stream.write_all(bytemuck::cast_slice(&quads))?;
                } else {
                    stream.read_exact(bytemuck::cast_slice_mut(&mut quads))?;
                    if let Some(backup) = &mut backup {
                        backup.send(PUSH_ROWS, &ids, bytemuck::cast_slice(&quads))?;
                    }
                    table.push(&ids, &quads);
                    if let Some(backup) = &mut backup {
                        backup.acknowledged()?;
                    }
                    stream.write_all(&[1])?;
                }
            }
            PULL_DENSE => {
                let dense = dense.read().unwrap_or_else(PoisonError::into_inner);
                stream.write_all(bytemuck::cast_slice(&dense))?;
            }
            _ => {
                ensure!(operation == PUSH_DENSE, "operation {operation}");
                ensure!(backup.is_none(), "a relay passes rows on, not tensors");
                let mut dense = dense.write().unwrap_or_else(PoisonError::into_inner);
                for values in dense.chunks_mut(CHUNK_FLOATS) {
                    let gradients = &mut chunk[..values.len()];
                    stream.read_exact(bytemuck::cast_slice_mut(gradients))?;
                    for (value, gradient) in values.iter_mut().zip(gradients) {
                        *value -= LEARNING_RATE * *gradient;
                    }
                }
                stream.write_all(&[1])?;
            }
        }
    }
}
