//! Nothing is promised before it is on the disk: every message is compared with what a power cut at that moment would leave.

#[path = "support/network.rs"]
mod network;

use network::Network;

#[tokio::test]
async fn no_message_leaves_before_what_it_promises_is_durable() {
    let mut network = Network::new(true);
    for _ in 0..6 {
        network.commit(30).await;
        let leader = network.leader().unwrap();
        network.crash(leader).await;
        network.commit(30).await;
        network.start(leader);
        let goal = network.members[&network.leader().unwrap()].0.status().commit;
        let caught_up = |network: &Network| network.members[&leader].0.status().applied >= goal;
        network.carry_until(caught_up).await;
    }
    let findings = network.findings.lock().unwrap();
    assert_eq!(findings.broken, Vec::<String>::new());
    for kind in ["MsgRequestVote", "MsgRequestVoteResponse", "MsgAppendResponse", "MsgSnapshot"] {
        assert!(findings.kept.contains_key(kind), "{kind} was never sent: {findings:?}");
    }
}

#[tokio::test]
async fn a_disk_that_forgets_its_barriers_is_found() {
    let mut network = Network::new(false);
    network.commit(1).await;
    assert!(!network.findings.lock().unwrap().broken.is_empty());
}
