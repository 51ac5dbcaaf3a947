//! The domain of Downpour, pure: no I/O, no clock, no randomness, no async.
//!
//! Names: [`id`] (who and where in a log), [`spec`] (what users define), [`view`] (what the coordinator tells everybody).
//! Where things live: [`routing`] (key → shard), [`placement`] (shard → servers), [`rebalance`] (the same by what is measured).
//! Who waits for whom: [`consistency`] (the modes), [`clocks`] (who has finished how many steps).
//! Exactly once: [`cells`] (what each session last did to a shard), [`lineage`] (which log positions belong to a shard's history), [`ledger`] (who trains which task).
//! Arithmetic, bit for bit the same on every machine: [`mix`] (hashing), [`init`] (first values), [`optimizer`] (updates),
//! [`tensor_bytes`] (raw tensors read in place). Speed alone: [`prefetch`] (asking for memory before it is needed). For the simulation alone: [`planted`].

// `instruction_set` and `prefetch` alone may, and say why.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod cells;
pub mod checkpoint;
pub mod clocks;
pub mod consistency;
pub mod id;
pub mod init;
mod instruction_set;
pub mod ledger;
pub mod lineage;
pub mod mix;
pub mod optimizer;
pub mod parameter;
pub mod placement;
pub mod planted;
pub mod prefetch;
pub mod rebalance;
pub mod routing;
pub mod row_format;
pub mod spec;
pub mod tensor_bytes;
pub mod view;
