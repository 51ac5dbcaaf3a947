//! A model out of a checkpoint, for programs that know nothing of shards: one safetensors file of all dense variables, and one of each table with its keys rising.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use downpour_core::id::ShardId;
use downpour_core::spec::{Shape, Variable};
use downpour_proto::threads;
use downpour_proto::v1::{self, cut_piece::Piece};
use serde::Serialize;
use serde_json::json;

use crate::catalog::{Catalog, links};
use crate::manifest::Manifest;
use crate::read::ShardReader;
use crate::sort::Sorter;
use crate::spool::Spool;
use crate::write::Scratch;
use crate::{Error, Malformed};

/// The file of the dense variables, each under its name.
pub const DENSE_FILE: &str = "dense.safetensors";
const FLOAT_BYTES: usize = 4;

/// A table that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExportedTable {
    /// Its name in the job.
    pub name: String,
    /// In the folder: tensors `keys` (U64, rising) and `rows` (F32).
    pub file: String,
    /// Keys.
    pub rows: u64,
}

/// Writes the variables of a checkpoint, the last of a chain, into a folder that is there. Memory is bounded by `scratch` and the dense variables; `progress` is told of each
/// shard that is read.
///
/// # Errors
/// Names the file of the checkpoint, or of the folder.
pub async fn export(
    catalog: &Catalog,
    chain: &[Manifest],
    folder: &Path,
    scratch: &Scratch,
    mut progress: impl FnMut(ShardId),
) -> Result<Vec<ExportedTable>, Error> {
    let Some(manifest) = chain.last() else { return Ok(Vec::new()) };
    let mut model = Model::new(manifest, folder, scratch);
    for shard in (0..manifest.job.shards).map(ShardId) {
        for (manifest, link) in links(chain, shard).map_err(|bad| bad.of(catalog.store().uri()))? {
            let object = link.entry.object(shard);
            let reader = catalog.open_file(manifest, shard, scratch).await?;
            model = blocking(object, move || model.take(reader)).await?;
        }
        progress(shard);
    }
    blocking(folder.display().to_string(), move || model.write()).await
}

async fn blocking<T: Send + 'static>(
    object: String,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = threads::blocking(work).await;
    done.map_err(|error| Error::Io { object, source: io::Error::other(error) })?
}

/// What is read of the variables so far.
struct Model {
    checkpoint: String,
    folder: PathBuf,
    memory_bytes_max: usize,
    variables: Vec<Variable>,
    tables: BTreeMap<u32, Sorter>,
    /// Values of the blocks that were read: what a manifest says of sizes takes no memory.
    dense: BTreeMap<u32, BTreeMap<u32, Vec<u8>>>,
}

impl Model {
    fn new(manifest: &Manifest, folder: &Path, scratch: &Scratch) -> Self {
        let variables = &manifest.variables;
        let memory_bytes_max = scratch.memory_bytes_max / variables.len().max(1);
        let mut model = Self {
            checkpoint: manifest.checkpoint.to_string(),
            folder: folder.to_owned(),
            memory_bytes_max,
            variables: variables.clone(),
            tables: BTreeMap::new(),
            dense: BTreeMap::new(),
        };
        for Variable { id, spec } in variables {
            match &spec.shape {
                Shape::Table(table) => {
                    let row_bytes = table.dim as usize * FLOAT_BYTES;
                    let sorter = Sorter::new(row_bytes, memory_bytes_max, scratch.folder.clone());
                    model.tables.insert(id.0, sorter);
                }
                Shape::Dense(_) => {
                    model.dense.insert(id.0, BTreeMap::new());
                }
            }
        }
        model
    }

    fn take(mut self, mut reader: ShardReader) -> Result<Self, Error> {
        while let Some(piece) = reader.next_piece()? {
            match piece {
                Piece::Rows(rows) => self.rows(&rows).map_err(|error| self.io(error))?,
                Piece::Blocks(blocks) => self.blocks(&blocks),
                _ => {}
            }
        }
        Ok(self)
    }

    fn io(&self, source: io::Error) -> Error {
        Error::Io { object: self.folder.display().to_string(), source }
    }

    /// Weights stand before the slots of the optimizer.
    fn rows(&mut self, rows: &v1::CutRows) -> io::Result<()> {
        let Some(sorter) = self.tables.get_mut(&rows.variable) else { return Ok(()) };
        let keys = rows.keys.as_chunks::<8>().0;
        let stride = rows.floats.len() / keys.len().max(1);
        for (key, row) in keys.iter().zip(rows.floats.chunks_exact(stride.max(1))) {
            sorter.push(u64::from_le_bytes(*key), &row[..sorter.row_bytes()])?;
        }
        Ok(())
    }

    fn blocks(&mut self, blocks: &v1::CutBlocks) {
        let variable = self.variables.iter().find(|variable| variable.id.0 == blocks.variable);
        let Some(Shape::Dense(dense)) = variable.map(|variable| &variable.spec.shape) else {
            return;
        };
        let Some(values) = self.dense.get_mut(&blocks.variable) else { return };
        let slots = blocks.floats.len()
            / blocks.blocks.iter().map(|&b| dense.block_len(b) * FLOAT_BYTES).sum::<usize>().max(1);
        let mut floats = &blocks.floats[..];
        for &block in &blocks.blocks {
            let bytes = dense.block_len(block) * FLOAT_BYTES;
            values.insert(block, floats[..bytes].to_vec());
            floats = &floats[bytes * slots..];
        }
    }

    fn write(mut self) -> Result<Vec<ExportedTable>, Error> {
        let mut dense = Vec::new();
        for Variable { id, spec } in &self.variables {
            let (Shape::Dense(shape), Some(values)) = (&spec.shape, self.dense.remove(&id.0))
            else {
                continue;
            };
            if !values.keys().copied().eq(0..shape.blocks()) {
                let problem = "has no values yet: it was saved before its first ones were there";
                return Err(Malformed::new(&spec.name, problem).of(self.checkpoint.as_str()));
            }
            dense.push((spec.name.as_str(), "F32", shape.shape.clone(), values));
        }
        let file = |name: &str| {
            let path = self.folder.join(name);
            File::create_new(&path)
                .map_err(|source| Error::Io { object: path.display().to_string(), source })
        };
        let head = header(dense.iter().map(|(name, dtype, shape, values)| {
            let bytes = values.values().map(|block| block.len() as u64).sum();
            (*name, *dtype, shape.clone(), bytes)
        }));
        let mut all = io::BufWriter::new(file(DENSE_FILE)?);
        let blocks = dense.iter().flat_map(|(.., values)| values.values());
        [&head]
            .into_iter()
            .chain(blocks)
            .try_for_each(|bytes| all.write_all(bytes))
            .and_then(|()| all.flush())
            .map_err(|error| self.io(error))?;

        let mut tables = Vec::new();
        for Variable { id, spec } in &self.variables {
            let (Shape::Table(table), Some(sorter)) = (&spec.shape, self.tables.remove(&id.0))
            else {
                continue;
            };
            let name = format!("table-{id}.safetensors");
            let mut spool = Spool::new(2, self.memory_bytes_max, self.folder.clone());
            let mut rows = 0;
            let merged = sorter.merge(|key, row| {
                rows += 1;
                spool.append(0, &key.to_le_bytes())?;
                spool.append(1, row)
            });
            merged.map_err(|error| self.io(error))?;
            let head = header([
                ("keys", "U64", vec![rows], spool.bytes(0)),
                ("rows", "F32", vec![rows, table.dim.into()], spool.bytes(1)),
            ]);
            let mut all = spool.into_reader(head, &[0, 1]);
            io::copy(&mut all, &mut file(&name)?).map_err(|error| self.io(error))?;
            tables.push(ExportedTable { name: spec.name.clone(), file: name, rows });
        }
        Ok(tables)
    }
}

/// The beginning of a safetensors file whose tensors (name, dtype, shape, bytes) follow in this order.
fn header<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a str, Vec<u64>, u64)>) -> Vec<u8> {
    let mut at = 0;
    let entry = |(name, dtype, shape, bytes): (&str, &str, Vec<u64>, u64)| {
        let offsets = [at, at + bytes];
        at += bytes;
        (name.to_owned(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}))
    };
    let entries: serde_json::Map<_, _> = tensors.into_iter().map(entry).collect();
    let mut text = serde_json::Value::Object(entries).to_string().into_bytes();
    // Tensors begin at a multiple of 8.
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}
