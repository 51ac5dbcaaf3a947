//! What users define: jobs and their variables.

use thiserror::Error;

use crate::id::{ShardId, VariableId};
use crate::init::Init;
use crate::mix::salt;
use crate::optimizer::{OptimizerSpec, Rule};
use crate::parameter::InvalidParameter;
use crate::routing::shard_of;
use crate::row_format::RowFormat;

/// Most characters of a name.
pub const NAME_BYTES_MAX: usize = 200;
/// Most shards of a job.
pub const SHARDS_MAX: u32 = 65_536;
/// Most replicas of a shard, the primary included.
pub const REPLICAS_MAX: u32 = 3;
/// Most floats of a table's row.
pub const DIM_MAX: u32 = 65_536;
/// Most floats of a dense block, so that a block fits into a message.
pub const BLOCK_FLOATS_MAX: u32 = 1 << 18;
/// Most floats of one dense variable.
pub const DENSE_FLOATS_MAX: u64 = 1 << 36;
/// Most blocks of one dense variable: servers go through all of them when the variable is defined.
pub const DENSE_BLOCKS_MAX: u64 = 1 << 22;
/// Most dimensions of a dense variable.
pub const DENSE_RANK_MAX: usize = 8;
/// Floats of a dense block where the user does not say.
pub const BLOCK_FLOATS_DEFAULT: u32 = 16_384;

/// What is wrong with a definition; names the field.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct InvalidSpec {
    /// The field as the wire contract names it.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl InvalidSpec {
    /// A problem with `field`.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        InvalidSpec { field, problem: problem.into() }
    }
}

impl From<InvalidParameter> for InvalidSpec {
    fn from(invalid: InvalidParameter) -> Self {
        InvalidSpec::new(
            invalid.field,
            format!("is {}, but must be {}", invalid.value, invalid.rule),
        )
    }
}

/// Checks a name of a job, a variable, a node: `A-Z a-z 0-9 . _ - /`, 1 to [`NAME_BYTES_MAX`].
pub fn check_name(field: &'static str, name: &str) -> Result<(), InvalidSpec> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"._-/".contains(&c);
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(InvalidSpec::new(field, format!("must have 1 to {NAME_BYTES_MAX} characters")));
    }
    if !name.bytes().all(allowed) {
        return Err(InvalidSpec::new(
            field,
            format!("{name:?} has a character other than A-Z a-z 0-9 . _ - /"),
        ));
    }
    Ok(())
}

/// Checks that a count is within its bounds.
pub fn check_range(
    field: &'static str,
    value: u64,
    low: u64,
    high: u64,
) -> Result<(), InvalidSpec> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(InvalidSpec::new(field, format!("{value} is not between {low} and {high}")))
    }
}

/// What a job is created with; it never changes afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSpec {
    /// Unique in the cluster.
    pub name: String,
    /// Shards of every variable.
    pub shards: u32,
    /// Copies of each shard, the primary included.
    pub replicas: u32,
    /// Members that an in-sync set must keep for pushes to be accepted.
    pub min_in_sync: u32,
    /// Seed of every `init`.
    pub seed: u64,
}

impl JobSpec {
    /// Checks every bound.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        check_name("name", &self.name)?;
        check_range("shards", self.shards.into(), 1, SHARDS_MAX.into())?;
        check_range("replicas", self.replicas.into(), 1, REPLICAS_MAX.into())?;
        check_range("min_in_sync", self.min_in_sync.into(), 1, self.replicas.into())
    }
}

/// An embedding table.
#[derive(Clone, Debug, PartialEq)]
pub struct TableSpec {
    /// Floats in a row.
    pub dim: u32,
    /// Value of a row that was never pushed.
    pub init: Init,
    /// Tables of one group place equal keys on one shard.
    pub group: String,
    /// How its rows and their gradients travel.
    pub row_format: RowFormat,
}

impl TableSpec {
    /// A table whose rows travel as they are.
    #[must_use]
    pub fn new(dim: u32, init: Init, group: impl Into<String>) -> Self {
        TableSpec { dim, init, group: group.into(), row_format: RowFormat::F32 }
    }

    /// Bytes of a row on the wire.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.row_format.row_bytes(self.dim as usize)
    }
}

/// A dense tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenseSpec {
    /// Sizes, row-major; empty for a scalar.
    pub shape: Vec<u64>,
    /// Floats of a block.
    pub block_floats: u32,
}

impl DenseSpec {
    /// Floats of the whole tensor.
    #[must_use]
    pub fn floats(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.floats().div_ceil(self.block_floats.into()) as u32
    }

    /// Floats of block `block`.
    #[must_use]
    pub fn block_len(&self, block: u32) -> usize {
        let start = u64::from(block) * u64::from(self.block_floats);
        self.floats().saturating_sub(start).min(self.block_floats.into()) as usize
    }
}

/// Table or dense.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// Rows by key.
    Table(TableSpec),
    /// Blocks by number.
    Dense(DenseSpec),
}

/// A variable, as its users define it.
#[derive(Clone, Debug, PartialEq)]
pub struct VariableSpec {
    /// Unique in the job.
    pub name: String,
    /// What a push does to it.
    pub optimizer: OptimizerSpec,
    /// What it is.
    pub shape: Shape,
}

impl VariableSpec {
    /// Checks every bound.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        check_name("name", &self.name)?;
        self.optimizer.validate()?;
        match &self.shape {
            Shape::Table(table) => {
                check_range("table.dim", table.dim.into(), 1, DIM_MAX.into())?;
                check_name("table.group", &table.group)?;
                Ok(table.init.validate()?)
            }
            Shape::Dense(dense) => {
                let for_rows = match &self.optimizer {
                    OptimizerSpec { rule: Rule::RowwiseAdagrad(_), .. } => Some("rowwise_adagrad"),
                    OptimizerSpec { clip_row_norm: Some(_), .. } => Some("clip_row_norm"),
                    _ => None,
                };
                if let Some(what) = for_rows {
                    let problem = "is for tables: a block of a dense variable is no row";
                    return Err(InvalidSpec::new("optimizer", format!("{what} {problem}")));
                }
                check_range("dense.shape", dense.shape.len() as u64, 0, DENSE_RANK_MAX as u64)?;
                check_range(
                    "dense.block_floats",
                    dense.block_floats.into(),
                    1,
                    BLOCK_FLOATS_MAX.into(),
                )?;
                let product =
                    dense.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
                let floats = product.unwrap_or(u64::MAX);
                check_range("dense.shape (product)", floats, 1, DENSE_FLOATS_MAX)?;
                let blocks = floats.div_ceil(dense.block_floats.into());
                check_range("dense.shape (blocks)", blocks, 1, DENSE_BLOCKS_MAX)
            }
        }
    }

    /// The salt of [`shard_of`]: of the table's group, or of the dense variable's name.
    #[must_use]
    pub fn routing_salt(&self) -> u64 {
        match &self.shape {
            Shape::Table(table) => salt(&table.group),
            Shape::Dense(_) => salt(&self.name),
        }
    }
}

/// A variable of a job: its definition and its number.
#[derive(Clone, Debug, PartialEq)]
pub struct Variable {
    /// In order of definition from 1.
    pub id: VariableId,
    /// As defined.
    pub spec: VariableSpec,
}

/// The blocks of a dense variable that live on `shard`, rising.
pub fn dense_blocks_on(spec: &VariableSpec, shard: ShardId, shards: u32) -> Vec<u32> {
    let Shape::Dense(dense) = &spec.shape else { return Vec::new() };
    let salt = spec.routing_salt();
    (0..dense.blocks()).filter(|&block| shard_of(block.into(), salt, shards) == shard).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> JobSpec {
        JobSpec { name: "ctr".into(), shards: 64, replicas: 2, min_in_sync: 1, seed: 1 }
    }

    #[test]
    fn a_job_out_of_bounds_is_refused_by_field() {
        assert_eq!(job().validate(), Ok(()));
        let field = |spec: JobSpec| spec.validate().unwrap_err().field;
        assert_eq!(field(JobSpec { name: "a b".into(), ..job() }), "name");
        assert_eq!(field(JobSpec { name: String::new(), ..job() }), "name");
        assert_eq!(field(JobSpec { shards: 0, ..job() }), "shards");
        assert_eq!(field(JobSpec { replicas: 4, ..job() }), "replicas");
        assert_eq!(field(JobSpec { min_in_sync: 3, ..job() }), "min_in_sync");
    }

    #[test]
    fn dense_blocks_tile_the_tensor() {
        let dense = DenseSpec { shape: vec![3, 7], block_floats: 8 };
        assert_eq!((dense.floats(), dense.blocks()), (21, 3));
        assert_eq!((0..3).map(|block| dense.block_len(block)).collect::<Vec<_>>(), [8, 8, 5]);
        let scalar = DenseSpec { shape: vec![], block_floats: 8 };
        assert_eq!((scalar.floats(), scalar.blocks(), scalar.block_len(0)), (1, 1, 1));
    }
}
