//! The wire contract of Downpour.
//!
//! [`v1`] holds the generated messages and services (read `proto/downpour/v1/*.proto`: their comments are the contract).
//! What arrives is checked in two places and trusted behind them: [`convert`] turns messages of the control plane into the types of
//! `downpour_core` ([`clock`]: those of modes and clocks), [`validate`] checks the bulk requests of the data plane, whose [`tensor`]s are then read in place.
//! [`transport`] holds the settings of gRPC that both ends share, [`group`] what is told with each call of a coordinator; [`frame`], [`gather`] and [`framed`] are the data plane on plain TCP. [`net`] and [`threads`] are
//! what a simulation replaces.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod clock;
pub mod convert;
pub mod frame;
pub mod framed;
pub mod gather;
pub mod group;
pub mod net;
pub mod tensor;
pub mod threads;
pub mod transport;
pub mod validate;

use thiserror::Error;

/// Generated from `downpour/v1/*.proto`.
#[allow(clippy::all, missing_docs, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("downpour.v1");
}

/// A message that is not what the contract allows.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// The field as the `.proto` files name it.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl Invalid {
    /// A problem with `field`.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Invalid { field, problem: problem.into() }
    }
}

impl From<Invalid> for tonic::Status {
    fn from(invalid: Invalid) -> Self {
        tonic::Status::invalid_argument(invalid.to_string())
    }
}
