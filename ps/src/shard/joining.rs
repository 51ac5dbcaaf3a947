//! A shard gets one more member while pushes go on (docs/protocol.md 3.2 and 6).
//!
//! Follow a join: a committed route names who is [joining](ShardRoute); the primary [copies](Shard::begin_copy) an exact cut to it, which makes it a
//! [`Role::Joining`] replica there; the links bring it the log after the cut; when it is nearly level the primary waits for it too, and when it has
//! everything up to that moment its addition is [proposed](Shard::proposal). Whether that was committed is known when a newer set is read back.

use std::sync::Arc;

use downpour_core::id::{Epoch, Lsn, ServerRef, ShardId};
use downpour_core::view::JobView;

use super::member::Member;
use super::{Effects, Role, Shard};
use crate::cut::CutId;
use crate::log::Log;
use crate::record::Record;
use crate::state::ShardState;

/// A learner whose log is behind by at most this, or by this share of what members may lack, is waited for: that is soon over, and without waiting it might
/// never be level. Records that are merely on their way count, and large tensors fill megabytes with them.
const LAG_BYTES: usize = 256 << 10;
const LAG_SHARE: usize = 8;
/// A learner may lack this many times what members may. Then the copy is dropped, and never a member.
const LOG_SHARE: usize = 4;

/// A server that the shard is copied to. It has a log of its own, so that what it lacks holds up nobody.
#[derive(Debug)]
pub struct Learner {
    server: ServerRef,
    cut: CutId,
    /// Where the cut is.
    at: Lsn,
    /// `acked` is none until it has loaded the cut.
    pub(super) position: Member,
    /// Records after what it has.
    pub(super) log: Log,
    /// The last record when the primary began to wait for it.
    waited_from: Option<Lsn>,
    /// Version of the set that its addition is proposed on. Until a newer one is read back it may be a member or not.
    proposed: Option<u64>,
}

/// A copy to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// To whom.
    pub server: ServerRef,
    /// The cut to be sent.
    pub cut: CutId,
    /// Of the primary.
    pub epoch: Epoch,
    /// Version of the set that names the server as joining.
    pub set_version: u64,
}

/// An addition to be committed: compare-and-swap on the set version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// Of the primary.
    pub epoch: Epoch,
    /// Of the set that it is based on.
    pub set_version: u64,
    /// Whom to add.
    pub server: ServerRef,
}

impl Learner {
    /// Who it is.
    #[must_use]
    pub fn server(&self) -> ServerRef {
        self.server
    }

    pub(super) fn cut(&self) -> CutId {
        self.cut
    }

    /// How far it is; `acked` is none until it has loaded the cut.
    #[must_use]
    pub fn position(&self) -> &Member {
        &self.position
    }

    /// Pushes wait for it: it may be a member already.
    #[must_use]
    pub fn waited_for(&self) -> bool {
        self.waited_from.is_some()
    }

    /// Its addition was proposed, and the outcome is not known.
    #[must_use]
    pub fn proposed(&self) -> bool {
        self.proposed.is_some()
    }

    /// A newer set without it was read back, after that of version `known`. True if it goes on: its addition may still be committed, or the set still
    /// names it and so did every one before. One that was not seen here may have been without it, and then it has dropped its copy.
    pub(super) fn goes_on(
        &mut self,
        joining: Option<ServerRef>,
        known: u64,
        set_version: u64,
    ) -> bool {
        if self.proposed.is_some_and(|proposed| proposed >= set_version) {
            return true;
        }
        self.proposed = None;
        joining == Some(self.server) && set_version <= known + 1
    }

    /// Takes note of how far it is. True when its addition is to be proposed.
    fn progress(&mut self, last: Lsn, commit: Lsn, lag_max: usize) -> bool {
        let Some(acked) = self.position.acked else { return false };
        // Members that lack something from before the cut could not get it from here.
        if self.waited_from.is_none() && commit >= self.at && self.log.bytes() <= lag_max {
            self.waited_from = Some(last);
        }
        self.proposed.is_none() && self.waited_from.is_some_and(|from| acked >= from)
    }
}

impl Shard {
    /// A replica that loaded a cut of `epoch`, for a route that names it as joining at `set_version`. It serves nobody and is in no set.
    #[must_use]
    pub fn joining(
        me: ServerRef,
        log_bytes_max: usize,
        view: Arc<JobView>,
        state: ShardState,
        (epoch, set_version): (Epoch, u64),
    ) -> Self {
        let id: ShardId = state.identity().shard;
        let mut shard = Shard {
            me,
            id,
            log_bytes_max,
            view: Arc::clone(&view),
            epoch,
            set_version,
            leader: None,
            joining: Some(me),
            leaving: None,
            commit: Lsn::ZERO,
            log: Log::starting_after(state.last()),
            state,
            role: Role::Joining,
            check_due: false,
            check: None,
            differs: false,
            traffic: super::Traffic::default(),
            effects: Effects::default(),
        };
        shard.on_view(view);
        shard
    }

    /// Who the shard is copied to.
    #[must_use]
    pub fn learner(&self) -> Option<&Learner> {
        self.wait_set().and_then(|set| set.learner.as_ref())
    }

    /// The members and who has loaded a copy: everybody that records are sent to.
    pub fn peers(&self) -> impl Iterator<Item = (ServerRef, &Member)> {
        let loaded = self.learner().filter(|learner| learner.position.acked.is_some());
        self.members().chain(loaded.map(|learner| (learner.server, &learner.position)))
    }

    /// Begins the copy that the committed route asks for, if it does and there is none yet.
    pub fn begin_copy(&mut self) -> Option<Copy> {
        let server = self.joining?;
        let (epoch, set_version, at) = (self.epoch, self.set_version, self.last());
        let Role::Primary(set) = &mut self.role else { return None };
        if set.learner.is_some() {
            return None;
        }
        let cut = self.state.open_cut(Lsn::ZERO);
        set.learner = Some(Learner {
            server,
            cut,
            at,
            position: Member::default(),
            log: Log::starting_after(at),
            waited_from: None,
            proposed: None,
        });
        Some(Copy { server, cut, epoch, set_version })
    }

    /// The server has loaded the cut.
    pub fn copied(&mut self, cut: CutId) {
        self.state.close_cut(cut);
        let Role::Primary(set) = &mut self.role else { return };
        if let Some(learner) = set.learner.as_mut().filter(|learner| learner.cut == cut) {
            learner.position.acked = Some(learner.at);
            learner.position.rewind();
            self.effects.send = true;
        }
        self.progress();
    }

    /// A copy came to nothing, and is to be begun again while the route asks for it. Not one whose addition was proposed: it may be a member.
    pub fn drop_copy(&mut self, cut: CutId) {
        self.drop_learner(|learner| learner.cut == cut);
    }

    /// What learners lack takes too much memory, or one makes no progress.
    pub fn drop_learner(&mut self, which: impl FnOnce(&Learner) -> bool) {
        let Role::Primary(set) = &mut self.role else { return };
        if let Some(learner) = set.learner.take_if(|one| one.proposed.is_none() && which(one)) {
            self.state.close_cut(learner.cut);
            self.progress();
            self.want_copy();
        }
    }

    /// The addition that is to be committed now. It is waited for, whatever becomes of it, until a newer set is read back.
    pub fn proposal(&mut self) -> Option<Proposal> {
        let (epoch, set_version) = (self.epoch, self.set_version);
        let (last, commit, lag_max) = (self.last(), self.commit, self.lag_max());
        let Role::Primary(set) = &mut self.role else { return None };
        let learner = set.learner.as_mut()?;
        if learner.proposed.is_none() && !learner.progress(last, commit, lag_max) {
            return None;
        }
        let set_version = *learner.proposed.get_or_insert(set_version);
        Some(Proposal { epoch, set_version, server: learner.server })
    }

    /// A record was logged.
    pub(super) fn log_for_learner(&mut self, record: &Arc<Record>) {
        let most = self.log_bytes_max.saturating_mul(LOG_SHARE);
        let Role::Primary(set) = &mut self.role else { return };
        let Some(learner) = &mut set.learner else { return };
        learner.log.push(Arc::clone(record));
        if learner.log.bytes() > most {
            self.drop_learner(|learner| !learner.waited_for());
        }
    }

    /// The learner may be further, or the commit LSN.
    pub(super) fn learner_progress(&mut self) {
        let (last, commit, lag_max) = (self.last(), self.commit, self.lag_max());
        if let Role::Primary(set) = &mut self.role
            && let Some(learner) = &mut set.learner
        {
            self.effects.propose |= learner.progress(last, commit, lag_max);
        }
    }

    fn lag_max(&self) -> usize {
        LAG_BYTES.max(self.log_bytes_max / LAG_SHARE)
    }

    /// Who is joining has no copy yet, and none is being made.
    #[must_use]
    pub fn wants_copy(&self) -> bool {
        matches!(self.role, Role::Primary(_)) && self.joining.is_some() && self.learner().is_none()
    }

    pub(super) fn want_copy(&mut self) {
        self.effects.copy |= self.wants_copy();
    }

    /// Whether `server` is a member, or on its way to become one.
    #[must_use]
    pub fn involves(&self, server: ServerRef) -> bool {
        let learner = self.learner().map(Learner::server);
        self.members().any(|(member, _)| member == server)
            || learner == Some(server)
            || self.joining == Some(server)
    }
}
