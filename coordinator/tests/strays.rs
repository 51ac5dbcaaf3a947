//! Messages that no member of a healthy group sends: none ends a member.

#[path = "support/network.rs"]
mod network;

use network::Network;
use raft::eraftpb::{Entry, Message, MessageType};

#[tokio::test]
async fn no_stray_message_about_what_a_member_lacks_ends_it() {
    let mut network = Network::new(true);
    network.commit(10).await;
    let leader = network.leader().unwrap();
    let (victim, other) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    let term = network.members[&leader].0.status().term;
    network.carry_until(|network| network.members[&victim].0.status().leader == Some(leader)).await;
    let stray = |kind, from, term| {
        let mut message = Message::default();
        message.set_msg_type(kind);
        (message.from, message.to, message.term) = (from, victim, term);
        (message.commit, message.index) = (99_999, 99_999);
        message
    };
    let mut gap = Message { index: 0, ..stray(MessageType::MsgAppend, leader, term) };
    gap.entries = vec![Entry { index: 99_999, term, ..Entry::default() }].into();
    // A vote that is asked for when leadership is handed over is heard whoever leads, and no election comes after the last term.
    let mut vote = stray(MessageType::MsgRequestVote, 77, u64::MAX);
    vote.context = b"CampaignTransfer".to_vec().into();
    let strays = [
        vote,
        stray(MessageType::MsgHeartbeat, leader, 50),
        stray(MessageType::MsgHeartbeat, other, 50),
        stray(MessageType::MsgHeartbeat, other, term),
        stray(MessageType::MsgAppend, leader, term),
        gap,
    ];
    for message in strays {
        network.members[&victim].0.deliver(message, 0).await;
    }
    network.commit(10).await;
    assert!(network.members.values().all(|(_, task)| !task.is_finished()));
    assert!(network.members[&victim].0.status().term < 50, "and none set the term");
}
