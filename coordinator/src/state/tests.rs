pub(crate) mod checkpoints;
mod consistency;
mod invariants;
pub(crate) mod ledgers;
mod lost;
mod moves;
mod operators;

use std::collections::BTreeMap;

use downpour_core::id::{Epoch, Incarnation, JobId, NodeId, ServerRef, SessionId, ShardId};
use downpour_core::init::Init;
use downpour_core::optimizer::{OptimizerSpec, Sgd};
use downpour_core::placement::TooFewServers;
use downpour_core::routing::ShardRoute;
use downpour_core::spec::{DenseSpec, JobSpec, Shape, TableSpec, VariableSpec};
use downpour_proto::v1;

use super::joins::{self, Join, Limits};
use super::{Outcome, Refused, Reply, State};
use crate::command::{Command, InSyncChange, LabelChange, Opening, Registration};
use crate::room::Room;

const JOB: JobId = JobId(1);
const SHARD: ShardId = ShardId(0);
const LIMITS: Limits = Limits { joins_per_server: 2, moves: 4 };

/// A state machine with the position in its log.
#[derive(Clone, Default)]
pub(crate) struct Machine {
    pub(crate) state: State,
    index: u64,
    requests: u64,
}

impl Machine {
    /// `servers` servers and a job of one shard with `replicas` copies, the primary first.
    pub(crate) fn with_job(servers: u32, replicas: u32) -> (Machine, Vec<ServerRef>) {
        let mut machine = Machine::default();
        for number in 0..servers {
            machine.register(number);
        }
        let created = machine.apply(Command::CreateJob(job_spec("ctr", 1, replicas)));
        assert_eq!(created, Ok(Reply::Created { job: JOB, created: true }));
        let route = machine.route();
        let primary = route.primary.unwrap();
        let members = std::iter::once(primary).chain(route.others(primary)).collect();
        (machine, members)
    }

    pub(crate) fn apply(&mut self, command: Command) -> Outcome {
        self.index += 1;
        self.state.apply(self.index, command)
    }

    fn register(&mut self, number: u32) -> ServerRef {
        match self.register_from(number, "here", false) {
            Ok(Reply::Registered(server)) => server,
            other => panic!("{other:?}"),
        }
    }

    /// A server that says where its process is.
    fn register_from(&mut self, number: u32, origin: &str, exclusive_name: bool) -> Outcome {
        self.requests += 1;
        let registration = Registration {
            name: format!("ps-{number}"),
            address: "host:1".into(),
            zone: String::new(),
            request_id: self.requests.to_string(),
            origin: origin.into(),
            exclusive_name,
            isolation_ms: 60_000,
            lease_ms: 0,
        };
        self.apply(Command::RegisterServer(registration))
    }

    /// A new life of a server that is known.
    fn restart(&mut self, server: ServerRef) -> ServerRef {
        let life = self.register(server.node.0 - 1);
        assert_eq!(life.node, server.node);
        life
    }

    fn judge(&mut self, server: ServerRef) {
        assert_eq!(self.apply(Command::JudgeDead(vec![server])), Ok(Reply::Done));
    }

    fn revive(&mut self, server: ServerRef) {
        assert_eq!(self.apply(Command::Revive(server)), Ok(Reply::Done));
    }

    fn route(&self) -> ShardRoute {
        self.state.cluster().job(JOB).unwrap().view.route(SHARD).unwrap().clone()
    }

    /// Has `server` join, if it may.
    fn join(&mut self, server: ServerRef) {
        let ShardRoute { epoch, set_version, .. } = self.route();
        let join = Join { job: JOB, shard: SHARD, epoch, set_version, server };
        assert_eq!(self.apply(Command::PlanJoins(vec![join])), Ok(Reply::Done));
    }

    /// A change that is based on what is committed now.
    fn change(&self, add: &[ServerRef], remove: &[ServerRef]) -> InSyncChange {
        let route = self.route();
        InSyncChange {
            job: JOB,
            shard: SHARD,
            epoch: route.epoch,
            set_version: route.set_version,
            primary: route.primary.unwrap(),
            add: add.to_vec(),
            remove: remove.to_vec(),
        }
    }

    pub(crate) fn open(&mut self, job: JobId) -> SessionId {
        self.requests += 1;
        let opening = Opening {
            name: "worker".into(),
            kind: v1::SessionKind::Worker,
            request_id: self.requests.to_string(),
        };
        match self.apply(Command::OpenSession(job, opening)) {
            Ok(Reply::Opened(session)) => session,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn close(&mut self, job: JobId, session: SessionId) {
        assert_eq!(self.apply(Command::CloseSessions(vec![(job, session)])), Ok(Reply::Done));
    }

    fn define(&mut self, session: SessionId, spec: VariableSpec) -> (SessionId, bool) {
        match self.apply(Command::DefineVariables(JOB, session, vec![spec])) {
            Ok(Reply::Defined { variables, .. }) => {
                (variables[0].initializer.unwrap(), variables[0].initialized)
            }
            other => panic!("{other:?}"),
        }
    }
}

fn job_spec(name: &str, shards: u32, replicas: u32) -> JobSpec {
    JobSpec { name: name.into(), shards, replicas, min_in_sync: 1, seed: 1 }
}

fn table(name: &str, dim: u32) -> VariableSpec {
    let shape = Shape::Table(TableSpec::new(dim, Init::Zeros, name));
    VariableSpec { name: name.into(), optimizer: optimizer(), shape }
}

fn dense(name: &str) -> VariableSpec {
    let shape = Shape::Dense(DenseSpec { shape: vec![4, 4], block_floats: 8 });
    VariableSpec { name: name.into(), optimizer: optimizer(), shape }
}

fn optimizer() -> OptimizerSpec {
    OptimizerSpec::Sgd(Sgd { learning_rate: 0.1 })
}

fn server(node: u32, incarnation: u64) -> ServerRef {
    ServerRef { node: NodeId(node), incarnation: Incarnation(incarnation) }
}

// Protocol 1.1.

#[test]
fn a_new_life_leaves_every_set_and_another_member_is_promoted_in_the_same_step() {
    let (mut machine, members) = Machine::with_job(3, 2);
    let (primary, backup) = (members[0], members[1]);
    machine.restart(primary);
    let route = machine.route();
    assert_eq!((route.primary, route.in_sync), (Some(backup), vec![backup]));
    assert_eq!((route.epoch, route.set_version), (Epoch(2), 2));
}

#[test]
fn a_new_life_of_a_backup_leaves_the_set_and_the_primary_stays() {
    let (mut machine, members) = Machine::with_job(2, 2);
    machine.restart(members[1]);
    let route = machine.route();
    assert_eq!((route.primary, route.in_sync), (Some(members[0]), vec![members[0]]));
    assert_eq!((route.epoch, route.set_version), (Epoch(1), 2), "no new tenure");
}

#[test]
fn a_shard_whose_last_member_begins_a_new_life_is_lost() {
    let (mut machine, members) = Machine::with_job(2, 1);
    machine.restart(members[0]);
    let route = machine.route();
    assert!(route.lost() && route.in_sync.is_empty());
    machine.restart(members[0]);
    assert_eq!(machine.route(), route, "and stays lost");
}

#[test]
fn a_server_keeps_its_node_and_each_life_has_a_higher_number() {
    let mut machine = Machine::default();
    let (first, other) = (machine.register(0), machine.register(1));
    let second = machine.register(0);
    assert_eq!((first, other, second), (server(1, 1), server(2, 2), server(1, 3)));
}

// Protocol 3.

#[test]
fn no_life_has_the_number_of_one_that_a_lost_log_knew() {
    let founded_at = |now_ms| {
        let mut machine = Machine::default();
        machine.state.tell_time(now_ms);
        [0, 1].map(|number| machine.register(number))
    };
    let (before, after) = (founded_at(5_000), founded_at(6_000));
    assert!(before.iter().all(|old| after.iter().all(|new| old.incarnation < new.incarnation)));
    // Time stands still, or a leader's clock is behind.
    assert!(before[0].incarnation < before[1].incarnation);
}

#[test]
fn a_change_that_is_based_on_another_epoch_version_or_primary_changes_nothing() {
    let (mut machine, members) = Machine::with_job(3, 2);
    let right = machine.change(&[], &members[1..]);
    let wrong = [
        InSyncChange { epoch: Epoch(2), ..right.clone() },
        InSyncChange { set_version: 2, ..right.clone() },
        InSyncChange { primary: members[1], ..right.clone() },
    ];
    let route = machine.route();
    for change in wrong {
        let outcome = machine.apply(Command::ChangeInSync(change));
        assert_eq!(outcome, Ok(Reply::InSync { changed: false, route: route.clone() }));
    }
    let outcome = machine.apply(Command::ChangeInSync(right.clone()));
    let shrunk = ShardRoute { set_version: 2, in_sync: vec![members[0]], ..route };
    assert_eq!(outcome, Ok(Reply::InSync { changed: true, route: shrunk.clone() }));
    let outcome = machine.apply(Command::ChangeInSync(right));
    assert_eq!(outcome, Ok(Reply::InSync { changed: false, route: shrunk }), "only once");
}

#[test]
fn a_set_takes_only_live_servers_on_nodes_of_their_own_and_keeps_its_primary() {
    let (mut machine, members) = Machine::with_job(3, 2);
    let third = (1..=3).map(|n| server(n, n.into())).find(|one| !members.contains(one)).unwrap();
    let refused = |machine: &mut Machine, change| {
        let before = machine.state.clone();
        let outcome = machine.apply(Command::ChangeInSync(change));
        assert!(matches!(outcome, Err(Refused::FailedPrecondition(_))), "{outcome:?}");
        assert_eq!(before.cluster.jobs, machine.state.cluster.jobs);
    };
    let change = machine.change(&[], &members[..1]);
    refused(&mut machine, change);
    let change = machine.change(&[third], &[]);
    refused(&mut machine, change); // three copies where the job has two
    let change = machine.change(&[server(9, 9)], &members[1..]);
    refused(&mut machine, change);
    machine.judge(third);
    let change = machine.change(&[third], &members[1..]);
    refused(&mut machine, change);
    let outcome = machine.apply(Command::ChangeInSync(machine.change(&[], &members[1..])));
    assert!(matches!(outcome, Ok(Reply::InSync { changed: true, .. })));
    let again = machine.restart(third);
    let change = machine.change(&[again], &[]);
    refused(&mut machine, change); // it is not joining
    machine.join(again);
    let outcome = machine.apply(Command::ChangeInSync(machine.change(&[again], &[])));
    assert!(matches!(outcome, Ok(Reply::InSync { changed: true, .. })));
    assert!(machine.route().in_sync.contains(&again) && machine.route().joining.is_none());
}

#[test]
fn a_shard_that_lacks_a_member_gets_one_that_lives_and_the_wish_ends_with_the_tenure_or_that_life()
{
    let (mut machine, members) = Machine::with_job(3, 2);
    let third = (1..=3).map(|n| server(n, n.into())).find(|one| !members.contains(one)).unwrap();
    let plan = |machine: &Machine| {
        joins::plan(machine.state.cluster(), &BTreeMap::new(), LIMITS, &mut Room::default())
    };
    assert_eq!(plan(&machine), [], "nothing is missing");
    machine.join(third);
    assert_eq!(machine.route().joining, None, "nor taken");
    machine.judge(members[1]);
    machine.apply(Command::ChangeInSync(machine.change(&[], &members[1..]))).unwrap();
    let joins = plan(&machine);
    let ShardRoute { epoch, set_version, .. } = machine.route();
    assert_eq!(joins, [Join { job: JOB, shard: SHARD, epoch, set_version, server: third }]);
    machine.apply(Command::PlanJoins(joins.clone())).unwrap();
    assert_eq!(
        (machine.route().joining, machine.route().set_version),
        (Some(third), set_version + 1)
    );
    assert_eq!(plan(&machine), [], "one at a time");
    let before = machine.route();
    machine.apply(Command::PlanJoins(joins)).unwrap();
    assert_eq!(machine.route(), before, "based on what is over");
    // Its life ends.
    let next = machine.restart(third);
    assert_eq!((machine.route().joining, machine.route().set_version), (None, set_version + 2));
    // Proposals that were on their way cannot succeed any more.
    let late = InSyncChange { set_version: set_version + 1, ..machine.change(&[third], &[]) };
    let outcome = machine.apply(Command::ChangeInSync(late));
    assert!(matches!(outcome, Ok(Reply::InSync { changed: false, .. })));
    // The primary gives up, and somebody else is better.
    machine.join(next);
    let given_up = machine.change(&[], &[next]);
    machine.apply(Command::ChangeInSync(given_up)).unwrap();
    assert_eq!((machine.route().joining, machine.route().in_sync), (None, vec![members[0]]));
    let again = machine.restart(members[1]);
    let tried = [((JOB, SHARD), next)].into();
    assert_eq!(
        joins::plan(machine.state.cluster(), &tried, LIMITS, &mut Room::default())[0].server,
        again
    );
    let tried = [((JOB, SHARD), again)].into();
    assert_eq!(
        joins::plan(machine.state.cluster(), &tried, LIMITS, &mut Room::default())[0].server,
        next
    );
    // The tenure ends: its primary alone could have gone on.
    machine.join(again);
    machine.apply(Command::ChangeInSync(machine.change(&[again], &[]))).unwrap();
    assert_eq!(machine.route().in_sync.len(), 2);
}

#[test]
fn who_is_joining_is_never_promoted_and_joins_no_more_under_another_primary() {
    let (mut machine, members) = Machine::with_job(3, 3);
    machine.apply(Command::ChangeInSync(machine.change(&[], &members[2..]))).unwrap();
    machine.join(members[2]);
    machine.judge(members[0]);
    let route = machine.route();
    assert_eq!((route.primary, route.joining), (Some(members[1]), None));
    assert_eq!(route.in_sync, vec![members[1]]);
}

#[test]
fn who_is_joining_is_free_again_while_the_primary_is_not_heard() {
    let (mut machine, members) = Machine::with_job(3, 2);
    let third = (1..=3).map(|n| server(n, n.into())).find(|one| !members.contains(one)).unwrap();
    machine.apply(Command::ChangeInSync(machine.change(&[], &members[1..]))).unwrap();
    machine.join(third);
    assert_eq!(machine.route().joining, Some(third));
    machine.judge(members[0]);
    let route = machine.route();
    assert_eq!((route.primary, route.joining), (Some(members[0]), None), "it is waited for");
    machine.join(third);
    assert_eq!(machine.route().joining, None);
    machine.revive(members[0]);
    machine.join(third);
    assert_eq!(machine.route().joining, Some(third));
}

#[test]
fn a_primary_that_wants_to_remove_all_the_others_although_they_are_heard_is_itself_replaced() {
    let (mut machine, members) = Machine::with_job(3, 3);
    let one = machine.change(&[], &members[1..2]);
    machine.apply(Command::ReplacePrimary(one)).unwrap();
    assert_eq!(machine.route().primary, Some(members[0]), "another one is left");
    let stale = InSyncChange { set_version: 1, ..machine.change(&[], &members[2..]) };
    let outcome = machine.apply(Command::ReplacePrimary(stale));
    assert!(matches!(outcome, Ok(Reply::InSync { changed: false, .. })));
    let all = machine.change(&[], &members[2..]);
    machine.apply(Command::ReplacePrimary(all)).unwrap();
    let route = machine.route();
    assert_eq!((route.primary, route.epoch), (Some(members[2]), Epoch(2)));
    assert_eq!(route.in_sync, [members[2]], "it would want the same of its successor");
    // One that is judged dead takes nothing over.
    machine.join(members[0]);
    machine.apply(Command::ChangeInSync(machine.change(&members[..1], &[]))).unwrap();
    machine.judge(members[0]);
    machine.apply(Command::ReplacePrimary(machine.change(&[], &members[..1]))).unwrap();
    assert_eq!(machine.route().primary, Some(members[2]));
    assert_eq!(machine.route().in_sync, [members[2]]);
}

#[test]
fn no_server_copies_or_is_copied_to_more_than_twice_at_once() {
    let mut machine = Machine::default();
    for number in 0..3 {
        machine.register(number);
    }
    machine.apply(Command::CreateJob(job_spec("ctr", 30, 2))).unwrap();
    let dead = server(1, 1);
    machine.restart(dead);
    let mut rounds = 0;
    loop {
        let joins =
            joins::plan(machine.state.cluster(), &BTreeMap::new(), LIMITS, &mut Room::default());
        if joins.is_empty() {
            break;
        }
        rounds += 1;
        machine.apply(Command::PlanJoins(joins)).unwrap();
        let view = &machine.state.cluster().job(JOB).unwrap().view;
        let mut busy: BTreeMap<ServerRef, u32> = BTreeMap::new();
        let mut open = Vec::new();
        for (shard, route) in (0..).map(ShardId).zip(&view.shards) {
            let Some(joining) = route.joining else { continue };
            *busy.entry(joining).or_default() += 1;
            *busy.entry(route.primary.unwrap()).or_default() += 1;
            open.push((shard, route.clone()));
        }
        assert!(busy.values().all(|&joins| joins <= 2), "{busy:?}");
        for (shard, route) in open {
            let change = InSyncChange {
                job: JOB,
                shard,
                epoch: route.epoch,
                set_version: route.set_version,
                primary: route.primary.unwrap(),
                add: route.joining.into_iter().collect(),
                remove: Vec::new(),
            };
            machine.apply(Command::ChangeInSync(change)).unwrap();
        }
    }
    let view = &machine.state.cluster().job(JOB).unwrap().view;
    assert!(rounds >= 4 && view.shards.iter().all(|route| route.in_sync.len() == 2));
}

#[test]
fn judging_a_backup_dead_does_not_remove_it_and_judging_a_primary_replaces_it() {
    let (mut machine, members) = Machine::with_job(3, 3);
    let before = machine.route();
    machine.judge(members[2]);
    assert_eq!(machine.route(), before, "only the primary removes a backup");
    machine.judge(members[0]);
    let route = machine.route();
    assert_eq!((route.primary, route.epoch), (Some(members[1]), Epoch(2)), "one that is heard");
    assert!(!route.in_sync.contains(&members[0]));
    assert!(route.in_sync.contains(&members[2]), "the new primary will report it");
}

#[test]
fn a_replica_outside_the_set_is_never_promoted() {
    let (mut machine, members) = Machine::with_job(2, 2);
    machine.apply(Command::ChangeInSync(machine.change(&[], &members[1..]))).unwrap();
    machine.judge(members[0]);
    assert_eq!(machine.route().primary, Some(members[0]), "waited for");
    machine.restart(members[0]);
    assert!(machine.route().lost());
}

// Protocol 4.4.

#[test]
fn a_last_member_that_is_only_unreachable_is_waited_for_and_comes_back_as_it_was() {
    let (mut machine, members) = Machine::with_job(1, 1);
    let before = machine.route();
    machine.judge(members[0]);
    assert_eq!(machine.route(), before);
    assert!(!machine.state.cluster().nodes[&members[0].node].view.alive);
    machine.revive(members[0]);
    assert_eq!(machine.route(), before);
    assert!(machine.state.cluster().nodes[&members[0].node].view.alive);
}

#[test]
fn of_two_unreachable_members_the_first_to_be_heard_leads() {
    for first in [0, 1] {
        let (mut machine, members) = Machine::with_job(2, 2);
        machine.judge(members[1]);
        machine.judge(members[0]);
        assert_eq!(machine.route().epoch, Epoch(1), "nobody to promote");
        machine.revive(members[first]);
        assert_eq!(machine.route().primary, Some(members[first]));
    }
}

#[test]
fn a_life_that_is_over_or_holds_nothing_is_not_revived() {
    let (mut machine, members) = Machine::with_job(3, 2);
    machine.judge(members[0]);
    machine.revive(members[0]);
    assert!(!machine.state.cluster().nodes[&members[0].node].view.alive, "it was replaced");
    let newer = machine.restart(members[0]);
    machine.judge(newer);
    machine.revive(members[0]);
    assert!(!machine.state.cluster().nodes[&members[0].node].view.alive, "another life");
}

#[test]
fn a_primary_that_is_over_goes_to_an_unreachable_member_before_the_shard_is_lost() {
    let (mut machine, members) = Machine::with_job(2, 2);
    machine.judge(members[1]);
    machine.restart(members[0]);
    let route = machine.route();
    assert_eq!((route.primary, route.epoch), (Some(members[1]), Epoch(2)));
    machine.revive(members[1]);
    assert_eq!(machine.route(), route);
}

#[test]
fn the_shards_of_a_dead_primary_are_shared_out_evenly() {
    let mut machine = Machine::default();
    for number in 0..4 {
        machine.register(number);
    }
    machine.apply(Command::CreateJob(job_spec("ctr", 60, 2))).unwrap();
    machine.judge(server(1, 1));
    let mut counts = [0; 5];
    for route in &machine.state.cluster().job(JOB).unwrap().view.shards {
        counts[route.primary.unwrap().node.0 as usize] += 1;
    }
    assert_eq!(counts, [0, 0, 20, 20, 20]);
}

#[test]
fn jobs_of_one_shard_do_not_all_have_the_same_primary() {
    let mut machine = Machine::default();
    for number in 0..2 {
        machine.register(number);
    }
    let mut counts = [0; 3];
    for number in 0..6 {
        machine.apply(Command::CreateJob(job_spec(&format!("job-{number}"), 1, 2))).unwrap();
    }
    for job in machine.state.cluster().jobs.values() {
        counts[job.view.shards[0].primary.unwrap().node.0 as usize] += 1;
    }
    assert_eq!(counts, [0, 3, 3]);
}

// Protocol 1.4.

#[test]
fn numbers_of_sessions_rise_over_all_jobs_and_a_closed_one_is_closed_for_ever() {
    let (mut machine, _) = Machine::with_job(1, 1);
    machine.apply(Command::CreateJob(job_spec("second", 1, 1))).unwrap();
    let sessions = [machine.open(JOB), machine.open(JobId(2)), machine.open(JOB)];
    assert_eq!(sessions.map(|session| session.0), [1, 2, 3]);
    let before = machine.state.cluster().job(JOB).unwrap().view.clone();
    assert_eq!(before.version, 2, "opening a session is no change of the view");
    machine.close(JOB, sessions[2]);
    machine.close(JOB, sessions[2]);
    let view = machine.state.cluster().job(JOB).unwrap().view.clone();
    assert!(view.version > before.version);
    assert!(view.sessions.contains(sessions[2]) && !view.sessions.contains(sessions[0]));
    machine.close(JOB, sessions[0]);
    let view = machine.state.cluster().job(JOB).unwrap().view.clone();
    assert!(view.sessions.contains(sessions[0]) && view.sessions.contains(SessionId(2)));
    assert!(!view.sessions.contains(machine.open(JOB)));
}

#[test]
fn a_repeated_request_gives_the_same_life_and_the_same_session() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let registration = Registration {
        name: "ps-9".into(),
        address: "host:1".into(),
        zone: String::new(),
        request_id: "once".into(),
        origin: String::new(),
        exclusive_name: false,
        isolation_ms: 0,
        lease_ms: 0,
    };
    let first = machine.apply(Command::RegisterServer(registration.clone()));
    assert_eq!(machine.apply(Command::RegisterServer(registration)), first);
    let opening =
        Opening { name: "worker".into(), kind: v1::SessionKind::Worker, request_id: "once".into() };
    let first = machine.apply(Command::OpenSession(JOB, opening.clone()));
    assert_eq!(machine.apply(Command::OpenSession(JOB, opening)), first);
}

// Jobs and variables.

#[test]
fn a_job_is_created_once_and_a_different_one_of_its_name_is_refused_by_field() {
    let (mut machine, _) = Machine::with_job(3, 2);
    let again = machine.apply(Command::CreateJob(job_spec("ctr", 1, 2)));
    assert_eq!(again, Ok(Reply::Created { job: JOB, created: false }));
    let other = machine.apply(Command::CreateJob(job_spec("ctr", 2, 2)));
    let Err(Refused::AlreadyExists(problem)) = other else { panic!("{other:?}") };
    assert!(problem.contains("shards is 1, not 2"), "{problem}");
    let large = machine.apply(Command::CreateJob(job_spec("large", 1, 3)));
    assert!(large.is_ok());
    machine.judge(server(1, 1));
    let refused = machine.apply(Command::CreateJob(job_spec("larger", 1, 3)));
    let too_few = TooFewServers { replicas: 3, servers: 2 };
    assert_eq!(refused, Err(Refused::TooFewServers(too_few)));
}

#[test]
fn a_deleted_job_is_gone_and_its_number_never_comes_back() {
    let (mut machine, _) = Machine::with_job(1, 1);
    assert_eq!(machine.apply(Command::DeleteJob(JOB, None)), Ok(Reply::Done));
    assert_eq!(machine.apply(Command::DeleteJob(JOB, None)), Ok(Reply::Done), "a repeat");
    let created = machine.apply(Command::CreateJob(job_spec("ctr", 1, 1)));
    assert_eq!(created, Ok(Reply::Created { job: JobId(2), created: true }));
    assert!(matches!(machine.apply(Command::DeleteJob(JobId(3), None)), Err(Refused::NotFound(_))));
}

#[test]
fn variables_are_defined_all_or_none_and_equal_definitions_are_one_variable() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let session = machine.open(JOB);
    let define =
        |machine: &mut Machine, specs| machine.apply(Command::DefineVariables(JOB, session, specs));
    let numbers = |outcome: Outcome| match outcome {
        Ok(Reply::Defined { variables, .. }) => {
            variables.iter().map(|defined| defined.variable.id.0).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(numbers(define(&mut machine, vec![table("a", 4), table("b", 4)])), [1, 2]);
    let before = machine.state.clone();
    let refused = define(&mut machine, vec![table("c", 4), table("a", 8)]);
    assert!(matches!(refused, Err(Refused::AlreadyExists(_))), "{refused:?}");
    assert_eq!(machine.state.cluster.jobs, before.cluster.jobs);
    assert_eq!(numbers(define(&mut machine, vec![table("b", 4), table("c", 4)])), [2, 3]);
    let stranger = Command::DefineVariables(JOB, SessionId(9), vec![table("d", 1)]);
    assert!(matches!(machine.apply(stranger), Err(Refused::NotFound(_))));
}

#[test]
fn the_blocks_of_all_dense_variables_of_a_job_are_bounded() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let session = machine.open(JOB);
    let dense = |name: &str, floats| {
        let shape = Shape::Dense(DenseSpec { shape: vec![floats], block_floats: 8 });
        VariableSpec { name: name.into(), optimizer: optimizer(), shape }
    };
    let mut define = |specs| machine.apply(Command::DefineVariables(JOB, session, specs));
    let half = 8 * (2 << 20);
    let refused = define(vec![dense("a", half), dense("b", half + 1)]);
    let Err(Refused::FailedPrecondition(problem)) = refused else { panic!("{refused:?}") };
    assert!(problem.starts_with("dense.block_floats: "), "{problem}");
    assert!(define(vec![dense("a", half)]).is_ok());
    assert!(define(vec![dense("b", half + 1)]).is_err());
    assert!(define(vec![dense("b", half), table("c", 4)]).is_ok());
    assert!(define(vec![dense("a", half)]).is_ok(), "at the bound what is known is known");
}

#[test]
fn the_first_session_initialises_a_dense_variable_and_the_next_one_where_it_ended_too_early() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let (first, second) = (machine.open(JOB), machine.open(JOB));
    assert_eq!(machine.define(first, dense("net")), (first, false));
    assert_eq!(machine.define(second, dense("net")), (first, false));
    let mark = |machine: &mut Machine, session| {
        let variables = vec![downpour_core::id::VariableId(1)];
        machine.apply(Command::MarkInitialized(JOB, session, variables))
    };
    assert!(matches!(mark(&mut machine, second), Err(Refused::FailedPrecondition(_))));
    machine.close(JOB, first);
    assert_eq!(machine.define(second, dense("net")), (second, false));
    assert_eq!(mark(&mut machine, second), Ok(Reply::Done));
    assert_eq!(mark(&mut machine, second), Ok(Reply::Done), "a repeat");
    machine.close(JOB, second);
    let third = machine.open(JOB);
    assert_eq!(machine.define(third, dense("net")), (second, true));
}

#[test]
fn a_label_is_a_register_with_compare_and_swap() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let mut label = |value: &str, expected: Option<&str>| {
        let change = LabelChange {
            key: "owner".into(),
            value: value.into(),
            expected: expected.map(Into::into),
        };
        match machine.apply(Command::LabelJob(JOB, change)) {
            Ok(Reply::Labelled { changed, value }) => (changed, value),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(label("a", Some("")), (true, "a".into()));
    assert_eq!(label("b", Some("")), (false, "a".into()));
    assert_eq!(label("b", Some("a")), (true, "b".into()));
    assert_eq!(label("", None), (true, String::new()));
    assert_eq!(label("c", Some("")), (true, "c".into()));
}

#[test]
fn the_labels_of_a_job_fit_into_a_command_and_removing_one_makes_room() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let mut label = |number: usize, value: String| {
        let key = format!("label/{number}");
        machine.apply(Command::LabelJob(JOB, LabelChange { key, value, expected: None }))
    };
    let full = (0..256).find(|&number| label(number, "x".repeat(4096)).is_err());
    assert_eq!(full, Some(127));
    assert!(label(0, String::new()).is_ok());
    assert!(label(127, "x".repeat(4096)).is_ok());
}

#[test]
fn a_state_at_its_bound_fits_into_a_message_and_takes_nothing_more() {
    let mut machine = Machine::default();
    for number in 0..3 {
        machine.register(number);
    }
    let mut jobs = 0;
    let refused = loop {
        let spec = job_spec(&format!("job-{jobs}"), 65_536, 3);
        match machine.apply(Command::CreateJob(spec)) {
            Ok(_) => jobs += 1,
            Err(refused) => break refused,
        }
    };
    assert!(
        matches!(&refused, Refused::FailedPrecondition(problem) if problem.contains("delete jobs"))
    );
    assert!(jobs >= 7, "{jobs}");
    let bytes = machine.state.snapshot().len();
    assert!(bytes <= machine.state.bytes_max());
    assert!(bytes < downpour_proto::transport::MESSAGE_BYTES_MAX - (1 << 20), "{bytes}");
    let small = machine.apply(Command::CreateJob(job_spec("small", 1, 1)));
    assert!(small.is_ok(), "what fits is still taken");
}
