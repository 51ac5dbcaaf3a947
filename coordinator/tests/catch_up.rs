//! Members that were away come back by log or by snapshot; one that lost its disk is silent until it has; one that has an old copy does not come back at all.

mod support;

use downpour_coordinator::Config;
use downpour_proto::v1;
use support::{Group, eventually};

fn compact_often(config: &mut Config) {
    config.compact_entries = 16;
}

async fn label(group: &Group, job: u64, value: u64) {
    let request =
        v1::LabelJobRequest { job, key: "count".into(), value: value.to_string(), expected: None };
    group.ask(async |mut client| client.label_job(request.clone()).await).await.unwrap();
}

/// Makes `member` the leader by cutting off who leads instead, and reads from it.
async fn read_from(group: &Group, member: u64, others: &[u64]) -> v1::GetClusterReply {
    loop {
        let leader = group.leader().await;
        if leader == member {
            return support::get_cluster(&group.client(member)).await.unwrap();
        }
        assert!(others.contains(&leader));
        group.isolate(leader, true);
        let rest: Vec<u64> = group.ids().into_iter().filter(|&id| id != leader).collect();
        group.leader_among(&rest).await;
        group.isolate(leader, false);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_for_long_catches_up_by_snapshot() {
    let mut group = Group::start_with(3, compact_often).await;
    group.register("ps-0", "").await;
    let job = group.create_job("ctr", 256, 1).await;
    let leader = group.leader().await;
    let away = group.ids().into_iter().find(|&id| id != leader).unwrap();
    group.stop(away).await.unwrap();
    for value in 0..100 {
        label(&group, job.job, value).await;
    }
    group.restart(away).await;
    label(&group, job.job, 100).await;
    let snapshots = || {
        let files = std::fs::read_dir(group.data_dir(away)).map_err(|error| error.to_string())?;
        let names = files.map(|file| file.unwrap().file_name().to_string_lossy().into_owned());
        names
            .into_iter()
            .find(|name| name.starts_with("snapshot-"))
            .ok_or_else(|| "none".to_owned())
    };
    eventually("a snapshot arrived", || async { snapshots() }).await;
    let others: Vec<u64> = group.ids().into_iter().filter(|&id| id != away).collect();
    let cluster = read_from(&group, away, &others).await;
    assert_eq!(cluster.jobs[0].labels["count"], "100");
    assert_eq!(cluster.jobs[0].view.as_ref(), Some(&job));
    // And from its own disk.
    group.stop(away).await.unwrap();
    group.restart(away).await;
    let cluster = read_from(&group, away, &others).await;
    assert_eq!(cluster.jobs[0].labels["count"], "100");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_members_go_on_without_two_and_all_restart() {
    let mut group = Group::start_with(5, compact_often).await;
    group.register("ps-0", "").await;
    let job = group.create_job("ctr", 4, 1).await.job;
    for round in 0..2 {
        let leader = group.leader().await;
        let other = group.ids().into_iter().find(|&id| id != leader).unwrap();
        group.stop(leader).await.unwrap();
        group.stop(other).await.unwrap();
        label(&group, job, round).await;
        group.restart(leader).await;
        group.restart(other).await;
    }
    for id in group.ids() {
        group.stop(id).await.unwrap();
    }
    for id in group.ids() {
        group.restart(id).await;
    }
    let leader = group.leader().await;
    let cluster = support::get_cluster(&group.client(leader)).await.unwrap();
    assert_eq!(cluster.jobs[0].labels["count"], "1");
    assert_eq!(cluster.members.len(), 5);
    assert_eq!(cluster.members.iter().filter(|member| member.leader).count(), 1);
}

/// Until the leader knows that `member` has what it has itself.
async fn caught_up(group: &Group, leader: u64, member: u64) {
    let matched = || async {
        let cluster = support::get_cluster(&group.client(leader)).await?;
        let matched = |id| cluster.members.iter().find(|one| one.id == id).unwrap().matched;
        if matched(member) == matched(leader) {
            return Ok(());
        }
        Err(tonic::Status::unavailable("it lags"))
    };
    eventually("the leader knows what it has", matched).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_with_an_old_copy_of_its_data_stops_and_says_so() {
    let mut group = Group::start(3).await;
    group.register("ps-0", "").await;
    let leader = group.leader().await;
    let victim = group.ids().into_iter().find(|&id| id != leader).unwrap();
    caught_up(&group, leader, victim).await;
    group.stop(victim).await.unwrap();
    let copy = tempfile::tempdir().unwrap();
    copy_dir(&group.data_dir(victim), copy.path());
    group.restart(victim).await;
    group.register("ps-1", "").await;
    caught_up(&group, leader, victim).await;
    group.stop(victim).await.unwrap();
    std::fs::remove_dir_all(group.data_dir(victim)).unwrap();
    copy_dir(copy.path(), &group.data_dir(victim));
    group.restart(victim).await;
    let error = group.ended(victim).await.unwrap_err();
    assert!(error.to_string().contains("must not vote with what it forgot"), "{error:#}");
    group.register("ps-2", "").await;
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lost_its_disk_comes_back_by_itself_and_votes_once_it_is_ready() {
    let mut group = Group::start_with(3, compact_often).await;
    for number in 0..40 {
        group.register(&format!("ps-{number}"), "").await;
    }
    let leader = group.leader().await;
    let victim = group.ids().into_iter().find(|&id| id != leader).unwrap();
    caught_up(&group, leader, victim).await;
    group.stop(victim).await.unwrap();
    std::fs::remove_dir_all(group.data_dir(victim)).unwrap();
    group.restart(victim).await;
    group.ready(victim).await;
    let leader = group.leader().await;
    group.stop(leader).await.unwrap();
    let rest: Vec<u64> = group.ids().into_iter().filter(|&id| id != leader).collect();
    let next = group.leader_among(&rest).await;
    let cluster = support::get_cluster(&group.client(next)).await.unwrap();
    assert_eq!(cluster.nodes.len(), 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_other_clusters_are_refused() {
    let mut group = Group::start(1).await;
    group.leader().await;
    let envelope = v1::RaftEnvelope {
        cluster: "another".into(),
        source: 2,
        target: 1,
        message: Vec::new().into(),
        birth: 0,
        ..v1::RaftEnvelope::default()
    };
    let mut client = group.raft_client(1);
    let mut deliver = async |envelope| {
        client.deliver(futures::stream::iter([envelope])).await.unwrap_err().message().to_owned()
    };
    assert!(deliver(envelope.clone()).await.starts_with("cluster"));
    let stranger = v1::RaftEnvelope { cluster: "downpour".into(), source: 1, ..envelope.clone() };
    assert!(deliver(stranger).await.starts_with("source"));
    let stray = v1::RaftEnvelope { cluster: "downpour".into(), target: 2, ..envelope };
    assert!(deliver(stray).await.starts_with("target"));
    group.stop(1).await.unwrap();
}
