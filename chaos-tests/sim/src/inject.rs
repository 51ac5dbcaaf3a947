//! Does to the simulated cluster what the schedule says, and undoes it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use downpour_core::id::Epoch;
use downpour_proto::net;
use turmoil::Sim;

use crate::cluster::{COORDINATORS, OTHERS, PROBES, SERVERS, SHARDS};
use crate::draw::Draw;
use crate::faults::{self, Kind};
use crate::invariants::replicas;
use crate::shared::{Shared, count};

type Host = &'static str;

const LATENCY_MAX: Duration = Duration::from_millis(10);
/// After the last of a fault has passed, before the next server is taken: removals that were under way are seen then.
const REST: Duration = Duration::from_millis(1300);
/// Between looks whether a primary was replaced.
const LOOK: Duration = Duration::from_millis(6);

/// A single act.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// The process is gone; connections are refused unless the whole machine is.
    Kill {
        host: Host,
        machine: bool,
    },
    Start(Host),
    Partition(Host, Host),
    /// What the first says does not arrive.
    PartitionOneWay(Host, Host),
    Repair(Host, Host),
    Hold(Host, Host),
    Release(Host, Host),
    Reset(Host, Host),
    Latency(Duration),
    /// Kills who leads a shard in a later epoch than this, some time after there is one.
    KillSuccessor {
        shard: usize,
        after: Epoch,
        until: Duration,
        once: bool,
    },
}

/// See the module.
pub(crate) struct Conductor {
    shared: Rc<Shared>,
    draw: Draw,
    left: Vec<Kind>,
    next_at: Duration,
    /// A move was begun for the next one.
    moved: bool,
    agenda: BTreeMap<(Duration, u64), Act>,
    planned: u64,
    /// The last act that servers could notice.
    disturbed: Duration,
    pub(crate) done: Vec<String>,
}

impl Conductor {
    pub(crate) fn new(shared: &Rc<Shared>) -> Self {
        let mut draw = Draw::new(shared.seed, 1);
        let left = faults::schedule(&mut draw, shared.setting);
        Conductor {
            shared: Rc::clone(shared),
            draw,
            left,
            next_at: Duration::ZERO,
            moved: false,
            agenda: BTreeMap::new(),
            planned: 0,
            disturbed: Duration::ZERO,
            done: Vec::new(),
        }
    }

    /// Faults begin.
    pub(crate) fn begin(&mut self, now: Duration) {
        self.next_at = now + self.draw.millis(100, 600);
    }

    /// Nothing is left to do or to undo.
    pub(crate) fn is_over(&self) -> bool {
        self.left.is_empty() && self.agenda.is_empty()
    }

    /// Between two steps of the simulation.
    pub(crate) fn conduct(&mut self, sim: &mut Sim<'_>, now: Duration) {
        while let Some(entry) = self.agenda.first_entry()
            && entry.key().0 <= now
        {
            let act = entry.remove();
            self.act(sim, act, now);
        }
        let Some(&kind) = self.left.last() else { return };
        if now < self.next_at {
            return;
        }
        if kind == Kind::IsolateServers && self.lacks_checkpoint() {
            count(&self.shared.checkpoints_wanted);
            self.next_at = now + REST;
            return;
        }
        if !self.may(kind, now) {
            return;
        }
        if !std::mem::take(&mut self.moved) && self.draw.below(2) == 0 {
            // The fault meets a move.
            count(&self.shared.moves_wanted);
            (self.moved, self.next_at) = (true, now + self.draw.millis(60, 500));
            return;
        }
        self.left.pop();
        if self.fault(kind, now) {
            tracing::info!(?kind, ?now, "fault");
            self.done.push(format!("{kind:?}"));
        }
        if self.draw.below(3) == 0 {
            count(&self.shared.checkpoints_wanted);
        }
        self.next_at = now + faults::pause(&mut self.draw);
    }

    /// There is nothing that shards could be set back to, and nobody makes it.
    fn lacks_checkpoint(&self) -> bool {
        let seen = self.shared.seen.borrow();
        let asked = self.shared.checkpoints_wanted.get() > 0;
        seen.checkpoint_whole.is_none() && !seen.checkpointing() && !asked
    }

    fn may(&self, kind: Kind, now: Duration) -> bool {
        let seen = self.shared.seen.borrow();
        let hit = |hosts: &[Host]| {
            self.agenda.values().any(|act| match act {
                Act::Start(host) => hosts.contains(host),
                Act::Repair(a, b) | Act::Release(a, b) => hosts.contains(a) || hosts.contains(b),
                Act::KillSuccessor { .. } => hosts == SERVERS,
                _ => false,
            })
        };
        let full = seen.full(self.shared.replicas) && seen.asked > self.disturbed + REST;
        match kind {
            // A successor may be told from what is committed only while there is a leader.
            Kind::KillPrimaryAndSuccessor => full && seen.all_alive() && self.agenda.is_empty(),
            // What is set back needs a leader all the time, and what it is set back to.
            Kind::IsolateServers => {
                full && seen.all_alive()
                    && self.agenda.is_empty()
                    && seen.checkpoint_whole.is_some()
                    && !seen.checkpointing()
            }
            kind if kind.lethal() => full && !hit(&SERVERS) && now > self.disturbed + REST,
            kind if kind.of_a_coordinator() => !hit(&COORDINATORS) && seen.leader.is_some(),
            Kind::HoldServers => !hit(&SERVERS),
            _ => true,
        }
    }

    fn plan(&mut self, at: Duration, act: Act) {
        self.planned += 1;
        self.agenda.insert((at, self.planned), act);
    }

    /// Everything between a host and these is cut from now until `end`.
    fn cut(&mut self, now: Duration, end: Duration, host: Host, others: &[Host], one_way: bool) {
        for &other in others.iter().filter(|&&other| other != host) {
            let act = if one_way { Act::PartitionOneWay } else { Act::Partition };
            self.plan(now, act(host, other));
            self.plan(end, Act::Repair(host, other));
        }
    }

    /// False: there is nobody whom it could hit.
    fn fault(&mut self, kind: Kind, now: Duration) -> bool {
        let shared = Rc::clone(&self.shared);
        let seen = shared.seen.borrow();
        let shard = self.draw.below(SHARDS.into()) as usize;
        let members = seen.members(shard);
        let everybody: Vec<Host> =
            [&COORDINATORS[..], &SERVERS[..], &PROBES[..], &OTHERS[..]].concat();
        let server = self.draw.one_of(&SERVERS);
        let probe = self.draw.one_of(&PROBES);
        let draw = &mut self.draw;
        match kind {
            Kind::KillServer | Kind::PowerOffServer => {
                let machine = kind == Kind::PowerOffServer;
                let end = now + draw.millis(300, 4000);
                self.plan(now, Act::Kill { host: server, machine });
                self.plan(end, Act::Start(server));
            }
            Kind::RestartServer => {
                let end = now + draw.millis(2, 250);
                self.plan(now, Act::Kill { host: server, machine: false });
                self.plan(end, Act::Start(server));
            }
            Kind::PartitionServer | Kind::PartitionServerOneWay => {
                let end = now + draw.millis(500, 6000);
                let one_way = kind == Kind::PartitionServerOneWay;
                self.cut(now, end, server, &everybody, one_way);
            }
            Kind::CutAndKillPrimary => {
                let Some((primary, _)) = members else { return false };
                // Time for pushes to arrive, and to be sent again; not so long that the backups leave the set.
                let reset = now + draw.millis(30, 200);
                let kill = reset + draw.millis(20, 500);
                let end = kill + draw.millis(1000, 4000);
                self.cut(now, kill + Duration::from_millis(20), primary, &SERVERS, false);
                for host in PROBES.into_iter().chain(OTHERS) {
                    self.plan(reset, Act::Reset(host, primary));
                }
                self.plan(kill, Act::Kill { host: primary, machine: false });
                self.plan(end, Act::Start(primary));
            }
            Kind::KillPrimaryAndSuccessor => {
                let route = seen
                    .job
                    .as_ref()
                    .and_then(|job| job.route(downpour_core::id::ShardId(shard as u32)));
                let (Some((primary, others)), Some(route)) = (members, route) else { return false };
                let missing = others[draw.below(others.len() as u64) as usize];
                let kill = now + draw.millis(50, 600);
                let until = kill + Duration::from_secs(4);
                let end = until + draw.millis(500, 1500);
                self.cut(now, kill + Duration::from_millis(20), primary, &[missing], false);
                self.plan(kill, Act::Kill { host: primary, machine: false });
                self.plan(
                    kill,
                    Act::KillSuccessor { shard, after: route.epoch, until, once: false },
                );
                self.plan(end, Act::Start(primary));
            }
            Kind::CutOffDuringCheckpoint => {
                let Some((primary, _)) = members else { return false };
                count(&shared.checkpoints_wanted);
                let (from, lasts) = (now + draw.millis(50, 500), draw.millis(4000, 8000));
                self.cut(from, from + lasts, primary, &everybody, false);
            }
            Kind::KillLeader | Kind::KillCoordinator => {
                let leader = seen.leader.and_then(|id| COORDINATORS.get(id as usize - 1).copied());
                let any = draw.one_of(&COORDINATORS);
                let host = leader.filter(|_| kind == Kind::KillLeader).unwrap_or(any);
                let end = now + draw.millis(100, 3000);
                let machine = draw.below(2) == 0;
                self.plan(now, Act::Kill { host, machine });
                self.plan(end, Act::Start(host));
            }
            Kind::PartitionCoordinator => {
                let host = draw.one_of(&COORDINATORS);
                let end = now + draw.millis(500, 4000);
                self.cut(now, end, host, &everybody, false);
            }
            Kind::HoldServers => {
                let other = draw.one_of(&SERVERS);
                if other == server {
                    return false;
                }
                let end = now + draw.millis(50, 600);
                self.plan(now, Act::Hold(server, other));
                self.plan(end, Act::Release(server, other));
            }
            Kind::HoldClient => {
                let end = now + draw.millis(50, 3000);
                self.plan(now, Act::Hold(probe, server));
                self.plan(end, Act::Release(probe, server));
            }
            Kind::ResetClient => {
                for server in SERVERS {
                    self.plan(now, Act::Reset(probe, server));
                }
            }
            Kind::PauseServer => {
                let end = now + draw.millis(300, 6000);
                for other in everybody.into_iter().filter(|&other| other != server) {
                    self.plan(now, Act::Hold(server, other));
                    self.plan(end, Act::Release(server, other));
                }
            }
            Kind::IsolateServers => {
                let Some((primary, others)) = members else { return false };
                let end = now + draw.millis(9000, 13000);
                for host in others.into_iter().chain([primary]) {
                    self.cut(now, end, host, &COORDINATORS, false);
                }
            }
            Kind::Slow => {
                let end = now + draw.millis(300, 3000);
                let latency = draw.millis(20, 120);
                self.plan(now, Act::Latency(latency));
                self.plan(end, Act::Latency(LATENCY_MAX));
            }
        }
        true
    }

    fn act(&mut self, sim: &mut Sim<'_>, act: Act, now: Duration) {
        tracing::info!(?act, ?now, "act");
        match act {
            Act::Kill { host, machine } => {
                replicas::found_none_that_differs(&self.shared, host);
                self.shared.registries.borrow_mut().remove(host);
                self.shared.down.borrow_mut().insert(host.into());
                sim.crash(host);
                if !machine {
                    sim.bounce(host);
                }
            }
            Act::Start(host) => {
                self.shared.down.borrow_mut().remove(host);
                sim.bounce(host);
            }
            Act::Partition(a, b) => sim.partition(a, b),
            Act::PartitionOneWay(a, b) => sim.partition_oneway(a, b),
            Act::Repair(a, b) => sim.repair(a, b),
            Act::Hold(a, b) => sim.hold(a, b),
            Act::Release(a, b) => sim.release(a, b),
            Act::Reset(a, b) => net::reset(sim.lookup(a), sim.lookup(b)),
            Act::Latency(most) => sim.set_max_message_latency(most),
            Act::KillSuccessor { shard, after, until, once } => {
                let seen = self.shared.seen.borrow();
                let route = seen.job.as_ref().and_then(|job| job.shards.get(shard));
                // Somebody must be left who has everything.
                let replaced = route.filter(|route| route.epoch > after && route.in_sync.len() > 1);
                let successor =
                    replaced.and_then(|_| seen.members(shard)).map(|(primary, _)| primary);
                drop(seen);
                if successor.is_some() && !once {
                    // It has time to acknowledge what its predecessor could not.
                    let act = Act::KillSuccessor { shard, after, until, once: true };
                    let at = now + self.draw.millis(0, 600);
                    self.plan(at, act);
                } else if let Some(host) = successor {
                    self.plan(now, Act::Kill { host, machine: false });
                    let end = until + self.draw.millis(500, 1500);
                    self.plan(end, Act::Start(host));
                } else if now < until {
                    self.plan(now + LOOK, act);
                }
            }
        }
        if !matches!(act, Act::Latency(_) | Act::Reset(..) | Act::KillSuccessor { .. }) {
            self.disturbed = now;
        }
    }
}
