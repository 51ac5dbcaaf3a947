//! Client of a Downpour cluster: async, and it knows no LibTorch.
//!
//! - [`Coordinators`]: calls to the control plane at whichever member answers.
//! - [`Session`]: membership of a job; [`Session::pull`] reads, [`Session::push`] writes exactly once.
//! - [`JobState`]: the newest view of the job with the servers, kept by a watch.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod backoff;
mod coordinator;
mod dense;
mod error;
mod pull;
mod push;
mod session;
mod state;

pub use coordinator::{Coordinators, LEADER_METADATA, Member};
pub use dense::DenseCache;
pub use downpour_proto::v1::SessionKind;
pub use error::{Error, Refused, Retry};
pub use pull::{Pulled, TableRows};
pub use push::{DenseTensor, PushBatch, PushOutcome, PushTicket, RowGradients};
pub use session::{Defined, Job, Progress, Session, SessionOptions};
pub use state::{JobState, Route};
