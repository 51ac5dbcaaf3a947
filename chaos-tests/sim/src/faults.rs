//! What goes wrong in a run: kinds that follow from the seed.

use std::time::Duration;

use crate::draw::Draw;
use crate::shared::Setting;

/// One kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A server's process dies and starts again some time later, empty.
    KillServer,
    /// It starts again before anybody missed it.
    RestartServer,
    /// A server's machine says nothing any more, and starts again.
    PowerOffServer,
    /// Nothing passes to or from a server.
    PartitionServer,
    /// A server hears everybody and nobody hears it.
    PartitionServerOneWay,
    /// A primary's records do not leave it for a moment, clients connect anew and send again; then it dies.
    CutAndKillPrimary,
    /// One of two backups misses what the other gets; the primary dies, and once it is replaced its successor too.
    KillPrimaryAndSuccessor,
    /// A checkpoint is begun, and a primary is cut off from all but the place where files go.
    CutOffDuringCheckpoint,
    /// The coordinator that leads dies and starts again with what it had on its disk.
    KillLeader,
    /// Any of them.
    KillCoordinator,
    /// Nothing passes to or from a coordinator.
    PartitionCoordinator,
    /// What two servers say to each other is late.
    HoldServers,
    /// What a client and a server say to each other is late.
    HoldClient,
    /// A client's connections break.
    ResetClient,
    /// Everything is slow.
    Slow,
    /// What a server hears and says is late, as of a process that was stopped and goes on.
    PauseServer,
    /// No coordinator hears two servers, which hear each other and the clients: where both are all copies of a shard, it is set back to a checkpoint.
    IsolateServers,
}

impl Kind {
    /// A server may leave its in-sync sets: must not come before all sets are full, or the last copy of a shard may go.
    pub(crate) fn lethal(self) -> bool {
        matches!(
            self,
            Kind::KillServer
                | Kind::RestartServer
                | Kind::PowerOffServer
                | Kind::PartitionServer
                | Kind::PartitionServerOneWay
                | Kind::CutAndKillPrimary
                | Kind::KillPrimaryAndSuccessor
                | Kind::CutOffDuringCheckpoint
                | Kind::PauseServer
                | Kind::IsolateServers
        )
    }

    /// A coordinator is gone for a while: must not come before all are back, or no majority is left.
    pub(crate) fn of_a_coordinator(self) -> bool {
        matches!(self, Kind::KillLeader | Kind::KillCoordinator | Kind::PartitionCoordinator)
    }
}

const LETHAL: [Kind; 8] = [
    Kind::KillServer,
    Kind::RestartServer,
    Kind::PowerOffServer,
    Kind::PartitionServer,
    Kind::PartitionServerOneWay,
    Kind::CutAndKillPrimary,
    Kind::CutOffDuringCheckpoint,
    Kind::PauseServer,
];
const MILD: [Kind; 4] = [Kind::HoldServers, Kind::HoldClient, Kind::ResetClient, Kind::Slow];

/// The faults of a run, the last one first.
pub(crate) fn schedule(draw: &mut Draw, setting: Setting) -> Vec<Kind> {
    let mut kinds = vec![
        draw.one_of(&[Kind::KillServer, Kind::CutAndKillPrimary, Kind::PowerOffServer]),
        draw.one_of(&LETHAL),
        draw.one_of(&LETHAL),
        Kind::KillLeader,
        draw.one_of(&[Kind::KillLeader, Kind::KillCoordinator, Kind::PartitionCoordinator]),
    ];
    if setting.replicas > 2 {
        kinds.push(Kind::KillPrimaryAndSuccessor);
    }
    if setting.sets_back {
        kinds.push(Kind::IsolateServers);
    }
    for _ in 0..1 + draw.below(3) {
        kinds.push(draw.one_of(&MILD));
    }
    draw.shuffle(&mut kinds);
    kinds
}

/// Between two faults: often so short that the second meets what the first brought about.
pub(crate) fn pause(draw: &mut Draw) -> Duration {
    if draw.below(2) == 0 { draw.millis(20, 800) } else { draw.millis(500, 2500) }
}
