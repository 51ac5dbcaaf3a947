//! The group changes while it runs, one member at a time, and decides all the while.

#[path = "support/network.rs"]
mod network;

use downpour_coordinator::raft::{Error, WishKind};
use downpour_coordinator::state::{Refused, Reply};
use network::Network;
use raft::eraftpb::MessageType;

fn added(id: u64) -> WishKind {
    WishKind::Add(id, format!("c{id}:1"))
}

/// All members have applied what the leader has committed.
fn level(network: &Network) -> bool {
    let Some(leader) = network.leader() else { return false };
    let commit = network.members[&leader].0.status().commit;
    network.members.values().all(|(handle, _)| handle.status().applied == commit)
}

#[tokio::test]
async fn a_new_member_counts_in_no_majority_before_it_has_caught_up() {
    let mut network = Network::new(true);
    // More than is kept: it takes a snapshot, which has it in the group.
    network.commit(60).await;
    let member = Reply::Member { id: 4, changed: true };
    assert_eq!(network.change(added(4)).await.unwrap(), member);
    let again = Reply::Member { id: 4, changed: false };
    assert_eq!(network.change(added(4)).await.unwrap(), again, "a repeat");
    let another = network.change(added(5)).await;
    assert!(matches!(another, Err(Error::Refused(Refused::FailedPrecondition(_)))), "{another:?}");

    // Two of three decide, though the fourth does not run.
    let absent = (1..=3).find(|id| network.leader() != Some(*id)).unwrap();
    network.isolated.insert(absent);
    network.commit(5).await;
    assert_eq!(network.voters(), [1, 2, 3]);
    network.isolated.clear();

    network.start_new(4);
    network.carry_until(|network| network.voters() == [1, 2, 3, 4]).await;
    network.carry_until(level).await;
    // Three of four decide now: the new one is among them.
    network.isolated.insert(absent);
    network.commit(5).await;
    let handle = &network.members[&4].0;
    assert_eq!(handle.cluster().members.list[&4].address, "c4:1");
    assert!(handle.cluster().members.list[&4].voter);
}

#[tokio::test]
async fn all_members_are_replaced_one_by_one_and_the_new_ones_remember_the_group() {
    let mut network = Network::new(true);
    network.commit(30).await;
    for (old, new) in [(1, 4), (2, 5), (3, 6)] {
        network.change(added(new)).await.unwrap();
        network.start_new(new);
        network.carry_until(|network| network.voters().contains(&new)).await;
        // Also where it leads: it hands over first.
        let gone = Reply::Member { id: old, changed: true };
        assert_eq!(network.change(WishKind::Remove(old)).await.unwrap(), gone);
        network.carry_until(|network| !network.voters().contains(&old)).await;
        assert_ne!(network.leader(), Some(old));
        network.crash(old).await;
        network.commit(5).await;
    }
    assert_eq!(network.voters(), [4, 5, 6]);
    let kept = |network: &Network| {
        let cluster = network.members[&network.leader().unwrap()].0.cluster();
        (cluster.nodes.len(), cluster.members.list.keys().copied().collect::<Vec<_>>())
    };
    network.carry_until(level).await;
    assert_eq!(kept(&network), (3, vec![4, 5, 6]));

    for id in 4..=6 {
        network.crash(id).await;
    }
    for id in 4..=6 {
        network.start(id);
    }
    network.commit(5).await;
    assert_eq!((network.voters(), kept(&network)), (vec![4, 5, 6], (3, vec![4, 5, 6])));
    let findings = network.findings.lock().unwrap();
    assert!(findings.broken.is_empty(), "{:?}", findings.broken);
}

#[tokio::test]
async fn a_member_without_which_nothing_could_be_decided_is_not_removed() {
    let mut network = Network::new(true);
    network.commit(5).await;
    let leader = network.leader().unwrap();
    let others: Vec<u64> = (1..=3).filter(|&id| id != leader).collect();
    network.isolated.insert(others[0]);
    // Long enough for the leader to notice.
    network
        .carry_until(|network| {
            let members = network.members[&leader].0.status().members;
            members.iter().any(|one| one.id == others[0] && !one.heard)
        })
        .await;
    let refused = network.change(WishKind::Remove(others[1])).await;
    assert!(matches!(refused, Err(Error::Refused(Refused::FailedPrecondition(_)))), "{refused:?}");
    // The silent one may go.
    network.change(WishKind::Remove(others[0])).await.unwrap();
    network.commit(5).await;
}

#[tokio::test]
async fn a_member_without_its_data_has_no_way_back_into_a_group_that_was_changed() {
    let mut network = Network::new(true);
    network.commit(5).await;
    network.change(added(4)).await.unwrap();
    network.start_new(4);
    network.carry_until(|network| network.voters().contains(&4)).await;
    network.carry_until(level).await;
    let leader = network.leader().unwrap();
    let refused = network.members[&leader].0.meet(2, 99).await;
    assert!(matches!(refused, Err(Error::Refused(Refused::FailedPrecondition(_)))), "{refused:?}");
}

#[tokio::test]
async fn a_learner_to_which_nobody_speaks_says_something_so_that_it_can_be_told_that_it_was_removed()
 {
    let mut network = Network::new(true);
    network.commit(30).await;
    // Nobody hears it, so it does not come to vote.
    network.mute.insert(4);
    network.change(added(4)).await.unwrap();
    network.start_new(4);
    network.change(WishKind::Remove(4)).await.unwrap();
    network.mute.clear();
    // Answers to heartbeats go to who leads, except these.
    let leader = network.leader().unwrap();
    let follower = (1..=3).find(|&id| id != leader).unwrap();
    let told = (follower, MessageType::MsgHeartbeatResponse);
    let before = network.delivered.get(&told).copied();
    network.carry_until(|network| network.delivered.get(&told).copied() > before).await;
}
