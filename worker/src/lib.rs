//! The worker SDK of Downpour on LibTorch: embeddings with autograd, dense weights, a training loop, metrics, models.
//!
//! Follow one step: [`reader`] turns rows into batches with each key once ([`prepare`], [`keys`]); [`pipeline`] pulls their rows
//! and the dense weights; [`Steps::next`] writes the dense weights into the VarStore and gives out a [`Step`], whose features
//! gather from one leaf per table ([`rows`]); [`Step::backward`] makes [`Grads`], and [`Grads::push`] hands them to the pipeline.
//! [`evaluate`] goes the same way without gradients; [`recorder`] keeps count.
//!
//! Everything blocks: the network's runtime is inside, and forward and backward stay on the caller's thread, because autograd's
//! state belongs to a thread. Routing and retries are `downpour-client`'s job, files and hashing `downpour-data`'s; the
//! optimizers run on the servers.
//!
//! The ready-made [`models`] are written on the public interface and are its examples; `docs/sdk.md` is the manual.

mod cluster;
mod dense;
pub mod device;
mod error;
mod evaluate;
mod every;
mod features;
mod grads;
mod job;
mod keys;
pub mod metrics;
pub mod models;
mod optimizer;
mod pipeline;
mod prepare;
mod reader;
mod recorder;
mod rows;
mod source;
mod step;
mod table;
mod train;

pub use cluster::Cluster;
pub use downpour_core::init::Init;
pub use downpour_core::optimizer::OptimizerSpec;
pub use downpour_data::{Dataset, Encoded, FileSpec, Pool, Schema};
pub use error::{Error, NonFinite, Result};
pub use evaluate::{EvaluateBuilder, Report, Scores};
pub use every::Every;
pub use features::Features;
pub use grads::{Gradient, Grads};
pub use job::{Job, JobBuilder};
pub use optimizer::{Adagrad, Adam, RowwiseAdagrad, Sgd};
pub use source::{Parquet, Paths, Source};
pub use step::Step;
pub use table::{Table, TableHandle};
pub use train::{OnNonFinite, Steps, TrainBuilder};
