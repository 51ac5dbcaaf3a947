//! A member that lost its disk cannot vote with what it forgot, and comes back by itself.

#[path = "support/network.rs"]
mod network;

use network::Network;
use raft::eraftpb::MessageType;

/// A leader and the two others.
async fn roles(network: &mut Network) -> (u64, u64, u64) {
    network.commit(10).await;
    let leader = network.leader().unwrap();
    let others: Vec<u64> = (1..=3).filter(|&id| id != leader).collect();
    (leader, others[0], others[1])
}

#[tokio::test]
async fn it_does_not_help_one_who_missed_what_it_had_acknowledged() {
    let mut network = Network::new(true);
    let (leader, forgetful, absent) = roles(&mut network).await;
    // Acknowledged by the leader and the one that will forget it.
    network.isolated.insert(absent);
    network.commit(5).await;
    let goal = network.members[&leader].0.status().commit;
    network.crash(forgetful).await;
    network.crash(leader).await;
    network.lose_disk(forgetful);
    network.start(forgetful);
    network.isolated.clear();
    network.meet(forgetful, absent).await;
    let asked = (forgetful, MessageType::MsgRequestPreVote);
    let before = network.delivered.get(&asked).copied().unwrap_or(0);
    network
        .carry_until(|network| network.delivered.get(&asked).is_some_and(|&now| now > before + 20))
        .await;
    assert_eq!(network.leader(), None, "elected without what was committed");

    network.start(leader);
    network.meet(forgetful, leader).await;
    network.carry_until(caught_up(forgetful, goal)).await;
    // And it votes again: without it there is no majority.
    network.crash(leader).await;
    network.commit(5).await;
    assert!(network.members[&forgetful].0.status().commit > goal);
}

/// The member is ready and has applied the log up to `goal`.
fn caught_up(member: u64, goal: u64) -> impl Fn(&Network) -> bool {
    move |network| {
        let status = network.members[&member].0.status();
        status.ready && status.applied >= goal
    }
}

#[tokio::test]
async fn it_comes_back_under_the_leader_that_counted_on_it() {
    let mut network = Network::new(true);
    let (leader, forgetful, other) = roles(&mut network).await;
    network.crash(forgetful).await;
    network.lose_disk(forgetful);
    network.start(forgetful);
    network.meet(forgetful, leader).await;
    network.meet(forgetful, other).await;
    let goal = network.members[&leader].0.status().commit;
    network.carry_until(caught_up(forgetful, goal)).await;
    // Restarted, it remembers that it was admitted.
    network.crash(forgetful).await;
    network.start(forgetful);
    network.crash(other).await;
    network.commit(5).await;
}

#[tokio::test]
async fn a_vote_is_not_asked_of_it_before_it_has_met_everybody() {
    let mut network = Network::new(true);
    let (leader, forgetful, other) = roles(&mut network).await;
    network.crash(forgetful).await;
    network.lose_disk(forgetful);
    network.start(forgetful);
    network.meet(forgetful, leader).await;
    let goal = network.members[&leader].0.status().commit;
    network.carry_until(|network| network.members[&forgetful].0.status().applied >= goal).await;
    assert!(!network.members[&forgetful].0.status().ready);
    network.meet(forgetful, other).await;
    network.carry_until(|network| network.members[&forgetful].0.status().ready).await;
}
