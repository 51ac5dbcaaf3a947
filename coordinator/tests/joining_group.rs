//! Processes that are let into a group, and that are sent away.

mod support;

use downpour_proto::v1;
use support::{Group, eventually, get_cluster};
use tonic::{Code, Status};

async fn add(group: &Group, id: u64, address: &str) -> Result<v1::AddCoordinatorReply, Status> {
    let request = v1::AddCoordinatorRequest { id, address: address.into(), dry_run: false };
    group.operate(async |mut client| client.add_coordinator(request.clone()).await).await
}

async fn remove(group: &Group, id: u64) -> Result<v1::RemoveCoordinatorReply, Status> {
    let request = v1::RemoveCoordinatorRequest { id, dry_run: false };
    group.operate(async |mut client| client.remove_coordinator(request).await).await
}

async fn votes(group: &Group, asked: &[u64], id: u64) -> v1::GetClusterReply {
    eventually("it votes", || async {
        let leader = group.leader_among(asked).await;
        let cluster =
            get_cluster(&group.client(leader)).await.map_err(|status| status.to_string())?;
        let votes = cluster.members.iter().any(|member| member.id == id && !member.learner);
        if votes { Ok(cluster) } else { Err(format!("{:?}", cluster.members)) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_waits_until_it_is_let_in_and_who_is_removed_ends_and_stays_away() {
    let mut group = Group::start(3).await;
    group.leader().await;
    let address = group.join(4).await;
    let reply = add(&group, 0, &address).await.unwrap();
    assert_eq!((reply.id, reply.added), (4, true));
    let cluster = votes(&group, &[1, 2, 3], 4).await;
    assert_eq!(cluster.members.last().unwrap().address, address);
    group.ready(4).await;
    assert!(!add(&group, 4, &address).await.unwrap().added, "a repeat");

    // The leader, so that it hands over first.
    let leader = group.leader().await;
    assert!(remove(&group, leader).await.unwrap().removed);
    group.ended(leader).await.expect("it ends cleanly");
    let left: Vec<u64> = (1..=4).filter(|&id| id != leader).collect();
    assert!(!remove(&group, leader).await.unwrap().removed, "a repeat");
    // Started again, it is told again.
    group.restart(leader).await;
    group.ended(leader).await.expect("it ends cleanly");
    let cluster = get_cluster(&group.client(group.leader_among(&left).await)).await.unwrap();
    assert_eq!(cluster.members.iter().map(|one| one.id).collect::<Vec<_>>(), left);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_a_changed_group_comes_back_with_its_data_and_never_without() {
    let mut group = Group::start(3).await;
    group.leader().await;
    let address = group.join(4).await;
    add(&group, 4, &address).await.unwrap();
    votes(&group, &[1, 2, 3], 4).await;
    group.ready(4).await;
    group.stop(4).await.unwrap();
    group.restart(4).await;
    group.ready(4).await;

    // It may have forgotten a vote.
    group.stop(4).await.unwrap();
    std::fs::remove_dir_all(group.data_dir(4)).unwrap();
    group.restart(4).await;
    let refused = format!("{:#}", group.ended(4).await.unwrap_err());
    assert!(refused.contains("has begun before"), "{refused}");
    remove(&group, 4).await.unwrap();

    // One that founded the group would have to meet everybody that ever was in it.
    group.stop(1).await.unwrap();
    std::fs::remove_dir_all(group.data_dir(1)).unwrap();
    group.restart(1).await;
    let refused = format!("{:#}", group.ended(1).await.unwrap_err());
    assert!(refused.contains("the group was changed"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_makes_no_sense_names_what_is_wrong() {
    let group = Group::start(1).await;
    group.leader().await;
    let wrong = add(&group, 2, "nowhere").await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    assert!(wrong.message().starts_with("address"), "{}", wrong.message());
    let wrong = remove(&group, 0).await.unwrap_err();
    assert!(wrong.message().starts_with("id"), "{}", wrong.message());
    assert_eq!(remove(&group, 7).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(remove(&group, 1).await.unwrap_err().code(), Code::FailedPrecondition);
    let transfer = v1::TransferLeaderRequest { from: 1, to: 2 };
    let refused = group.operate(async |mut client| client.transfer_leader(transfer).await).await;
    assert_eq!(refused.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_founded_a_group_alone_is_not_believed_with_another_data_directory() {
    let mut group = Group::start(1).await;
    for id in [2, 3] {
        group.leader_among(&[1]).await;
        let address = group.join(id).await;
        add(&group, id, &address).await.unwrap();
        votes(&group, &[1], id).await;
        group.ready(id).await;
    }
    // Without it the others have the log, and none of them may count on its vote any more.
    group.stop(1).await.unwrap();
    std::fs::remove_dir_all(group.data_dir(1)).unwrap();
    group.stop(3).await.unwrap();
    group.restart(1).await;
    let refused = format!("{:#}", group.ended(1).await.unwrap_err());
    assert!(refused.contains("member 2 counts member 1 as one of its group"), "{refused}");
    group.restart(3).await;
    group.leader_among(&[2, 3]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_was_founded_anew_tells_nobody_who_knew_the_old_one_that_it_is_over() {
    let mut group = Group::start(1).await;
    group.leader().await;
    let server = group.register("ps-0", "").await;
    let address = group.join(2).await;
    add(&group, 2, &address).await.unwrap();
    votes(&group, &[1], 2).await;
    let request = v1::WatchRequest { job: 0 };
    let mut events = group.client(1).watch(request).await.unwrap().into_inner();
    let known = events.message().await.unwrap().unwrap().coordinators_version;
    assert!(known > 0, "the group was changed");
    for id in [1, 2] {
        group.stop(id).await.unwrap();
    }
    // Nobody is there who would tell it that its directory is not the one that the group knows.
    std::fs::remove_dir_all(group.data_dir(1)).unwrap();
    group.restart(1).await;
    group.leader_among(&[1]).await;

    let heartbeat = v1::HeartbeatRequest { server: Some(server), ..Default::default() };
    let reply = group.client(1).heartbeat(heartbeat.clone()).await.unwrap().into_inner();
    assert!(reply.fenced, "who knows of no other group believes it");
    let mut client = group.client_that_knows(1, known);
    let unavailable = |code| assert_eq!(code, Some(Code::Unavailable));
    unavailable(client.heartbeat(heartbeat).await.err().map(|status| status.code()));
    let renew = v1::RenewSessionRequest { job: 1, session: 1, progress: None };
    unavailable(client.renew_session(renew).await.err().map(|status| status.code()));
    unavailable(client.watch(request).await.err().map(|status| status.code()));
    let same = group.client_that_knows(1, 0).get_cluster(v1::GetClusterRequest {}).await;
    assert!(same.unwrap().into_inner().nodes.is_empty());
}
