//! The replicated state machine: everything that must survive, and what each command does to it.
//!
//! Plain data. No clock, no I/O, no randomness, nothing that iterates in another order on another member: the same commands give the same
//! state everywhere. A command that is refused changes nothing. [`Cluster`] is the part that others see: it is cheap to clone, and each node
//! and job in it names the position in the log that last changed it, so that a watcher can be told exactly what it lacks.
//!
//! Follow a command: [`State::apply`] dispatches to [`nodes`] (registering, judging), [`jobs`] (creating, variables, labels) or [`sessions`], or [`ledgers`] (who trains what);
//! whenever a life of a server begins or ends, [`routes`] decides what that means for each shard; [`joins`] finds those that lack a member, [`moves`] carries copies elsewhere. [`members`] is the group of coordinators itself, [`deletions`] what is to go of checkpoints. [`snapshot`] is the encoding of it
//! all, and [`size`] keeps that within one message.

pub mod checkpoints;
mod consistency;
pub mod deletions;
mod events;
mod jobs;
pub mod joins;
mod ledgers;
pub mod lost;
pub mod members;
pub mod moves;
mod nodes;
mod requests;
pub mod routes;
mod sessions;
mod size;
mod snapshot;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use downpour_core::id::{JobId, NodeId, ServerRef, SessionId, VariableId};
use downpour_core::ledger::Ledger;
use downpour_core::placement::{Candidate, TooFewServers};
use downpour_core::routing::ShardRoute;
use downpour_core::spec::Variable;
use downpour_core::view::{JobView, NodeView};
use downpour_proto::v1;
use thiserror::Error;

use crate::command::Command;
use requests::Requests;

pub use events::Event;
pub use nodes::Life;

/// Everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    cluster: Cluster,
    last: Counters,
    requests: Requests,
    /// Wall time of the newest command, as its leader knew it: for people, and so that no life of a server has the number of one that a lost log knew.
    now_ms: u64,
}

/// Numbers that were given out last. They only rise: none is ever used again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counters {
    node: u32,
    incarnation: u64,
    job: u64,
    session: u64,
}

/// What everybody may see of the state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Position in the log of the last command that was applied.
    pub version: u64,
    /// Servers by their stable number.
    pub nodes: BTreeMap<NodeId, Arc<Node>>,
    /// Jobs by number.
    pub jobs: BTreeMap<JobId, Arc<Job>>,
    /// Tasks of the jobs' data. Apart from the jobs: they change with every task, and no watcher is told.
    pub ledgers: BTreeMap<JobId, Arc<Ledger>>,
    /// What was decided of late, oldest first.
    pub events: Arc<VecDeque<Event>>,
    /// The group of coordinators, where it was changed.
    pub members: Arc<members::Members>,
    /// Checkpoints that are to be deleted, or must not be.
    pub deletions: Arc<deletions::Deletions>,
    /// The longest lease that a leader may have given: none gives longer ones, and all wait for it, whatever their option is.
    pub lease_ms: u64,
}

/// A server.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// As everybody sees it.
    pub view: NodeView,
    /// Position in the log of its last change.
    pub version: u64,
    /// See [`v1::RegisterServerRequest`].
    pub origin: String,
    /// Cut off for so long, this life acknowledges nothing more; 0: no bound.
    pub isolation_ms: u64,
}

/// A job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// As clients and servers see it.
    pub view: JobView,
    /// For people and tools.
    pub labels: BTreeMap<String, String>,
    /// Open sessions.
    pub sessions: BTreeMap<SessionId, Session>,
    /// Taken, being taken, to be taken.
    pub checkpoints: v1::JobCheckpoints,
    /// Dense variables.
    dense: BTreeMap<VariableId, Dense>,
    /// Shards that were set back since all of them last were.
    back: lost::Back,
}

/// An open session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// What people see.
    pub name: String,
    /// What it is for.
    pub kind: v1::SessionKind,
}

/// Who gives a dense variable its first values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dense {
    initializer: SessionId,
    initialized: bool,
}

/// What a command that was applied answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Nothing but that it is so.
    Done,
    /// The server's new life.
    Registered(ServerRef),
    /// Whether the set changed, and how it is now.
    InSync {
        /// The compare-and-swap succeeded.
        changed: bool,
        /// As committed.
        route: ShardRoute,
    },
    /// The job, new or as it was.
    Created {
        /// Its number.
        job: JobId,
        /// It did not exist before.
        created: bool,
    },
    /// The variables in the order of the request.
    Defined {
        /// Each with who initialises it.
        variables: Vec<Defined>,
        /// Version of the job's view that has them all.
        version: u64,
    },
    /// The label.
    Labelled {
        /// The compare-and-swap succeeded.
        changed: bool,
        /// As committed; empty: absent.
        value: String,
    },
    /// The new session.
    Opened(SessionId),
    /// So many of the changes were made.
    Placed(u32),
    /// Whether it was not so before.
    Changed(bool),
    /// A member of the group of coordinators.
    Member {
        /// Its number.
        id: u64,
        /// It was not so before.
        changed: bool,
    },
    /// Version of the job's view that has it.
    Viewed(u64),
}

/// A variable that a session defined.
#[derive(Clone, Debug, PartialEq)]
pub struct Defined {
    /// Its definition and number.
    pub variable: Variable,
    /// Dense only: who pushes its first values.
    pub initializer: Option<SessionId>,
    /// Its first values are there (always, for a table).
    pub initialized: bool,
}

/// Why a command changed nothing.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// There is no such job, node, session.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken by something that differs.
    #[error("{0}")]
    AlreadyExists(String),
    /// More servers must register first.
    #[error(transparent)]
    TooFewServers(#[from] TooFewServers),
    /// The state forbids it.
    #[error("{0}")]
    FailedPrecondition(String),
    /// Something else is under way, or was first: to be looked at again, and asked for again.
    #[error("{0}")]
    Conflict(String),
    /// Not yet: to be asked for again.
    #[error("{0}")]
    Later(String),
}

/// What became of a command.
pub type Outcome = Result<Reply, Refused>;

impl State {
    /// What everybody may see.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Applies the command at `index` of the log.
    pub fn apply(&mut self, index: u64, command: Command) -> Outcome {
        debug_assert!(index > self.cluster.version);
        self.cluster.version = index;
        match command {
            Command::RegisterServer(registration) => self.register_server(registration),
            Command::JudgeDead(servers) => self.judge_dead(&servers),
            Command::Revive(server) => self.revive(server),
            Command::ReplacePrimary(change) => self.replace_primary(&change),
            Command::PlanJoins(joins) => self.plan_joins(&joins),
            Command::Place(placements) => self.place(placements),
            Command::Admit(node, admission) => self.admit(node, admission),
            Command::RemoveNode(node) => self.remove_node(node),
            Command::ChangeInSync(change) => self.change_in_sync(&change),
            Command::CreateJob(spec) => self.create_job(spec),
            Command::DeleteJob(job, if_version) => self.delete_job(job, if_version),
            Command::DefineVariables(job, session, specs) => self.define(job, session, specs),
            Command::MarkInitialized(job, session, variables) => {
                self.mark_initialized(job, session, &variables)
            }
            Command::LabelJob(job, change) => self.label_job(job, change),
            Command::OpenSession(job, opening) => self.open_session(job, opening),
            Command::CloseSessions(sessions) => self.close_sessions(&sessions),
            Command::BeginCheckpoint(start) => self.begin_checkpoint(start),
            Command::ShardsSaved(job, name, saved) => self.shards_saved(job, &name, saved),
            Command::EndCheckpoint(end) => self.end_checkpoint(end),
            Command::ScheduleCheckpoints(job, schedule) => self.schedule_checkpoints(job, schedule),
            Command::RestoreJob(restoring) => self.restore_job(restoring),
            Command::SetBack(setting) => self.set_back(setting),
            Command::BeginMember(address, birth) => self.begin_member(&address, birth),
            Command::PauseJob(job, paused) => self.pause_job(job, paused),
            Command::EvictSession(job, session) => self.evict_session(job, session),
            Command::DefineLedger(job, session, plan) => self.define_ledger(job, session, plan),
            Command::AdvanceLedger(job, session, generation, advance) => {
                self.advance_ledger(job, session, generation, &advance)
            }
            Command::SetConsistency(job, change) => self.set_consistency(job, change),
            Command::Condemn(checkpoints) => self.condemn(checkpoints),
            Command::Pin(checkpoint) => self.pin(checkpoint),
            Command::Forget(checkpoints) => self.forget_condemned(&checkpoints),
        }
    }

    /// Tells the wall time at which the next command was proposed. It never goes back.
    pub fn tell_time(&mut self, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
    }

    /// Takes note of an entry of the log that holds no command.
    pub fn skip(&mut self, index: u64) {
        debug_assert!(index > self.cluster.version);
        self.cluster.version = index;
    }

    fn job(&self, job: JobId) -> Result<&Job, Refused> {
        self.cluster.job(job).ok_or_else(|| Refused::NotFound(format!("there is no job {job}")))
    }

    /// The job, to be changed. Copies it where somebody still looks at the old one.
    fn job_mut(&mut self, job: JobId) -> &mut Job {
        Arc::make_mut(self.cluster.jobs.get_mut(&job).expect("callers looked it up"))
    }
}

impl Cluster {
    /// The job of this number.
    #[must_use]
    pub fn job(&self, job: JobId) -> Option<&Job> {
        self.jobs.get(&job).map(AsRef::as_ref)
    }

    /// The servers that may be given copies with what they hold, once all moves are done.
    fn candidates(&self) -> Vec<Candidate> {
        // Copies and primaries.
        let mut held: BTreeMap<ServerRef, (u64, u64)> = BTreeMap::new();
        for (_, _, _, route) in self.routes() {
            let arriving = route.moving.map(|moving| moving.to);
            let arriving = arriving.filter(|to| !route.in_sync.contains(to));
            let joining = route.joining.filter(|joining| arriving != Some(*joining));
            let leaving = route.moving.map(|moving| moving.from);
            let staying = route.in_sync.iter().copied().filter(|one| leaving != Some(*one));
            for member in staying.chain(joining).chain(arriving) {
                held.entry(member).or_default().0 += 1;
            }
            let moved = route.moving.filter(|moving| route.primary == Some(moving.from));
            if let Some(primary) = moved.map(|moving| moving.to).or(route.primary) {
                held.entry(primary).or_default().1 += 1;
            }
        }
        let nodes = self.nodes.values().map(|node| &node.view);
        let open = nodes.filter(|view| self.takes_copies(view.server));
        let candidate = |view: &NodeView| {
            let (copies, primaries) = held.get(&view.server).copied().unwrap_or_default();
            Candidate { server: view.server, zone: view.zone.clone(), copies, primaries }
        };
        open.map(candidate).collect()
    }

    /// Whether `server` is in an in-sync set: whether anything would be lost with it.
    #[must_use]
    pub fn holds_shards(&self, server: ServerRef) -> bool {
        let mut routes = self.jobs.values().flat_map(|job| &job.view.shards);
        routes.any(|route| route.in_sync.contains(&server))
    }
}
