//! A group of members serves, survives the loss of a minority, and keeps what it committed.

mod support;

use downpour_proto::v1;
use support::{Group, eventually, get_cluster, unique};
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_member_serves_and_keeps_what_it_committed_over_a_restart() {
    let mut group = Group::start(1).await;
    let server = group.register("ps-0", "").await;
    let view = group.create_job("ctr", 4, 1).await;
    assert_eq!(view.shards.len(), 4);
    assert!(view.shards.iter().all(|route| route.primary == Some(server)));

    group.stop(1).await.unwrap();
    group.restart(1).await;
    group.leader().await;
    let cluster = get_cluster(&group.client(1)).await.unwrap();
    assert_eq!(cluster.jobs[0].view.as_ref(), Some(&view));
    assert_eq!(cluster.nodes[0].incarnation, server.incarnation);
    assert!(group.register("ps-1", "").await.incarnation > server.incarnation);
    group.stop(1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_go_on_without_their_leader_and_it_catches_up() {
    let mut group = Group::start(3).await;
    for name in ["ps-0", "ps-1"] {
        group.register(name, "").await;
    }
    let before = group.create_job("ctr", 64, 2).await;
    let leader = group.leader().await;
    group.stop(leader).await.unwrap();
    let others: Vec<u64> = group.ids().into_iter().filter(|&id| id != leader).collect();
    group.leader_among(&others).await;
    let after = group.create_job("second", 8, 2).await;
    group.restart(leader).await;

    // A watch is served by every member, the one that was away too.
    let mut events = eventually("the member is ready", || {
        let mut client = group.client(leader);
        async move { client.watch(v1::WatchRequest { job: 0 }).await }
    })
    .await
    .into_inner();
    // It shows nothing before it has what was committed while it was away.
    let event = events.message().await.unwrap().expect("the stream goes on");
    assert!(event.whole);
    assert_eq!(event.jobs, [before, after]);
    for id in group.ids() {
        group.stop(id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_names_the_leader() {
    let group = Group::start(3).await;
    let leader = group.leader().await;
    let follower = group.ids().into_iter().find(|&id| id != leader).unwrap();
    let status = eventually("it knows the leader", || async {
        let status = get_cluster(&group.client(follower)).await.unwrap_err();
        status.metadata().get("downpour-leader").cloned().ok_or(status)
    });
    assert!(status.await.to_str().unwrap().starts_with("127.0.0.1:"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_is_the_same_call() {
    let group = Group::start(1).await;
    let register = v1::RegisterServerRequest {
        name: "ps-0".into(),
        address: "127.0.0.1:9".into(),
        zone: String::new(),
        request_id: unique(),
        origin: "here".into(),
        ..Default::default()
    };
    let ask = async || {
        let reply = group.ask(async |mut client| client.register_server(register.clone()).await);
        reply.await.unwrap().server.unwrap()
    };
    assert_eq!(ask().await, ask().await);
    let job = group.create_job("ctr", 4, 1).await;
    assert_eq!(group.create_job("ctr", 4, 1).await, job);
    let open = v1::OpenSessionRequest {
        job: job.job,
        name: "worker".into(),
        kind: v1::SessionKind::Worker.into(),
        request_id: unique(),
    };
    let ask = async || {
        let reply = group.ask(async |mut client| client.open_session(open.clone()).await);
        reply.await.unwrap().session
    };
    assert_eq!(ask().await, ask().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_say_what_to_do() {
    let group = Group::start(1).await;
    let spec = |replicas| v1::CreateJobRequest {
        spec: Some(v1::JobSpec {
            name: "ctr".into(),
            shards: 4,
            replicas,
            min_in_sync: 1,
            seed: 1,
        }),
    };
    let create = async |replicas| {
        group.ask(async |mut client| client.create_job(spec(replicas)).await).await.unwrap_err()
    };
    let refused = create(9).await;
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("replicas"), "{refused}");
    let delete = v1::DeleteJobRequest { job: 7, if_version: 0 };
    let refused = group.ask(async |mut client| client.delete_job(delete).await).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_larger_than_any_is_refused_before_it_is_decoded() {
    let group = Group::start(1).await;
    group.leader().await;
    let define = async |count| {
        let variables = vec![v1::VariableSpec::default(); count];
        let request = v1::DefineVariablesRequest { job: 1, session: 1, variables };
        group.client(1).define_variables(request).await.unwrap_err()
    };
    assert_eq!(define(1 << 20).await.code(), Code::OutOfRange);
    let refused = define(10_000).await;
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("variables"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_asked_for_before_its_servers_have_started_waits_for_them() {
    let group = Group::start(1).await;
    group.register("ps-0", "").await;
    let spec = v1::JobSpec { name: "ctr".into(), shards: 4, replicas: 2, min_in_sync: 1, seed: 1 };
    let request = v1::CreateJobRequest { spec: Some(spec) };
    let refused = group.client(1).create_job(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(refused.message(), "2 replicas need as many live servers, and there are 1");
    let (job, _) = tokio::join!(group.create_job("ctr", 4, 2), group.register("ps-1", ""));
    assert_eq!(job.shards.len(), 4);
}
