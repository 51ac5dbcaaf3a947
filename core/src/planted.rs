//! Bugs that the simulation (docs/simulation.md) puts back, to show that it finds them. In every other build [`planted`] is false and costs nothing.

/// A way to break a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A push is acknowledged before the backups have it.
    AckBeforeBackup,
    /// A repeated push is acknowledged before the first one is committed.
    RepeatBeforeCommit,
    /// A new primary serves without fencing and levelling the other members.
    SkipFenceAndLevel,
    /// A server outside the in-sync set is promoted.
    PromoteOutsider,
    /// A server that restarts empty under its old name is taken for the one that it was.
    KeepIncarnation,
    /// A shard forgets that a session was closed.
    DropClosedMark,
    /// A Raft message leaves before what it promises is on the disk.
    SendBeforeDisk,
    /// Files of a checkpoint have the same name in every tenure, and are overwritten: also by a primary that was replaced.
    StaleCheckpoint,
    /// Rows of a cut come with the optimizer slots of a later moment.
    SlotsOfAnotherMoment,
    /// A copy of a shard lacks the cells.
    ForgetCells,
    /// A server that the coordinators do not hear goes on for ever.
    ForgetIsolation,
}

impl Bug {
    /// All of them, with their names on the command line.
    pub const ALL: [(&'static str, Bug); 11] = [
        ("ack-before-backup", Bug::AckBeforeBackup),
        ("repeat-before-commit", Bug::RepeatBeforeCommit),
        ("skip-fence-and-level", Bug::SkipFenceAndLevel),
        ("promote-outsider", Bug::PromoteOutsider),
        ("keep-incarnation", Bug::KeepIncarnation),
        ("drop-closed-mark", Bug::DropClosedMark),
        ("send-before-disk", Bug::SendBeforeDisk),
        ("stale-checkpoint", Bug::StaleCheckpoint),
        ("slots-of-another-moment", Bug::SlotsOfAnotherMoment),
        ("forget-cells", Bug::ForgetCells),
        ("forget-isolation", Bug::ForgetIsolation),
    ];
}

/// Whether the promise is to be broken.
#[cfg(not(downpour_sim))]
#[must_use]
#[inline(always)]
pub const fn planted(_: Bug) -> bool {
    false
}

#[cfg(downpour_sim)]
static PLANTED: std::sync::OnceLock<Bug> = std::sync::OnceLock::new();

/// Whether the promise is to be broken.
#[cfg(downpour_sim)]
#[must_use]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(&bug)
}

/// Breaks one promise from here on.
#[cfg(downpour_sim)]
pub fn plant(bug: Bug) {
    PLANTED.get_or_init(|| bug);
}
