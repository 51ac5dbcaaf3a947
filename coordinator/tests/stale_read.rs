//! A leader that was replaced and does not know it answers no read. Random schedules hardly ever meet this moment: here it is made.

#[path = "support/network.rs"]
mod network;

use network::Network;

#[tokio::test]
async fn a_leader_that_was_replaced_and_does_not_know_it_answers_no_read() {
    // Member 3 would lead on without a majority for 20 s.
    let mut network = Network::with_election_ticks(true, 4000);
    network.commit(1).await;
    while network.leader() != Some(3) {
        let leader = network.leader().unwrap();
        let handle = network.members[&leader].0.clone();
        // Leadership goes to the most advanced member, of these to the highest number.
        let leaving = tokio::spawn(async move { handle.leave().await });
        network.carry_until(|_| leaving.is_finished()).await;
        network.carry_until(|network| network.leader().is_some_and(|id| id != leader)).await;
        network.crash(leader).await;
        network.start(leader);
        network.commit(1).await;
    }
    let old = network.members[&3].0.clone();
    let reading = |handle: &downpour_coordinator::raft::Handle| {
        let handle = handle.clone();
        tokio::spawn(async move { handle.read().await })
    };
    let read = reading(&old);
    network.carry_until(|_| read.is_finished()).await;
    let before = read.await.unwrap().unwrap().version;

    network.isolated.insert(3);
    network.carry_until(|network| network.leader().is_some()).await;
    network.commit(1).await;
    assert!(old.status().leads(), "it does not know");
    let stale = reading(&old);
    network.commit(20).await;
    assert!(!stale.is_finished(), "{:?}", stale.await);

    network.isolated.clear();
    network.carry_until(|_| stale.is_finished()).await;
    stale.await.unwrap().unwrap_err();
    let read = reading(&network.members[&network.leader().unwrap()].0);
    network.carry_until(|_| read.is_finished()).await;
    assert!(read.await.unwrap().unwrap().version > before);
}
