//! Training data: files as a stream of Arrow record batches, turned by a schema into batches for a model.
//!
//! Follow one row: [`open`] finds files and makes a [`Dataset`], which lists its pieces as [`Task`]s and
//! opens one as Arrow batches ([`Chunk`]); Parquet, CSV and libFM each have a module. The [`Encoder`]
//! turns rows into [`Encoded`] (keys, numbers, labels) by the [`Schema`]; [`hash`] says how a value
//! becomes a key. [`Batches`] does all of it for a stream of tasks, in batches of equal size.
//!
//! ```no_run
//! use std::sync::Arc;
//! use downpour_data::{BatchOptions, Batches, Dataset, Encoder, Schema, open};
//!
//! let schema = Schema::load("criteo.toml")?;
//! let data = Arc::new(open(&["train/*.tsv"], &schema)?);
//! let tasks = data.tasks()?;
//! let options = BatchOptions { batch: 1024, shuffle_rows: 16_384, seed: 7 };
//! for batch in Batches::new(data, Encoder::new(schema), tasks, options) {
//!     let batch = batch?;
//!     println!("{} rows, {} keys of the first feature", batch.rows(), batch.features[0].keys.len());
//! }
//! # downpour_data::Result::Ok(())
//! ```
//!
//! [`generate`] makes data with a known ceiling. Nothing here knows the network, the cluster or
//! LibTorch: who trains which task is decided elsewhere. `docs/data.md` is the manual for schema files.

mod batches;
mod column;
mod csv;
mod encode;
mod encoded;
mod error;
mod files;
pub mod generate;
pub mod hash;
mod libfm;
mod lines;
mod parquet;
mod rng;
pub mod schema;
mod task;

pub use arrow_array::RecordBatch;
pub use batches::{BatchOptions, Batches};
pub use encode::Encoder;
pub use encoded::{Encoded, Finished, Keys, Origin};
pub use error::{Error, Result};
pub use files::{Files, open};
pub use hash::Salt;
pub use schema::{
    Bucket, BucketSpec, Columns, CrossSpec, Feature, FileSpec, Format, KeySpec, Label, LabelRule,
    LabelSpec, Number, NumberSpec, Pool, Schema, Source, Spec, Transform,
};
pub use task::{BatchReader, Chunk, Dataset, Part, Task};

/// Rows of a [`Chunk`] that the readers here hand out.
const CHUNK_ROWS_MAX: usize = 1024;
/// A text chunk ends when it has so many bytes, however few its rows.
const CHUNK_BYTES_MAX: usize = 4 << 20;
