//! What must hold, one file for each promise.

pub(crate) mod acknowledged;
pub(crate) mod checkpoints;
pub(crate) mod epochs;
pub(crate) mod isolated;
pub(crate) mod replicas;
