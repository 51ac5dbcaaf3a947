//! Whether a server has room for one more copy, by what the servers report: what it may hold is a label of its own (`--capacity-bytes`), or follows from its memory
//! limit. Volatile, like everything that is measured: what nobody has reported takes nothing, and who reported no bound has none.

use std::collections::BTreeMap;

use downpour_core::id::{JobId, ServerRef, ShardId};
use downpour_core::rebalance::FULL;

use crate::liveness::Liveness;
use crate::state::Cluster;

/// Of those that have a bound, what is free; copies that are planned from it take their part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Room {
    free: BTreeMap<ServerRef, u64>,
    copies: BTreeMap<(JobId, ShardId), u64>,
    refused: bool,
}

impl Room {
    /// As far as this leader knows.
    #[must_use]
    pub fn new(cluster: &Cluster, liveness: &Liveness) -> Self {
        let mut room = Room::default();
        let (mut held, mut coming) = (BTreeMap::new(), BTreeMap::new());
        for (job, shard, _, route) in cluster.routes() {
            let Some(report) = liveness.last_report(job, shard) else { continue };
            let bytes = report.copy_bytes;
            room.copies.insert((job, shard), bytes);
            let add = |sums: &mut BTreeMap<ServerRef, u64>, server: ServerRef| {
                let sum = sums.entry(server).or_default();
                *sum = sum.saturating_add(bytes);
            };
            let more = route.joining.into_iter().chain(route.moving.map(|moving| moving.to));
            let mut more: Vec<_> = more.filter(|one| !route.in_sync.contains(one)).collect();
            more.dedup();
            route.in_sync.iter().chain(&more).for_each(|&server| add(&mut held, server));
            more.into_iter().for_each(|server| add(&mut coming, server));
        }
        for server in cluster.nodes.values().map(|node| node.view.server) {
            let Some(load) = liveness.load(server) else { continue };
            let of = |sums: &BTreeMap<ServerRef, u64>| sums.get(&server).copied().unwrap_or(0);
            let by_label =
                (load.capacity_bytes > 0).then(|| load.capacity_bytes.saturating_sub(of(&held)));
            let by_memory = (load.memory_limit > 0).then(|| {
                let limit = (FULL * load.memory_limit as f64) as u64;
                limit.saturating_sub(load.memory_bytes.saturating_add(of(&coming)))
            });
            if let Some(free) = by_label.into_iter().chain(by_memory).min() {
                room.free.insert(server, free);
            }
        }
        room
    }

    /// Whether a copy of the shard may go there.
    ///
    /// # Errors
    /// It may not: what is free, and what the copy takes.
    pub fn fits(
        &mut self,
        server: ServerRef,
        job: JobId,
        shard: ShardId,
    ) -> Result<(), (u64, u64)> {
        let bytes = self.copies.get(&(job, shard)).copied().unwrap_or(0);
        match self.free.get(&server) {
            Some(&free) if bytes > free => {
                self.refused = true;
                Err((free, bytes))
            }
            _ => Ok(()),
        }
    }

    /// Whether there was no room for something: with other reports there may be, though nothing is committed.
    #[must_use]
    pub fn refused(&self) -> bool {
        self.refused
    }

    /// It goes there.
    pub fn take(&mut self, server: ServerRef, job: JobId, shard: ShardId) {
        let bytes = self.copies.get(&(job, shard)).copied().unwrap_or(0);
        if let Some(free) = self.free.get_mut(&server) {
            *free = free.saturating_sub(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use downpour_core::id::NodeId;
    use downpour_core::spec::JobSpec;
    use downpour_core::view::Admission;
    use downpour_proto::v1;

    use super::*;
    use crate::command::{Command, Registration};
    use crate::state::joins::{self, Limits};
    use crate::state::moves::{Placing, evacuations};
    use crate::state::{Reply, State};

    const JOB: JobId = JobId(1);
    const SHARDS: u32 = 8;
    const BYTES: u64 = 1000;
    const LIMITS: Limits = Limits { joins_per_server: 100, moves: 100 };

    /// Two servers with a job whose shards have as many bytes each, and a third that came later.
    struct World {
        state: State,
        index: u64,
        liveness: Liveness,
        servers: Vec<ServerRef>,
    }

    impl World {
        fn new(replicas: u32) -> Self {
            let (state, liveness) = (State::default(), Liveness::new(Instant::now()));
            let mut world = World { state, index: 0, liveness, servers: Vec::new() };
            world.register();
            world.register();
            let name = "ctr".into();
            let (shards, min_in_sync, seed) = (SHARDS, 1, 1);
            let spec = JobSpec { name, shards, replicas, min_in_sync, seed };
            world.apply(Command::CreateJob(spec));
            world.register();
            for shard in 0..SHARDS {
                let report =
                    v1::ShardReport { job: 1, shard, copy_bytes: BYTES, ..Default::default() };
                world.liveness.report(report);
            }
            world
        }

        fn register(&mut self) {
            let name = format!("ps-{}", self.servers.len());
            let registered = self.apply(Command::RegisterServer(Registration {
                request_id: name.clone(),
                name,
                address: "host:1".into(),
                zone: String::new(),
                origin: String::new(),
                exclusive_name: false,
                isolation_ms: 0,
                lease_ms: 0,
            }));
            let Reply::Registered(server) = registered else { panic!("{registered:?}") };
            self.servers.push(server);
        }

        fn apply(&mut self, command: Command) -> Reply {
            self.index += 1;
            self.state.apply(self.index, command).expect("allowed")
        }

        fn load(&mut self, server: usize, load: v1::NodeLoad) {
            self.liveness.take_load(self.servers[server], load);
        }

        fn room(&self) -> Room {
            Room::new(self.state.cluster(), &self.liveness)
        }

        /// Who would get what the first server holds.
        fn evacuated_to(&mut self) -> Vec<ServerRef> {
            self.apply(Command::Admit(NodeId(1), Admission::Draining));
            let moves = evacuations(self.state.cluster(), &BTreeMap::new(), &mut self.room());
            let to = moves.iter().map(|one| match one.placing {
                Placing::Move(moving) => moving.to,
                other => panic!("{other:?}"),
            });
            to.collect()
        }
    }

    fn capacity(capacity_bytes: u64) -> v1::NodeLoad {
        v1::NodeLoad { capacity_bytes, ..Default::default() }
    }

    #[test]
    fn a_drained_servers_copies_go_where_there_is_room_and_the_others_stay() {
        let mut world = World::new(1);
        world.load(2, capacity(2 * BYTES));
        let to = world.evacuated_to();
        let (second, third) = (world.servers[1], world.servers[2]);
        assert_eq!(to.len(), 4, "one of them has no bound");
        assert_eq!(to.iter().filter(|to| **to == third).count(), 2);
        // It has its four shards.
        world.load(1, capacity(5 * BYTES));
        let to = world.evacuated_to();
        assert_eq!(to.iter().filter(|to| **to == second).count(), 1, "{to:?}");
        assert_eq!(to.len(), 3, "one stays");
    }

    #[test]
    fn a_shard_gets_no_member_without_room_for_it() {
        for (load, joins) in [
            (v1::NodeLoad::default(), 8),
            (capacity(3 * BYTES), 3),
            (capacity(BYTES - 1), 0),
            // Nine tenths of it.
            (v1::NodeLoad { memory_limit: 5000, memory_bytes: 1000, ..Default::default() }, 3),
        ] {
            let mut world = World::new(2);
            world.load(2, load);
            let gone = world.servers[1];
            world.apply(Command::RegisterServer(Registration {
                name: "ps-1".into(),
                request_id: "again".into(),
                address: "host:1".into(),
                zone: String::new(),
                origin: String::new(),
                exclusive_name: true,
                isolation_ms: 0,
                lease_ms: 0,
            }));
            assert!(world.state.cluster().nodes[&gone.node].view.server != gone);
            world.apply(Command::Admit(gone.node, Admission::Cordoned));
            // They are led by the first server now.
            for shard in 0..SHARDS {
                let report =
                    v1::ShardReport { job: 1, shard, copy_bytes: BYTES, ..Default::default() };
                world.liveness.report(report);
            }
            let mut room = world.room();
            let planned = joins::plan(world.state.cluster(), &BTreeMap::new(), LIMITS, &mut room);
            assert_eq!(planned.len(), joins, "{load:?}");
        }
    }

    #[test]
    fn what_is_on_its_way_takes_its_room_already() {
        let mut world = World::new(1);
        world.load(2, capacity(BYTES));
        let (third, mut room) = (world.servers[2], world.room());
        assert_eq!(room.fits(third, JOB, ShardId(0)), Ok(()));
        room.take(third, JOB, ShardId(0));
        assert!(!room.refused());
        assert_eq!(room.fits(third, JOB, ShardId(1)), Err((0, BYTES)));
        assert!(room.refused());
        assert_eq!(room.fits(third, JOB, ShardId(99)), Ok(()), "nobody has said what it takes");
        world.apply(Command::Admit(NodeId(1), Admission::Draining));
        let moves = evacuations(world.state.cluster(), &BTreeMap::new(), &mut world.room());
        world.apply(Command::Place(moves));
        assert_eq!(world.room().fits(third, JOB, ShardId(1)), Err((0, BYTES)));
    }
}
