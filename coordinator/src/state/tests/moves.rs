//! Moves: each step is found in the committed state, whoever dies meanwhile.

use std::collections::BTreeMap;

use downpour_core::routing::{Move, MoveStep};
use downpour_core::view::Admission;

use super::super::moves::{self, Placement, Placing};
use super::*;

impl Machine {
    fn try_place(&mut self, placing: Placing) -> Outcome {
        let ShardRoute { epoch, set_version, .. } = self.route();
        let reason = "a test".into();
        let placement = Placement { job: JOB, shard: SHARD, epoch, set_version, placing, reason };
        self.apply(Command::Place(vec![placement]))
    }

    fn place(&mut self, placing: Placing) {
        assert_eq!(self.try_place(placing), Ok(Reply::Placed(1)), "{:?}", self.route());
    }

    /// What the leader would commit now.
    fn lead(&mut self) {
        let cluster = self.state.cluster().clone();
        let mut placements = moves::promotions(&cluster);
        placements.extend(moves::evacuations(&cluster, &BTreeMap::new(), &mut Room::default()));
        self.apply(Command::Place(placements)).unwrap();
        let joins =
            joins::plan(self.state.cluster(), &BTreeMap::new(), LIMITS, &mut Room::default());
        self.apply(Command::PlanJoins(joins)).unwrap();
    }

    fn add_joining(&mut self) {
        let joining = self.route().joining.expect("somebody is joining");
        let change = self.change(&[joining], &[]);
        self.apply(Command::ChangeInSync(change)).unwrap();
    }

    fn remove(&mut self, member: ServerRef) {
        let change = self.change(&[], &[member]);
        self.apply(Command::ChangeInSync(change)).unwrap();
    }

    fn step(&self) -> Option<MoveStep> {
        self.route().step()
    }

    fn free(&self) -> ServerRef {
        let nodes = self.state.cluster().nodes.values().map(|node| node.view.server);
        let members = self.route().in_sync;
        nodes.into_iter().find(|one| !members.contains(one)).expect("one is free")
    }

    /// The events since `version`.
    fn told(&self, version: u64) -> Vec<&str> {
        let events = self.state.cluster().events.iter();
        events.filter(|event| event.version > version).map(|event| event.text.as_str()).collect()
    }
}

fn moving(servers: u32, replicas: u32) -> (Machine, Move) {
    let (mut machine, members) = Machine::with_job(servers, replicas);
    let moving = Move { from: members[0], to: machine.free() };
    machine.place(Placing::Move(moving));
    (machine, moving)
}

#[test]
fn a_primary_moves_in_four_committed_steps_and_is_a_member_until_the_new_one_serves() {
    for replicas in [1, 2] {
        let (mut machine, Move { from, to }) = moving(3, replicas);
        assert_eq!(machine.step(), Some(MoveStep::Queued));
        machine.lead();
        assert_eq!((machine.step(), machine.route().joining), (Some(MoveStep::Copying), Some(to)));
        let before = machine.route();
        machine.lead();
        assert_eq!(machine.route(), before, "the primary is at work");
        machine.add_joining();
        assert_eq!(machine.step(), Some(MoveStep::Promotion));
        assert_eq!(machine.route().in_sync.len(), replicas as usize + 1);
        assert_eq!(machine.route().leaving(replicas), None, "a primary is not taken from a set");
        let epoch = machine.route().epoch;
        machine.lead();
        assert_eq!(machine.route().primary, Some(to));
        assert_eq!(machine.route().epoch.0, epoch.0 + 1);
        assert_eq!(machine.route().leaving(replicas), Some(from));
        let before = machine.route();
        machine.lead();
        assert_eq!(machine.route(), before, "only the primary removes a member");
        machine.remove(from);
        let route = machine.route();
        assert_eq!((route.moving, route.in_sync.len()), (None, replicas as usize));
        assert!(route.in_sync.contains(&to) && !route.in_sync.contains(&from));
        assert!(machine.told(0).iter().any(|text| text.contains("done")));
    }
}

#[test]
fn a_backup_moves_without_a_new_epoch() {
    let (mut machine, members) = Machine::with_job(3, 2);
    let (from, to) = (members[1], machine.free());
    machine.place(Placing::Move(Move { from, to }));
    machine.lead();
    machine.add_joining();
    assert_eq!(machine.route().leaving(2), Some(from));
    machine.lead();
    machine.remove(from);
    let route = machine.route();
    assert_eq!((route.primary, route.epoch), (Some(members[0]), Epoch(1)));
    assert!(route.moving.is_none() && route.in_sync.contains(&to));
}

#[test]
fn a_placement_that_cannot_be_is_passed_over() {
    let (mut machine, members) = Machine::with_job(4, 2);
    let free = machine.free();
    let from = members[0];
    let nothing = [
        Placing::Move(Move { from, to: members[1] }),
        Placing::Move(Move { from: free, to: free }),
        Placing::Move(Move { from, to: server(9, 9) }),
        Placing::Promote(from),
        Placing::Promote(free),
        Placing::Cancel,
    ];
    for placing in nothing {
        let before = machine.route();
        assert_eq!(machine.try_place(placing), Ok(Reply::Placed(0)), "{placing:?}");
        assert_eq!(machine.route(), before);
    }
    machine.place(Placing::Move(Move { from, to: free }));
    let again = machine.try_place(Placing::Move(Move { from: members[1], to: free }));
    assert_eq!(again, Ok(Reply::Placed(0)), "one move at a time");
    let stale = Placement {
        job: JOB,
        shard: SHARD,
        epoch: Epoch(1),
        set_version: 1,
        placing: Placing::Cancel,
        reason: String::new(),
    };
    assert_eq!(machine.apply(Command::Place(vec![stale])), Ok(Reply::Placed(0)));
}

#[test]
fn a_change_of_primary_between_members_copies_nothing() {
    let (mut machine, members) = Machine::with_job(3, 2);
    machine.place(Placing::Promote(members[1]));
    let route = machine.route();
    assert_eq!((route.primary, route.epoch), (Some(members[1]), Epoch(2)));
    assert_eq!((route.in_sync.len(), route.joining, route.moving), (2, None, None));
}

#[test]
fn the_death_of_who_copies_sends_the_move_back_into_the_queue() {
    // The backup is to move; the primary dies while it copies.
    let (mut machine, members) = Machine::with_job(4, 3);
    let (from, to) = (members[1], machine.free());
    machine.place(Placing::Move(Move { from, to }));
    machine.lead();
    assert_eq!(machine.step(), Some(MoveStep::Copying));
    machine.judge(members[0]);
    assert_eq!(machine.step(), Some(MoveStep::Queued));
    assert_ne!(machine.route().primary, Some(members[0]));
    // The next primary copies anew, although a member is missing meanwhile.
    machine.lead();
    assert_eq!((machine.step(), machine.route().joining), (Some(MoveStep::Copying), Some(to)));
}

#[test]
fn a_move_ends_with_the_life_of_who_it_goes_to_and_the_old_copy_stays() {
    for steps in 0..4 {
        let (mut machine, Move { from, to }) = moving(3, 2);
        if steps > 0 {
            machine.lead();
        }
        if steps > 1 {
            machine.add_joining();
        }
        if steps > 2 {
            machine.lead();
            assert_eq!(machine.route().primary, Some(to));
        }
        machine.restart(to);
        let route = machine.route();
        assert_eq!((route.moving, route.joining), (None, None), "{steps}: {route:?}");
        assert!(route.in_sync.contains(&from) && route.in_sync.len() == 2, "{steps}: {route:?}");
        assert!(machine.told(0).iter().any(|text| text.contains("came to nothing")));
    }
}

#[test]
fn a_move_is_over_when_the_old_copy_dies_and_the_new_one_is_made_all_the_same() {
    for steps in 0..4 {
        let (mut machine, Move { from, to }) = moving(3, 2);
        if steps > 0 {
            machine.lead();
        }
        if steps > 1 {
            machine.add_joining();
        }
        if steps > 2 {
            machine.lead();
        }
        machine.restart(from);
        assert_eq!(machine.route().moving, None);
        machine.lead();
        if machine.route().joining.is_some() {
            machine.add_joining();
        }
        let route = machine.route();
        assert!(!route.in_sync.contains(&from) && route.in_sync.len() == 2, "{steps}: {route:?}");
        assert!(steps < 2 || route.in_sync.contains(&to), "{steps}: {route:?}");
    }
}

#[test]
fn a_copy_that_is_still_needed_stays_until_another_one_has_joined() {
    let (mut machine, Move { from, to }) = moving(4, 2);
    let other = machine.route().others(from).next().unwrap();
    machine.lead();
    machine.add_joining();
    machine.judge(other);
    machine.remove(other);
    machine.lead();
    let route = machine.route();
    assert_eq!((route.primary, route.leaving(2)), (Some(to), None), "{route:?}");
    machine.lead();
    machine.add_joining();
    assert_eq!(machine.route().leaving(2), Some(from));
    machine.remove(from);
    assert_eq!((machine.route().in_sync.len(), machine.route().moving), (2, None));
}

#[test]
fn a_move_is_undone_before_the_new_primary_is_committed_and_not_after() {
    let (mut machine, Move { from, to }) = moving(3, 2);
    machine.place(Placing::Cancel);
    assert_eq!(machine.route().moving, None, "queued");
    machine.place(Placing::Move(Move { from, to }));
    machine.lead();
    machine.place(Placing::Cancel);
    assert_eq!((machine.route().moving, machine.route().joining), (None, None), "copying");
    machine.place(Placing::Move(Move { from, to }));
    machine.lead();
    machine.add_joining();
    machine.place(Placing::Cancel);
    assert_eq!(machine.route().leaving(2), Some(to), "it leaves as any other");
    machine.lead();
    assert_eq!(machine.route().primary, Some(from));
    machine.remove(to);
    assert_eq!(machine.route().moving, None);
    machine.place(Placing::Move(Move { from, to }));
    machine.lead();
    machine.add_joining();
    machine.lead();
    assert_eq!(machine.try_place(Placing::Cancel), Ok(Reply::Placed(0)), "promoted");
}

#[test]
fn a_copy_that_does_not_keep_up_ends_its_move() {
    let (mut machine, Move { from, to }) = moving(3, 2);
    machine.lead();
    machine.remove(to);
    assert_eq!((machine.route().moving, machine.route().joining), (None, None));
    machine.place(Placing::Move(Move { from, to }));
    machine.lead();
    machine.add_joining();
    machine.remove(to);
    assert_eq!(machine.route().moving, None);
}

#[test]
fn a_cordoned_server_is_given_nothing_and_what_was_on_its_way_goes_elsewhere() {
    let (mut machine, Move { from, to }) = moving(3, 2);
    machine.lead();
    machine.apply(Command::Admit(to.node, Admission::Cordoned)).unwrap();
    assert_eq!((machine.route().moving, machine.route().joining), (None, None));
    assert_eq!(machine.try_place(Placing::Move(Move { from, to })), Ok(Reply::Placed(0)));
    machine.apply(Command::CreateJob(job_spec("other", 8, 2))).unwrap();
    let other = &machine.state.cluster().job(JobId(2)).unwrap().view;
    assert!(other.shards.iter().all(|route| !route.in_sync.contains(&to)));
    let tight = machine.apply(Command::CreateJob(job_spec("tight", 8, 3)));
    assert_eq!(tight, Err(Refused::TooFewServers(TooFewServers { replicas: 3, servers: 2 })));
    // It stays so over lives of its process.
    let to = machine.restart(to);
    assert!(!machine.state.cluster().takes_copies(to));
    machine.apply(Command::Admit(to.node, Admission::Open)).unwrap();
    machine.place(Placing::Move(Move { from, to }));
}

#[test]
fn a_drained_server_ends_with_nothing_and_can_be_removed_when_it_is_gone() {
    let mut machine = Machine::default();
    let servers: Vec<_> = (0..4).map(|number| machine.register(number)).collect();
    machine.apply(Command::CreateJob(job_spec("ctr", 12, 2))).unwrap();
    let drained = servers[1];
    machine.apply(Command::Admit(drained.node, Admission::Draining)).unwrap();
    assert!(matches!(
        machine.apply(Command::RemoveNode(drained.node)),
        Err(Refused::FailedPrecondition(problem)) if problem.contains("drain")
    ));
    let held = |machine: &Machine| machine.state.cluster().holds_shards(drained);
    let mut rounds = 0;
    while held(&machine) {
        rounds += 1;
        assert!(rounds < 100, "it never ends");
        machine.lead();
        let routes: Vec<_> = machine
            .state
            .cluster()
            .routes()
            .map(|(_, shard, _, route)| (shard, route.clone()))
            .collect();
        let under_way = routes.iter().filter(|(_, route)| route.joining.is_some()).count();
        assert!(under_way <= LIMITS.moves);
        for (shard, route) in routes {
            let change = InSyncChange {
                job: JOB,
                shard,
                epoch: route.epoch,
                set_version: route.set_version,
                primary: route.primary.unwrap(),
                add: route.joining.into_iter().collect(),
                remove: route.leaving(2).into_iter().collect(),
            };
            machine.apply(Command::ChangeInSync(change)).unwrap();
        }
    }
    let routes = machine.state.cluster().routes();
    assert!(
        routes
            .into_iter()
            .all(|(_, _, _, route)| route.in_sync.len() == 2 && route.moving.is_none())
    );
    // Not beyond balance: the others share what it had.
    let mut copies: BTreeMap<ServerRef, u32> = BTreeMap::new();
    for (_, _, _, route) in machine.state.cluster().routes() {
        route.in_sync.iter().for_each(|member| *copies.entry(*member).or_default() += 1);
    }
    assert!(copies.values().all(|&count| count == 8), "{copies:?}");
    let alive = machine.apply(Command::RemoveNode(drained.node));
    assert!(matches!(alive, Err(Refused::FailedPrecondition(_))));
    machine.judge(drained);
    assert_eq!(machine.apply(Command::RemoveNode(drained.node)), Ok(Reply::Done));
    assert!(!machine.state.cluster().nodes.contains_key(&drained.node));
}

#[test]
fn a_drain_waits_where_nobody_can_take_the_copy_and_ends_when_it_is_called_off() {
    let (mut machine, members) = Machine::with_job(2, 2);
    machine.apply(Command::Admit(members[0].node, Admission::Draining)).unwrap();
    machine.lead();
    assert_eq!(machine.route().moving, None);
    machine.register(7);
    machine
        .apply(Command::Place(moves::evacuations(
            machine.state.cluster(),
            &BTreeMap::new(),
            &mut Room::default(),
        )))
        .unwrap();
    assert_eq!(machine.step(), Some(MoveStep::Queued));
    machine.apply(Command::Admit(members[0].node, Admission::Open)).unwrap();
    assert_eq!(machine.route().moving, None);
}

#[test]
fn a_drain_goes_elsewhere_when_the_copy_could_not_be_made_there() {
    let (mut machine, members) = Machine::with_job(3, 1);
    machine.apply(Command::Admit(members[0].node, Admission::Draining)).unwrap();
    let to = |machine: &Machine, tried: Option<ServerRef>| {
        let tried = tried.into_iter().map(|server| ((JOB, SHARD), server)).collect();
        match moves::evacuations(machine.state.cluster(), &tried, &mut Room::default())[..] {
            [Placement { placing: Placing::Move(moving), .. }] => moving.to,
            ref other => panic!("{other:?}"),
        }
    };
    let first = to(&machine, None);
    assert_ne!(to(&machine, Some(first)), first, "the primary cannot reach it, or it is too slow");
}
