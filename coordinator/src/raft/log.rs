//! The log of a member: an image in memory that Raft reads, and a [`Disk`] that has every change before Raft builds on it.
//!
//! The image is small because the log is compacted: `state` is megabytes at most. [`super::sled_disk`] is the disk of production,
//! [`super::mem_disk`] that of tests and simulation; one suite holds both to the contract.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use protobuf::Message as _;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use thiserror::Error;

/// Why the log cannot be read or written. Fatal for the member: it must not promise what it may not have.
#[derive(Debug, Error)]
pub enum Error {
    /// The disk failed, or another process has the directory.
    #[error("{action}: {problem}")]
    Disk {
        /// What was tried.
        action: String,
        /// What the system said.
        problem: String,
    },
    /// What is on the disk is not what was written.
    #[error(
        "{record} is corrupted: {problem}; move this member's data directory away and start it again: it takes the log from the others, \
         and does not vote before it has"
    )]
    Corrupted {
        /// Which record.
        record: String,
        /// How that shows.
        problem: String,
    },
    /// The directory is that of another member or cluster.
    #[error(
        "the data directory belongs to {found}, but this process is {expected}; --peers says who founded the group, also where members were added \
         and removed since"
    )]
    Stranger {
        /// Whose it is.
        found: Identity,
        /// Who asks.
        expected: Identity,
    },
}

impl Error {
    /// The disk failed at `action`.
    pub fn disk(action: impl Into<String>, problem: impl ToString) -> Error {
        Error::Disk { action: action.into(), problem: problem.to_string() }
    }

    /// `record` is not what was written.
    pub fn corrupted(record: impl Into<String>, problem: impl ToString) -> Error {
        Error::Corrupted { record: record.into(), problem: problem.to_string() }
    }
}

/// Whose log this is. Fixed when the directory is first used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Name of the cluster.
    pub cluster: String,
    /// Number of the member.
    pub member: u64,
    /// Numbers of the members that founded the group, rising: who votes where its log begins.
    pub voters: Vec<u64>,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Identity { cluster, member, voters } = self;
        write!(f, "member {member} of {voters:?} in cluster {cluster:?}")
    }
}

/// How far a data directory is trusted: see [`super::joining`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// Drawn when the directory was first used. 0: it is from before there were such numbers.
    pub birth: u64,
    /// The member may have forgotten what it promised with an earlier directory.
    pub joining: bool,
}

/// A position in the log: index and term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// From 1.
    pub index: u64,
    /// Of the leader that appended it.
    pub term: u64,
}

/// All that a disk holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Image {
    /// None: never used.
    pub identity: Option<Identity>,
    /// How far it is trusted.
    pub admission: Admission,
    /// Term, vote, commit.
    pub hard_state: HardState,
    /// The newest snapshot, with its data.
    pub snapshot: Option<Snapshot>,
    /// The entry before the first that is kept.
    pub truncated: Position,
    /// Contiguous, from `truncated.index + 1`.
    pub entries: VecDeque<Entry>,
}

/// One atomic change of a disk: removals first.
#[derive(Clone, Debug, Default)]
pub struct Change<'a> {
    /// Given when the directory is first used.
    pub identity: Option<&'a Identity>,
    /// Replaces the older one.
    pub admission: Option<Admission>,
    /// Replaces the older snapshot.
    pub snapshot: Option<&'a Snapshot>,
    /// Where the log begins from now on.
    pub truncated: Option<Position>,
    /// Entries that go.
    pub removed: Option<RangeInclusive<u64>>,
    /// Entries that come.
    pub entries: &'a [Entry],
    /// Replaces the older one.
    pub hard_state: Option<&'a HardState>,
    /// Something is promised on the strength of this change: it must survive a power cut. Otherwise it may be lost, but never be
    /// reordered with a later change.
    pub sync: bool,
}

/// Where an [`Image`] is kept.
pub trait Disk: Send + 'static {
    /// Everything that was written. Checks every record.
    ///
    /// # Errors
    /// See [`enum@Error`].
    fn load(&mut self) -> Result<Image, Error>;

    /// Writes one change, whole or not at all.
    ///
    /// # Errors
    /// See [`enum@Error`]; what was written is then unknown.
    fn write(&mut self, change: &Change<'_>) -> Result<(), Error>;
}

/// The log of one member.
#[derive(Debug)]
pub struct Log<D> {
    image: Image,
    /// Of the group, at the last entry that is applied.
    members: ConfState,
    /// Of the entries in the image.
    bytes: u64,
    disk: D,
}

impl<D: Disk> Log<D> {
    /// Opens the log of `identity`; an unused disk becomes that member's, with `fresh` trust.
    ///
    /// # Errors
    /// The disk fails or is somebody else's.
    pub fn open(mut disk: D, identity: &Identity, fresh: Admission) -> Result<Self, Error> {
        let mut image = disk.load()?;
        match &image.identity {
            Some(found) if found == identity => {}
            Some(found) => {
                let (found, expected) = (found.clone(), identity.clone());
                return Err(Error::Stranger { found, expected });
            }
            None => {
                let (identity, admission) = (Some(identity), Some(fresh));
                disk.write(&Change { identity, admission, sync: true, ..Change::default() })?;
                (image.identity, image.admission) = (identity.cloned(), fresh);
            }
        }
        // A commit index is written without a barrier; the snapshot proves at least its own.
        let snapshot_index = image.snapshot.as_ref().map_or(0, |one| one.get_metadata().index);
        image.hard_state.commit = image.hard_state.commit.max(snapshot_index);
        let bytes = image.entries.iter().map(entry_bytes).sum();
        let members = members(&image);
        Ok(Log { image, members, bytes, disk })
    }

    /// A change of the group was applied: the next snapshot says so.
    pub fn set_members(&mut self, members: ConfState) {
        self.members = members;
    }

    /// Writes what a `Ready` asks for; durable on return if `sync`. Entries replace what is there from the first one's index on.
    ///
    /// # Errors
    /// The disk fails.
    pub fn persist(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
        sync: bool,
    ) -> Result<(), Error> {
        let mut removed = None;
        if let Some(first) = entries.first() {
            assert!(first.index > self.image.truncated.index, "raft overwrites a compacted entry");
            assert!(first.index <= self.last() + 1, "raft leaves a gap in its log");
            let kept = entries[entries.len() - 1].index + 1;
            removed = (kept <= self.last()).then(|| kept..=self.last());
        }
        self.disk.write(&Change { removed, entries, hard_state, sync, ..Change::default() })?;
        if let Some(first) = entries.first() {
            self.forget_from(first.index);
            self.bytes += entries.iter().map(entry_bytes).sum::<u64>();
            self.image.entries.extend(entries.iter().cloned());
        }
        if let Some(hard_state) = hard_state {
            self.image.hard_state = hard_state.clone();
        }
        Ok(())
    }

    /// Takes the leader's snapshot in place of everything that is here.
    ///
    /// # Errors
    /// The disk fails.
    pub fn install(
        &mut self,
        snapshot: &Snapshot,
        hard_state: Option<&HardState>,
    ) -> Result<(), Error> {
        let position = position(snapshot);
        let first = self.image.truncated.index + 1;
        let removed = (first <= self.last()).then(|| first..=self.last());
        let mut hard_state = hard_state.unwrap_or(&self.image.hard_state).clone();
        hard_state.commit = hard_state.commit.max(position.index);
        self.disk.write(&Change {
            snapshot: Some(snapshot),
            truncated: Some(position),
            removed,
            hard_state: Some(&hard_state),
            sync: true,
            ..Change::default()
        })?;
        self.image.entries.clear();
        self.bytes = 0;
        self.image.snapshot = Some(snapshot.clone());
        self.image.truncated = position;
        self.image.hard_state = hard_state;
        self.members = members(&self.image);
        Ok(())
    }

    /// Stores a snapshot of the state at an index that is applied, and forgets the log up to `keep` entries before it.
    ///
    /// # Errors
    /// The disk fails.
    pub fn compact(&mut self, index: u64, data: Vec<u8>, keep: u64) -> Result<(), Error> {
        let term = self.term_of(index).expect("an applied entry is in the log");
        let mut snapshot = Snapshot::default();
        snapshot.set_data(data.into());
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = (index, term);
        metadata.set_conf_state(self.members.clone());
        let first = self.image.truncated.index + 1;
        let until = index.saturating_sub(keep);
        let truncated = (first <= until).then(|| Position {
            index: until,
            term: self.term_of(until).expect("between the first entry and an applied one"),
        });
        self.disk.write(&Change {
            snapshot: Some(&snapshot),
            truncated,
            removed: truncated.map(|position| first..=position.index),
            sync: true,
            ..Change::default()
        })?;
        if let Some(position) = truncated {
            let gone = self.image.entries.drain(..(position.index + 1 - first) as usize);
            self.bytes -= gone.map(|entry| entry_bytes(&entry)).sum::<u64>();
            self.image.truncated = position;
        }
        self.image.snapshot = Some(snapshot);
        Ok(())
    }

    /// From now on the member is trusted: it has all that it may have promised before, and `hard_state` keeps it from voting twice. Durable
    /// on return.
    ///
    /// # Errors
    /// The disk fails.
    pub fn admit(&mut self, hard_state: HardState) -> Result<(), Error> {
        let admission = Admission { joining: false, ..self.image.admission };
        self.disk.write(&Change {
            admission: Some(admission),
            hard_state: Some(&hard_state),
            sync: true,
            ..Change::default()
        })?;
        (self.image.admission, self.image.hard_state) = (admission, hard_state);
        Ok(())
    }

    /// Takes note of a commit index that came without a `Ready`. May be lost: it is learnt again.
    ///
    /// # Errors
    /// The disk fails.
    pub fn set_commit(&mut self, commit: u64) -> Result<(), Error> {
        let hard_state = HardState { commit, ..self.image.hard_state.clone() };
        self.persist(&[], Some(&hard_state), false)
    }

    /// What is held.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Index of the newest snapshot, or 0.
    #[must_use]
    pub fn snapshot_index(&self) -> u64 {
        self.image.snapshot.as_ref().map_or(0, |snapshot| snapshot.get_metadata().index)
    }

    /// Bytes of the entries that are kept.
    #[must_use]
    pub fn entries_bytes(&self) -> u64 {
        self.bytes
    }

    fn last(&self) -> u64 {
        self.image.truncated.index + self.image.entries.len() as u64
    }

    fn entry(&self, index: u64) -> Option<&Entry> {
        let at = index.checked_sub(self.image.truncated.index + 1)?;
        self.image.entries.get(at as usize)
    }

    fn term_of(&self, index: u64) -> Option<u64> {
        let Position { index: truncated, term } = self.image.truncated;
        if index == truncated { Some(term) } else { self.entry(index).map(|entry| entry.term) }
    }

    fn forget_from(&mut self, index: u64) {
        let kept = (index - self.image.truncated.index - 1) as usize;
        let gone = self.image.entries.drain(kept..);
        self.bytes -= gone.map(|entry| entry_bytes(&entry)).sum::<u64>();
    }
}

/// Who is in the group where what `image` has of the log begins: as the snapshot says, or as it was founded.
fn members(image: &Image) -> ConfState {
    let snapshot = image.snapshot.as_ref().map(|snapshot| snapshot.get_metadata().get_conf_state());
    match snapshot.filter(|members| !members.voters.is_empty()) {
        Some(members) => members.clone(),
        None => {
            let voters = image.identity.as_ref().map(|identity| identity.voters.clone());
            ConfState::from((voters.unwrap_or_default(), Vec::new()))
        }
    }
}

fn entry_bytes(entry: &Entry) -> u64 {
    u64::from(entry.compute_size())
}

/// Where a snapshot stands.
#[must_use]
pub fn position(snapshot: &Snapshot) -> Position {
    let metadata = snapshot.get_metadata();
    Position { index: metadata.index, term: metadata.term }
}

impl<D: Disk> Storage for Log<D> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.image.hard_state.clone(), members(&self.image)))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.image.truncated.index {
            return Err(StorageError::Compacted.into());
        }
        assert!(high <= self.last() + 1, "raft reads past its log");
        let first = (low - self.image.truncated.index - 1) as usize;
        let wanted = self.image.entries.range(first..first + (high - low) as usize);
        let mut entries = wanted.cloned().collect();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.image.truncated.index {
            return Err(StorageError::Compacted.into());
        }
        self.term_of(index).ok_or_else(|| StorageError::Unavailable.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.image.truncated.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        match &self.image.snapshot {
            Some(snapshot) if snapshot.get_metadata().index >= request_index => {
                Ok(snapshot.clone())
            }
            _ => Err(StorageError::SnapshotTemporarilyUnavailable.into()),
        }
    }
}
