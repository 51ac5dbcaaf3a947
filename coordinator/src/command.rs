//! What may enter the log, and its encoding there.
//!
//! A change that somebody asks for is logged as the request that asked: [`Logged`] wraps the messages of the wire contract, whose rules of
//! compatibility are also those of the log. [`Command`] is the same, checked: what a handler lets through, and what apply reads.

pub mod deleting;

use std::collections::BTreeMap;

use downpour_checkpoint::manifest::CHAIN_MAX;
use downpour_checkpoint::name::CheckpointName;
use downpour_core::checkpoint::{CheckpointOrder, RestoreOrder, SetBack};
use downpour_core::consistency::{Consistency, Mode};
use downpour_core::id::{Epoch, JobId, Lsn, NodeId, ServerRef, SessionId, ShardId, VariableId};
use downpour_core::ledger::{Advance, Ledger, Plan};
use downpour_core::spec::{JobSpec, Variable, VariableSpec, check_name, check_range};
use downpour_core::view::Admission;
use downpour_proto::{Invalid, clock, convert, v1};
use prost::Message;

use crate::state::deletions::Filed;
use crate::state::joins::Join;
use crate::state::lost::{Again, SettingBack};
use crate::state::moves::{Placement, Placing};
use deleting::{CheckpointList, Checkpoints};

/// Largest command, encoded.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;
/// Most variables in one request: an empty one takes two bytes encoded, and far more here.
const VARIABLES_MAX: u64 = 4096;
/// Most placements in one request.
const PLACEMENTS_MAX: u64 = 4096;
/// Longest `request_id`.
const REQUEST_ID_BYTES_MAX: usize = 64;
/// Longest address, zone, name of a session.
const TEXT_BYTES_MAX: usize = 256;
/// Longest place of checkpoints.
const URI_BYTES_MAX: usize = 1024;
/// Longest reason why a checkpoint failed.
pub const ERROR_BYTES_MAX: usize = 1024;
/// Longest value of a label.
const LABEL_VALUE_BYTES_MAX: usize = 4096;

/// A command as it is in the log.
#[derive(Clone, PartialEq, Message)]
pub struct Logged {
    /// What is to be done.
    #[prost(
        oneof = "Body",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 21, 22, 23, 24, 25, 60, 61, 70, 80, 81, 82, 101, 102, 103"
    )]
    pub body: Option<Body>,
    /// Wall time of who proposed it, in milliseconds since 1970: for people.
    #[prost(uint64, tag = "100")]
    pub at_ms: u64,
}

/// The kinds of commands. The first eight are asked for; the rest are the leader's own decisions.
#[derive(Clone, PartialEq, prost::Oneof)]
#[allow(missing_docs)]
pub enum Body {
    #[prost(message, tag = "1")]
    RegisterServer(v1::RegisterServerRequest),
    #[prost(message, tag = "2")]
    ChangeInSync(v1::ChangeInSyncRequest),
    #[prost(message, tag = "3")]
    CreateJob(v1::CreateJobRequest),
    #[prost(message, tag = "4")]
    DeleteJob(v1::DeleteJobRequest),
    #[prost(message, tag = "5")]
    DefineVariables(v1::DefineVariablesRequest),
    #[prost(message, tag = "6")]
    MarkInitialized(v1::MarkInitializedRequest),
    #[prost(message, tag = "7")]
    LabelJob(v1::LabelJobRequest),
    #[prost(message, tag = "8")]
    OpenSession(v1::OpenSessionRequest),
    #[prost(message, tag = "9")]
    CloseSessions(SessionList),
    #[prost(message, tag = "10")]
    JudgeDead(ServerList),
    #[prost(message, tag = "11")]
    Revive(v1::ServerRef),
    #[prost(message, tag = "12")]
    PlanJoins(JoinList),
    #[prost(message, tag = "13")]
    ReplacePrimary(v1::ChangeInSyncRequest),
    #[prost(message, tag = "14")]
    Place(v1::PlaceShardsRequest),
    #[prost(message, tag = "15")]
    Admit(v1::AdmitNodeRequest),
    #[prost(message, tag = "16")]
    RemoveNode(v1::RemoveNodeRequest),
    #[prost(message, tag = "20")]
    BeginCheckpoint(BeginCheckpoint),
    #[prost(message, tag = "21")]
    ShardsSaved(v1::ReportSavedRequest),
    #[prost(message, tag = "22")]
    EndCheckpoint(EndCheckpoint),
    #[prost(message, tag = "23")]
    ScheduleCheckpoints(v1::ScheduleCheckpointsRequest),
    #[prost(message, tag = "24")]
    RestoreJob(RestoreJob),
    #[prost(message, tag = "25")]
    SetBack(SetBackShards),
    #[prost(message, tag = "80")]
    BeginMember(v1::JoinRequest),
    #[prost(message, tag = "81")]
    PauseJob(v1::PauseJobRequest),
    #[prost(message, tag = "82")]
    EvictSession(v1::EvictSessionRequest),
    #[prost(message, tag = "60")]
    DefineLedger(v1::DefineLedgerRequest),
    #[prost(message, tag = "61")]
    AdvanceLedger(v1::AdvanceLedgerRequest),
    #[prost(message, tag = "70")]
    SetConsistency(v1::SetConsistencyRequest),
    #[prost(message, tag = "101")]
    Condemn(CheckpointList),
    #[prost(message, tag = "102")]
    Pin(CheckpointList),
    #[prost(message, tag = "103")]
    Forget(CheckpointList),
}

/// Sessions of any jobs.
#[derive(Clone, PartialEq, Message)]
pub struct SessionList {
    /// Each with its job.
    #[prost(message, repeated, tag = "1")]
    pub sessions: Vec<v1::CloseSessionRequest>,
}

/// Members that shards lack.
#[derive(Clone, PartialEq, Message)]
pub struct JoinList {
    /// Each of another shard.
    #[prost(message, repeated, tag = "1")]
    pub joins: Vec<JoinEntry>,
}

/// See [`Join`].
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)]
pub struct JoinEntry {
    #[prost(uint64, tag = "1")]
    pub job: u64,
    #[prost(uint32, tag = "2")]
    pub shard: u32,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    #[prost(uint64, tag = "4")]
    pub set_version: u64,
    #[prost(message, optional, tag = "5")]
    pub server: Option<v1::ServerRef>,
}

impl From<Join> for JoinEntry {
    fn from(join: Join) -> Self {
        JoinEntry {
            job: join.job.0,
            shard: join.shard.0,
            epoch: join.epoch.0,
            set_version: join.set_version,
            server: Some(join.server.into()),
        }
    }
}

impl TryFrom<JoinEntry> for Join {
    type Error = Invalid;

    fn try_from(entry: JoinEntry) -> Result<Self, Invalid> {
        Ok(Join {
            job: job(entry.job)?,
            shard: ShardId(entry.shard),
            epoch: Epoch(entry.epoch),
            set_version: entry.set_version,
            server: convert::server("server", entry.server)?,
        })
    }
}

/// Lives of servers.
#[derive(Clone, PartialEq, Message)]
pub struct ServerList {
    /// Each with its node.
    #[prost(message, repeated, tag = "1")]
    pub servers: Vec<v1::ServerRef>,
}

/// A checkpoint begins.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)]
pub struct BeginCheckpoint {
    #[prost(uint64, tag = "1")]
    pub job: u64,
    #[prost(message, optional, tag = "2")]
    pub order: Option<v1::CheckpointOrder>,
    #[prost(uint64, tag = "3")]
    pub created_ms: u64,
    #[prost(string, repeated, tag = "4")]
    pub chain: Vec<String>,
    #[prost(uint64, tag = "5")]
    pub clock: u64,
}

/// The open checkpoint of a job is whole, or will never be.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)]
pub struct EndCheckpoint {
    #[prost(uint64, tag = "1")]
    pub job: u64,
    #[prost(string, tag = "2")]
    pub checkpoint: String,
    /// Empty: it is whole.
    #[prost(string, tag = "3")]
    pub error: String,
    #[prost(uint64, tag = "4")]
    pub ended_ms: u64,
}

/// A job begins with what a manifest says.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)]
pub struct RestoreJob {
    #[prost(message, optional, tag = "1")]
    pub spec: Option<v1::JobSpec>,
    #[prost(message, repeated, tag = "2")]
    pub variables: Vec<v1::Variable>,
    #[prost(uint32, repeated, tag = "3")]
    pub initialized: Vec<u32>,
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
    /// Sessions up to here have ended.
    #[prost(uint64, tag = "5")]
    pub high_water: u64,
    #[prost(message, optional, tag = "6")]
    pub order: Option<v1::RestoreOrder>,
    #[prost(bool, tag = "7")]
    pub replace: bool,
    /// See [`v1::RestoreJobRequest`].
    #[prost(uint64, tag = "8")]
    pub if_version: u64,
    #[prost(message, optional, tag = "60")]
    pub ledger: Option<v1::LedgerRecord>,
    #[prost(message, optional, tag = "110")]
    pub consistency: Option<v1::Consistency>,
}

/// Lost shards of a job go on from a checkpoint.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)]
pub struct SetBackShards {
    #[prost(uint64, tag = "1")]
    pub job: u64,
    #[prost(string, tag = "2")]
    pub uri: String,
    /// Name of the job that the checkpoint is of.
    #[prost(string, tag = "3")]
    pub of: String,
    #[prost(string, tag = "4")]
    pub checkpoint: String,
    /// Epochs below this one are in the checkpoint.
    #[prost(uint64, tag = "5")]
    pub epoch_min: u64,
    #[prost(message, repeated, tag = "6")]
    pub shards: Vec<AgainEntry>,
    #[prost(btree_map = "string, string", tag = "7")]
    pub labels: BTreeMap<String, String>,
    #[prost(uint32, repeated, tag = "8")]
    pub initialized: Vec<u32>,
    #[prost(message, optional, tag = "60")]
    pub ledger: Option<v1::LedgerRecord>,
}

/// See [`Again`].
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)]
pub struct AgainEntry {
    #[prost(uint32, tag = "1")]
    pub shard: u32,
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    #[prost(message, optional, tag = "3")]
    pub server: Option<v1::ServerRef>,
    #[prost(uint64, tag = "4")]
    pub judged: u64,
}

impl From<Again> for AgainEntry {
    fn from(again: Again) -> Self {
        let Again { shard, epoch, server, judged } = again;
        AgainEntry { shard: shard.0, epoch: epoch.0, server: Some(server.into()), judged }
    }
}

impl TryFrom<AgainEntry> for Again {
    type Error = Invalid;

    fn try_from(entry: AgainEntry) -> Result<Self, Invalid> {
        let server = convert::server("server", entry.server)?;
        let (shard, epoch) = (ShardId(entry.shard), Epoch(entry.epoch));
        Ok(Again { shard, epoch, server, judged: entry.judged })
    }
}

impl Body {
    /// As it goes into the log, proposed at this wall time.
    ///
    /// # Errors
    /// It is not a valid command, or larger than the log takes.
    pub fn to_log(self, at_ms: u64) -> Result<Vec<u8>, Invalid> {
        if let Body::DefineVariables(request) = &self {
            check_range("variables", request.variables.len() as u64, 0, VARIABLES_MAX)?;
        }
        let logged = Logged { body: Some(self), at_ms };
        let bytes = logged.encoded_len();
        if bytes > COMMAND_BYTES_MAX {
            let problem = format!("has {bytes} bytes; send at most {COMMAND_BYTES_MAX}");
            return Err(Invalid::new("request", problem));
        }
        let bytes = logged.encode_to_vec();
        Command::try_from(logged)?;
        Ok(bytes)
    }
}

/// A command whose fields are within their bounds.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// A server announces a new life.
    RegisterServer(Registration),
    /// A primary changes the in-sync set of its shard.
    ChangeInSync(InSyncChange),
    /// A job begins.
    CreateJob(JobSpec),
    /// A job and all it holds is forgotten, if its view is of this version.
    DeleteJob(JobId, Option<u64>),
    /// A session defines variables.
    DefineVariables(JobId, SessionId, Vec<VariableSpec>),
    /// A session has pushed the first values of these.
    MarkInitialized(JobId, SessionId, Vec<VariableId>),
    /// A label changes.
    LabelJob(JobId, LabelChange),
    /// A client becomes a member of a job.
    OpenSession(JobId, Opening),
    /// Sessions that ended or were not renewed.
    CloseSessions(Vec<(JobId, SessionId)>),
    /// Lives that were silent for too long.
    JudgeDead(Vec<ServerRef>),
    /// A life that was judged dead and is heard again while it still holds what nobody else has.
    Revive(ServerRef),
    /// Shards that lack a member are to get one.
    PlanJoins(Vec<Join>),
    /// Copies move, or primaries change.
    Place(Vec<Placement>),
    /// A server is opened, cordoned or drained.
    Admit(NodeId, Admission),
    /// A server that is gone is forgotten.
    RemoveNode(NodeId),
    /// The others in its set are heard, but not by the primary.
    ReplacePrimary(InSyncChange),
    /// Primaries are to write what they hold.
    BeginCheckpoint(CheckpointStart),
    /// They wrote it.
    ShardsSaved(JobId, String, Vec<v1::ShardSaved>),
    /// A checkpoint is whole, or was given up.
    EndCheckpoint(CheckpointEnd),
    /// When checkpoints begin by themselves.
    ScheduleCheckpoints(JobId, v1::CheckpointSchedule),
    /// A job begins from a checkpoint.
    RestoreJob(Restoring),
    /// Lost shards go on from one.
    SetBack(SettingBack),
    /// A member of the coordinators that was added at this address begins, with a data directory of this birth.
    BeginMember(String, u64),
    /// Workers of a job hold, or go on.
    PauseJob(JobId, bool),
    /// An operator closes a session.
    EvictSession(JobId, SessionId),
    /// A worker says what it is to train.
    DefineLedger(JobId, SessionId, Plan),
    /// What it did of the ledger of this generation, and wants.
    AdvanceLedger(JobId, SessionId, u64, Advance),
    /// The workers of a job may drift apart as far as this.
    SetConsistency(JobId, ConsistencyChange),
    /// Checkpoints are to be deleted, if nothing needs them.
    Condemn(Checkpoints),
    /// One is about to be read, to make a job of it.
    Pin(Filed),
    /// These are deleted.
    Forget(Checkpoints),
}

/// See [`v1::SetConsistencyRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsistencyChange {
    /// Everything.
    All(Consistency),
    /// One variable.
    Variable(VariableId, Mode),
}

/// See [`BeginCheckpoint`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CheckpointStart {
    pub job: JobId,
    pub order: CheckpointOrder,
    pub created_ms: u64,
    pub chain: Vec<String>,
    pub clock: u64,
}

/// See [`EndCheckpoint`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CheckpointEnd {
    pub job: JobId,
    pub checkpoint: String,
    pub error: String,
    pub ended_ms: u64,
}

/// See [`RestoreJob`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Restoring {
    pub spec: JobSpec,
    pub variables: Vec<Variable>,
    pub initialized: Vec<VariableId>,
    pub labels: BTreeMap<String, String>,
    pub high_water: u64,
    pub order: RestoreOrder,
    pub replace: bool,
    pub if_version: Option<u64>,
    pub ledger: Option<Ledger>,
    pub consistency: Consistency,
}

/// See [`v1::RegisterServerRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Registration {
    pub name: String,
    pub address: String,
    pub zone: String,
    pub request_id: String,
    pub origin: String,
    pub exclusive_name: bool,
    pub isolation_ms: u64,
    pub lease_ms: u64,
}

/// See [`v1::ChangeInSyncRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct InSyncChange {
    pub job: JobId,
    pub shard: ShardId,
    pub epoch: Epoch,
    pub set_version: u64,
    pub primary: ServerRef,
    pub add: Vec<ServerRef>,
    pub remove: Vec<ServerRef>,
}

/// See [`v1::LabelJobRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct LabelChange {
    pub key: String,
    pub value: String,
    pub expected: Option<String>,
}

/// See [`v1::OpenSessionRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Opening {
    pub name: String,
    pub kind: v1::SessionKind,
    pub request_id: String,
}

impl Command {
    /// Reads a command from the log, and the wall time at which it was proposed.
    ///
    /// # Errors
    /// The bytes are not what [`Body::to_log`] writes.
    pub fn decode(bytes: &[u8]) -> Result<(Command, u64), Invalid> {
        let logged = Logged::decode(bytes);
        let logged = logged.map_err(|error| Invalid::new("command", error.to_string()))?;
        let at_ms = logged.at_ms;
        Ok((logged.try_into()?, at_ms))
    }
}

impl TryFrom<Logged> for Command {
    type Error = Invalid;

    fn try_from(logged: Logged) -> Result<Command, Invalid> {
        logged.body.ok_or_else(|| Invalid::new("command", "is of an unknown kind"))?.try_into()
    }
}

impl TryFrom<Body> for Command {
    type Error = Invalid;

    fn try_from(body: Body) -> Result<Command, Invalid> {
        Ok(match body {
            Body::RegisterServer(request) => Command::RegisterServer(request.try_into()?),
            Body::ChangeInSync(request) => Command::ChangeInSync(request.try_into()?),
            Body::CreateJob(request) => {
                let spec = request.spec.ok_or_else(|| Invalid::new("spec", "is not given"))?;
                Command::CreateJob(spec.try_into()?)
            }
            Body::DeleteJob(request) => {
                Command::DeleteJob(job(request.job)?, given(request.if_version))
            }
            Body::DefineVariables(request) => {
                let variables = request.variables.into_iter().map(TryInto::try_into);
                Command::DefineVariables(
                    job(request.job)?,
                    session(request.session)?,
                    variables.collect::<Result<_, _>>()?,
                )
            }
            Body::MarkInitialized(request) => Command::MarkInitialized(
                job(request.job)?,
                session(request.session)?,
                request.variables.into_iter().map(VariableId).collect(),
            ),
            Body::LabelJob(request) => {
                let id = job(request.job)?;
                check_name("key", &request.key)?;
                bounded("value", &request.value, LABEL_VALUE_BYTES_MAX)?;
                let v1::LabelJobRequest { key, value, expected, .. } = request;
                Command::LabelJob(id, LabelChange { key, value, expected })
            }
            Body::OpenSession(request) => {
                let (id, kind) = (job(request.job)?, request.kind());
                if kind == v1::SessionKind::Unspecified {
                    return Err(Invalid::new("kind", "is not given or not known"));
                }
                bounded("name", &request.name, TEXT_BYTES_MAX)?;
                let request_id = request_id(request.request_id)?;
                Command::OpenSession(id, Opening { name: request.name, kind, request_id })
            }
            Body::CloseSessions(list) => {
                let sessions = list.sessions.into_iter();
                let checked = sessions.map(|one| Ok((job(one.job)?, session(one.session)?)));
                Command::CloseSessions(checked.collect::<Result<_, Invalid>>()?)
            }
            Body::JudgeDead(list) => Command::JudgeDead(servers(list.servers)?),
            Body::Revive(server) => Command::Revive(server.try_into()?),
            Body::ReplacePrimary(request) => Command::ReplacePrimary(request.try_into()?),
            Body::PlanJoins(list) => {
                let joins = list.joins.into_iter().map(Join::try_from);
                Command::PlanJoins(joins.collect::<Result<_, _>>()?)
            }
            Body::Place(request) => {
                let count = request.placements.len() as u64;
                check_range("placements", count, 0, PLACEMENTS_MAX)?;
                let placements = request.placements.into_iter().map(Placement::try_from);
                Command::Place(placements.collect::<Result<_, _>>()?)
            }
            Body::Admit(request) => {
                let unknown = |_| Invalid::new("admission", "is not known");
                let admission = v1::Admission::try_from(request.admission).map_err(unknown)?;
                Command::Admit(node(request.node)?, admission.into())
            }
            Body::RemoveNode(request) => Command::RemoveNode(node(request.node)?),
            Body::BeginCheckpoint(begin) => Command::BeginCheckpoint(begin.try_into()?),
            Body::ShardsSaved(report) => {
                let job = job(report.job)?;
                check_checkpoint(&report.checkpoint)?;
                Command::ShardsSaved(job, report.checkpoint, report.saved)
            }
            Body::EndCheckpoint(end) => {
                let EndCheckpoint { job: id, checkpoint, error, ended_ms } = end;
                check_checkpoint(&checkpoint)?;
                bounded("error", &error, ERROR_BYTES_MAX)?;
                Command::EndCheckpoint(CheckpointEnd { job: job(id)?, checkpoint, error, ended_ms })
            }
            Body::ScheduleCheckpoints(request) => {
                let job = job(request.job)?;
                let schedule = request.schedule.unwrap_or_default();
                if schedule.every_ms > 0 {
                    check_range("schedule.every_ms", schedule.every_ms, 1000, u64::MAX)?;
                }
                if schedule.every_ms > 0 || schedule.every_steps > 0 {
                    check_uri(&schedule.uri)?;
                    check_range(
                        "schedule.full_every",
                        schedule.full_every.into(),
                        0,
                        CHAIN_MAX as u64,
                    )?;
                }
                Command::ScheduleCheckpoints(job, schedule)
            }
            Body::RestoreJob(restore) => Command::RestoreJob(restore.try_into()?),
            Body::SetBack(setting) => Command::SetBack(setting.try_into()?),
            Body::BeginMember(v1::JoinRequest { address, birth, .. }) => {
                check_address("address", &address)?;
                check_range("birth", birth, 1, u64::MAX)?;
                Command::BeginMember(address, birth)
            }
            Body::PauseJob(request) => Command::PauseJob(job(request.job)?, request.paused),
            Body::EvictSession(request) => {
                Command::EvictSession(job(request.job)?, session(request.session)?)
            }
            Body::DefineLedger(request) => {
                let v1::DefineLedgerRequest { job: id, session: one, plan } = request;
                let plan = plan.ok_or_else(|| Invalid::new("plan", "is not given"))?.try_into()?;
                Command::DefineLedger(job(id)?, session(one)?, plan)
            }
            Body::AdvanceLedger(request) => {
                let (id, one) = (job(request.job)?, session(request.session)?);
                Command::AdvanceLedger(id, one, request.generation, request.try_into()?)
            }
            Body::SetConsistency(request) => {
                use v1::set_consistency_request::Change;
                let id = job(request.job)?;
                let missing = || Invalid::new("change", "is not given");
                let change = match request.change.ok_or_else(missing)? {
                    Change::All(all) => {
                        let count = all.variables.len() as u64;
                        check_range("all.variables", count, 0, VARIABLES_MAX)?;
                        ConsistencyChange::All(all.try_into()?)
                    }
                    Change::Variable(of) => {
                        let (variable, mode) = clock::variable_mode(of)?;
                        ConsistencyChange::Variable(variable, mode)
                    }
                };
                Command::SetConsistency(id, change)
            }
            Body::Condemn(list) => Command::Condemn(list.try_into()?),
            Body::Pin(list) => match Checkpoints::try_from(list)?.pop() {
                Some((filed, _)) => Command::Pin(filed),
                None => return Err(Invalid::new("checkpoints", "is not given")),
            },
            Body::Forget(list) => Command::Forget(list.try_into()?),
        })
    }
}

impl From<Placement> for v1::ShardPlacement {
    fn from(placement: Placement) -> Self {
        use v1::shard_placement::Placing as Wire;
        let Placement { job, shard, epoch, set_version, placing, reason } = placement;
        v1::ShardPlacement {
            job: job.0,
            shard: shard.0,
            epoch: epoch.0,
            set_version,
            reason,
            placing: Some(match placing {
                Placing::Move(moving) => Wire::Move(moving.into()),
                Placing::Promote(to) => Wire::Promote(to.into()),
                Placing::Cancel => Wire::Cancel(true),
            }),
        }
    }
}

impl TryFrom<v1::ShardPlacement> for Placement {
    type Error = Invalid;

    fn try_from(placement: v1::ShardPlacement) -> Result<Self, Invalid> {
        use v1::shard_placement::Placing as Wire;
        let v1::ShardPlacement { job: id, shard, epoch, set_version, reason, placing } = placement;
        check_range("epoch", epoch, 1, u64::MAX)?;
        check_range("set_version", set_version, 1, u64::MAX)?;
        bounded("reason", &reason, TEXT_BYTES_MAX)?;
        let missing = || Invalid::new("placing", "is not given");
        Ok(Placement {
            job: job(id)?,
            shard: ShardId(shard),
            epoch: Epoch(epoch),
            set_version,
            reason,
            placing: match placing.ok_or_else(missing)? {
                Wire::Move(moving) => Placing::Move(moving.try_into()?),
                Wire::Promote(to) => Placing::Promote(to.try_into()?),
                Wire::Cancel(true) => Placing::Cancel,
                Wire::Cancel(false) => return Err(missing()),
            },
        })
    }
}

fn node(node: u32) -> Result<NodeId, Invalid> {
    if node == 0 { Err(Invalid::new("node", "is not given")) } else { Ok(NodeId(node)) }
}

impl TryFrom<BeginCheckpoint> for CheckpointStart {
    type Error = Invalid;

    fn try_from(begin: BeginCheckpoint) -> Result<Self, Invalid> {
        let BeginCheckpoint { job: id, order, created_ms, chain, clock } = begin;
        let order: CheckpointOrder =
            order.ok_or_else(|| Invalid::new("order", "is not given"))?.into();
        check_uri(&order.uri)?;
        check_checkpoint(&order.checkpoint)?;
        check_range("chain", chain.len() as u64, 0, CHAIN_MAX as u64)?;
        chain.iter().try_for_each(|name| check_checkpoint(name))?;
        Ok(CheckpointStart { job: job(id)?, order, created_ms, chain, clock })
    }
}

impl TryFrom<RestoreJob> for Restoring {
    type Error = Invalid;

    fn try_from(restore: RestoreJob) -> Result<Self, Invalid> {
        let missing = |field| move || Invalid::new(field, "is not given");
        let RestoreJob {
            spec,
            variables,
            initialized,
            labels,
            high_water,
            order,
            replace,
            if_version,
            ledger,
            consistency,
        } = restore;
        let order: RestoreOrder = order.ok_or_else(missing("order"))?.into();
        check_uri(&order.uri)?;
        check_name("order.job", &order.job)?;
        check_checkpoint(&order.checkpoint)?;
        check_range("order.epoch", order.epoch.0, 1, Lsn::EPOCH_MAX.0)?;
        let variables = variables.into_iter().map(Variable::try_from);
        let variables = variables.collect::<Result<Vec<_>, _>>()?;
        for (variable, id) in variables.iter().zip(1..) {
            check_range("variables.id", variable.id.0.into(), id, id)?;
        }
        Ok(Restoring {
            spec: spec.ok_or_else(missing("spec"))?.try_into()?,
            variables,
            initialized: initialized.into_iter().map(VariableId).collect(),
            labels,
            high_water,
            order,
            replace,
            if_version: given(if_version),
            ledger: ledger.map(Ledger::try_from).transpose()?,
            consistency: consistency.unwrap_or_default().try_into()?,
        })
    }
}

impl TryFrom<SetBackShards> for SettingBack {
    type Error = Invalid;

    fn try_from(setting: SetBackShards) -> Result<Self, Invalid> {
        let SetBackShards {
            job: id,
            uri,
            of,
            checkpoint,
            epoch_min,
            shards,
            labels,
            initialized,
            ledger,
        } = setting;
        check_uri(&uri)?;
        check_name("of", &of)?;
        check_checkpoint(&checkpoint)?;
        check_range("epoch_min", epoch_min, 1, Lsn::EPOCH_MAX.0)?;
        let shards = shards.into_iter().map(Again::try_from).collect::<Result<_, _>>()?;
        let from = SetBack { uri, job: of, checkpoint, shards: BTreeMap::new() };
        let initialized = initialized.into_iter().map(VariableId).collect();
        let (job, epoch_min) = (job(id)?, Epoch(epoch_min));
        let ledger = ledger.map(Ledger::try_from).transpose()?;
        Ok(SettingBack { job, from, epoch_min, shards, labels, initialized, ledger })
    }
}

impl TryFrom<v1::RegisterServerRequest> for Registration {
    type Error = Invalid;

    fn try_from(request: v1::RegisterServerRequest) -> Result<Self, Invalid> {
        check_name("name", &request.name)?;
        check_address("address", &request.address)?;
        bounded("zone", &request.zone, TEXT_BYTES_MAX)?;
        bounded("origin", &request.origin, TEXT_BYTES_MAX)?;
        Ok(Registration {
            name: request.name,
            address: request.address,
            zone: request.zone,
            request_id: request_id(request.request_id)?,
            origin: request.origin,
            exclusive_name: request.exclusive_name,
            isolation_ms: request.isolation_ms,
            lease_ms: request.lease_ms,
        })
    }
}

impl TryFrom<v1::ChangeInSyncRequest> for InSyncChange {
    type Error = Invalid;

    fn try_from(request: v1::ChangeInSyncRequest) -> Result<Self, Invalid> {
        check_range("epoch", request.epoch, 1, u64::MAX)?;
        check_range("set_version", request.set_version, 1, u64::MAX)?;
        Ok(InSyncChange {
            job: job(request.job)?,
            shard: ShardId(request.shard),
            epoch: Epoch(request.epoch),
            set_version: request.set_version,
            primary: convert::server("primary", request.primary)?,
            add: servers(request.add)?,
            remove: servers(request.remove)?,
        })
    }
}

/// The number of a job that a request must name.
///
/// # Errors
/// It is not given.
pub fn job(job: u64) -> Result<JobId, Invalid> {
    if job == 0 { Err(Invalid::new("job", "is not given")) } else { Ok(JobId(job)) }
}

/// The number of a session that a request must name.
///
/// # Errors
/// It is not given.
pub fn session(session: u64) -> Result<SessionId, Invalid> {
    if session == 0 {
        return Err(Invalid::new("session", "is not given"));
    }
    Ok(SessionId(session))
}

/// A number that 0 stands for the absence of.
fn given(number: u64) -> Option<u64> {
    Some(number).filter(|&number| number > 0)
}

fn servers(servers: Vec<v1::ServerRef>) -> Result<Vec<ServerRef>, Invalid> {
    servers.into_iter().map(ServerRef::try_from).collect()
}

/// That it is host:port.
///
/// # Errors
/// It is not.
pub fn check_address(field: &'static str, address: &str) -> Result<(), Invalid> {
    bounded(field, address, TEXT_BYTES_MAX)?;
    let known = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if known { Ok(()) } else { Err(Invalid::new(field, format!("{address:?} is not host:port"))) }
}

fn bounded(field: &'static str, text: &str, bytes_max: usize) -> Result<(), Invalid> {
    if text.len() > bytes_max {
        let problem = format!("has {} bytes, more than {bytes_max}", text.len());
        return Err(Invalid::new(field, problem));
    }
    Ok(())
}

fn check_checkpoint(name: &str) -> Result<(), Invalid> {
    let checked = CheckpointName::new(name);
    checked.map(|_| ()).map_err(|bad| Invalid::new("checkpoint", bad.problem))
}

/// That a place is named at all; whether it can be reached shows where it is used.
fn check_uri(uri: &str) -> Result<(), Invalid> {
    bounded("uri", uri, URI_BYTES_MAX)?;
    if uri.starts_with("file:///") || uri.starts_with("s3://") {
        return Ok(());
    }
    Err(Invalid::new("uri", format!("{uri:?} is neither file:///folder nor s3://bucket/prefix")))
}

pub(crate) fn request_id(id: String) -> Result<String, Invalid> {
    if id.is_empty() || id.len() > REQUEST_ID_BYTES_MAX {
        let problem = format!("must have 1 to {REQUEST_ID_BYTES_MAX} bytes");
        return Err(Invalid::new("request_id", problem));
    }
    Ok(id)
}

#[cfg(test)]
mod tests;
