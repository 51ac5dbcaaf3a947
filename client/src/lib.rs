//! Client of a Downpour cluster: async, and it knows no LibTorch. [`blocking`] is the same over plain slices, without async.
//!
//! # Map
//!
//! - [`Coordinators`]: calls to the control plane at whichever member answers; follows the leader.
//! - [`Session`]: membership of a job, renewed in the background. [`Session::define`] its variables.
//! - [`JobState`]: the newest view of the job and its servers. A watch keeps it, redirects of servers run ahead of it.
//! - [`Error`] by what the caller can do; [`Error::retry`] says it.
//!
//! Follow one pull ([`Session::pull`]): `partition` deals the keys to shards, `pull::plan` puts shards into messages of about 1 MiB
//! for their servers, the answers are decoded from where they arrived into the caller's buffers, and what was redirected is asked again.
//!
//! Follow one push ([`Session::push`]): `encode` copies keys and gradients once into the outgoing bytes of each shard; the one `pusher` task
//! gives them to the pure `outbox`, which numbers them and decides what to send where, and again after a failure; a [`PushTicket`] brings
//! the [`PushOutcome`]. `docs/protocol.md`, section 2, is the contract.
//!
//! A worker that is to keep step with the others asks its [`Clock`] before each step.
//!
//! Pulls and pushes travel as [`Transport`] says: frames on plain TCP (`framed`), or gRPC. `servers` hides which.
//!
//! Keys must be sorted and unique, and gradients of equal keys summed, before they come here.
//!
//! # Example
//!
//! ```no_run
//! use downpour_client::{Coordinators, Error, Job, PushBatch, RowGradients, Session, SessionOptions, TableRows};
//! use downpour_core::init::Init;
//! use downpour_core::optimizer::{OptimizerSpec, Sgd};
//! use downpour_core::spec::{JobSpec, Shape, TableSpec, VariableSpec};
//!
//! # async fn example() -> Result<(), Error> {
//! let coordinators = Coordinators::parse("127.0.0.1:7070,127.0.0.1:7071")?;
//! let spec = JobSpec { name: "ctr".into(), shards: 64, replicas: 2, min_in_sync: 1, seed: 1 };
//! let session = Session::open(&coordinators, &Job::Create(spec), SessionOptions::worker("me")).await?;
//!
//! let table = TableSpec::new(2, Init::Zeros, "item");
//! let optimizer = OptimizerSpec::Sgd(Sgd { learning_rate: 0.1 });
//! let item = VariableSpec { name: "item".into(), optimizer, shape: Shape::Table(table) };
//! let variable = session.define(&[item]).await?[0].variable.id;
//!
//! let keys = [7, 9];
//! let mut values = [0.0; 4];
//! session.pull(&mut [TableRows { variable, keys: &keys, values: &mut values }], None).await?;
//! let gradients = values.map(|value| value - 1.0);
//!
//! let rows = vec![RowGradients { variable, keys: &keys, gradients: &gradients }];
//! let ticket = session.push(&PushBatch { clock: 1, rows, ..Default::default() }).await?;
//! let outcome = ticket.await?.applied()?; // acknowledged by every in-sync replica
//! println!("{:?}", outcome.lsns);
//! session.flush().await?;
//! session.close().await
//! # }
//! ```

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod backoff;
pub mod blocking;
mod buffers;
mod checkpoint;
mod clock;
mod coordinator;
mod dense;
mod driver;
mod encode;
mod error;
mod framed;
mod ledger;
mod operator;
mod outbox;
mod partition;
mod pull;
mod push;
mod pusher;
mod servers;
mod session;
mod state;
mod watch;

pub use clock::{Begun, Clock, StepRound};
pub use coordinator::{Coordinators, Member};
pub use dense::DenseCache;
pub use downpour_proto::v1::SessionKind;
pub use error::{Error, Refused, Retry};
pub use partition::Arrangement;
pub use pull::{Pulled, TableRows};
pub use push::{DenseTensor, PushBatch, PushOutcome, PushTicket, RolledBack, RowGradients};
pub use servers::Transport;
pub use session::{Defined, Job, Progress, Session, SessionOptions};
pub use state::{JobState, Route};
