//! What can go wrong, by what the caller can do about it.

use std::time::Duration;

use downpour_core::cells::Refusal;
use downpour_core::id::{SessionId, ShardId};
use downpour_proto::Invalid;
use thiserror::Error;
use tonic::Code;

/// Why a call failed.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is wrong: change it.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which argument.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The cluster has this job with another definition.
    #[error("job {job:?} exists with {field} = {cluster}, not {wanted}")]
    JobDiffers {
        /// Name of the job.
        job: String,
        /// The field that differs.
        field: &'static str,
        /// Its value in the cluster.
        cluster: String,
        /// Its value in the caller's definition.
        wanted: String,
    },
    /// The job has this variable with another definition.
    #[error("variable {variable:?} exists with {field} = {cluster}, not {wanted}")]
    VariableDiffers {
        /// Name of the variable.
        variable: String,
        /// The field that differs.
        field: &'static str,
        /// Its value in the cluster.
        cluster: String,
        /// Its value in the caller's definition.
        wanted: String,
    },
    /// The cluster has no such job, node or session.
    #[error("{what}: not found: {message}")]
    NotFound {
        /// What was being done.
        what: &'static str,
        /// What the coordinator said.
        message: String,
    },
    /// The cluster refuses the request, and would refuse it again.
    #[error("{what}: refused ({code:?}): {message}")]
    Refused {
        /// What was being done.
        what: &'static str,
        /// The kind of refusal.
        code: Refused,
        /// What the server said.
        message: String,
    },
    /// Nobody gave an answer in time. Whether a change happened is unknown; it may be repeated.
    #[error("{what}: no answer within {within:?}; last problem: {last}")]
    Deadline {
        /// What was being done.
        what: &'static str,
        /// The time that it was given.
        within: Duration,
        /// What stood in the way last.
        last: String,
    },
    /// It is not known whether these gradients were applied, and it never will be: they are not sent again.
    #[error("outcome of the push is unknown: {reason}")]
    Unknown {
        /// Why it is not known.
        reason: String,
    },
    /// A shard refused its part of a push for good; see [`crate::PushOutcome::applied`].
    #[error(
        "shard {shard} refused the gradients of variable {}: {}",
        refusal.variable,
        refusal.reason
    )]
    PushRefused {
        /// The shard.
        shard: ShardId,
        /// Why, and which variable.
        refusal: Refusal,
    },
    /// The coordinator closed the session: open a new one.
    #[error("session {0} is closed")]
    SessionClosed(SessionId),
    /// An operator closed the session (`psctl worker evict`): its worker is not wanted any more.
    #[error("session {0} was evicted by an operator")]
    Evicted(SessionId),
    /// The job was deleted.
    #[error("the job was deleted")]
    JobDeleted,
    /// A shard has forgotten pushes that it had acknowledged: its state was lost or restored. Open a new session.
    #[error(
        "shard {shard} went back: it expects push {expected} of this session, \
         {acknowledged} were acknowledged"
    )]
    RolledBack {
        /// The shard.
        shard: ShardId,
        /// The number that the shard would apply next.
        expected: u64,
        /// The highest number that it had acknowledged.
        acknowledged: u64,
    },
    /// A server broke the contract.
    #[error("{from} answered against the protocol: {problem}")]
    Protocol {
        /// Who.
        from: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// The blocking face was called from inside an async runtime, where it would stop the runtime's thread.
    #[error(
        "the blocking client was called inside an async runtime: use the async `Session` there, or a thread of your own"
    )]
    InsideRuntime,
    /// The runtime inside the blocking face did not start.
    #[error("start the client's runtime: {0}")]
    Runtime(String),
}

/// Kinds of [`Error::Refused`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused {
    /// A field of the request is wrong.
    InvalidArgument,
    /// A name is taken by something that differs.
    AlreadyExists,
    /// The state forbids it.
    FailedPrecondition,
    /// Something else is under way, or was first: look again, and ask again.
    Conflict,
    /// The message is over a limit.
    TooLarge,
    /// Anything else that repeating does not help against.
    Other,
}

/// What helps against an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same call again may succeed later.
    Later,
    /// A new session may succeed.
    NewSession,
    /// Nothing: the call or the cluster has to change.
    Never,
}

impl Error {
    /// A wrong argument.
    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Error::Invalid { field, problem: problem.into() }
    }

    /// What helps.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Error::Deadline { .. } => Retry::Later,
            Error::SessionClosed(_) | Error::RolledBack { .. } => Retry::NewSession,
            Error::Unknown { .. }
            | Error::Evicted(_)
            | Error::PushRefused { .. }
            | Error::Invalid { .. }
            | Error::JobDiffers { .. }
            | Error::VariableDiffers { .. }
            | Error::NotFound { .. }
            | Error::Refused { .. }
            | Error::JobDeleted
            | Error::Protocol { .. }
            | Error::InsideRuntime
            | Error::Runtime(_) => Retry::Never,
        }
    }

    /// The error of a status that repeating does not help against; `None` for one that it may.
    pub(crate) fn permanent(what: &'static str, status: &tonic::Status) -> Option<Self> {
        let code = match status.code() {
            Code::NotFound => {
                return Some(Error::NotFound { what, message: status.message().into() });
            }
            Code::InvalidArgument => Refused::InvalidArgument,
            Code::AlreadyExists => Refused::AlreadyExists,
            Code::FailedPrecondition => Refused::FailedPrecondition,
            Code::Aborted => Refused::Conflict,
            Code::OutOfRange => Refused::TooLarge,
            Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => Refused::Other,
            _ => return None,
        };
        Some(Error::Refused { what, code, message: status.message().into() })
    }
}

impl From<Invalid> for Error {
    fn from(invalid: Invalid) -> Self {
        Error::Invalid { field: invalid.field, problem: invalid.problem }
    }
}

impl From<downpour_core::spec::InvalidSpec> for Error {
    fn from(invalid: downpour_core::spec::InvalidSpec) -> Self {
        Error::Invalid { field: invalid.field, problem: invalid.problem }
    }
}
