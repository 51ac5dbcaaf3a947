//! The wire contract of Downpour.
//!
//! [`v1`] holds the generated messages and services (read `proto/downpour/v1/*.proto`: their comments are the contract).

/// Generated from `downpour/v1/*.proto`.
#[allow(clippy::all, missing_docs, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("downpour.v1");
}
