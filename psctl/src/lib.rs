//! What `psctl` is made of that others can use: [`local`] runs a whole cluster as child processes on this machine.
//!
//! The commands themselves are in the binary: `src/commands/<noun>/<verb>.rs`.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod local;
