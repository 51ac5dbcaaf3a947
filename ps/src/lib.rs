//! The parameter server of Downpour: holds shards of models, applies pushes, answers pulls.
//!
//! Follow one push: `service` (gRPC) or `frames` (plain TCP) receives it, `push` hands each part to a [`shard::Shard`], which checks it and appends a closed
//! [`record::Record`]; [`state::ShardState`] applies it to the rows of a `table` or the blocks of a `dense` variable; `link` sends it to the
//! backups, whose `replica` service applies the same record; their answers move the commit LSN, and the push is acknowledged.
//!
//! Follow one failover: `membership` hears of the new epoch by its watch, `life` hands the view to the shard, `promote` carries out
//! what [`shard::Promotion`] asks for (fence, level), and the shard serves.
//!
//! Follow one cut: [`shard::Shard::open_cut`] copies what is small; [`shard::Shard::read_cut`] gives the rest piece by piece while pushes go on ([`cut`]);
//! [`cut::Loader`] makes a state of the pieces.
//!
//! Follow one join: the coordinator names who is joining; `join` sends it a cut, which `receive` makes a replica of; `link` brings it the log; the state
//! machine says when to have it added ([`shard::Proposal`]).
//!
//! The decisions are in [`shard`] and [`state`], which know no clock, no network and no async. *Where* a shard lives is the coordinator's to say:
//! nothing here chooses a primary.

#![deny(unsafe_code)]
#![warn(missing_docs)]

mod accept;
mod arena;
mod bench_table;
mod bounded;
mod checkpoint;
mod clock;
mod config;
mod coordinators;
pub mod cut;
mod dense;
mod for_job;
mod frames;
mod hosted;
#[cfg(test)]
mod hostile;
mod index;
#[cfg(downpour_sim)]
pub mod inspect;
mod join;
mod keeper;
mod lease;
mod life;
mod link;
mod log;
mod membership;
mod memory;
mod metrics;
mod origin;
mod pace;
mod pool;
mod promote;
mod pull;
mod push;
mod receive;
pub mod record;
mod replica;
mod reply;
mod report;
mod round_room;
mod rounds;
mod rounds_known;
mod server;
mod service;
pub mod shard;
mod staleness;
pub mod state;
mod table;
mod threads;

pub use bench_table::main as bench_table;
pub use config::Config;
pub use server::run;
