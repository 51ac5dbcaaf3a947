//! What can go wrong with processes.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why a cluster or one of its processes is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A process ended that was not told to, or not with status 0.
    #[error("{name} ended ({status}); the end of {}:\n{tail}", .log.display())]
    Crashed {
        /// Of the process.
        name: String,
        /// How it ended.
        status: ExitStatus,
        /// The whole log.
        log: PathBuf,
        /// Its last lines.
        tail: String,
    },
    /// The system's loader did not find LibTorch for a program.
    #[error(
        "{name} did not find LibTorch: `cargo xtask libtorch` gets it, LD_LIBRARY_PATH names another place; the loader said:\n{tail}"
    )]
    NoLibTorch {
        /// Of the process.
        name: String,
        /// Last lines of its log.
        tail: String,
    },
    /// A process runs and does not get ready.
    #[error("{name} is not ready after {waited:?} ({reason}); the end of {}:\n{tail}", .log.display())]
    NotReady {
        /// Of the process.
        name: String,
        /// How long it had.
        waited: Duration,
        /// What `/readyz` says, or why it says nothing.
        reason: String,
        /// The whole log.
        log: PathBuf,
        /// Its last lines.
        tail: String,
    },
    /// A process did not end in time. If it had been told to stop it was killed then.
    #[error("{name} did not end within {waited:?}; its log is {}", .log.display())]
    Late {
        /// Of the process.
        name: String,
        /// How long it had.
        waited: Duration,
        /// The whole log.
        log: PathBuf,
    },
    /// The caller's [`Interrupt`](super::Interrupt) was set.
    #[error("interrupted")]
    Interrupted,
    /// A binary is not built, or not where it was looked for.
    #[error("there is no {binary} in {}: build it, or name its directory with --bin-dir", .dir.display())]
    NoBinary {
        /// Its file name.
        binary: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A cluster's directory must be new.
    #[error("{} is not empty: a cluster needs a directory of its own", .dir.display())]
    DirectoryInUse {
        /// As given.
        dir: PathBuf,
    },
    /// Nothing says that a cluster runs there.
    #[error("no cluster runs in {}: `psctl local` starts one and says where it is", .dir.display())]
    NoCluster {
        /// As given.
        dir: PathBuf,
    },
    /// The socket is there, and nobody listens.
    #[error("the cluster in {} was killed, and all its processes with it: start another with `psctl local`", .dir.display())]
    ClusterKilled {
        /// As given.
        dir: PathBuf,
    },
    /// The owner went away before it answered.
    #[error("the `psctl local` that owns {} has ended, and all its processes with it", .dir.display())]
    OwnerEnded {
        /// As given.
        dir: PathBuf,
    },
    /// The owner runs and says nothing.
    #[error("the `psctl local` that owns {} does not answer: is it stopped?", .dir.display())]
    OwnerSilent {
        /// As given.
        dir: PathBuf,
    },
    /// The owner did not do what it was asked for.
    #[error("{0}")]
    Refused(String),
    /// No process has this name.
    #[error("this cluster runs no server {0:?}")]
    NoServer(String),
    /// The system refused something.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What it said.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { action: action.into(), source: source.into() }
    }
}
