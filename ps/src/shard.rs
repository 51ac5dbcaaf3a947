//! One replica of one shard: the protocol as a state machine (docs/protocol.md 2 to 5).
//!
//! It decides and never waits: no clock, no I/O, no async. Every call leaves in [`Effects`] what its owner has to do next.
//!
//! Follow a tenure: [`Shard::on_view`] says that this replica is the primary of a new epoch; it [fences](Shard::promotion) the others and
//! levels with them ([`Role::Promoting`]); then it serves ([`Role::Primary`]): [`Shard::push`] appends a record, the members
//! [acknowledge](Shard::acked) it, and the push [settles](Shard::settle). A higher epoch from anywhere ends the tenure at once.

mod clocks;
mod joining;
mod member;
mod promotion;
mod replication;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;

use downpour_core::cells::{Refusal, Verdict};
use downpour_core::id::{Epoch, Lsn, ServerRef, ShardId};
use downpour_core::optimizer::Staleness;
use downpour_core::planted::{Bug, planted};
use downpour_core::routing::ShardRoute;
use downpour_core::view::JobView;
use downpour_proto::v1::RetryReason;
use downpour_proto::v1::cut_piece::Piece;

pub use crate::lease::Contact;
pub use clocks::{Advanced, CLOCK_SHARD, Standing, Told};
pub use joining::{Copy, Learner, Proposal};
pub use member::{Member, WaitSet};
pub use promotion::{Diverged, Fenced, Promotion};
pub use replication::{Ack, Batch, Check, FetchRefused, Incoming, Room};

use crate::cut::{CutGone, CutId};
use crate::log::Log;
use crate::record::{Body, Push, Read, Record};
use crate::state::{Identity, ShardState, WithoutRoom, extends};

/// One replica of one shard.
///
/// It owns the replicated state and the records that not every member is known to have. It promises the numbered rules of
/// docs/protocol.md 2 to 5. Its price: every push to the shard passes through its owner's lock, so a shard is applied by one thread at a time.
#[derive(Debug)]
pub struct Shard {
    me: ServerRef,
    id: ShardId,
    log_bytes_max: usize,
    view: Arc<JobView>,
    /// Highest epoch seen; lower ones are refused for ever.
    epoch: Epoch,
    /// Of the in-sync set, within `epoch`.
    set_version: u64,
    /// Primary of `epoch`, as far as known.
    leader: Option<ServerRef>,
    /// Who is to become a member, by the newest route.
    joining: Option<ServerRef>,
    /// The member that a move takes from the set now, by the newest route.
    leaving: Option<ServerRef>,
    commit: Lsn,
    state: ShardState,
    log: Log,
    role: Role,
    /// The next record is to be followed by a digest.
    check_due: bool,
    /// The last digest of a primary.
    check: Option<Check>,
    /// What is here differs from what a primary had.
    differs: bool,
    traffic: Traffic,
    effects: Effects,
}

/// What was logged here as the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Rows and blocks that records name.
    pub rows: u64,
    /// Of records.
    pub bytes: u64,
    /// Pushes that said what they had read, and how stale they were in all.
    pub measured: u64,
    /// In steps of the furthest worker.
    pub stale_clocks: u64,
    /// In records; what is not known counts as none.
    pub stale_records: u64,
}

/// What a replica is to its shard.
#[derive(Debug)]
pub enum Role {
    /// Follows the primary of the epoch.
    Backup,
    /// Follows it too, but is in no set yet.
    Joining,
    /// Named primary of the epoch: fences and levels the members, and serves nobody yet.
    Promoting(WaitSet),
    /// Serves.
    Primary(WaitSet),
    /// No longer a member: its memory is to be freed.
    Removed,
}

/// What the owner of a [`Shard`] must do after a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Pushes that wait may settle now.
    pub settle: bool,
    /// Members have something to be sent.
    pub send: bool,
    /// A promotion began or can go on.
    pub promote: bool,
    /// The replica was removed.
    pub removed: bool,
    /// The replica began to serve.
    pub serving: bool,
    /// Elements that were left as they were because their new values would not be finite.
    pub not_stored: u64,
    /// New keys that were refused.
    pub without_room: Option<WithoutRoom>,
    /// The shard is to be copied to who is joining.
    pub copy: bool,
    /// Who is joining is to be added.
    pub propose: bool,
    /// Sessions that wait for others may go on.
    pub clocks: bool,
}

/// Who a request should have gone to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// Highest epoch known here.
    pub epoch: Epoch,
    /// Its primary, if known.
    pub primary: Option<ServerRef>,
}

impl Redirect {
    /// Nothing is known of the shard here.
    pub const UNKNOWN: Redirect = Redirect { epoch: Epoch(0), primary: None };
}

/// A request that had no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declined {
    /// This replica is not the primary of the epoch that the request names.
    Redirect(Redirect),
    /// Later, perhaps.
    Retry(RetryReason),
}

/// What a client knew of the shard when it sent a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basis {
    /// Whose primary it believes to speak to.
    pub epoch: Epoch,
    /// The shard's last setting back that its number counts from.
    pub numbering: Epoch,
    /// Version of the view that the variables are of.
    pub view_version: u64,
    /// What its gradients were computed with, where it says so.
    pub read: Option<Read>,
}

/// What became of a push at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It has its place in the log: [`Shard::settle`] says when it is acknowledged.
    Logged(Ticket),
    /// Not consumed.
    Declined(Declined),
    /// Not consumed: a push before it is missing, or its number was given before the shard was set back to a checkpoint.
    Gap {
        /// The number that would be applied.
        expected: u64,
        /// [`ShardState::numbering`].
        numbering: Epoch,
    },
    /// Not consumed: the session has ended.
    SessionClosed,
}

/// A push that waits for the members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    epoch: Epoch,
    /// Position to be committed.
    pub lsn: Lsn,
    /// It had been applied before.
    pub repeated: bool,
    /// Why it changed nothing.
    pub refusal: Option<Refusal>,
    /// How stale its gradients were, where that is known.
    pub staleness: Option<Staleness>,
}

/// Whether a push that was logged may be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Not every member has it.
    Pending,
    /// Every member has it.
    Acknowledged,
    /// It cannot be said here; the number may be consumed, and a repeat will tell.
    Declined(Declined),
}

impl Shard {
    /// A replica of a shard that nothing was logged for. [`Shard::on_view`] gives it its role.
    #[must_use]
    pub fn new(me: ServerRef, id: ShardId, log_bytes_max: usize, view: Arc<JobView>) -> Self {
        let identity = Identity { shard: id, shards: view.spec.shards, seed: view.spec.seed };
        Self::restored(me, id, log_bytes_max, view, ShardState::new(identity))
    }

    /// A replica with a state that a checkpoint holds. Nobody else has it: the coordinator gave it a route of its own, in a new epoch.
    #[must_use]
    pub fn restored(
        me: ServerRef,
        id: ShardId,
        log_bytes_max: usize,
        view: Arc<JobView>,
        state: ShardState,
    ) -> Self {
        let mut shard = Shard {
            me,
            id,
            log_bytes_max,
            view: Arc::clone(&view),
            epoch: Epoch(0),
            set_version: 0,
            leader: None,
            joining: None,
            leaving: None,
            commit: state.last(),
            log: Log::starting_after(state.last()),
            state,
            role: Role::Backup,
            check_due: false,
            check: None,
            differs: false,
            traffic: Traffic::default(),
            effects: Effects::default(),
        };
        shard.on_view(view);
        shard
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// Highest epoch seen.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Version of the in-sync set, within the epoch.
    #[must_use]
    pub fn set_version(&self) -> u64 {
        self.set_version
    }

    /// What it is.
    #[must_use]
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// Every in-sync member has everything up to here.
    #[must_use]
    pub fn commit(&self) -> Lsn {
        self.commit
    }

    /// Position of the last record.
    #[must_use]
    pub fn last(&self) -> Lsn {
        self.state.last()
    }

    /// The replicated state.
    #[must_use]
    pub fn state(&self) -> &ShardState {
        &self.state
    }

    /// Records kept for the members, and the bytes of all that are kept.
    #[must_use]
    pub fn log_size(&self) -> (usize, usize) {
        let learner = self.learner().map_or(0, |learner| learner.log.bytes());
        (self.log.len(), self.log.bytes() + learner)
    }

    /// What was logged here so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// The other members of the wait-set, for who promotes or serves.
    #[must_use]
    pub fn wait_set(&self) -> Option<&WaitSet> {
        match &self.role {
            Role::Promoting(set) | Role::Primary(set) => Some(set),
            Role::Backup | Role::Joining | Role::Removed => None,
        }
    }

    /// The members of the wait-set and how far they are.
    pub fn members(&self) -> impl Iterator<Item = (ServerRef, &Member)> {
        self.wait_set().into_iter().flat_map(WaitSet::members)
    }

    /// The member that a committed move takes from the set now. Whoever serves has it removed: then the one that the copy moved to serves, and nobody stops waiting for
    /// the old one before the removal was read back.
    #[must_use]
    pub fn retiring(&self) -> Option<ServerRef> {
        let Role::Primary(set) = &self.role else { return None };
        self.leaving.filter(|leaving| set.members().any(|(member, _)| member == *leaving))
    }

    /// What the calls so far ask of the owner. Forgets it.
    pub fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    /// The coordinator's newest view of the job: routes, variables, closed sessions.
    pub fn on_view(&mut self, view: Arc<JobView>) {
        let route = view.route(self.id).cloned();
        self.view = view;
        match route {
            Some(route) => self.on_route(&route),
            None => self.remove(),
        }
        self.log_view();
    }

    /// The shard's committed route, from the watch or read back after a change. A stale one is ignored, and so is one that would begin a tenure here before the view says with
    /// what: the shard may have been set back to a checkpoint.
    pub fn on_route(&mut self, route: &ShardRoute) {
        let known = (self.epoch, self.set_version);
        if matches!(self.role, Role::Removed) || (route.epoch, route.set_version) < known {
            return;
        }
        let member = route.in_sync.contains(&self.me);
        let waits = matches!(self.role, Role::Joining) && route.joining == Some(self.me);
        if !member && !waits {
            // What is dropped is not to come back by a copy from an older epoch.
            (self.epoch, self.leader) = (route.epoch, route.primary);
            return self.remove();
        }
        // Whether an epoch begins with what is here is in the view, and a route that was read back may be newer.
        let seen = self.view.route(self.id).is_some_and(|seen| seen.epoch >= route.epoch);
        if route.primary == Some(self.me) && route.epoch > self.epoch && !seen {
            return;
        }
        let tenure_goes_on = route.epoch == self.epoch;
        // What is here is not what the epoch begins with. Only a replica that was just loaded has seen no epoch yet.
        let begins_again = self.view.orders.set_back_in(self.id) == Some(route.epoch);
        if begins_again
            && !tenure_goes_on
            && self.epoch != Epoch(0)
            && route.primary == Some(self.me)
        {
            return self.remove();
        }
        (self.epoch, self.set_version) = (route.epoch, route.set_version);
        (self.leader, self.joining) = (route.primary, route.joining);
        self.leaving = route.leaving(self.view.spec.replicas);
        if waits {
            return;
        }
        let me = self.me;
        if route.primary != Some(me) {
            self.step_down();
            self.role = Role::Backup;
        } else if tenure_goes_on && let Some(set) = self.wait_set_mut() {
            if let Some(learner) = set.replace(route, known.1, me) {
                self.state.close_cut(learner.cut());
            }
        } else {
            self.step_down();
            self.role = Role::Promoting(WaitSet::new(route.others(me)));
        }
        self.progress();
        self.want_copy();
    }

    /// The members are to compare what they have with what is here, after the next record.
    pub fn check_soon(&mut self) {
        self.check_due = true;
    }

    /// The shard is no longer here: its job was deleted, or this replica left the set.
    pub fn remove(&mut self) {
        self.step_down();
        self.role = Role::Removed;
        self.effects.removed = true;
    }

    /// What a removed replica held, to be freed where that disturbs nobody.
    pub fn take_memory(&mut self) -> impl Send + 'static + use<> {
        let empty = ShardState::new(self.state.identity());
        (std::mem::replace(&mut self.state, empty), std::mem::take(&mut self.log))
    }

    /// A push, in the order of its stream. `contact`: as it is now. `room`: bytes that new rows may take.
    pub fn push(&mut self, basis: Basis, push: Push, contact: Contact, room: u64) -> Pushed {
        let Basis { epoch, view_version, .. } = basis;
        if let Err(declined) = self.serving(epoch, contact) {
            return Pushed::Declined(declined);
        }
        if view_version > self.view.version {
            return Pushed::Declined(Declined::Retry(RetryReason::NotReady));
        }
        let numbering = self.state.numbering();
        let verdict = match self.state.cells().check(push.session, push.sequence) {
            // A late copy of what was sent before the shard was set back may have the very number that is next.
            Verdict::Apply | Verdict::Repeat { .. } | Verdict::Gap { .. }
                if basis.numbering != numbering =>
            {
                Verdict::Gap { expected: self.state.cells().next(push.session) }
            }
            verdict => verdict,
        };
        match verdict {
            Verdict::Apply => {}
            Verdict::Repeat { lsn, refusal } => {
                let (repeated, staleness) = (true, None);
                return Pushed::Logged(Ticket { epoch, lsn, repeated, refusal, staleness });
            }
            Verdict::Gap { expected } => return Pushed::Gap { expected, numbering },
            Verdict::Closed => return Pushed::SessionClosed,
        }
        if self.too_few() {
            return Pushed::Declined(Declined::Retry(RetryReason::TooFewInSync));
        }
        if !self.state.cells().has_room(push.session) {
            return Pushed::Declined(Declined::Retry(RetryReason::Overloaded));
        }
        if self.state.cut_bytes() >= self.log_bytes_max {
            return Pushed::Declined(Declined::Retry(RetryReason::Overloaded));
        }
        if self.log.bytes() >= self.log_bytes_max {
            return Pushed::Declined(Declined::Retry(RetryReason::Overloaded));
        }
        let staleness = basis.read.map(|read| self.state.staleness(read));
        let (push, without_room) = self.state.resolve(push, staleness.unwrap_or_default(), room);
        self.effects.without_room = without_room;
        let refusal = push.refusal;
        if let Some(Staleness { clocks, records }) = staleness {
            let traffic = &mut self.traffic;
            traffic.measured += 1;
            traffic.stale_clocks = traffic.stale_clocks.saturating_add(clocks);
            traffic.stale_records += records.unwrap_or_default();
        }
        let lsn = self.append(Body::Push(push));
        Pushed::Logged(Ticket { epoch, lsn, repeated: false, refusal, staleness })
    }

    /// Whether a push that was logged may be acknowledged now. `contact`: as it is now.
    #[must_use]
    pub fn settle(&self, ticket: &Ticket, contact: Contact) -> Settled {
        match self.serving(ticket.epoch, contact) {
            Err(declined) => Settled::Declined(declined),
            // Members may have left since it was logged: fewer hold it than were asked for.
            Ok(_) if self.too_few() => {
                Settled::Declined(Declined::Retry(RetryReason::TooFewInSync))
            }
            Ok(_) if self.commit >= ticket.lsn => Settled::Acknowledged,
            Ok(_) if planted(Bug::AckBeforeBackup) => Settled::Acknowledged,
            Ok(_) if planted(Bug::RepeatBeforeCommit) && ticket.repeated => Settled::Acknowledged,
            Ok(_) => Settled::Pending,
        }
    }

    /// The state, for a pull that names `epoch`.
    ///
    /// # Errors
    /// This replica does not serve that epoch, is alone without a lease, or isolated.
    pub fn read(&self, epoch: Epoch, contact: Contact) -> Result<&ShardState, Declined> {
        self.serving(epoch, contact).map(|_| &self.state)
    }

    /// Opens an exact cut at the last record: all of the shard, or what is newer than a position. Only who serves can.
    pub fn open_cut(&mut self, newer_than: Lsn) -> Option<CutId> {
        matches!(self.role, Role::Primary(_)).then(|| self.state.open_cut(newer_than))
    }

    /// The next piece of a cut, of about `bytes_max`; at the end always the end.
    ///
    /// # Errors
    /// The cut was closed, or the shard is no longer served here.
    pub fn read_cut(&mut self, id: CutId, bytes_max: usize) -> Result<Piece, CutGone> {
        self.state.read_cut(id, bytes_max)
    }

    /// What writers had to save for cuts takes half of what it may: pushes will have to wait unless it is read faster.
    #[must_use]
    pub fn cuts_press(&self) -> bool {
        self.state.cut_bytes() >= self.log_bytes_max / 2
    }

    /// Nobody reads a cut any more.
    pub fn close_cut(&mut self, id: CutId) {
        self.state.close_cut(id);
    }

    /// The members that a request of `epoch` waits for, if this replica serves it.
    fn serving(&self, epoch: Epoch, contact: Contact) -> Result<&WaitSet, Declined> {
        if epoch > self.epoch {
            return Err(Declined::Retry(RetryReason::NotReady));
        }
        match &self.role {
            _ if epoch < self.epoch => Err(self.redirect()),
            Role::Backup | Role::Joining | Role::Removed => Err(self.redirect()),
            Role::Promoting(_) => Err(Declined::Retry(RetryReason::NotReady)),
            Role::Primary(set) if !may_acknowledge(contact, set.is_empty()) => {
                Err(Declined::Retry(RetryReason::NoLease))
            }
            Role::Primary(set) => Ok(set),
        }
    }

    /// Fewer members than the job wants to have each push, the primary included.
    fn too_few(&self) -> bool {
        self.wait_set().map_or(0, WaitSet::len) + 1 < self.view.spec.min_in_sync as usize
    }

    fn redirect(&self) -> Declined {
        Declined::Redirect(Redirect { epoch: self.epoch, primary: self.leader })
    }

    fn wait_set_mut(&mut self) -> Option<&mut WaitSet> {
        match &mut self.role {
            Role::Promoting(set) | Role::Primary(set) => Some(set),
            Role::Backup | Role::Joining | Role::Removed => None,
        }
    }

    /// A higher epoch was seen: lower ones are refused from here on. One that no coordinator can have minted is nonsense, and believed by nobody.
    fn adopt(&mut self, epoch: Epoch, leader: Option<ServerRef>) {
        if epoch > self.epoch && epoch <= Lsn::EPOCH_MAX {
            (self.epoch, self.set_version, self.leader) = (epoch, 0, leader);
            self.step_down();
        }
    }

    fn step_down(&mut self) {
        if self.wait_set().is_some() {
            self.state.close_cuts();
            self.role = Role::Backup;
            self.effects.settle = true;
            self.effects.clocks = true;
        }
    }

    /// Appends a record as the primary, applies it, and returns its position.
    fn append(&mut self, body: Body) -> Lsn {
        let previous = self.last();
        let record = Arc::new(Record { lsn: previous.next_in(self.epoch), previous, body });
        let floor = self.state.board().floor();
        let applied = self.state.apply(&record).expect("a primary applies what it resolved");
        self.effects.not_stored += applied.not_stored;
        let lsn = record.lsn;
        if std::mem::take(&mut self.check_due) && self.peers().next().is_some() {
            self.check = Some(Check { lsn, digest: self.state.sample_digest() });
        }
        self.traffic.rows += record.rows();
        self.traffic.bytes += record.bytes() as u64;
        self.effects.clocks |= match record.body {
            Body::Push(_) | Body::Define(_) => false,
            // Nobody goes on only because another one has finished a step, unless it was the slowest.
            Body::Tick(..) => self.state.board().floor() > floor,
            _ => true,
        };
        self.log_for_learner(&record);
        self.log.push(record);
        self.effects.send = true;
        self.progress();
        lsn
    }

    /// Restores what follows from the members' positions: the commit LSN, the end of a promotion, the kept log.
    fn progress(&mut self) {
        let last = self.last();
        let Some(set) = self.wait_set() else { return };
        if let Some(commit) = set.committed(last)
            && commit > self.commit
        {
            self.commit = commit;
            self.log.trim(commit);
            self.effects.settle = true;
        }
        if let Role::Promoting(set) = &mut self.role {
            if planted(Bug::SkipFenceAndLevel) && !set.level_at(last) {
                set.assume_level_at(last);
            }
            if !set.level_at(last) {
                self.effects.promote = true;
                self.effects.send = true;
                return;
            }
            self.role = Role::Primary(std::mem::take(set));
            self.effects.serving = true;
            self.want_copy();
            self.log_view();
        }
        self.learner_progress();
    }

    /// Logs what the view has and the log has not: variables, and sessions that ended. So records are closed and backups need no configuration.
    fn log_view(&mut self) {
        let view = Arc::clone(&self.view);
        // Before anything else of its epoch: it is how members that follow and clients hear of it.
        if let Role::Primary(_) = self.role
            && view.orders.set_back_in(self.id) == Some(self.epoch)
            && self.state.numbering() != self.epoch
        {
            self.append(Body::RolledBack);
        }
        while let Role::Primary(_) = self.role
            && let Some(variable) = view.variables.get(self.state.defined() as usize)
        {
            self.append(Body::Define(variable.clone()));
        }
        let closed = self.state.cells().closed();
        if let Role::Primary(_) = self.role
            && view.sessions != *closed
            && extends(&view.sessions, closed)
        {
            self.append(Body::Close(view.sessions.clone()));
        }
        self.decide();
    }
}

/// Whether a member may acknowledge anything now. Without a lease only what others hold too; isolated nothing, for it may be set back elsewhere by now.
fn may_acknowledge(contact: Contact, alone: bool) -> bool {
    match contact {
        Contact::Leased => true,
        Contact::Late => !alone,
        Contact::Isolated => false,
    }
}
