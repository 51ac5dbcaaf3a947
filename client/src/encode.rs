//! A push batch cut into the parts of its shards: keys and gradients are copied once, from the caller's slices into outgoing bytes.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use downpour_core::id::{ShardId, VariableId};
use downpour_core::spec::Shape;
use downpour_core::tensor_bytes::FLOAT_BYTES;
use downpour_core::view::JobView;
use downpour_proto::tensor::{KEY_BYTES, put_floats};
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::v1::{self, update::Body};

use crate::Error;
use crate::dense::Layouts;
use crate::outbox::OutPart;
use crate::partition::Partition;
use crate::push::{DenseTensor, PushBatch, RowGradients};

/// What a part costs beside its tensors.
const PART_BYTES: usize = 64;
/// Room for what a message holds beside one part.
const PART_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (1 << 16);

enum Source<'a> {
    Rows(RowGradients<'a>),
    Gradients(DenseTensor<'a>),
    Values(DenseTensor<'a>),
}

impl Source<'_> {
    fn variable(&self) -> VariableId {
        match self {
            Source::Rows(rows) => rows.variable,
            Source::Gradients(dense) | Source::Values(dense) => dense.variable,
        }
    }
}

/// About how many bytes the parts of a batch will have.
pub(crate) fn size(batch: &PushBatch<'_>) -> usize {
    let rows = batch
        .rows
        .iter()
        .map(|rows| rows.keys.len() * KEY_BYTES + rows.gradients.len() * FLOAT_BYTES + PART_BYTES);
    let dense = batch.dense.iter().chain(&batch.values);
    rows.chain(dense.map(|dense| dense.floats.len() * FLOAT_BYTES + PART_BYTES)).sum()
}

/// The parts, by shard. Checks the batch against the job's variables.
pub(crate) fn encode(
    batch: &PushBatch<'_>,
    view: &JobView,
    layouts: &Layouts,
) -> Result<Vec<OutPart>, Error> {
    let rows = batch.rows.iter().map(|&rows| Source::Rows(rows));
    let gradients = batch.dense.iter().map(|&dense| Source::Gradients(dense));
    let values = batch.values.iter().map(|&dense| Source::Values(dense));
    let mut sources: Vec<Source<'_>> = rows.chain(gradients).chain(values).collect();
    sources.sort_unstable_by_key(Source::variable);
    if let Some(pair) = sources.windows(2).find(|pair| pair[0].variable() == pair[1].variable()) {
        let problem = format!("variable {} appears twice in one push", pair[0].variable());
        return Err(Error::invalid("variable", problem));
    }
    let mut parts = BTreeMap::new();
    for source in sources {
        match source {
            Source::Rows(rows) => encode_rows(&rows, view, &mut parts)?,
            Source::Gradients(dense) => {
                encode_dense(&dense, view, layouts, &mut parts, Body::Gradients)?;
            }
            Source::Values(dense) => encode_dense(&dense, view, layouts, &mut parts, Body::Values)?,
        }
    }
    Ok(parts.into_values().collect())
}

/// Dimension and salt of a table; names what is wrong otherwise.
pub(crate) fn table(view: &JobView, id: VariableId) -> Result<(usize, u64), Error> {
    let variable = view.variable(id);
    let variable = variable.ok_or_else(|| unknown(id))?;
    match &variable.spec.shape {
        Shape::Table(table) => Ok((table.dim as usize, variable.spec.routing_salt())),
        Shape::Dense(_) => {
            let problem = format!("{:?} is dense, not a table", variable.spec.name);
            Err(Error::invalid("variable", problem))
        }
    }
}

pub(crate) fn unknown(id: VariableId) -> Error {
    Error::invalid("variable", format!("the job has no variable {id}"))
}

/// Names a tensor whose length does not fit.
pub(crate) fn check_floats(field: &'static str, has: usize, needs: usize) -> Result<(), Error> {
    if has == needs {
        return Ok(());
    }
    Err(Error::invalid(field, format!("has {has} floats, {needs} are needed")))
}

fn encode_rows(
    rows: &RowGradients<'_>,
    view: &JobView,
    parts: &mut BTreeMap<ShardId, OutPart>,
) -> Result<(), Error> {
    let (dim, salt) = table(view, rows.variable)?;
    check_floats("gradients", rows.gradients.len(), rows.keys.len() * dim)?;
    let partition = Partition::new(rows.keys, salt, view.spec.shards)?;
    let row_bytes = dim * FLOAT_BYTES;
    let mut out = BytesMut::with_capacity(rows.keys.len() * (KEY_BYTES + row_bytes));
    for (shard, positions) in partition.shards() {
        let keys = put_chunks(&mut out, positions, KEY_BYTES, |bytes, position| {
            bytes.copy_from_slice(&rows.keys[position].to_le_bytes());
        });
        let gradients = put_chunks(&mut out, positions, row_bytes, |bytes, position| {
            let row = &rows.gradients[position * dim..][..dim];
            for (bytes, float) in bytes.chunks_exact_mut(FLOAT_BYTES).zip(row) {
                bytes.copy_from_slice(&float.to_le_bytes());
            }
        });
        let bytes = keys.len() + gradients.len();
        let body = Body::Rows(v1::RowGradients { keys, gradients });
        add(parts, shard, rows.variable, body, bytes)?;
    }
    Ok(())
}

/// Appends one chunk for each position and cuts them off as bytes of their own.
fn put_chunks(
    out: &mut BytesMut,
    positions: &[u32],
    chunk_bytes: usize,
    put: impl Fn(&mut [u8], usize),
) -> Bytes {
    out.resize(positions.len() * chunk_bytes, 0);
    for (bytes, &position) in out.chunks_exact_mut(chunk_bytes).zip(positions) {
        put(bytes, position as usize);
    }
    out.split().freeze()
}

fn encode_dense(
    dense: &DenseTensor<'_>,
    view: &JobView,
    layouts: &Layouts,
    parts: &mut BTreeMap<ShardId, OutPart>,
    body: impl Fn(v1::DenseBlocks) -> Body,
) -> Result<(), Error> {
    let layout = layouts.get(view, dense.variable)?;
    check_floats("dense", dense.floats.len(), layout.floats)?;
    let mut out = BytesMut::with_capacity(layout.floats * FLOAT_BYTES);
    for (shard, blocks) in &layout.shards {
        for &block in blocks {
            put_floats(&mut out, &dense.floats[layout.range(block)]);
        }
        let values = out.split().freeze();
        let bytes = values.len();
        let blocks = v1::DenseBlocks { blocks: blocks.clone(), values };
        add(parts, *shard, dense.variable, body(blocks), bytes)?;
    }
    Ok(())
}

fn add(
    parts: &mut BTreeMap<ShardId, OutPart>,
    shard: ShardId,
    variable: VariableId,
    body: Body,
    bytes: usize,
) -> Result<(), Error> {
    let empty = || OutPart { shard, updates: Vec::new(), bytes: PART_BYTES };
    let part = parts.entry(shard).or_insert_with(empty);
    part.bytes += bytes + PART_BYTES;
    if part.bytes > PART_BYTES_MAX {
        let problem = format!(
            "{} bytes for shard {shard}, at most {PART_BYTES_MAX} fit into a message: push less at once or give the job more shards",
            part.bytes
        );
        return Err(Error::invalid("gradients", problem));
    }
    part.updates.push(v1::Update { variable: variable.0, body: Some(body) });
    Ok(())
}
