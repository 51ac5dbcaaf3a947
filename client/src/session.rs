//! One client's membership of a job.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use downpour_core::id::{JobId, SessionId, ShardId, VariableId};
use downpour_core::spec::{JobSpec, Variable, VariableSpec};
use downpour_core::view::{JobView, NodeView};
use downpour_proto::v1::{self, SessionKind};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::buffers::Buffers;
use crate::dense::{DenseCache, Layouts};
use crate::encode::Encoder;
use crate::outbox::Outbox;
use crate::partition::Arrangement;
use crate::pull::{Pulled, Puller, TableRows};
use crate::push::{PushBatch, PushTicket, RolledBack};
use crate::pusher::{Accepted, Input, Pusher};
use crate::servers::{Servers, Transport};
use crate::state::{JobState, variable_difference};
use crate::watch::Watched;
use crate::{Coordinators, Error, Refused, encode};

/// Renewals within a session's timeout.
const RENEWALS: u32 = 4;
/// Stretches of pushes that were rolled back that a renewal names, the newest.
const TOLD_MAX: usize = 64;
/// A view that is known to be newer should have arrived by then.
const VIEW_PATIENCE: Duration = Duration::from_millis(500);
/// Why a session is over, or nothing does.
const EXPLAINED_WITHIN: Duration = Duration::from_secs(5);

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
    /// How pulls and pushes travel.
    pub transport: Transport,
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
            transport: Transport::default(),
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
/// well as that goes, when the last clone is dropped (pushes without an outcome are then not sent again).
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    coordinators: Coordinators,
    id: SessionId,
    options: SessionOptions,
    watched: Watched,
    puller: Puller,
    pusher: mpsc::Sender<Input>,
    in_flight: Arc<Semaphore>,
    trouble: Arc<Mutex<String>>,
    rolled_back: Arc<Mutex<Vec<RolledBack>>>,
    layouts: Layouts,
    outgoing: Mutex<Buffers>,
    /// How many seats it took among the clocks of its job, in whatever loop: shard 0 heeds no number that is not above those that were given back.
    seats: AtomicU64,
    progress: Arc<Mutex<Option<v1::WorkerProgress>>>,
    ended: watch::Sender<Option<Error>>,
    /// Ended with the session.
    _tasks: JoinSet<()>,
}

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
        if options.in_flight_bytes_max == 0 {
            return Err(Error::invalid("in_flight_bytes_max", "must be at least 1"));
        }
        let job = match job {
            Job::Create(spec) => coordinators.create_job(spec).await?.0.job,
            Job::Existing(name) => coordinators.job(name).await?.job,
        };
        let opened = coordinators.open_session(job, &options.name, options.kind).await?;
        let broken = |problem: String| Error::Protocol { from: "the coordinator".into(), problem };
        let (id, renewal) = (SessionId(opened.session), Duration::from_millis(opened.timeout_ms));
        if id.0 == 0 || renewal.is_zero() {
            return Err(broken("a session without a number or a timeout".into()));
        }
        let view = opened.view.map(JobView::try_from).transpose();
        let view = view.map_err(|invalid| broken(invalid.to_string()))?;
        let view = view.filter(|view| view.job == job);
        let view = view.ok_or_else(|| broken("view is not of the job".into()))?;
        let nodes = opened.nodes.into_iter().map(NodeView::try_from).collect::<Result<Vec<_>, _>>();
        let nodes = nodes.map_err(|invalid| broken(invalid.to_string()))?;

        let shards = (0..view.spec.shards).map(ShardId);
        let state = JobState::new(view, nodes);
        let outbox = Outbox::new(
            job,
            id,
            options.transport.message_bytes(),
            options.transport.lanes(),
            shards.map(|shard| state.route(shard)),
        );
        let watched = Watched::new(state);
        let (ended, _) = watch::channel(None);
        let progress = Arc::new(Mutex::new(None));
        let trouble = Arc::new(Mutex::new(String::from("no answer yet")));
        let rolled_back = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        tasks.spawn(watched.clone().follow(coordinators.clone()));
        tasks.spawn(end_with_job(watched.subscribe(), id, ended.clone()));
        let renewals = coordinators.clone().with_deadline(renewal);
        let told = Told { progress: progress.clone(), rolled_back: rolled_back.clone() };
        tasks.spawn(renew(renewals, job, id, renewal, told, ended.clone()));
        let servers = Servers::new(id, options.transport);
        let pusher = Pusher::start(
            outbox,
            watched.clone(),
            servers,
            ended.clone(),
            trouble.clone(),
            rolled_back.clone(),
            &mut tasks,
        );
        let permits = options.in_flight_bytes_max.min(Semaphore::MAX_PERMITS);
        Ok(Session(Arc::new(Inner {
            coordinators: coordinators.clone(),
            id,
            puller: Puller {
                job,
                watched: watched.clone(),
                servers: Servers::new(id, options.transport),
                ended: ended.clone(),
                deadline: options.deadline,
            },
            options,
            watched,
            pusher,
            in_flight: Arc::new(Semaphore::new(permits)),
            trouble,
            rolled_back,
            layouts: Layouts::default(),
            outgoing: Mutex::default(),
            seats: AtomicU64::new(0),
            progress,
            ended,
            _tasks: tasks,
        })))
    }

    /// Its number; it never comes back.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.0.id
    }

    /// The job's number.
    #[must_use]
    pub fn job(&self) -> JobId {
        self.0.puller.job
    }

    /// Of [`SessionOptions`].
    #[must_use]
    pub fn deadline(&self) -> Duration {
        self.0.options.deadline
    }

    /// What is known of the job now.
    #[must_use]
    pub fn state(&self) -> Arc<JobState> {
        self.0.watched.now()
    }

    /// What is known of the job, now and whenever it changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<JobState>> {
        self.0.watched.subscribe()
    }

    /// The state and its upkeep.
    pub(crate) fn watched(&self) -> &Watched {
        &self.0.watched
    }

    /// Counts the seats that it took.
    pub(crate) fn seats(&self) -> &AtomicU64 {
        &self.0.seats
    }

    /// Tells when the session is over.
    pub(crate) fn watch_end(&self) -> watch::Receiver<Option<Error>> {
        self.0.ended.subscribe()
    }

    /// Why the session is over, if it is.
    #[must_use]
    pub fn ended(&self) -> Option<Error> {
        self.0.ended.borrow().clone()
    }

    /// Whether an operator wants workers to begin no further step. Pulls and pushes work all the same. False once the session is over.
    #[must_use]
    pub fn paused(&self) -> bool {
        let works = self.0.options.kind == v1::SessionKind::Worker && self.ended().is_none();
        works && self.state().view.orders.paused
    }

    /// Waits until the job is not paused, or the session is over.
    pub async fn resumed(&self) {
        let (mut ended, mut state) = (self.0.ended.subscribe(), self.watch());
        tokio::select! {
            _ = ended.wait_for(Option::is_some) => {}
            _ = state.wait_for(|state| !state.view.orders.paused) => {}
        }
    }

    /// The same error, or what lies behind it: a server may say that a session is closed, and a coordinator that it knows none of this number, before the job's view has said why.
    pub async fn explain(&self, error: Error) -> Error {
        let unknown = match &error {
            Error::NotFound { .. } => true,
            Error::SessionClosed(_) | Error::Unknown { .. } if self.ended().is_some() => false,
            _ => return error,
        };
        let id = self.0.id;
        let mut state = self.watch();
        let known = state.wait_for(|state| over(state, id).is_some());
        // The member that is watched may be cut off from the one that answered.
        let impatient = async {
            loop {
                sleep(VIEW_PATIENCE).await;
                self.0.watched.nudge();
            }
        };
        let looked = async {
            tokio::select! {
                state = known => state.ok().and_then(|state| over(&state, id)),
                () = impatient => None,
            }
        };
        match timeout(EXPLAINED_WITHIN, looked).await {
            Ok(Some(why)) if unknown || matches!(why, Error::Evicted(_)) => why,
            _ => error,
        }
    }

    /// Defines variables, all or none. One that exists with an equal definition is the same variable. Repeat the call to learn whether dense
    /// variables are initialised by now, or whether this session has become their initializer.
    ///
    /// # Errors
    /// [`Error::VariableDiffers`] names the field in which an existing variable differs.
    pub async fn define(&self, variables: &[VariableSpec]) -> Result<Vec<Defined>, Error> {
        variables.iter().try_for_each(VariableSpec::validate)?;
        let inner = &*self.0;
        let reply = inner.coordinators.define_variables(self.job(), inner.id, variables).await;
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => return Err(self.explain_variables(variables, error).await),
        };
        let broken = |problem: &str| Error::Protocol {
            from: "the coordinator".into(),
            problem: problem.into(),
        };
        if reply.variables.len() != variables.len() {
            return Err(broken("not as many variables as were defined"));
        }
        let defined = reply.variables.into_iter().zip(variables).map(|(defined, wanted)| {
            let variable = defined.variable.ok_or_else(|| broken("variable is not given"))?;
            let variable = Variable::try_from(variable)?;
            if variable.spec.name != wanted.name {
                return Err(broken("a definition of another variable"));
            }
            Ok(Defined {
                variable,
                initializer: !defined.initialized && defined.initializer == inner.id.0,
                initialized: defined.initialized,
            })
        });
        let defined = defined.collect::<Result<Vec<_>, Error>>()?;
        self.wait_for_version(reply.version).await?;
        Ok(defined)
    }

    /// Says that all first values of these dense variables are acknowledged.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn mark_initialized(&self, variables: &[VariableId]) -> Result<(), Error> {
        self.0.coordinators.mark_initialized(self.job(), self.0.id, variables).await
    }

    /// What the next renewal tells the coordinators.
    pub fn set_progress(&self, progress: Progress) {
        let Progress { clock, samples, samples_per_s, loss } = progress;
        let progress =
            v1::WorkerProgress { clock, samples, samples_per_s, loss, rolled_back: Vec::new() };
        *self.0.progress.lock() = Some(progress);
    }

    /// What shards lost so far of the pushes that this session had acknowledgements for, in the order in which it was found out (at most 10,000 stretches).
    #[must_use]
    pub fn rolled_back(&self) -> Vec<RolledBack> {
        self.0.rolled_back.lock().clone()
    }

    /// A cache for these dense variables.
    ///
    /// # Errors
    /// A variable is unknown or a table.
    pub fn dense_cache(&self, variables: &[VariableId]) -> Result<DenseCache, Error> {
        let state = self.state();
        let layouts = variables.iter().map(|&variable| self.0.layouts.get(&state.view, variable));
        Ok(DenseCache::new(layouts.collect::<Result<_, _>>()?))
    }

    /// The order in which keys of a table are dealt best.
    ///
    /// # Errors
    /// The job has no such table.
    pub fn arrangement(&self, table: VariableId) -> Result<Arrangement, Error> {
        Ok(encode::table(&self.state().view, table)?.arrangement)
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
        self.0.puller.pull(tables, dense).await
    }

    /// Takes the gradients over and returns a ticket for the outcome. Waits while more than `in_flight_bytes_max` are unacknowledged. Exactly
    /// once: each shard applies its part once and in order, whatever fails in between.
    ///
    /// Dropping the future before it is done may leave the push sent to some shards only.
    ///
    /// # Errors
    /// The batch does not fit the variables, or the session is over. Nothing was sent then.
    pub async fn push(&self, batch: &PushBatch<'_>) -> Result<PushTicket, Error> {
        let inner = &*self.0;
        let permits = inner.options.in_flight_bytes_max.min(u32::MAX as usize);
        let bytes = encode::size(batch).clamp(1, permits) as u32;
        let mut ended = inner.ended.subscribe();
        let share = tokio::select! {
            biased;
            Ok(end) = ended.wait_for(Option::is_some) => {
                return Err(end.clone().unwrap_or(Error::SessionClosed(inner.id)));
            }
            share = inner.in_flight.clone().acquire_many_owned(bytes) => share,
        };
        let over = |_| Error::SessionClosed(inner.id);
        let share = Arc::new(share.map_err(over)?);
        let state = self.state();
        let encoder = Encoder::new(batch, &state.view, &inner.layouts)?;
        let transport = inner.options.transport;
        let group_bytes = transport.message_bytes() * transport.lanes() as usize;
        let (mut left, mut outcomes) = (encoder.shards(), Vec::new());
        // A shard's part is whole in one of them, so the outbox takes each as a push of its own.
        loop {
            let mut parts = encoder.parts(&mut left, group_bytes, &mut inner.outgoing.lock());
            if let Some(round) = &batch.round {
                parts.iter_mut().for_each(|part| round.mark(&mut part.updates));
            }
            let (outcome, pending) = oneshot::channel();
            let (clock, view_version) = (batch.clock, state.view.version);
            let (share, read) = (Arc::clone(&share), batch.read.clone());
            let accepted = Accepted { clock, view_version, read, parts, outcome, share };
            let refused = inner.pusher.send(Input::Push(accepted)).await.is_err();
            if refused && outcomes.is_empty() {
                return Err(self.ended().unwrap_or(Error::SessionClosed(inner.id)));
            }
            // Where the session ended meanwhile, the sender is gone and the outcome unknown.
            outcomes.push(pending);
            if left.is_empty() || refused {
                return Ok(PushTicket::new(
                    outcomes,
                    inner.options.deadline,
                    inner.trouble.clone(),
                ));
            }
            // What is encoded goes out now, and servers apply it while the rest is encoded.
            tokio::task::yield_now().await;
        }
    }

    /// Waits until every push accepted so far has its outcome (that of each is in its ticket).
    ///
    /// # Errors
    /// [`Error::Deadline`] at the session's deadline, or why the session ended.
    pub async fn flush(&self) -> Result<(), Error> {
        let inner = &*self.0;
        let (done, flushed) = oneshot::channel();
        let over = || self.ended().unwrap_or(Error::SessionClosed(inner.id));
        inner.pusher.send(Input::Flush(done)).await.map_err(|_| over())?;
        let within = inner.options.deadline;
        match timeout(within, flushed).await {
            Ok(flushed) => flushed.unwrap_or_else(|_| Err(over())),
            Err(_) => {
                let last = inner.trouble.lock().clone();
                Err(Error::Deadline { what: "flush", within, last })
            }
        }
    }

    /// Ends the session. Pushes without an outcome become [`Error::Unknown`]: flush before.
    ///
    /// # Errors
    /// See [`Coordinators::call`]; the session is over for this client all the same.
    pub async fn close(&self) -> Result<(), Error> {
        let id = self.0.id;
        end(&self.0.ended, Error::SessionClosed(id));
        match self.0.coordinators.close_session(self.job(), id).await {
            Err(Error::NotFound { .. }) => Ok(()),
            closed => closed,
        }
    }

    /// Waits until the job's view is at least this new.
    async fn wait_for_version(&self, version: u64) -> Result<(), Error> {
        let within = self.0.options.deadline;
        let mut watch = self.watch();
        let seen = watch.wait_for(|state| state.view.version >= version || state.deleted);
        // The member that is watched may be cut off from the one that answered.
        let impatient = async {
            loop {
                sleep(VIEW_PATIENCE).await;
                self.0.watched.nudge();
            }
        };
        let seen = async {
            tokio::select! {
                seen = seen => seen.is_ok_and(|state| state.deleted),
                () = impatient => false,
            }
        };
        match timeout(within, seen).await {
            Ok(false) => Ok(()),
            Ok(true) => Err(Error::JobDeleted),
            Err(_) => {
                let last = format!("the view of the job did not reach version {version}");
                Err(Error::Deadline { what: "define variables", within, last })
            }
        }
    }

    /// Makes of "already exists" an error that names the variable and the field.
    async fn explain_variables(&self, wanted: &[VariableSpec], error: Error) -> Error {
        if !matches!(error, Error::Refused { code: Refused::AlreadyExists, .. }) {
            return error;
        }
        let name = self.state().view.spec.name.clone();
        let Ok(view) = self.0.coordinators.job(&name).await else { return error };
        let different = wanted.iter().find_map(|wanted| {
            let cluster = view.variables.iter().find(|known| known.spec.name == wanted.name)?;
            let (field, cluster, value) = variable_difference(&cluster.spec, wanted)?;
            let variable = wanted.name.clone();
            Some(Error::VariableDiffers { variable, field, cluster, wanted: value })
        });
        different.unwrap_or(error)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let over = self.ended.borrow().is_some();
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if !over {
            let (coordinators, job, id) = (self.coordinators.clone(), self.puller.job, self.id);
            runtime.spawn(async move {
                if let Err(error) = coordinators.close_session(job, id).await {
                    tracing::debug!(session = %id, %error, "close a dropped session");
                }
            });
        }
    }
}

/// The first reason stays.
fn end(ended: &watch::Sender<Option<Error>>, error: Error) {
    ended.send_if_modified(|ended| {
        let first = ended.is_none();
        ended.get_or_insert(error);
        first
    });
}

/// What renewals tell.
struct Told {
    progress: Arc<Mutex<Option<v1::WorkerProgress>>>,
    rolled_back: Arc<Mutex<Vec<RolledBack>>>,
}

fn wire(lost: &RolledBack) -> v1::RolledBackPushes {
    v1::RolledBackPushes {
        shard: lost.shard.0,
        epoch: lost.epoch.0,
        first: lost.first,
        last: lost.last,
        first_clock: lost.clocks.map(|(first, _)| first),
        last_clock: lost.clocks.map(|(_, last)| last),
    }
}

/// Keeps the session open. What cannot be reached for a while may still count as open: only an answer ends it.
async fn renew(
    coordinators: Coordinators,
    job: JobId,
    session: SessionId,
    timeout: Duration,
    told: Told,
    ended: watch::Sender<Option<Error>>,
) {
    loop {
        sleep(timeout / RENEWALS).await;
        let mut progress = told.progress.lock().clone();
        let lost: Vec<_> = told.rolled_back.lock().iter().rev().take(TOLD_MAX).map(wire).collect();
        if !lost.is_empty() {
            progress.get_or_insert_default().rolled_back = lost;
        }
        match coordinators.renew_session(job, session, progress).await {
            Ok(true) => {}
            Ok(false) | Err(Error::NotFound { .. }) => {
                return end(&ended, Error::SessionClosed(session));
            }
            Err(error) => tracing::warn!(%session, %error, "renew the session"),
        }
    }
}

/// The watch may know sooner than a renewal.
async fn end_with_job(
    mut state: watch::Receiver<Arc<JobState>>,
    session: SessionId,
    ended: watch::Sender<Option<Error>>,
) {
    if let Ok(state) = state.wait_for(|state| over(state, session).is_some()).await
        && let Some(error) = over(&state, session)
    {
        end(&ended, error);
    }
}

/// Why a session is over, if it is.
fn over(state: &JobState, session: SessionId) -> Option<Error> {
    let view = &state.view;
    match state.deleted {
        true => Some(Error::JobDeleted),
        false if view.orders.evicted.contains(&session) => Some(Error::Evicted(session)),
        false => view.sessions.contains(session).then_some(Error::SessionClosed(session)),
    }
}
