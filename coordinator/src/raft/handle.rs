//! What the rest of the process may ask of the driver.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use downpour_proto::Invalid;
use raft::eraftpb::Message;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use super::joining::Told;
use crate::command::Body;
use crate::state::{Cluster, Outcome, Refused, Reply};

/// Longest wait for a proposal or a read. Callers have deadlines of their own; this one bounds what waits in the driver.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum Error {
    /// Ask the leader.
    #[error("this member does not lead")]
    NotLeader {
        /// The leader, if one is known.
        leader: Option<u64>,
    },
    /// Another leader's entry took the place of the proposal: nothing was changed.
    #[error("the leader changed before the change was committed")]
    Overwritten,
    /// It may have been committed or not.
    #[error("the outcome is unknown: no answer in time")]
    Unknown,
    /// Too much is waiting; nothing was changed.
    #[error("too many changes are waiting")]
    Overloaded,
    /// The member stops.
    #[error("this member is stopping")]
    Stopped,
    /// It was committed, and changed nothing.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It is no valid command.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// Everything that reaches the driver from outside but time.
#[derive(Debug)]
pub(super) enum Input {
    /// With the birth of the sender's data directory.
    Peer(Box<Message>, u64),
    /// A member with a data directory of this birth asks what this one knows.
    Meet(u64, u64, oneshot::Sender<Result<Told, Error>>),
    /// Another member told this one, which joins.
    Met(u64, Told),
    Unreachable(u64),
    SnapshotSent(u64),
    Propose(Vec<u8>, oneshot::Sender<Result<Outcome, Error>>),
    Read(oneshot::Sender<Result<(), Error>>),
    ChangeMembers(Wish, oneshot::Sender<Result<Outcome, Error>>),
    Transfer {
        from: u64,
        to: u64,
        reply: oneshot::Sender<Result<Outcome, Error>>,
    },
    /// This member is told that it was removed.
    Removed,
    /// Another member does not let this one come back.
    Expelled(String),
    Leave(oneshot::Sender<()>),
}

/// A change of the group that an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// What.
    pub kind: WishKind,
    /// Only say whether it may be.
    pub dry_run: bool,
}

/// See [`Wish`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WishKind {
    /// A new member at this address; number 0: the next.
    Add(u64, String),
    /// A member leaves.
    Remove(u64),
}

/// How a member stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Its number.
    pub id: u64,
    /// Raft's term.
    pub term: u64,
    /// Who leads in this term, as far as this member knows.
    pub leader: Option<u64>,
    /// Index up to which the log is committed.
    pub commit: u64,
    /// Index up to which it is applied.
    pub applied: u64,
    /// It has applied what was committed when it started: it has a state worth showing.
    pub ready: bool,
    /// All members; how far they are is known by the leader only.
    pub members: Vec<Member>,
}

impl Status {
    /// Whether this member leads.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.leader == Some(self.id)
    }
}

/// A member as the leader sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Its number.
    pub id: u64,
    /// Index up to which its log is known to be the leader's.
    pub matched: u64,
    /// It does not vote yet.
    pub learner: bool,
    /// Something was heard of it within the shortest time after which a follower misses its leader.
    pub heard: bool,
}

/// Asks the driver. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) cluster: watch::Receiver<Arc<Cluster>>,
    pub(super) status: watch::Receiver<Status>,
}

impl Handle {
    /// Commits and applies a change.
    ///
    /// # Errors
    /// See [`enum@Error`].
    pub async fn propose(&self, body: Body) -> Result<Reply, Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let bytes = body.to_log(now.map_or(0, |since| since.as_millis() as u64))?;
        Ok(self.ask(|reply| Input::Propose(bytes, reply)).await??)
    }

    /// The state, with every change in it that was answered before this call.
    ///
    /// # Errors
    /// See [`enum@Error`].
    pub async fn read(&self) -> Result<Arc<Cluster>, Error> {
        self.ask(Input::Read).await?;
        Ok(self.cluster())
    }

    /// Changes the group: the answer names the member, and says whether it was not so before.
    ///
    /// # Errors
    /// See [`enum@Error`].
    pub async fn change_members(&self, wish: Wish) -> Result<Reply, Error> {
        Ok(self.ask(|reply| Input::ChangeMembers(wish, reply)).await??)
    }

    /// Has `to` lead (0: whoever is furthest), unless somebody else than `from` does already. Answers before it is so.
    ///
    /// # Errors
    /// See [`enum@Error`].
    pub async fn transfer_leader(&self, from: u64, to: u64) -> Result<Reply, Error> {
        Ok(self.ask(|reply| Input::Transfer { from, to, reply }).await??)
    }

    async fn ask<T>(
        &self,
        input: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Input,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.inputs.send(input(reply)).await.map_err(|_| Error::Stopped)?;
            // A driver that stops drops what waits.
            answer.await.map_err(|_| Error::Unknown)?
        };
        tokio::time::timeout(ANSWER_TIMEOUT, asked).await.unwrap_or(Err(Error::Unknown))
    }

    /// Hands over a message from another member, whose data directory has this birth.
    pub async fn deliver(&self, message: Message, birth: u64) {
        // A driver that stopped misses nothing.
        let _ = self.inputs.send(Input::Peer(Box::new(message), birth)).await;
    }

    /// Another member has a data directory of this birth: from now on only that is believed. Tells what this member knows.
    ///
    /// # Errors
    /// See [`enum@Error`].
    pub async fn meet(&self, member: u64, birth: u64) -> Result<Told, Error> {
        self.ask(|reply| Input::Meet(member, birth, reply)).await
    }

    /// What another member told this one when they met.
    pub async fn met(&self, member: u64, told: Told) {
        let _ = self.inputs.send(Input::Met(member, told)).await;
    }

    pub(super) async fn report(&self, input: Input) {
        let _ = self.inputs.send(input).await;
    }

    /// Gives up leadership, if this member has it, and stops the driver.
    pub async fn leave(&self) {
        let (reply, left) = oneshot::channel();
        if self.inputs.send(Input::Leave(reply)).await.is_ok() {
            let _ = left.await;
        }
    }

    /// The state as of now on this member: it may lag behind the leader's.
    #[must_use]
    pub fn cluster(&self) -> Arc<Cluster> {
        self.cluster.borrow().clone()
    }

    /// Every state from now on; a slow watcher skips some.
    #[must_use]
    pub fn watch_cluster(&self) -> watch::Receiver<Arc<Cluster>> {
        self.cluster.clone()
    }

    /// How this member stands.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Every change of how this member stands.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}
