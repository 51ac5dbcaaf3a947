//! Random commands never break what must always hold, and a state that went through a snapshot goes on as if it had not.

use std::collections::{BTreeMap, BTreeSet};

use downpour_core::id::{Epoch, JobId, ServerRef, SessionId, ShardId};
use downpour_core::routing::{Move, ShardRoute};
use downpour_core::view::Admission;
use proptest::prelude::*;
use proptest::sample::Index;

use super::super::joins::{self, Join};
use super::super::moves::{self, Placement, Placing};
use super::super::{Cluster, Life, Outcome, Reply, State};
use super::{LIMITS, Machine, job_spec, server, table};
use crate::command::{Command, InSyncChange, LabelChange, Opening, Registration};
use crate::room::Room;

/// What is tried next. Choices are made among what exists when it is tried.
#[derive(Clone, Debug)]
enum Step {
    Register {
        name: u32,
        request: u8,
    },
    Judge(Index),
    Revive(Index),
    Join {
        job: Index,
        shard: Index,
        server: Option<Index>,
    },
    Change {
        job: Index,
        shard: Index,
        add: Option<Index>,
        remove: Option<Index>,
        stale: bool,
    },
    /// What the leader would do about moves.
    Lead,
    Place {
        job: Index,
        shard: Index,
        server: Index,
        kind: u8,
    },
    Admit {
        server: Index,
        admission: u8,
    },
    RemoveNode(Index),
    Create {
        name: u8,
        shards: u32,
        replicas: u32,
    },
    Delete(Index),
    Define {
        job: Index,
        session: Index,
        name: u8,
        dim: u32,
    },
    Label {
        job: Index,
        value: u8,
        expected: Option<u8>,
    },
    Open {
        job: Index,
        request: u8,
    },
    Close {
        job: Index,
        session: Index,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    prop_oneof![
        4 => (0u32..5, 0u8..20).prop_map(|(name, request)| Step::Register { name, request }),
        4 => index().prop_map(Step::Judge),
        2 => index().prop_map(Step::Revive),
        6 => (index(), index(), any::<Option<Index>>(), any::<Option<Index>>(), prop::bool::weighted(0.2))
            .prop_map(|(job, shard, add, remove, stale)| Step::Change { job, shard, add, remove, stale }),
        4 => (index(), index(), any::<Option<Index>>())
            .prop_map(|(job, shard, server)| Step::Join { job, shard, server }),
        6 => (index(), index(), index(), 0u8..8)
            .prop_map(|(job, shard, server, kind)| Step::Place { job, shard, server, kind }),
        4 => Just(Step::Lead),
        2 => (index(), 0u8..3).prop_map(|(server, admission)| Step::Admit { server, admission }),
        1 => index().prop_map(Step::RemoveNode),
        2 => (0u8..4, 1u32..6, 1u32..=3)
            .prop_map(|(name, shards, replicas)| Step::Create { name, shards, replicas }),
        1 => index().prop_map(Step::Delete),
        2 => (index(), index(), 0u8..4, 1u32..3)
            .prop_map(|(job, session, name, dim)| Step::Define { job, session, name, dim }),
        2 => (index(), 0u8..3, any::<Option<u8>>())
            .prop_map(|(job, value, expected)| Step::Label { job, value, expected }),
        2 => (index(), 0u8..20).prop_map(|(job, request)| Step::Open { job, request }),
        2 => (index(), index()).prop_map(|(job, session)| Step::Close { job, session }),
    ]
}

/// Lives that exist, and one that never did.
fn any_server(cluster: &Cluster, index: &Index) -> ServerRef {
    let mut servers: Vec<_> = cluster.nodes.values().map(|node| node.view.server).collect();
    servers.push(server(9, 99));
    *index.get(&servers)
}

fn any_job(cluster: &Cluster, index: &Index) -> JobId {
    let mut jobs: Vec<_> = cluster.jobs.keys().copied().collect();
    jobs.push(JobId(99));
    *index.get(&jobs)
}

fn any_session(cluster: &Cluster, job: JobId, index: &Index) -> SessionId {
    let mut sessions: Vec<SessionId> =
        cluster.job(job).into_iter().flat_map(|job| job.sessions.keys().copied()).collect();
    sessions.push(SessionId(1));
    *index.get(&sessions)
}

fn command(cluster: &Cluster, step: Step) -> Command {
    match step {
        Step::Register { name, request } => Command::RegisterServer(Registration {
            name: format!("ps-{name}"),
            address: "host:1".into(),
            zone: format!("zone-{}", name % 2),
            request_id: request.to_string(),
            // Some are known to be at the place of the one before, others are not.
            origin: format!("origin-{}", request % 2),
            exclusive_name: false,
            isolation_ms: 0,
            lease_ms: 0,
        }),
        Step::Judge(index) => Command::JudgeDead(vec![any_server(cluster, &index)]),
        Step::Revive(index) => Command::Revive(any_server(cluster, &index)),
        Step::Join { job, shard, server } => {
            let planned = joins::plan(cluster, &BTreeMap::new(), LIMITS, &mut Room::default());
            let Some(server) = server else { return Command::PlanJoins(planned) };
            let job = any_job(cluster, &job);
            let routes = cluster.job(job).map_or(Vec::new(), |job| job.view.shards.clone());
            let shard = shard.index(routes.len().max(1));
            let (epoch, set_version) =
                routes.get(shard).map_or((Epoch(1), 1), |route| (route.epoch, route.set_version));
            let server = any_server(cluster, &server);
            let shard = ShardId(shard as u32);
            Command::PlanJoins(vec![Join { job, shard, epoch, set_version, server }])
        }
        Step::Change { job, shard, add, remove, stale } => {
            let job = any_job(cluster, &job);
            let shards = cluster.job(job).map_or(1, |job| job.view.shards.len());
            let shard = shard.index(shards);
            let route = cluster.job(job).map(|job| job.view.shards[shard].clone());
            let nobody = server(9, 99);
            let route_joining = route.as_ref().and_then(|route| route.joining);
            Command::ChangeInSync(InSyncChange {
                job,
                shard: ShardId(shard as u32),
                epoch: route.as_ref().map_or(Epoch(1), |route| route.epoch),
                set_version: route.as_ref().map_or(1, |one| one.set_version - u64::from(stale)),
                primary: route.and_then(|route| route.primary).unwrap_or(nobody),
                // Mostly who is joining.
                add: match route_joining {
                    Some(joining) if remove.is_none() => vec![joining],
                    _ => add.map(|index| any_server(cluster, &index)).into_iter().collect(),
                },
                remove: remove.map(|index| any_server(cluster, &index)).into_iter().collect(),
            })
        }
        Step::Lead => {
            let mut placements = moves::promotions(cluster);
            placements.extend(moves::evacuations(cluster, &BTreeMap::new(), &mut Room::default()));
            Command::Place(placements)
        }
        Step::Place { job, shard, server: to, kind } => {
            let job = any_job(cluster, &job);
            let routes = cluster.job(job).map_or(Vec::new(), |job| job.view.shards.clone());
            let shard = shard.index(routes.len().max(1));
            let (epoch, set_version, from) =
                routes.get(shard).map_or((Epoch(1), 1, None), |route| {
                    let from =
                        if kind % 2 == 0 { route.primary } else { route.in_sync.last().copied() };
                    (route.epoch, route.set_version, from)
                });
            let to = any_server(cluster, &to);
            let placing = match kind {
                0..5 => Placing::Move(Move { from: from.unwrap_or_else(|| server(9, 99)), to }),
                5 | 6 => Placing::Promote(to),
                _ => Placing::Cancel,
            };
            let (shard, reason) = (ShardId(shard as u32), String::from("it was asked for"));
            Command::Place(vec![Placement { job, shard, epoch, set_version, placing, reason }])
        }
        Step::Admit { server, admission } => {
            let admissions = [Admission::Open, Admission::Cordoned, Admission::Draining];
            Command::Admit(any_server(cluster, &server).node, admissions[usize::from(admission)])
        }
        Step::RemoveNode(index) => Command::RemoveNode(any_server(cluster, &index).node),
        Step::Create { name, shards, replicas } => {
            Command::CreateJob(job_spec(&format!("job-{name}"), shards, replicas))
        }
        Step::Delete(index) => Command::DeleteJob(any_job(cluster, &index), None),
        Step::Define { job, session, name, dim } => {
            let job = any_job(cluster, &job);
            let session = any_session(cluster, job, &session);
            Command::DefineVariables(job, session, vec![table(&format!("table-{name}"), dim)])
        }
        Step::Label { job, value, expected } => {
            let (key, value) = ("key".into(), value.to_string());
            let expected = expected.map(|value| (value % 3).to_string());
            Command::LabelJob(any_job(cluster, &job), LabelChange { key, value, expected })
        }
        Step::Open { job, request } => {
            let opening = Opening {
                name: "worker".into(),
                kind: downpour_proto::v1::SessionKind::Worker,
                request_id: request.to_string(),
            };
            Command::OpenSession(any_job(cluster, &job), opening)
        }
        Step::Close { job, session } => {
            let job = any_job(cluster, &job);
            Command::CloseSessions(vec![(job, any_session(cluster, job, &session))])
        }
    }
}

/// What must hold of a route whatever happened before.
fn check_route(cluster: &Cluster, route: &ShardRoute, replicas: u32) {
    let nodes: BTreeSet<_> = route.in_sync.iter().map(|member| member.node).collect();
    assert_eq!(nodes.len(), route.in_sync.len(), "a node once: {route:?}");
    let most = replicas as usize + usize::from(route.moving.is_some());
    assert!(route.in_sync.is_sorted() && route.in_sync.len() <= most, "{route:?}");
    if let Some(moving) = route.moving {
        assert!(route.in_sync.contains(&moving.from) && moving.from.node != moving.to.node);
        let arrived = route.in_sync.contains(&moving.to);
        assert!(arrived || cluster.life(moving.to) == Life::Alive, "{route:?}");
        assert!(route.step().is_some());
    }
    match route.primary {
        Some(primary) => assert!(route.in_sync.contains(&primary), "{route:?}"),
        None => assert!(route.in_sync.is_empty(), "lost: {route:?}"),
    }
    if let Some(joining) = route.joining {
        let moves = route.moving.is_some_and(|moving| moving.to == joining);
        let short = route.staying().count() < replicas as usize;
        assert!(!nodes.contains(&joining.node) && (short || moves), "{route:?}");
        assert_eq!(cluster.life(joining), Life::Alive, "{route:?}");
    }
    for &member in &route.in_sync {
        assert_ne!(cluster.life(member), Life::Over, "{member} in {route:?}");
    }
}

/// What may become of a route in one step.
fn check_route_step(before: &ShardRoute, after: &ShardRoute, cluster: &Cluster, placed: bool) {
    assert!(after.epoch >= before.epoch && after.set_version >= before.set_version);
    let added = after.in_sync.iter().filter(|one| !before.in_sync.contains(one));
    assert!(added.clone().all(|&one| before.joining == Some(one)), "{before:?} {after:?}");
    let set =
        |route: &ShardRoute| (route.in_sync.clone(), route.joining, route.moving, route.primary);
    if set(before) != set(after) {
        assert_eq!(after.set_version, before.set_version + 1);
    } else {
        assert_eq!(before, after);
    }
    if before.primary == after.primary {
        assert_eq!(before.epoch, after.epoch, "one epoch per tenure");
    } else if let Some(promoted) = after.primary {
        assert_eq!(after.epoch.0, before.epoch.0 + 1);
        assert!(before.in_sync.contains(&promoted), "promoted from outside: {before:?} {after:?}");
        let heard = after.in_sync.iter().any(|&member| cluster.life(member) == Life::Alive);
        assert!(!heard || cluster.life(promoted) == Life::Alive, "{after:?}");
        let lives = cluster.life(before.primary.unwrap()) == Life::Alive;
        assert!(placed || !lives, "a live primary stays unless it is told to go");
        assert!(!lives || before.in_sync == after.in_sync, "and remains a member");
    } else {
        assert!(before.in_sync.iter().all(|&member| cluster.life(member) == Life::Over));
    }
}

fn check(
    before: &State,
    after: &State,
    outcome: &Outcome,
    closed: &mut BTreeSet<(JobId, SessionId)>,
) {
    let (old, new) = (before.cluster(), after.cluster());
    if outcome.is_err() {
        let unchanged =
            State { cluster: Cluster { version: new.version, ..old.clone() }, ..before.clone() };
        assert_eq!(&unchanged, after, "a refused command changes nothing");
    }
    let counts = |state: &State| {
        let last = &state.last;
        (last.node, last.incarnation, last.job, last.session)
    };
    let (low, high) = (counts(before), counts(after));
    assert!(low.0 <= high.0 && low.1 <= high.1 && low.2 <= high.2 && low.3 <= high.3);
    for (id, job) in &new.jobs {
        for route in &job.view.shards {
            check_route(new, route, job.view.spec.replicas);
        }
        let Some(earlier) = old.job(*id) else { continue };
        if earlier.view == job.view {
            assert_eq!(earlier.view.version, job.view.version);
        } else {
            assert_eq!(job.view.version, new.version, "a watcher must learn of it");
        }
        for (before, after) in earlier.view.shards.iter().zip(&job.view.shards) {
            check_route_step(before, after, new, matches!(outcome, Ok(Reply::Placed(_))));
        }
        let ended = earlier.sessions.keys().filter(|session| !job.sessions.contains_key(session));
        closed.extend(ended.map(|&session| (*id, session)));
        for session in job.sessions.keys() {
            assert!(!closed.contains(&(*id, *session)), "{session} came back");
            assert!(!job.view.sessions.contains(*session), "{session} is open");
        }
        for (_, session) in closed.iter().filter(|(job, _)| job == id) {
            assert!(job.view.sessions.contains(*session), "{session} is closed for ever");
        }
    }
    for (id, node) in &new.nodes {
        if old.nodes.get(id).is_none_or(|earlier| earlier.view != node.view) {
            assert_eq!(node.version, new.version, "a watcher must learn of it");
        }
    }
    if let Ok(Reply::Created { job, created: true }) = outcome {
        let routes = &new.job(*job).unwrap().view.shards;
        let replicas = new.job(*job).unwrap().view.spec.replicas as usize;
        assert!(routes.iter().all(|route| route.in_sync.len() == replicas));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_commands_breaks_an_invariant(steps in prop::collection::vec(step(), 1..80)) {
        let mut machine = Machine::default();
        for number in 0..3 {
            machine.register(number);
        }
        let mut closed = BTreeSet::new();
        for step in steps {
            let before = machine.state.clone();
            let command = command(before.cluster(), step);
            // A state that went through a snapshot goes on alike.
            let snapshot = before.snapshot();
            prop_assert!(snapshot.len() <= before.bytes_max());
            let mut restored = State::restore(&snapshot).unwrap();
            prop_assert_eq!(&restored, &before);
            let outcome = machine.apply(command.clone());
            prop_assert!(machine.state.cluster().events.len() <= 512);
            prop_assert_eq!(&restored.apply(machine.index, command), &outcome);
            prop_assert_eq!(&restored, &machine.state);
            check(&before, &machine.state, &outcome, &mut closed);
        }
    }

    #[test]
    fn any_bytes_restore_to_a_state_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..128)) {
        let _ = State::restore(&bytes);
    }
}
