//! One client's membership of a job.

use std::sync::Arc;
use std::time::Duration;

use downpour_core::id::{JobId, SessionId, VariableId};
use downpour_core::spec::{JobSpec, Variable, VariableSpec};
use downpour_proto::v1::SessionKind;
use tokio::sync::watch;

use crate::dense::DenseCache;
use crate::pull::{Pulled, TableRows};
use crate::push::{PushBatch, PushTicket};
use crate::state::JobState;
use crate::{Coordinators, Error};

/// Which job a session joins.
#[derive(Clone, Debug)]
pub enum Job {
    /// The job with this definition; it is created where it does not exist.
    Create(JobSpec),
    /// The job of this name, which must exist.
    Existing(String),
}

/// How a session behaves.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// What people see in lists: host and process, for example.
    pub name: String,
    /// Worker, evaluator or operator.
    pub kind: SessionKind,
    /// For a pull, retries included, and for the outcome of a push, counted from its acceptance.
    pub deadline: Duration,
    /// Gradient bytes that may wait for their acknowledgement; [`Session::push`] waits beyond.
    pub in_flight_bytes_max: usize,
}

impl SessionOptions {
    /// A worker of this name: 30 s, 64 MiB.
    #[must_use]
    pub fn worker(name: impl Into<String>) -> Self {
        SessionOptions {
            name: name.into(),
            kind: SessionKind::Worker,
            deadline: Duration::from_secs(30),
            in_flight_bytes_max: 64 << 20,
        }
    }
}

/// A variable as the job has it now.
#[derive(Clone, Debug)]
pub struct Defined {
    /// Its number and definition.
    pub variable: Variable,
    /// Dense variables: this session must push the first values ([`PushBatch::values`]), wait for their outcome and call
    /// [`Session::mark_initialized`].
    pub initializer: bool,
    /// Dense variables: the first values are there.
    pub initialized: bool,
}

/// What a worker says of itself, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Steps finished.
    pub clock: u64,
    /// Samples finished.
    pub samples: u64,
    /// Recent speed.
    pub samples_per_s: f64,
    /// Recent loss.
    pub loss: f64,
}

/// Membership of a job: a cheap clone, all clones are one session. It is renewed in the background, and closed by [`Session::close`] or, as
/// well as that goes, when the last clone is dropped.
#[derive(Clone)]
pub struct Session {}

impl Session {
    /// Joins a job, which is created where [`Job::Create`] says so.
    ///
    /// # Errors
    /// [`Error::JobDiffers`] names the field in which an existing job differs.
    pub async fn open(
        coordinators: &Coordinators,
        job: &Job,
        options: SessionOptions,
    ) -> Result<Session, Error> {
        unimplemented!("{job:?} {options:?} {:?}", coordinators.addresses())
    }

    /// Its number; it never comes back.
    #[must_use]
    pub fn id(&self) -> SessionId {
        unimplemented!()
    }

    /// The job's number.
    #[must_use]
    pub fn job(&self) -> JobId {
        unimplemented!()
    }

    /// What is known of the job now.
    #[must_use]
    pub fn state(&self) -> Arc<JobState> {
        unimplemented!()
    }

    /// What is known of the job, now and whenever it changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<JobState>> {
        unimplemented!()
    }

    /// Defines variables, all or none. One that exists with an equal definition is the same variable.
    ///
    /// # Errors
    /// [`Error::VariableDiffers`] names the field in which an existing variable differs.
    pub async fn define(&self, variables: &[VariableSpec]) -> Result<Vec<Defined>, Error> {
        unimplemented!("{variables:?}")
    }

    /// Says that all first values of these dense variables are acknowledged.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn mark_initialized(&self, variables: &[VariableId]) -> Result<(), Error> {
        unimplemented!("{variables:?}")
    }

    /// What the next renewal tells the coordinators.
    pub fn set_progress(&self, progress: Progress) {
        unimplemented!("{progress:?}")
    }

    /// A cache for these dense variables.
    ///
    /// # Errors
    /// A variable is unknown or a table.
    pub fn dense_cache(&self, variables: &[VariableId]) -> Result<DenseCache, Error> {
        unimplemented!("{variables:?}")
    }

    /// Reads rows into the caller's buffers and newer dense blocks into `dense`: one round of requests, tables and dense together, at most
    /// one small group of concurrent messages for each server. Repeats what was redirected or refused for the moment until the session's
    /// deadline. May see pushes that are not acknowledged yet.
    ///
    /// # Errors
    /// [`Error::Deadline`]; the buffers then hold some of the rows.
    pub async fn pull(
        &self,
        tables: &mut [TableRows<'_>],
        dense: Option<&mut DenseCache>,
    ) -> Result<Pulled, Error> {
        unimplemented!("{tables:?} {dense:?}")
    }

    /// Takes the gradients over and returns a ticket for the outcome. Waits while more than `in_flight_bytes_max` are unacknowledged. Exactly
    /// once: each shard applies its part once and in order, whatever fails in between.
    ///
    /// # Errors
    /// The batch does not fit the variables, or the session is closed. Nothing was sent then.
    pub async fn push(&self, batch: &PushBatch<'_>) -> Result<PushTicket, Error> {
        unimplemented!("{batch:?}")
    }

    /// Waits until every push accepted so far has its outcome (that of each is in its ticket).
    ///
    /// # Errors
    /// [`Error::Deadline`], or why the session ended.
    pub async fn flush(&self) -> Result<(), Error> {
        unimplemented!()
    }

    /// Ends the session. Pushes without an outcome become [`Error::Unknown`]: flush before.
    ///
    /// # Errors
    /// See [`Coordinators::call`]; the session is over for this client all the same.
    pub async fn close(&self) -> Result<(), Error> {
        unimplemented!()
    }
}
