//! The client over plain slices, with its own runtime inside: for programs without one, and for bindings.
//!
//! ```no_run
//! use downpour_client::blocking::Client;
//! use downpour_core::init::Init;
//! use downpour_core::optimizer::{OptimizerSpec, Sgd};
//!
//! # fn main() -> Result<(), downpour_client::Error> {
//! let client = Client::connect("127.0.0.1:7070")?;
//! let job = client.job("ctr")?;
//! let sgd = OptimizerSpec::Sgd(Sgd { learning_rate: 0.1 });
//! let items = job.table("item", 2, Init::Zeros, sgd)?;
//! items.push(&[7, 9], &[1.0, 1.0, 2.0, 2.0])?;
//! job.flush()?;
//! let mut rows = [0.0; 4];
//! items.pull(&[7, 9], &mut rows)?;
//! job.close()
//! # }
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use downpour_core::id::VariableId;
use downpour_core::init::Init;
use downpour_core::optimizer::OptimizerSpec;
use downpour_core::spec::{
    BLOCK_FLOATS_DEFAULT, DenseSpec, JobSpec, Shape, TableSpec, VariableSpec,
};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::driver::Driver;
use crate::push::{DenseTensor, PushBatch, PushTicket, RowGradients};
use crate::{Coordinators, DenseCache, Error, Job as JobRef, Session, SessionOptions, TableRows};

/// Between two looks at whether another client has initialised a dense variable.
const INITIALIZED_POLL: Duration = Duration::from_millis(50);
/// Tickets kept before the oldest is waited for.
const TICKETS_MAX: usize = 1024;

/// Tasks between an accepted push and its socket: the pusher, and the connection (opened by then, or nothing could be sent at once).
const TURNS_TO_SEND: usize = 3;

/// A connection to a cluster. A cheap clone.
#[derive(Clone)]
pub struct Client {
    runtime: Arc<Driver>,
    coordinators: Coordinators,
}

impl Client {
    /// The cluster whose coordinators are at `host:port,host:port`. Connects when first used.
    ///
    /// # Errors
    /// There is no address, or the call comes from inside an async runtime.
    pub fn connect(coordinators: &str) -> Result<Client, Error> {
        let coordinators = Coordinators::parse(coordinators)?;
        Ok(Client { runtime: Arc::new(Driver::start()?), coordinators })
    }

    /// Joins the job of this name as a worker, or creates it with 64 shards and one copy of each.
    ///
    /// # Errors
    /// See [`Session::open`].
    pub fn job(&self, name: &str) -> Result<Job, Error> {
        match self.open(&JobRef::Existing(name.into()), SessionOptions::worker(name)) {
            Err(Error::NotFound { .. }) => self.create_job(JobSpec {
                name: name.into(),
                shards: 64,
                replicas: 1,
                min_in_sync: 1,
                seed: 0,
            }),
            joined => joined,
        }
    }

    /// Joins the job with this definition as a worker; it is created where it does not exist.
    ///
    /// # Errors
    /// See [`Session::open`].
    pub fn create_job(&self, spec: JobSpec) -> Result<Job, Error> {
        let options = SessionOptions::worker(&spec.name);
        self.open(&JobRef::Create(spec), options)
    }

    /// Joins a job with every option.
    ///
    /// # Errors
    /// See [`Session::open`].
    pub fn open(&self, job: &JobRef, options: SessionOptions) -> Result<Job, Error> {
        let session = self.runtime.block_on(Session::open(&self.coordinators, job, options))?;
        let tickets = Mutex::new(VecDeque::new());
        let inner = JobInner { session: Some(session), runtime: self.runtime.clone(), tickets };
        Ok(Job(Arc::new(inner)))
    }
}

/// Membership of a job: the blocking face of a [`Session`]. A cheap clone.
#[derive(Clone)]
pub struct Job(Arc<JobInner>);

struct JobInner {
    /// Given until drop.
    session: Option<Session>,
    runtime: Arc<Driver>,
    /// Of pushes whose outcome nobody has asked for.
    tickets: Mutex<VecDeque<PushTicket>>,
}

impl Drop for JobInner {
    fn drop(&mut self) {
        // The session closes itself in the background and needs the runtime for that.
        let _guard = self.runtime.handle().map(Handle::enter);
        self.session = None;
    }
}

impl Job {
    /// Defines a table or joins it.
    ///
    /// # Errors
    /// See [`Session::define`].
    pub fn table(
        &self,
        name: &str,
        dim: u32,
        init: Init,
        optimizer: OptimizerSpec,
    ) -> Result<Table, Error> {
        let shape = Shape::Table(TableSpec::new(dim, init, name));
        let spec = VariableSpec { name: name.into(), optimizer, shape };
        let variable = self.define(&spec)?.variable.id;
        Ok(Table { job: self.clone(), variable, dim: dim as usize })
    }

    /// Defines a dense variable or joins it. The first client's `values` become its first values; everybody else waits for them.
    ///
    /// # Errors
    /// See [`Session::define`]; [`Error::Deadline`] when nobody initialises it.
    pub fn dense(
        &self,
        name: &str,
        shape: &[u64],
        values: &[f32],
        optimizer: OptimizerSpec,
    ) -> Result<Dense, Error> {
        let dense = DenseSpec { shape: shape.to_vec(), block_floats: BLOCK_FLOATS_DEFAULT };
        let spec = VariableSpec { name: name.into(), optimizer, shape: Shape::Dense(dense) };
        let deadline = std::time::Instant::now() + self.session()?.deadline();
        loop {
            let defined = self.define(&spec)?;
            let variable = defined.variable.id;
            if defined.initializer {
                self.block_on(async |session| {
                    let values = vec![DenseTensor { variable, floats: values }];
                    let batch = PushBatch { values, ..Default::default() };
                    session.push(&batch).await?.await?.applied()?;
                    session.mark_initialized(&[variable]).await
                })?;
            } else if !defined.initialized {
                if std::time::Instant::now() > deadline {
                    return Err(Error::Deadline {
                        what: "wait for the first values of a dense variable",
                        within: self.session()?.deadline(),
                        last: format!("{name:?} is not initialised by its initializer"),
                    });
                }
                self.block_on(async |_| {
                    tokio::time::sleep(INITIALIZED_POLL).await;
                    Ok(())
                })?;
                continue;
            }
            let cache = self.session()?.dense_cache(&[variable])?;
            let floats = cache.values(variable).map_or(0, <[f32]>::len);
            crate::encode::check_floats("values", values.len(), floats)?;
            return Ok(Dense {
                job: self.clone(),
                variable,
                floats,
                cache: Mutex::new(Some(cache)),
            });
        }
    }

    /// Waits for all pushes.
    ///
    /// # Errors
    /// The first push that failed or was refused since the last flush.
    pub fn flush(&self) -> Result<(), Error> {
        let tickets = std::mem::take(&mut *self.0.tickets.lock());
        self.block_on(async |session| {
            session.flush().await?;
            for ticket in tickets {
                ticket.await?.applied()?;
            }
            Ok(())
        })
    }

    /// Leaves the job; flush before.
    ///
    /// # Errors
    /// See [`Session::close`].
    pub fn close(&self) -> Result<(), Error> {
        self.block_on(async |session| session.close().await)
    }

    fn define(&self, spec: &VariableSpec) -> Result<crate::Defined, Error> {
        let mut defined =
            self.block_on(async |session| session.define(std::slice::from_ref(spec)).await)?;
        defined.pop().ok_or_else(|| Error::Protocol {
            from: "the coordinator".into(),
            problem: "no definition".into(),
        })
    }

    fn push(&self, batch: &PushBatch<'_>) -> Result<(), Error> {
        self.block_on(async |session| {
            let ticket = session.push(batch).await?;
            // The tasks that send it run when this thread lets them; without a turn they would wait for the next call.
            for _ in 0..TURNS_TO_SEND {
                tokio::task::yield_now().await;
            }
            let oldest = {
                let mut tickets = self.0.tickets.lock();
                tickets.push_back(ticket);
                if tickets.len() > TICKETS_MAX { tickets.pop_front() } else { None }
            };
            match oldest {
                Some(oldest) => oldest.await?.applied().map(drop),
                None => Ok(()),
            }
        })
    }

    fn session(&self) -> Result<&Session, Error> {
        self.0.session.as_ref().ok_or(Error::JobDeleted)
    }

    fn block_on<T>(
        &self,
        call: impl AsyncFnOnce(&Session) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let session = self.session()?;
        self.0.runtime.block_on(call(session))
    }
}

/// An embedding table.
#[derive(Clone)]
pub struct Table {
    job: Job,
    variable: VariableId,
    dim: usize,
}

impl Table {
    /// Floats of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Reads the rows of keys, each named once, into `values`, `dim` floats each, in their order.
    ///
    /// # Errors
    /// See [`Session::pull`].
    pub fn pull(&self, keys: &[u64], values: &mut [f32]) -> Result<(), Error> {
        self.job.block_on(async |session| {
            let rows = TableRows { variable: self.variable, keys, values };
            session.pull(&mut [rows], None).await.map(drop)
        })
    }

    /// Sends gradients of keys, each named once, `dim` floats each. Returns when they are taken over: [`Job::flush`] says what became of
    /// them.
    ///
    /// # Errors
    /// See [`Session::push`].
    pub fn push(&self, keys: &[u64], gradients: &[f32]) -> Result<(), Error> {
        let rows = vec![RowGradients { variable: self.variable, keys, gradients }];
        self.job.push(&PushBatch { rows, ..Default::default() })
    }
}

/// A dense variable.
pub struct Dense {
    job: Job,
    variable: VariableId,
    floats: usize,
    cache: Mutex<Option<DenseCache>>,
}

impl Dense {
    /// Floats of the tensor.
    #[must_use]
    pub fn floats(&self) -> usize {
        self.floats
    }

    /// Reads the whole tensor, row-major; only blocks that are new travel.
    ///
    /// # Errors
    /// See [`Session::pull`].
    pub fn pull(&self, values: &mut [f32]) -> Result<(), Error> {
        crate::encode::check_floats("values", values.len(), self.floats)?;
        // Taken out, so that no lock is held while waiting; a pull at the same time begins with an empty one.
        let taken = self.cache.lock().take();
        let mut cache = match taken {
            Some(cache) => cache,
            None => self.job.session()?.dense_cache(&[self.variable])?,
        };
        let pulled =
            self.job.block_on(async |session| session.pull(&mut [], Some(&mut cache)).await);
        if let Some(tensor) = cache.values(self.variable).filter(|_| pulled.is_ok()) {
            values.copy_from_slice(tensor);
        }
        *self.cache.lock() = Some(cache);
        pulled.map(drop)
    }

    /// Sends the gradient of the whole tensor; otherwise as [`Table::push`].
    ///
    /// # Errors
    /// See [`Session::push`].
    pub fn push(&self, gradients: &[f32]) -> Result<(), Error> {
        let dense = vec![DenseTensor { variable: self.variable, floats: gradients }];
        self.job.push(&PushBatch { dense, ..Default::default() })
    }
}
