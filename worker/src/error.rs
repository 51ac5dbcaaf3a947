use std::fmt;

use downpour_data::Encoded;

/// Why a call failed, in words that say what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The SDK blocks its thread and has a runtime of its own.
    #[error(
        "called inside an async runtime, whose thread this would stop: call it from a plain thread \
         (`std::thread::spawn`, or `tokio::task::spawn_blocking`)"
    )]
    InsideRuntime,
    /// The runtime inside did not start.
    #[error("start the runtime inside: {0}")]
    Runtime(std::io::Error),
    /// The cluster did not do what was asked.
    #[error(transparent)]
    Cluster(#[from] downpour_client::Error),
    /// The data cannot be read.
    #[error(transparent)]
    Data(#[from] downpour_data::Error),
    /// LibTorch refused an operation.
    #[error("LibTorch: {0}")]
    Torch(#[from] tch::TchError),
    /// An argument is wrong.
    #[error("{0}")]
    Usage(String),
    /// The loss or a gradient is not a finite number.
    #[error("{0}")]
    NonFinite(Box<NonFinite>),
    /// Every shard of the job was lost and went on from a checkpoint, and with it what its workers have trained: open the job anew to go on from there. See also
    /// [`Job::began_again`](crate::Job::began_again).
    #[error(
        "the job lost every shard and was set back to a checkpoint, and what was trained since is trained again"
    )]
    SetBack,
    /// SIGTERM or Ctrl-C came.
    #[error("stopped by a signal")]
    Stopped,
    /// A file of results could not be written.
    #[error("write {path}: {source}")]
    Write {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// A step whose loss or gradient is NaN or infinite, with the batch that led to it.
#[derive(Debug)]
pub struct NonFinite {
    /// `loss`, or the name of a variable.
    pub what: String,
    /// The loss of the step.
    pub loss: f64,
    /// The step's clock.
    pub clock: u64,
    /// The rows: files and row numbers in [`Encoded::describe_rows`].
    pub batch: Encoded,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, loss, clock) = (&self.what, self.loss, self.clock);
        let subject = match what.as_str() {
            "loss" => format!("the loss is {loss}"),
            variable => format!("the gradient of {variable} is not finite (loss {loss})"),
        };
        write!(f, "step {clock}: {subject}, with the batch {}", self.batch.describe_rows())
    }
}

impl Error {
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::Usage(what.into())
    }

    pub(crate) fn write(path: &std::path::Path, source: std::io::Error) -> Self {
        Self::Write { path: path.display().to_string(), source }
    }
}
