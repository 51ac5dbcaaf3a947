//! The worker SDK of Downpour on LibTorch: embeddings with autograd, dense weights, a training loop, metrics, models.
//!
//! Follow one step: `reader` turns rows into batches with each key once (`prepare`, `keys`); `pipeline` pulls their rows
//! and the dense weights; [`Steps::next`] writes the dense weights into the VarStore and gives out a [`Step`], whose features
//! gather from one leaf per table (`rows`); [`Step::backward`] makes [`Grads`], and [`Grads::push`] hands them to the pipeline.
//! `evaluate` goes the same way without gradients; `recorder` keeps count.
//!
//! Everything blocks: the network's runtime is inside, and forward and backward stay on the caller's thread, because autograd's
//! state belongs to a thread. Routing and retries are `downpour-client`'s job, files and hashing `downpour-data`'s; the
//! optimizers run on the servers.
//!
//! ```no_run
//! use downpour::{Adagrad, Adam, Cluster, Features, Parquet, Pool, Step, Table};
//! use tch::nn::Module;
//! use tch::{Device, Reduction, Tensor, nn};
//!
//! # fn main() -> downpour::Result<()> {
//! let cluster = Cluster::connect("127.0.0.1:7070")?;
//! let job = cluster.job("ctr").open()?;
//! let items = job.table("item", Table::dim(16).optimizer(Adagrad::lr(0.05)))?;
//! let vars = nn::VarStore::new(Device::Cpu);
//! let net = nn::linear(vars.root(), 16 + 16 + 1, 1, nn::LinearConfig::default());
//! job.dense("net", &vars, Adam::lr(1e-3))?;
//! let predict = |step: &Step| {
//!     let x = Tensor::cat(&[step.rows("item_id"), step.rows("last_items"), step.dense()], 1);
//!     net.forward(&x).squeeze_dim(1)
//! };
//!
//! let features = Features::new()
//!     .one("item_id", &items)
//!     .bag("last_items", &items, Pool::Mean)
//!     .dense(["price"])
//!     .label("click");
//! let mut steps = job.train(Parquet::glob("train/*.parquet"), features).depth(2).start()?;
//! while let Some(step) = steps.next()? {
//!     let (logits, labels) = (predict(&step), step.labels());
//!     let loss = logits.binary_cross_entropy_with_logits::<Tensor>(&labels, None, None, Reduction::Mean);
//!     step.backward(&loss)?.push()?;
//! }
//! let report = job.evaluate(Parquet::glob("test/*.parquet"), |step| Ok(predict(step)))?;
//! println!("{:?}", report.auc);
//! job.finish()
//! # }
//! ```
//!
//! The ready-made [`models`] are written on the public interface and are its examples; `docs/sdk.md` is the manual.

#![deny(unsafe_code)]
#![warn(missing_docs)]

mod begin;
mod cluster;
mod dense;
mod describe;
pub mod device;
mod error;
mod evaluate;
mod every;
mod features;
mod grads;
mod job;
mod keys;
mod memory;
pub mod metrics;
pub mod models;
mod optimizer;
mod pipeline;
mod prepare;
mod progress;
mod reader;
mod recorder;
mod rows;
mod source;
mod step;
mod table;
mod tasks;
mod train;

pub use begin::Checkpoints;
pub use cluster::Cluster;
pub use downpour_client::{RolledBack, Transport};
pub use downpour_core::init::Init;
pub use downpour_core::optimizer::{Course, OptimizerSpec, Scaling, Schedule};
pub use downpour_core::row_format::RowFormat;
pub use downpour_data::{Dataset, Encoded, FileSpec, Pool, Schema};
pub use error::{Error, NonFinite, Result};
pub use evaluate::{EvaluateBuilder, Report, Scores};
pub use every::Every;
pub use features::Features;
pub use grads::{Gradient, Grads};
pub use job::{Job, JobBuilder};
pub use memory::keep_memory;
pub use optimizer::{Adagrad, Adam, AdamW, Ftrl, Momentum, RmsProp, RowwiseAdagrad, Sgd};
pub use progress::Position;
pub use recorder::Staleness;
pub use source::{Parquet, Paths, Source};
pub use step::Step;
pub use table::{Table, TableHandle};
pub use tasks::Start;
pub use train::{OnNonFinite, Steps, TrainBuilder};
