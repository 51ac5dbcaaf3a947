//! What servers, clients and watchers experience: leases, judgements, sessions, events.

mod support;

use std::time::Duration;

use downpour_coordinator::Config;
use downpour_proto::v1;
use support::{DEADLINE, Group, eventually, get_cluster, unique};
use tokio::task::JoinHandle;
use tonic::Streaming;

/// Silence is borne for a moment only.
fn impatient(config: &mut Config) {
    config.heartbeat_ms = 30;
    config.failure_timeout_ms = 600;
    config.session_timeout_ms = 600;
}

async fn heartbeat(group: &Group, server: v1::ServerRef) -> v1::HeartbeatReply {
    let request = v1::HeartbeatRequest { server: Some(server), reports: vec![], load: None };
    group.ask(async |mut client| client.heartbeat(request.clone()).await).await.unwrap()
}

/// A server that lives until it is aborted.
fn keep_alive(group: &Group, server: v1::ServerRef) -> JoinHandle<()> {
    let clients: Vec<_> = group.ids().into_iter().map(|id| group.client(id)).collect();
    let request = v1::HeartbeatRequest { server: Some(server), reports: vec![], load: None };
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(30));
        loop {
            ticks.tick().await;
            for client in &clients {
                if let Ok(reply) = client.clone().heartbeat(request.clone()).await {
                    assert!(!reply.get_ref().fenced, "it was heard all the time");
                    break;
                }
            }
        }
    })
}

async fn watch(group: &Group, id: u64, job: u64) -> Streaming<v1::WatchEvent> {
    eventually("the member is ready", || {
        let mut client = group.client(id);
        async move { client.watch(v1::WatchRequest { job }).await }
    })
    .await
    .into_inner()
}

async fn next(events: &mut Streaming<v1::WatchEvent>) -> v1::WatchEvent {
    let event = tokio::time::timeout(DEADLINE, events.message()).await.expect("in time");
    event.unwrap().expect("the stream goes on")
}

async fn open_session(group: &Group, job: u64) -> v1::OpenSessionReply {
    let request = v1::OpenSessionRequest {
        job,
        name: "worker".into(),
        kind: v1::SessionKind::Worker.into(),
        request_id: unique(),
    };
    group.ask(async |mut client| client.open_session(request.clone()).await).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shards_of_a_silent_server_go_to_those_that_are_heard_and_it_is_fenced() {
    let group = Group::start_with(3, impatient).await;
    let (silent, heard) = (group.register("ps-0", "").await, group.register("ps-1", "").await);
    let _alive = keep_alive(&group, heard);
    let job = group.create_job("ctr", 4, 2).await;
    let mut events = watch(&group, 1, job.job).await;
    let mut routes = job.shards.clone();
    while routes.iter().any(|route| route.primary != Some(heard)) {
        let event = next(&mut events).await;
        routes = event.jobs.into_iter().next().map_or(routes, |view| view.shards);
    }
    for (before, after) in job.shards.iter().zip(&routes) {
        let moved = before.primary == Some(silent);
        assert_eq!(after.epoch, before.epoch + u64::from(moved));
        assert_eq!(after.in_sync.contains(&silent), !moved, "only a primary is judged");
    }
    let change = v1::ChangeInSyncRequest {
        job: job.job,
        primary: Some(heard),
        remove: vec![silent],
        ..Default::default()
    };
    for route in routes.iter().filter(|route| route.in_sync.contains(&silent)) {
        let change = v1::ChangeInSyncRequest {
            shard: route.shard,
            epoch: route.epoch,
            set_version: route.set_version,
            ..change.clone()
        };
        let reply = group.ask(async |mut client| client.change_in_sync(change.clone()).await);
        let reply = reply.await.unwrap();
        assert!(reply.changed && reply.lease_ms > 0, "{reply:?}");
        assert_eq!(reply.route.unwrap().in_sync, [heard]);
    }
    let reply = heartbeat(&group, silent).await;
    assert_eq!((reply.fenced, reply.lease_ms), (true, 0));
    let again = group.register("ps-0", "").await;
    assert!(again.node == silent.node && again.incarnation > heard.incarnation);
    assert!(!heartbeat(&group, again).await.fenced);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_cannot_reach_others_which_are_heard_is_replaced_and_goes_on_without_silent_ones()
 {
    let group = Group::start_with(3, |config| config.heartbeat_ms = 100).await;
    let (one, two) = (group.register("ps-0", "").await, group.register("ps-1", "").await);
    let job = group.create_job("ctr", 2, 2).await;
    let report = async |route: &v1::ShardRoute| {
        let primary = route.primary.expect("not lost");
        let change = v1::ChangeInSyncRequest {
            job: job.job,
            shard: route.shard,
            epoch: route.epoch,
            set_version: route.set_version,
            primary: Some(primary),
            remove: route.in_sync.iter().copied().filter(|one| *one != primary).collect(),
            unreachable: true,
            ..Default::default()
        };
        let reply = group.ask(async |mut client| client.change_in_sync(change.clone()).await).await;
        reply.unwrap().route.expect("as committed")
    };
    let silent = report(&job.shards[0]).await;
    assert_eq!((silent.epoch, silent.primary), (1, job.shards[0].primary), "nobody was heard");
    let alive = [keep_alive(&group, one), keep_alive(&group, two)];
    let replaced = report(&job.shards[1]).await;
    assert_eq!(replaced.epoch, 2);
    assert_ne!(replaced.primary, job.shards[1].primary);
    assert_eq!(replaced.in_sync, [replaced.primary.expect("not lost")]);
    alive.iter().for_each(JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_alone_holds_a_shard_is_waited_for_and_welcomed_back() {
    let group = Group::start_with(1, impatient).await;
    let server = group.register("ps-0", "").await;
    let job = group.create_job("ctr", 2, 1).await;
    let mut events = watch(&group, 1, 0).await;
    while next(&mut events).await.nodes.iter().all(|node| node.alive) {}
    let reply = heartbeat(&group, server).await;
    assert!(!reply.fenced && reply.lease_ms > 0, "{reply:?}");
    let cluster = get_cluster(&group.client(1)).await.unwrap();
    assert!(cluster.nodes[0].alive);
    assert_eq!(cluster.jobs[0].view.as_ref().unwrap().shards, job.shards);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_server_under_the_name_of_a_live_one_waits_until_that_one_is_judged() {
    let group = Group::start_with(1, impatient).await;
    let first = group.register("ps-0", "").await;
    let alive = keep_alive(&group, first);
    let job = group.create_job("ctr", 2, 1).await;
    let elsewhere = v1::RegisterServerRequest {
        name: "ps-0".into(),
        address: "127.0.0.1:10".into(),
        zone: String::new(),
        request_id: unique(),
        origin: "here".into(),
        ..Default::default()
    };
    let refused = group.client(1).register_server(elsewhere.clone()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    let said = refused.message();
    assert!(said.starts_with("ps-0 is alive at 127.0.0.1:"), "{said}");
    assert!(said.ends_with(": stop it, or register under another name"), "{said}");
    let cluster = get_cluster(&group.client(1)).await.unwrap();
    assert_eq!(cluster.jobs[0].view.as_ref(), Some(&job), "the first one keeps its shards");
    alive.abort();
    let restarted = group.register("ps-0", "").await;
    assert!(restarted.incarnation > first.incarnation, "at its address it is replaced at once");
    let ask = group.ask(async |mut client| client.register_server(elsewhere.clone()).await);
    let moved = ask.await.unwrap().server.unwrap();
    assert!(moved.node == first.node && moved.incarnation > restarted.incarnation);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_judged_because_leaders_change() {
    let mut group = Group::start_with(3, impatient).await;
    let server = group.register("ps-0", "").await;
    let alive = keep_alive(&group, server);
    for _ in 0..3 {
        let leader = group.leader().await;
        group.stop(leader).await.unwrap();
        group
            .leader_among(&group.ids().into_iter().filter(|&id| id != leader).collect::<Vec<_>>())
            .await;
        group.restart(leader).await;
        group.leader().await;
    }
    let leader = group.leader().await;
    let cluster = get_cluster(&group.client(leader)).await.unwrap();
    assert!(cluster.nodes[0].alive && cluster.nodes[0].incarnation == server.incarnation);
    assert!(!alive.is_finished(), "it was never fenced");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_not_renewed_is_closed_and_a_renewed_one_is_not() {
    let group = Group::start_with(3, impatient).await;
    group.register("ps-0", "").await;
    let job = group.create_job("ctr", 2, 1).await.job;
    let (silent, renewed) = (open_session(&group, job).await, open_session(&group, job).await);
    assert_eq!((silent.timeout_ms, silent.nodes.len()), (600, 1));
    let renew = async |session| {
        let request = v1::RenewSessionRequest {
            job,
            session,
            progress: Some(v1::WorkerProgress { samples: 7, ..Default::default() }),
        };
        let reply = group.ask(async |mut client| client.renew_session(request.clone()).await);
        reply.await.unwrap().open
    };
    let mut events = watch(&group, 1, job).await;
    loop {
        assert!(renew(renewed.session).await);
        let event = tokio::time::timeout(Duration::from_millis(50), events.message()).await;
        let Ok(event) = event else { continue };
        let jobs = event.unwrap().expect("the stream goes on").jobs;
        let closed = jobs.iter().filter_map(|view| view.sessions.as_ref());
        if closed.into_iter().any(|closed| closed.high_water >= silent.session) {
            break;
        }
    }
    assert!(!renew(silent.session).await);
    let leader = group.leader().await;
    let cluster = get_cluster(&group.client(leader)).await.unwrap();
    let sessions = &cluster.jobs[0].sessions;
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0].session, renewed.session);
    assert_eq!(sessions[0].progress.as_ref().unwrap().samples, 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_is_told_the_whole_then_the_changes_and_never_goes_back() {
    let mut group = Group::start(1).await;
    group.register("ps-0", "").await;
    let first = group.create_job("first", 2, 1).await;
    let mut all = watch(&group, 1, 0).await;
    let event = next(&mut all).await;
    assert!(event.whole && event.jobs == [first.clone()] && event.nodes.len() == 1);
    let mut one = watch(&group, 1, first.job).await;
    assert!(next(&mut one).await.whole);

    let second = group.create_job("second", 2, 1).await;
    let event_2 = next(&mut all).await;
    assert!(!event_2.whole && event_2.version > event.version);
    assert_eq!((event_2.jobs, event_2.nodes.len()), (vec![second.clone()], 0), "what changed");
    group.register("ps-1", "").await;
    let event_3 = next(&mut all).await;
    assert!(event_3.jobs.is_empty() && event_3.nodes.len() == 1);
    let event = next(&mut one).await;
    assert!(event.jobs.is_empty() && event.nodes.len() == 1, "not the other job: {event:?}");

    let delete = v1::DeleteJobRequest { job: first.job, if_version: 0 };
    group.ask(async |mut client| client.delete_job(delete).await).await.unwrap();
    for events in [&mut all, &mut one] {
        let event = next(events).await;
        assert_eq!((event.deleted_jobs, event.jobs.len()), (vec![first.job], 0));
        assert!(event.version > event_3.version);
    }
    group.stop(1).await.unwrap();
    let end = tokio::time::timeout(DEADLINE, all.message()).await.expect("in time");
    assert!(!matches!(end, Ok(Some(_))), "the stream ends with its server: {end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_of_the_primary_are_shown_and_reports_of_nonsense_are_not() {
    let group = Group::start(1).await;
    let server = group.register("ps-0", "").await;
    let job = group.create_job("ctr", 2, 1).await.job;
    let report = |job, shard| v1::ShardReport { job, shard, rows: 5, ..Default::default() };
    let request = v1::HeartbeatRequest {
        server: Some(server),
        reports: vec![report(job, 1), report(job, 99), report(99, 0)],
        load: None,
    };
    group.ask(async |mut client| client.heartbeat(request.clone()).await).await.unwrap();
    let cluster = get_cluster(&group.client(1)).await.unwrap();
    assert_eq!(cluster.jobs[0].reports, [report(job, 1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_server_that_refuses_connections_is_judged_before_the_failure_timeout() {
    // Longer than any wait of this test.
    let patient = |config: &mut Config| config.failure_timeout_ms = 2 * DEADLINE.as_millis() as u64;
    let mut group = Group::start_with(1, patient).await;
    let server = group.register("ps-0", "").await;
    heartbeat(&group, server).await;
    group.close_servers();
    let judged = || async {
        let cluster = get_cluster(&group.client(1)).await?;
        if cluster.nodes[0].alive {
            return Err(tonic::Status::unavailable("it counts as alive"));
        }
        Ok(())
    };
    eventually("it is judged", judged).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_lease_is_longer_than_what_a_leader_with_another_option_waits_for() {
    let patient = |config: &mut Config| {
        (config.lease_ms, config.failure_timeout_ms) = (5_000, 60_000);
    };
    let mut group = Group::start_with(1, patient).await;
    let server = group.register("ps-0", "").await;
    assert_eq!(heartbeat(&group, server).await.lease_ms, 5_000);
    for (lease_ms, now, after) in [(20_000, 5_000, 20_000), (3_000, 3_000, 3_000)] {
        group.stop(1).await.unwrap();
        group.adjust(1, |config| config.lease_ms = lease_ms);
        group.restart(1).await;
        assert_eq!(heartbeat(&group, server).await.lease_ms, now);
        // From then on it is committed.
        group.register(&format!("ps-{lease_ms}"), "").await;
        assert_eq!(heartbeat(&group, server).await.lease_ms, after);
    }
}
