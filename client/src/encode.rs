//! A push batch cut into the parts of its shards: keys and gradients are copied once, from the caller's slices into outgoing bytes.

use std::collections::BTreeMap;

use bytes::{BufMut, BytesMut};
use downpour_core::id::{ShardId, VariableId};
use downpour_core::spec::Shape;
use downpour_core::tensor_bytes::FLOAT_BYTES;
use downpour_core::view::JobView;
use downpour_proto::tensor::{KEY_BYTES, put_floats, put_rows};
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

/// The parts, by shard, cut off `out`: kept between pushes, it takes its memory back once they are acknowledged, and touching fresh memory
/// costs more than the copy. Checks the batch against the job's variables.
pub(crate) fn encode(
    batch: &PushBatch<'_>,
    view: &JobView,
    layouts: &Layouts,
    out: &mut BytesMut,
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
    out.clear();
    out.reserve(size(batch));
    let mut parts = BTreeMap::new();
    for source in sources {
        match source {
            Source::Rows(rows) => encode_rows(&rows, view, &mut parts, out)?,
            Source::Gradients(dense) => {
                encode_dense(&dense, view, layouts, &mut parts, out, Body::Gradients)?;
            }
            Source::Values(dense) => {
                encode_dense(&dense, view, layouts, &mut parts, out, Body::Values)?;
            }
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
    out: &mut BytesMut,
) -> Result<(), Error> {
    let (dim, salt) = table(view, rows.variable)?;
    check_floats("gradients", rows.gradients.len(), rows.keys.len() * dim)?;
    let partition = Partition::new(rows.keys, salt, view.spec.shards)?;
    for (shard, positions) in partition.shards() {
        for &position in positions {
            out.put_u64_le(rows.keys[position as usize]);
        }
        let keys = out.split().freeze();
        put_rows(out, rows.gradients, dim, positions);
        let gradients = out.split().freeze();
        let bytes = keys.len() + gradients.len();
        let body = Body::Rows(v1::RowGradients { keys, gradients });
        add(parts, shard, rows.variable, body, bytes)?;
    }
    Ok(())
}

fn encode_dense(
    dense: &DenseTensor<'_>,
    view: &JobView,
    layouts: &Layouts,
    parts: &mut BTreeMap<ShardId, OutPart>,
    out: &mut BytesMut,
    body: impl Fn(v1::DenseBlocks) -> Body,
) -> Result<(), Error> {
    let layout = layouts.get(view, dense.variable)?;
    check_floats("dense", dense.floats.len(), layout.floats)?;
    for (shard, blocks) in &layout.shards {
        for &block in blocks {
            put_floats(out, &dense.floats[layout.range(block)]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::view;
    use downpour_core::init::Init;
    use downpour_core::mix::salt;
    use downpour_core::optimizer::{OptimizerSpec, Sgd};
    use downpour_core::routing::shard_of;
    use downpour_core::spec::{DenseSpec, TableSpec, Variable, VariableSpec, dense_blocks_on};
    use downpour_core::tensor_bytes::floats;
    use downpour_proto::tensor::Keys;
    use downpour_proto::validate;
    use proptest::prelude::*;

    /// Variable 1 is a table of 2 floats a row, variable 2 a tensor of 50 floats in blocks of 8, variable 3 as 1.
    fn job() -> JobView {
        let table = || Shape::Table(TableSpec { dim: 2, init: Init::Zeros, group: "t".into() });
        let dense = Shape::Dense(DenseSpec { shape: vec![50], block_floats: 8 });
        let shapes = [("one", table()), ("net", dense), ("two", table())];
        let optimizer = OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 });
        let variables = (1..).map(VariableId).zip(shapes).map(|(id, (name, shape))| Variable {
            id,
            spec: VariableSpec { name: name.into(), optimizer, shape },
        });
        JobView { variables: variables.collect(), ..view(1) }
    }

    proptest! {
        #[test]
        fn every_gradient_arrives_once_on_its_shard(
            keys: std::collections::BTreeSet<u64>, first_values: bool,
        ) {
            let job = job();
            let keys: Vec<u64> = keys.into_iter().collect();
            let gradients: Vec<f32> = (0..keys.len() * 2).map(|at| at as f32).collect();
            let tensor: Vec<f32> = (0..50).map(|at| at as f32).collect();
            let row = |id| RowGradients { variable: VariableId(id), keys: &keys, gradients: &gradients };
            let dense = vec![DenseTensor { variable: VariableId(2), floats: &tensor }];
            let mut batch = PushBatch { rows: vec![row(3), row(1)], dense, ..Default::default() };
            if first_values {
                std::mem::swap(&mut batch.dense, &mut batch.values);
            }
            let parts = encode(&batch, &job, &Layouts::default(), &mut BytesMut::new()).unwrap();
            let mut rows = Vec::new();
            let mut blocks = 0;
            for part in parts {
                prop_assert_eq!(validate::updates(&part.updates), Ok(()));
                for update in &part.updates {
                    match update.body.as_ref().unwrap() {
                        Body::Rows(sent) => {
                            let mut gradients = floats(&sent.gradients);
                            for key in Keys::new("keys", &sent.keys).unwrap().iter() {
                                prop_assert_eq!(shard_of(key, salt("t"), 2), part.shard);
                                let gradient = [gradients.next(), gradients.next()];
                                rows.push((update.variable, key, gradient.map(Option::unwrap)));
                            }
                        }
                        Body::Gradients(sent) | Body::Values(sent) => {
                            let is_values = matches!(update.body, Some(Body::Values(_)));
                            prop_assert_eq!(is_values, first_values);
                            let own = dense_blocks_on(&job.variables[1].spec, part.shard, 2);
                            prop_assert_eq!(&sent.blocks, &own);
                            let wanted = own.iter().flat_map(|&block| {
                                let start = block as usize * 8;
                                tensor[start..(start + 8).min(50)].iter().copied()
                            });
                            prop_assert!(floats(&sent.values).eq(wanted));
                            blocks += own.len();
                        }
                    }
                }
            }
            prop_assert_eq!(blocks, 7);
            rows.sort_by_key(|&(variable, key, _)| (variable, key));
            let wanted = [1, 3].into_iter().flat_map(|variable| {
                keys.iter().enumerate().map(move |(at, &key)| {
                    (variable, key, [at as f32 * 2.0, at as f32 * 2.0 + 1.0])
                })
            });
            prop_assert!(rows.into_iter().eq(wanted));
        }
    }

    #[test]
    fn a_part_that_does_not_fit_into_a_message_is_refused_with_advice() {
        let mut parts = BTreeMap::new();
        let rows = || Body::Rows(v1::RowGradients::default());
        assert!(add(&mut parts, ShardId(0), VariableId(1), rows(), PART_BYTES_MAX / 2).is_ok());
        let error = add(&mut parts, ShardId(0), VariableId(2), rows(), PART_BYTES_MAX / 2);
        assert!(error.unwrap_err().to_string().contains("more shards"));
    }
}
