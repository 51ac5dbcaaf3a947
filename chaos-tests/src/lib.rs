//! A cluster under faults.
//!
//! Follow one run (`downpour-chaos`, or [`scenario::run`] from a test): [`faults`] says what goes wrong and when, from a seed alone. [`cluster`] starts
//! the real binaries, each behind a [`proxy`] of one [`network`] and on a [`disk`] of its own where a fault needs that. Clients
//! ([`downpour_psctl::probe`], docs/protocol.md 10) push without pause; [`downpour_psctl::acks`] notes how long they waited after each loss of a server. [`inject`] does what the
//! schedule says and undoes it (`members`: the group of coordinators changes), [`monitor`] watches the committed state meanwhile. In the end every row is read back, and [`report`] says
//! whether the promises were kept. The scenario `scale` has no faults unless it is told whose: servers come and go, and it says what moved and what
//! clients noticed. In `hot`, few shards have most of the work, and a cluster that looks after itself spreads them. In [`workers`] it is workers that are killed and that join.
//!
//! [`hosts`] are network namespaces, for the tests that want the kernel's own TCP to meet a link that is down.
//!
//! The tests that use real processes are in `real/`, one file for each promise.

#![forbid(unsafe_code)]

pub mod cluster;
pub mod disk;
pub mod faults;
pub mod hosts;
mod hot;
pub mod inject;
mod members;
pub mod monitor;
pub mod network;
pub mod proxy;
pub mod report;
mod saved;
mod scale;
pub mod scenario;
pub mod workers;
