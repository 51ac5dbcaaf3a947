//! The control plane of Downpour.
//!
//! Follow one change: [`service`] decodes the request, [`command`] checks it, [`raft`] makes it durable on a majority and applies it to
//! [`state`], whose outcome is the answer. Follow one fact to its watchers: the driver publishes the new [`state::Cluster`],
//! and each [`service::watch`] stream sends what its watcher lacks. Who lives is volatile: [`liveness`] remembers on the leader who was
//! heard, and [`overseer`] turns silence into commands and moves shards; [`balance`] says where they should be, and [`placer`] puts them there; [`scribe`] begins checkpoints and writes their manifests, [`deleter`] deletes old ones. [`server`] starts all of it, [`config`] says how.
//!
//! Bytes of models never pass here, and nothing here knows what a gradient is.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod balance;
mod beside;
pub mod command;
pub mod config;
pub mod deleter;
pub mod liveness;
pub mod metrics;
pub mod overseer;
pub mod placer;
pub mod raft;
pub mod rescue;
pub mod room;
pub mod scribe;
pub mod server;
pub mod service;
pub mod state;

pub use config::Config;
pub use server::run;
