//! What speed is measured with: the workloads, the processes that do them, and the floor under them.
//!
//! # Map
//!
//! - [`workload`]: S (sparse) and D (dense), to the letter; their ids come from [`random`], their unique keys from [`dedup`].
//! - [`sparse`], [`dense`]: a measurement and its report; they start worker processes ([`child`], [`protocol`]) and a [`System`] to measure.
//! - [`train`]: a measurement of E, a training by `downpour-worker`; its data comes from [`click`].
//! - [`consistency`]: workers of different speed under each consistency mode; [`plot`] draws it.
//! - [`floor`]: blocking sockets and a flat array, the least that can be called a parameter server: a ceiling, not a peer.
//!
//! Follow one repeat of S: [`sparse::Run::repeat`] tells every worker to take its steps; `worker::sparse` dedups, pulls, pushes and waits,
//! one after the other, through a `peer`: the client of a cluster or the floor's; what each step took goes back as a line of JSON, and
//! [`statistics`] makes the report of it.
//!
//! Who starts servers is elsewhere: `psctl bench` and its `local` clusters.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod child;
pub mod click;
pub mod clock;
pub mod consistency;
pub mod dedup;
pub mod dense;
pub mod floor;
mod peer;
pub mod plot;
pub mod protocol;
pub mod random;
pub mod sparse;
pub mod statistics;
pub mod train;
mod worker;
pub mod workload;

pub use worker::main as child_main;

use protocol::Peer;

/// What is measured, as seen by who started it.
pub trait System {
    /// Where workers find it.
    fn peer(&self) -> Peer;

    /// Called while workers work.
    ///
    /// # Errors
    /// It makes no sense to go on: a server has died, or somebody interrupted.
    fn check(&mut self) -> anyhow::Result<()>;

    /// Processor seconds that its servers have used so far. `None` if nobody here knows.
    fn cpu_s(&self) -> Option<f64>;
}

/// Says on stderr what takes long.
fn progress(name: &str, what: impl std::fmt::Display) {
    eprintln!("{name}: {what}");
}
