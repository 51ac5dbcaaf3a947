//! The one owner of Raft, its log and the replicated state.
//!
//! A loop: take every input that waits, then do what Raft says must be done now, in this order: persist, send, apply, answer. So all that
//! arrived together shares one barrier of the disk. The price: a slow disk or a large snapshot delays ticks too, which is why
//! the driver has a thread of its own (`run` blocks it) and elections take ten ticks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use downpour_core::planted::{Bug, planted};
use raft::eraftpb::{Entry, EntryType, HardState, Message, MessageType};
use raft::{Config, RawNode, ReadOnlyOption, SnapshotStatus, StateRole};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use super::handle::{Error, Handle, Input, Member, Status};
use super::joining::{Joining, Standing, Told};
use super::log::{self, Disk, Log};
use super::pending::{Proposals, Reads};
use super::tracing_drain;
use crate::command::Command;
use crate::metrics::RaftMetrics;
use crate::state::{Cluster, Refused, State};

/// Inputs that wait for the driver. When it is full, callers wait and peers' streams are not read.
const INPUTS_MAX: usize = 4096;
/// Most inputs that are taken before Raft's work is done.
const BATCH_MAX: usize = 1024;
const MESSAGE_BYTES: u64 = 1 << 20;
const MESSAGES_IN_FLIGHT_MAX: usize = 64;
const UNCOMMITTED_BYTES_MAX: u64 = 32 << 20;
const COMMITTED_BYTES_MAX: u64 = 8 << 20;
/// A member that lost its lead waits this long for the fate of what it proposed.
const ELECTIONS_UNTIL_UNKNOWN: usize = 4;
/// A member that was away missed fewer elections than that.
const TERMS_MAX: u64 = 1 << 40;
/// Longest wait for another member to take over when this one leaves.
const LEAVE_TICKS_MAX: u32 = 20;

/// Why a member cannot go on.
#[derive(Debug, Error)]
pub enum Fatal {
    /// It cannot keep its promises.
    #[error(transparent)]
    Log(#[from] log::Error),
    /// Its options or its log are not what Raft takes.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
    /// A committed entry or a snapshot is not what a coordinator writes; perhaps a newer version wrote it.
    #[error("{what} cannot be read: {problem}")]
    Unreadable {
        /// Which entry or snapshot.
        what: String,
        /// Why.
        problem: String,
    },
    /// The leader knows that this member had more than it has.
    #[error(
        "this member once had the log up to {had} and now has it up to {has}: its data directory was lost or is an old copy, \
         and it must not vote with what it forgot"
    )]
    Amnesia {
        /// What it had acknowledged.
        had: u64,
        /// What it has.
        has: u64,
    },
    /// Its data directory is new, and there is no way back for it.
    #[error("{0}")]
    Expelled(String),
}

/// Settings of a member.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its number.
    pub id: u64,
    /// Raft's unit of time.
    pub tick: Duration,
    /// Ticks without a leader before an election; drawn anew from `election..2 * election`.
    pub election_ticks: usize,
    /// Ticks between the leader's heartbeats.
    pub heartbeat_ticks: usize,
    /// Entries after which a snapshot is taken.
    pub compact_entries: u64,
    /// Bytes of entries after which a snapshot is taken.
    pub compact_bytes: u64,
    /// Entries before a snapshot that are kept for members that lag.
    pub keep_entries: u64,
    /// host:port of those that founded the group: where they are until the group is changed.
    pub founders: BTreeMap<u64, String>,
}

/// Carries messages to other members.
pub trait Outbox: Send + 'static {
    /// Queues a message. False: it was dropped, and Raft is to count the member as unreachable.
    fn send(&mut self, message: Message) -> bool;
}

/// See the module.
pub struct Driver<D: Disk, O> {
    pub(super) options: Options,
    pub(super) node: RawNode<Log<D>>,
    pub(super) state: State,
    applied: u64,
    pub(super) outbox: O,
    inputs: mpsc::Receiver<Input>,
    pub(super) proposals: Proposals,
    reads: Reads,
    leaving: Option<(oneshot::Sender<()>, u32)>,
    pub(super) joining: Option<Joining>,
    /// Of the data directories of other members that were met.
    pub(super) births: BTreeMap<u64, u64>,
    /// The index at which this member counts as ready: what a leader had committed when it was asked.
    ready_at: Option<u64>,
    ticks_without_lead: usize,
    /// Since the start.
    pub(super) ticks: u64,
    /// Since this member leads; 0: it does not.
    pub(super) ticks_leading: u64,
    /// The tick at which something was last heard of each other member.
    pub(super) heard: BTreeMap<u64, u64>,
    /// The group changed: a snapshot must say so, for the one before has a group without who was added.
    pub(super) snapshot_due: bool,
    /// This member is none any more.
    pub(super) removed: bool,
    cluster: watch::Sender<Arc<Cluster>>,
    status: watch::Sender<Status>,
    metrics: RaftMetrics,
}

impl<D: Disk, O: Outbox> Driver<D, O> {
    /// A member with the state of its log, and the handle that asks it once it runs.
    ///
    /// # Errors
    /// The log's snapshot cannot be read, or the options are not what Raft takes.
    pub fn new(
        options: Options,
        log: Log<D>,
        outbox: O,
        metrics: RaftMetrics,
    ) -> Result<(Self, Handle), Fatal> {
        let snapshot = log.image().snapshot.as_ref();
        let state = snapshot.map_or(Ok(State::default()), |one| restore(&one.data))?;
        let applied = log.snapshot_index();
        let removed = state.cluster().members.was_removed(options.id);
        let joining = log.image().admission.joining.then(|| {
            let voters = log.image().identity.iter().flat_map(|identity| &identity.voters);
            Joining::new(voters.copied().filter(|&id| id != options.id))
        });
        let config = Config {
            id: options.id,
            election_tick: options.election_ticks,
            heartbeat_tick: options.heartbeat_ticks,
            applied,
            max_size_per_msg: MESSAGE_BYTES,
            max_inflight_msgs: MESSAGES_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_MAX,
            ..Config::default()
        };
        #[cfg(downpour_sim)]
        let config = pinned(config);
        let node = RawNode::new(&config, log, &tracing_drain::logger())?;
        let (input, inputs) = mpsc::channel(INPUTS_MAX);
        let (cluster, cluster_seen) = watch::channel(Arc::new(state.cluster().clone()));
        let (status, status_seen) = watch::channel(Status { id: options.id, ..Status::default() });
        let handle = Handle { inputs: input, cluster: cluster_seen, status: status_seen };
        let driver = Driver {
            options,
            node,
            state,
            applied,
            outbox,
            inputs,
            proposals: Proposals::default(),
            reads: Reads::default(),
            leaving: None,
            joining,
            births: BTreeMap::new(),
            ready_at: None,
            ticks_without_lead: 0,
            ticks: 0,
            ticks_leading: 0,
            heard: BTreeMap::new(),
            snapshot_due: false,
            removed,
            cluster,
            status,
            metrics,
        };
        Ok((driver, handle))
    }

    /// Runs until it is told to leave, is removed from the group, or every handle is gone.
    ///
    /// # Errors
    /// See [`Fatal`]. Nothing was promised that is not on the disk.
    pub async fn run(mut self) -> Result<(), Fatal> {
        let mut ticks = tokio::time::interval(self.options.tick);
        // After a pause, catching up on ticks would only start an election that nobody needs.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH_MAX);
        self.publish();
        while !self.removed {
            tokio::select! {
                _ = ticks.tick() => {
                    if !self.tick() {
                        return Ok(());
                    }
                    self.promote();
                }
                count = self.inputs.recv_many(&mut batch, BATCH_MAX) => {
                    if count == 0 {
                        return Ok(());
                    }
                    for input in batch.drain(..) {
                        self.take(input)?;
                    }
                }
            }
            self.begin_reads();
            while self.node.has_ready() {
                self.process_ready()?;
                self.begin_reads();
            }
            self.admit()?;
            self.publish();
        }
        warn!(
            "this member was removed from the group: it stops, and its data directory is of no use any more"
        );
        Ok(())
    }

    /// False: this member has left.
    fn tick(&mut self) -> bool {
        self.ticks += 1;
        // Time is what makes a member campaign.
        if self.joining.is_none() {
            self.node.tick();
        }
        self.proposals.prune();
        self.reads.prune();
        if self.ready_at.is_none() && self.leader().is_some() {
            self.node.read_index(self.readiness_context());
        }
        self.ask_for_news();
        self.ticks_without_lead += 1;
        self.ticks_leading += 1;
        if self.node.raft.state == StateRole::Leader {
            self.ticks_without_lead = 0;
        } else {
            self.ticks_leading = 0;
        }
        if self.ticks_without_lead == ELECTIONS_UNTIL_UNKNOWN * self.options.election_ticks {
            self.proposals.abandon();
        }
        let Some((reply, ticks_left)) = self.leaving.take() else { return true };
        if self.node.raft.state != StateRole::Leader || ticks_left == 0 {
            let _ = reply.send(());
            return false;
        }
        self.leaving = Some((reply, ticks_left - 1));
        true
    }

    fn take(&mut self, input: Input) -> Result<(), Fatal> {
        match input {
            Input::Peer(message, birth) => {
                if let Some(problem) = self.forgot(message.from) {
                    return Err(Fatal::Expelled(problem));
                }
                if self.known_birth(message.from).is_none_or(|known| known == birth) {
                    // Whoever is not known (yet) is listened to, and not remembered: there may be any number of such.
                    if self.node.raft.prs().get(message.from).is_some() {
                        self.heard.insert(message.from, self.ticks);
                    }
                    self.step(*message)?;
                }
            }
            Input::Meet(member, birth, reply) => self.meet(member, birth, reply),
            Input::Met(member, told) => {
                if let Some(joining) = &mut self.joining {
                    info!(member, told.term, told.commit, "met a member");
                    joining.met(member, told);
                }
            }
            Input::Unreachable(member) => self.node.report_unreachable(member),
            Input::SnapshotSent(member) => {
                self.node.report_snapshot(member, SnapshotStatus::Finish);
            }
            Input::Propose(command, reply) => match self.append(command) {
                Ok((index, term)) => self.proposals.add(index, term, reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Input::Read(reply) => self.reads.add(reply),
            Input::ChangeMembers(wish, reply) => self.change_members(wish, reply),
            Input::Transfer { from, to, reply } => {
                let _ = reply.send(self.transfer(from, to));
            }
            Input::Removed => self.removed = true,
            Input::Expelled(problem) => {
                if self.joining.is_some() {
                    return Err(Fatal::Expelled(problem));
                }
            }
            Input::Leave(reply) => self.leave(reply),
        }
        Ok(())
    }

    /// What this member counted on the other's having may be gone with its former data directory.
    fn meet(&mut self, member: u64, birth: u64, reply: oneshot::Sender<Result<Told, Error>>) {
        if let Some(problem) = self.no_way_back(member, birth) {
            let _ = reply.send(Err(problem));
            return;
        }
        if self.node.raft.prs().get(member).is_none() {
            let problem =
                format!("member {member} is not in the group of member {}", self.options.id);
            let _ = reply.send(Err(Error::Refused(Refused::FailedPrecondition(problem))));
            return;
        }
        if self.births.insert(member, birth) != Some(birth)
            && let Some(progress) = self.node.raft.mut_prs().get_mut(member)
        {
            progress.matched = 0;
            progress.become_probe();
        }
        let raft = &self.node.raft;
        let _ = reply.send(Ok(Told { term: raft.term, commit: raft.raft_log.committed }));
    }

    /// Ends the silence of a member that has all that it may have promised before.
    fn admit(&mut self) -> Result<(), Fatal> {
        let Some(joining) = &self.joining else { return Ok(()) };
        let raft = &self.node.raft;
        let commit = raft.raft_log.committed;
        let standing = Standing {
            term: raft.term,
            follows: raft.leader_id != 0,
            commit,
            commit_term: raft.raft_log.term(commit)?,
        };
        if !joining.is_over(standing) {
            return Ok(());
        }
        let me = self.options.id;
        let (term, founding) = (raft.term, raft.term == 0);
        // It may have voted in this term.
        let vote = if founding { 0 } else { me };
        self.node.mut_store().admit(HardState { term, vote, commit, ..HardState::default() })?;
        self.node.raft.vote = vote;
        self.joining = None;
        if founding {
            info!("no member has a history: founding the cluster");
        } else {
            info!(term, commit, "caught up: this member votes from now on");
        }
        Ok(())
    }

    fn step(&mut self, mut message: Message) -> Result<(), Fatal> {
        let raft = &self.node.raft;
        // Raft counts on from there.
        if message.term.saturating_sub(raft.term) > TERMS_MAX {
            warn!(source = message.from, message.term, "ignored a term that no election comes to");
            return Ok(());
        }
        let has = raft.raft_log.last_index();
        if self.joining.is_some() {
            match message.get_msg_type() {
                MessageType::MsgRequestVote
                | MessageType::MsgRequestPreVote
                | MessageType::MsgTimeoutNow => return Ok(()),
                // The leader does not know yet what was forgotten.
                MessageType::MsgHeartbeat => message.commit = message.commit.min(has),
                _ => {}
            }
        }
        match message.get_msg_type() {
            // Members propose only where they lead: nobody forwards.
            MessageType::MsgPropose => return Ok(()),
            // A follower asks how far it must come to be ready; nobody passes that on.
            MessageType::MsgReadIndex if raft.state != StateRole::Leader => return Ok(()),
            // Raft panics on a commit beyond the log. Only the leader that this member follows is believed that it forgot something:
            // one stray message must not end a member.
            MessageType::MsgHeartbeat if message.term >= raft.term && message.commit > has => {
                let current = message.term == raft.term;
                if current && message.from == raft.leader_id {
                    return Err(Fatal::Amnesia { had: message.commit, has });
                }
                if !current || self.leader().is_some() {
                    let (source, commit) = (message.from, message.commit);
                    warn!(source, commit, has, "ignored a heartbeat that is not the leader's");
                    return Ok(());
                }
                // It may be the leader's: its next one tells.
                message.commit = 0;
            }
            MessageType::MsgAppend if !is_consecutive(&message) => {
                warn!(source = message.from, "ignored an append that no leader sends");
                return Ok(());
            }
            _ => {}
        }
        if let Err(error) = self.node.step(message) {
            debug!(%error, "raft ignored a message");
        }
        Ok(())
    }

    /// Appends a command where this member leads; gives its place.
    fn append(&mut self, command: Vec<u8>) -> Result<(u64, u64), Error> {
        if self.node.raft.state != StateRole::Leader {
            return Err(Error::NotLeader { leader: self.leader() });
        }
        // While leadership is handed over, and where too much is uncommitted, Raft drops proposals.
        if self.proposals.full() || self.node.propose(Vec::new(), command).is_err() {
            return Err(Error::Overloaded);
        }
        self.metrics.proposals.inc();
        Ok((self.node.raft.raft_log.last_index(), self.node.raft.term))
    }

    fn leave(&mut self, reply: oneshot::Sender<()>) {
        if self.node.raft.state == StateRole::Leader
            && let Some(id) = self.successor()
        {
            info!(member = id, "handing over leadership");
            self.node.transfer_leader(id);
            self.leaving = Some((reply, LEAVE_TICKS_MAX));
            return;
        }
        self.leaving = Some((reply, 0));
    }

    /// Raft drops a ReadIndex without a word before the leader has committed in its own term: reads are held until then.
    fn begin_reads(&mut self) {
        if self.node.raft.state != StateRole::Leader {
            self.reads.fail(self.leader());
        } else if self.node.raft.commit_to_current_term()
            && let Some(context) = self.reads.begin()
        {
            self.node.read_index(context.to_be_bytes().to_vec());
        }
    }

    /// Of the ReadIndex that says how far this member must come; the contexts of [`Reads`] are shorter.
    fn readiness_context(&self) -> Vec<u8> {
        [b"ready".as_slice(), &self.options.id.to_be_bytes()].concat()
    }

    fn process_ready(&mut self) -> Result<(), Fatal> {
        let mut ready = self.node.ready();
        // A leader's: they promise nothing of its own.
        self.send(ready.take_messages());
        let timer = ready.must_sync().then(|| self.metrics.persist_seconds.start_timer());
        let log = self.node.mut_store();
        if !ready.snapshot().is_empty() {
            log.install(ready.snapshot(), ready.hs())?;
        }
        if !ready.entries().is_empty() || ready.hs().is_some() {
            let sync = ready.must_sync() && !planted(Bug::SendBeforeDisk);
            log.persist(ready.entries(), ready.hs(), sync)?;
        }
        drop(timer);
        if !ready.snapshot().is_empty() {
            self.restore(log::position(ready.snapshot()).index)?;
        }
        self.send(ready.take_persisted_messages());
        for read in ready.take_read_states() {
            if let Ok(context) = read.request_ctx.as_slice().try_into() {
                self.reads.grant(u64::from_be_bytes(context), read.index);
            } else {
                self.ready_at.get_or_insert(read.index);
            }
        }
        self.apply(ready.take_committed_entries())?;
        let mut light = self.node.advance(ready);
        if let Some(commit) = light.commit_index() {
            self.node.mut_store().set_commit(commit)?;
        }
        self.send(light.take_messages());
        self.apply(light.take_committed_entries())?;
        self.node.advance_apply();
        self.compact()
    }

    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            let (target, kind) = (message.to, message.get_msg_type());
            if !self.outbox.send(message) {
                self.node.report_unreachable(target);
                if kind == MessageType::MsgSnapshot {
                    self.node.report_snapshot(target, SnapshotStatus::Failure);
                }
            }
        }
    }

    fn restore(&mut self, index: u64) -> Result<(), Fatal> {
        let image = self.node.store().image();
        let snapshot = image.snapshot.as_ref().expect("was just installed");
        self.state = restore(&snapshot.data)?;
        self.applied = index;
        self.proposals.skipped(index);
        info!(index, "took the leader's snapshot");
        self.cluster.send_replace(Arc::new(self.state.cluster().clone()));
        Ok(())
    }

    /// Publishes before it answers: whoever was answered finds the change in the published state.
    fn apply(&mut self, entries: Vec<Entry>) -> Result<(), Fatal> {
        if entries.is_empty() {
            self.reads.answer(self.applied);
            return Ok(());
        }
        let mut outcomes = Vec::with_capacity(entries.len());
        for entry in entries {
            let unreadable = |problem: String| {
                let what = format!("entry {}", entry.index);
                Fatal::Unreadable { what, problem }
            };
            self.applied = entry.index;
            match entry.get_entry_type() {
                EntryType::EntryNormal => {}
                EntryType::EntryConfChange => {
                    let outcome = self.apply_change(&entry)?.map_err(unreadable)?;
                    outcomes.push((entry.index, entry.term, Some(outcome)));
                    continue;
                }
                EntryType::EntryConfChangeV2 => {
                    return Err(unreadable("it changes several members at once".into()));
                }
            }
            if entry.data.is_empty() {
                // A new leader's first entry.
                self.state.skip(entry.index);
                outcomes.push((entry.index, entry.term, None));
                continue;
            }
            let (command, at_ms) =
                Command::decode(&entry.data).map_err(|error| unreadable(error.to_string()))?;
            debug!(index = entry.index, ?command, "apply");
            self.state.tell_time(at_ms);
            let outcome = self.state.apply(entry.index, command);
            outcomes.push((entry.index, entry.term, Some(outcome)));
        }
        self.cluster.send_replace(Arc::new(self.state.cluster().clone()));
        for (index, term, outcome) in outcomes {
            self.proposals.applied(index, term, outcome);
        }
        self.reads.answer(self.applied);
        Ok(())
    }

    fn compact(&mut self) -> Result<(), Fatal> {
        let Options { compact_entries, compact_bytes, keep_entries, .. } = self.options;
        let (index, log) = (self.applied, self.node.store());
        let since = index - log.snapshot_index();
        let large = log.entries_bytes() > compact_bytes;
        let due = since >= compact_entries || large || self.snapshot_due;
        if since == 0 || !due {
            return Ok(());
        }
        self.snapshot_due = false;
        // Entries that are kept for others must not bring the next snapshot about.
        let keep = if large { 0 } else { keep_entries };
        let data = self.state.snapshot();
        info!(index, bytes = data.len(), "taking a snapshot");
        self.node.mut_store().compact(index, data, keep)?;
        self.metrics.snapshots.inc();
        Ok(())
    }

    pub(super) fn leader(&self) -> Option<u64> {
        Some(self.node.raft.leader_id).filter(|&id| id != 0)
    }

    fn publish(&mut self) {
        let raft = &self.node.raft;
        let (leader, commit) = (self.leader(), raft.raft_log.committed);
        let standing = self.standing();
        let mut members: Vec<Member> = (raft.prs().iter())
            .map(|(&id, progress)| Member {
                id,
                matched: progress.matched,
                learner: standing.learners.contains(&id),
                heard: standing.heard.contains(&id),
            })
            .collect();
        members.sort_unstable_by_key(|member| member.id);
        let status = Status {
            id: self.options.id,
            term: raft.term,
            leader,
            commit,
            applied: self.applied,
            ready: self.joining.is_none()
                && self.ready_at.is_some_and(|index| self.applied >= index),
            members,
        };
        self.status.send_if_modified(|published| {
            if published.leader != status.leader || published.term != status.term {
                match status.leader {
                    Some(leader) => info!(leader, term = status.term, "following the leader"),
                    None => warn!(term = status.term, "no leader"),
                }
            }
            let differs = *published != status;
            *published = status;
            differs
        });
        self.metrics.observe(&self.status.borrow());
    }
}

/// Raft draws from a source that a simulation does not replace: this one is, and no two members wait equally long.
#[cfg(downpour_sim)]
fn pinned(config: Config) -> Config {
    use std::hash::{BuildHasher as _, RandomState};
    let drawn = RandomState::new().hash_one(config.id) as usize % (config.election_tick / 4);
    let min_election_tick = config.election_tick + 4 * drawn + config.id as usize % 4;
    Config { min_election_tick, max_election_tick: min_election_tick + 1, ..config }
}

/// Whether entries follow each other and an entry of the log, which has a term. Raft takes that for granted, and panics where it is not so.
fn is_consecutive(append: &Message) -> bool {
    let mut after = (1..).zip(&append.entries);
    (append.index == 0 || append.log_term > 0)
        && after.all(|(place, entry)| append.index.checked_add(place) == Some(entry.index))
}

fn restore(data: &[u8]) -> Result<State, Fatal> {
    State::restore(data).map_err(|error| Fatal::Unreadable {
        what: "the snapshot".into(),
        problem: error.to_string(),
    })
}
