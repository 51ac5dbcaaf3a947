//! A cluster under faults.
//!
//! [`probe`] is the client whose pushes can be counted afterwards (docs/protocol.md 9). [`cluster`] starts the real binaries for a test.
//! [`proxy`] is a slow network between clients and a server.
//! [`scenario`] disturbs a cluster for a while and reports what the probe saw; the binary `downpour-chaos` runs one by name.
//! The tests that use real processes are in `real/`, one file for each promise.

#![forbid(unsafe_code)]

pub mod cluster;
pub mod probe;
pub mod proxy;
pub mod scenario;
