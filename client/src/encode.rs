//! A push batch cut into the parts of its shards: keys and gradients are copied once, from the caller's slices into outgoing bytes.

use std::ops::Range;
use std::sync::Arc;

use bytes::BytesMut;
use downpour_core::id::{ShardId, VariableId};
use downpour_core::row_format::RowFormat;
use downpour_core::spec::Shape;
use downpour_core::tensor_bytes::FLOAT_BYTES;
use downpour_core::view::JobView;
use downpour_proto::tensor::{KEY_BYTES, put_floats, put_keys_at, put_rows};
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::v1::{self, update::Body};

use crate::Error;
use crate::buffers::Buffers;
use crate::dense::{DenseLayout, Layouts};
use crate::outbox::OutPart;
use crate::partition::{Arrangement, Partition};
use crate::push::{DenseTensor, PushBatch, RowGradients};

/// What a part costs beside its tensors.
const PART_BYTES: usize = 64;
/// Room for what a message holds beside one part.
const PART_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (1 << 16);

/// About how many bytes the parts of a batch will have.
pub(crate) fn size(batch: &PushBatch<'_>) -> usize {
    let rows = batch
        .rows
        .iter()
        .map(|rows| rows.keys.len() * KEY_BYTES + rows.gradients.len() * FLOAT_BYTES + PART_BYTES);
    let dense = batch.dense.iter().chain(&batch.values);
    rows.chain(dense.map(|dense| dense.floats.len() * FLOAT_BYTES + PART_BYTES)).sum()
}

/// A batch that fits the job's variables. Its parts are made one after the other, so that the first are on their way while the others are made.
#[derive(Debug)]
pub(crate) struct Encoder<'a> {
    /// Rising by variable.
    sources: Vec<Source<'a>>,
    shards: u32,
}

#[derive(Debug)]
struct Source<'a> {
    variable: VariableId,
    what: What<'a>,
}

#[derive(Debug)]
enum What<'a> {
    Rows { rows: RowGradients<'a>, columns: Columns, partition: Partition },
    Gradients { floats: &'a [f32], layout: Arc<DenseLayout> },
    Values { floats: &'a [f32], layout: Arc<DenseLayout> },
}

impl<'a> Encoder<'a> {
    /// Checks the whole batch.
    ///
    /// # Errors
    /// Names what does not fit.
    pub(crate) fn new(
        batch: &PushBatch<'a>,
        view: &JobView,
        layouts: &Layouts,
    ) -> Result<Self, Error> {
        let layout = |dense: &DenseTensor<'a>| {
            let layout = layouts.get(view, dense.variable)?;
            check_floats("dense", dense.floats.len(), layout.floats)?;
            Ok::<_, Error>(layout)
        };
        let mut sources =
            Vec::with_capacity(batch.rows.len() + batch.dense.len() + batch.values.len());
        for &rows in &batch.rows {
            let columns = table(view, rows.variable)?;
            check_floats("gradients", rows.gradients.len(), rows.keys.len() * columns.dim)?;
            let partition = Partition::new(rows.keys, columns.arrangement)?;
            let what = What::Rows { rows, columns, partition };
            sources.push(Source { variable: rows.variable, what });
        }
        for dense in &batch.dense {
            let what = What::Gradients { floats: dense.floats, layout: layout(dense)? };
            sources.push(Source { variable: dense.variable, what });
        }
        for dense in &batch.values {
            let what = What::Values { floats: dense.floats, layout: layout(dense)? };
            sources.push(Source { variable: dense.variable, what });
        }
        sources.sort_unstable_by_key(|source| source.variable);
        if let Some(pair) = sources.windows(2).find(|pair| pair[0].variable == pair[1].variable) {
            let problem = format!("variable {} appears twice in one push", pair[0].variable);
            return Err(Error::invalid("variable", problem));
        }
        let encoder = Encoder { sources, shards: view.spec.shards };
        for shard in (0..encoder.shards).map(ShardId) {
            check_part(shard, encoder.bytes(shard))?;
        }
        Ok(encoder)
    }

    /// The parts of the next shards of `left`, at most about `bytes`, in memory of `buffers`.
    pub(crate) fn parts(
        &self,
        left: &mut Range<u32>,
        bytes: usize,
        buffers: &mut Buffers,
    ) -> Vec<OutPart> {
        let (mut shards, mut sum) = (Vec::new(), 0);
        while let Some(shard) = left.clone().next().map(ShardId) {
            let part_bytes = self.bytes(shard);
            if sum > 0 && sum + part_bytes > bytes {
                break;
            }
            left.next();
            sum += part_bytes;
            shards.push((shard, part_bytes));
        }
        let out = buffers.with_room(sum);
        let parts = shards.into_iter().filter(|(_, bytes)| *bytes > 0).map(|(shard, bytes)| {
            let updates = self.sources.iter().filter_map(|source| source.update(shard, out));
            OutPart { shard, updates: updates.collect(), bytes }
        });
        parts.collect()
    }

    /// All shards of the job.
    pub(crate) fn shards(&self) -> Range<u32> {
        0..self.shards
    }

    /// Bytes of a shard's part; 0 where there is none.
    fn bytes(&self, shard: ShardId) -> usize {
        let updates = self.sources.iter().map(|source| source.bytes(shard));
        let sum: usize = updates.filter(|&bytes| bytes > 0).map(|bytes| bytes + PART_BYTES).sum();
        if sum == 0 { 0 } else { sum + PART_BYTES }
    }
}

impl Source<'_> {
    /// Bytes of its tensors for a shard.
    fn bytes(&self, shard: ShardId) -> usize {
        match &self.what {
            What::Rows { columns, partition, .. } => {
                let row_bytes = KEY_BYTES + columns.format.row_bytes(columns.dim);
                partition.on(shard).len() * row_bytes
            }
            What::Gradients { layout, .. } | What::Values { layout, .. } => {
                layout.floats_of(layout.blocks_on(shard)) * FLOAT_BYTES
            }
        }
    }

    fn update(&self, shard: ShardId, out: &mut BytesMut) -> Option<v1::Update> {
        let body = match &self.what {
            What::Rows { rows, columns, partition } => {
                let places = partition.on(shard);
                if places.is_empty() {
                    return None;
                }
                put_keys_at(out, rows.keys, &places);
                let keys = out.split().freeze();
                put_rows(out, columns.format, rows.gradients, columns.dim, &places);
                Body::Rows(v1::RowGradients { keys, gradients: out.split().freeze() })
            }
            What::Gradients { floats, layout } => {
                Body::Gradients(dense_blocks(floats, layout, shard, out)?)
            }
            What::Values { floats, layout } => {
                Body::Values(dense_blocks(floats, layout, shard, out)?)
            }
        };
        Some(v1::Update { variable: self.variable.0, body: Some(body) })
    }
}

fn dense_blocks(
    floats: &[f32],
    layout: &DenseLayout,
    shard: ShardId,
    out: &mut BytesMut,
) -> Option<v1::DenseBlocks> {
    let blocks = layout.blocks_on(shard);
    for &block in blocks {
        put_floats(out, &floats[layout.range(block)]);
    }
    let values = out.split().freeze();
    (!blocks.is_empty()).then(|| v1::DenseBlocks { blocks: blocks.to_vec(), values })
}

fn check_part(shard: ShardId, bytes: usize) -> Result<(), Error> {
    if bytes > PART_BYTES_MAX {
        let problem = format!(
            "{bytes} bytes for shard {shard}, at most {PART_BYTES_MAX} fit into a message: push less at once or give the job more shards"
        );
        return Err(Error::invalid("gradients", problem));
    }
    Ok(())
}

/// What is to be known of a table to move its rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Columns {
    pub(crate) dim: usize,
    pub(crate) arrangement: Arrangement,
    pub(crate) format: RowFormat,
}

/// A table of the job; names what is wrong otherwise.
pub(crate) fn table(view: &JobView, id: VariableId) -> Result<Columns, Error> {
    let variable = view.variable(id);
    let variable = variable.ok_or_else(|| unknown(id))?;
    match &variable.spec.shape {
        Shape::Table(table) => Ok(Columns {
            dim: table.dim as usize,
            arrangement: Arrangement {
                salt: variable.spec.routing_salt(),
                shards: view.spec.shards,
            },
            format: table.row_format,
        }),
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
        let table = || Shape::Table(TableSpec::new(2, Init::Zeros, "t"));
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
            keys: std::collections::BTreeSet<u64>, first_values: bool, group_bytes in 0usize..1000,
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
            let encoder = Encoder::new(&batch, &job, &Layouts::default()).unwrap();
            let (mut left, mut buffers, mut parts) = (encoder.shards(), Buffers::default(), Vec::new());
            while !left.is_empty() {
                parts.extend(encoder.parts(&mut left, group_bytes, &mut buffers));
            }
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
                        Body::Contribution(_) => prop_assert!(false, "nobody asked for one"),
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
        assert!(check_part(ShardId(0), PART_BYTES_MAX).is_ok());
        let error = check_part(ShardId(0), PART_BYTES_MAX + 1).unwrap_err();
        assert!(error.to_string().contains("more shards"));
    }
}
