//! Checkpoints: what is written of a job while it trains, and read when it begins again (docs/protocol.md 8).
//!
//! Follow one checkpoint: each shard's rows go through a [`write::ShardWriter`], which makes one safetensors file of them;
//! [`store::Store`] puts it into a directory or a bucket under a name that no other attempt has ([`name`]); the [`manifest`] names all
//! files with their sizes and checksums and is written last. A checkpoint without a manifest does not exist.
//! Follow one restore: [`catalog::Catalog`] finds the manifest and the chain of increments below it, [`store::Store::fetch`] brings each file
//! and refuses it unless size and checksum are those of the manifest, and [`read::ShardReader`] checks every tensor and hands out the rows.
//!
//! When a checkpoint is taken, and of which cut, is decided elsewhere: nothing here knows a server or a coordinator.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod catalog;
pub mod export;
pub mod head;
pub mod layout;
pub mod manifest;
pub mod name;
pub mod read;
mod sort;
mod spool;
pub mod store;
pub mod write;

use std::io;

use downpour_core::spec::InvalidSpec;
use downpour_proto::Invalid;
use thiserror::Error;

/// What is wrong with a checkpoint or the place where it is. Each names the object that it is about.
#[derive(Debug, Error)]
pub enum Error {
    /// The place cannot be used as it is written.
    #[error("{uri}: {problem}; write file:///folder or s3://bucket/prefix")]
    Uri {
        /// As given.
        uri: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no such checkpoint or object.
    #[error("{0}: is not there")]
    Missing(String),
    /// Somebody wrote it before: it is left as it is.
    #[error("{0}: exists already, and nothing that was written is ever overwritten")]
    Exists(String),
    /// Cut off, or longer than it was.
    #[error("{object}: has {bytes} bytes, and the manifest says {expected}")]
    Size {
        /// The file.
        object: String,
        /// It has.
        bytes: u64,
        /// It should have.
        expected: u64,
    },
    /// Not the bytes that were written.
    #[error("{object}: its checksum is {crc32:08x}, and {expected:08x} was written: it is corrupt")]
    Checksum {
        /// The file.
        object: String,
        /// It has.
        crc32: u32,
        /// It should have.
        expected: u32,
    },
    /// Not what this program writes.
    #[error("{object}: {field}: {problem}")]
    Structure {
        /// The file.
        object: String,
        /// Which part of it.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Something else needs it.
    #[error("{object} is needed by {by}: delete that first")]
    Needed {
        /// What was to be deleted.
        object: String,
        /// The checkpoint that builds on it.
        by: String,
    },
    /// The directory or bucket refused.
    #[error("{object}: {source}")]
    Store {
        /// What was asked for.
        object: String,
        /// Why it failed.
        source: object_store::Error,
    },
    /// A file of this machine.
    #[error("{object}: {source}")]
    Io {
        /// What was read or written.
        object: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// A part of a file that is not as it must be; [`Malformed::of`] adds which file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct Malformed {
    /// Which part.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl Malformed {
    /// A problem with `field`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Malformed { field: field.into(), problem: problem.into() }
    }

    /// It is a part of `object`.
    pub fn of(self, object: impl Into<String>) -> Error {
        Error::Structure { object: object.into(), field: self.field, problem: self.problem }
    }
}

impl From<Invalid> for Malformed {
    fn from(invalid: Invalid) -> Self {
        Malformed::new(invalid.field, invalid.problem)
    }
}

impl From<InvalidSpec> for Malformed {
    fn from(invalid: InvalidSpec) -> Self {
        Malformed::new(invalid.field, invalid.problem)
    }
}
