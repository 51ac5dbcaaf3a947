//! What `psctl` is made of that others can use: [`local`] runs a whole cluster as child processes on this machine; [`probe`] is a client
//! whose pushes can be counted afterwards, and [`acks`] how long it waited.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use downpour_psctl::local::{Error, LocalCluster, Options};
//!
//! fn main() -> Result<(), Error> {
//!     let mut cluster = LocalCluster::start(Options { servers: 3, ..Options::default() })?;
//!     println!("{}", cluster.coordinator_addresses());
//!     cluster.servers[1].kill()?;
//!     cluster.servers[1].start()?;
//!     cluster.servers[1].wait_ready(Duration::from_secs(30))
//! }
//! ```
//!
//! The commands themselves are in the binary: `src/commands/<noun>/<verb>.rs`.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod acks;
pub mod local;
pub mod probe;
