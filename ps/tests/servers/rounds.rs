//! Rounds over several servers: only shard 0 says when one is over and who counts, and only who there is has a seat.

use std::time::Duration;

use downpour_proto::v1::advance_reply::Result as AdvanceResult;
use downpour_proto::v1::clock_client::ClockClient;
use downpour_proto::v1::round_part_reply::Result as RoundResult;
use tonic::transport::Channel;

use super::*;
use crate::support::SESSIONS;

/// Shard 0 on one server and shard 1 on the other.
struct Rounds {
    script: std::sync::Arc<Script>,
    servers: [Server; 2],
}

impl Rounds {
    async fn start() -> Rounds {
        let script = Script::start().await;
        let servers = [Server::start(&script, "ps-0").await, Server::start(&script, "ps-1").await];
        create_job(&script, &["ps-0"]);
        let second = script.server("ps-1");
        script.commit(|event| {
            let job = &mut event.jobs[0];
            let route = &mut job.shards[1];
            (route.epoch, route.primary) = (2, second);
            route.in_sync = second.into_iter().collect();
            let sync = v1::consistency_mode::Mode::Sync(0);
            let mode = Some(v1::ConsistencyMode { mode: Some(sync) });
            job.consistency =
                Some(v1::Consistency { tables: mode, dense: mode, ..Default::default() });
        });
        Rounds { script, servers }
    }

    fn life(&self, shard: usize) -> v1::ServerRef {
        self.script.server(&self.servers[shard].name).expect("registered")
    }

    fn clock(&self, shard: usize) -> ClockClient<Channel> {
        let address = self.script.address_of(self.life(shard));
        ClockClient::new(channel(&address).expect("host and port"))
    }

    fn epoch(&self, shard: usize) -> u64 {
        self.script.now().jobs[0].shards[shard].epoch
    }

    /// What a session contributes to round 1, on both shards.
    async fn contribute(&self, session: u64, gradient: f32) {
        for shard in 0..2u32 {
            let rows = v1::RowGradients {
                keys: key_of(shard).to_le_bytes().to_vec().into(),
                gradients: gradient.to_le_bytes().to_vec().into(),
            };
            let body = Some(v1::contribution::Body::Rows(rows));
            let body = v1::update::Body::Contribution(v1::Contribution { round: 1, body });
            let update = v1::Update { variable: 1, body: Some(body) };
            let server = &self.servers[shard as usize];
            loop {
                let part = v1::PushPart {
                    shard,
                    epoch: self.epoch(shard as usize),
                    sequence: 1,
                    updates: vec![update.clone()],
                    ..Default::default()
                };
                let request = v1::PushRequest {
                    request: 1,
                    job: 1,
                    session,
                    incarnation: self.life(shard as usize).incarnation,
                    parts: vec![part],
                    ..Default::default()
                };
                let stream = tokio_stream::once(request);
                let mut replies =
                    server.client().push(stream).await.expect("it is served").into_inner();
                let reply = replies.message().await.expect("no error").expect("a reply");
                if let Some(PushResult::Done(done)) = reply.parts[0].result {
                    assert_eq!(done.refusal, None);
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    /// What shard 0 says to a session that has finished so many steps.
    async fn tell(&self, session: u64, clock: u64) -> AdvanceResult {
        loop {
            let request = v1::AdvanceRequest {
                job: 1,
                incarnation: self.life(0).incarnation,
                epoch: self.epoch(0),
                session,
                view_version: 1,
                clock,
                contributes: clock > 0,
                seat: 1,
                ..Default::default()
            };
            let reply = self.clock(0).advance(request).await.expect("it is served").into_inner();
            match reply.result.expect("a result") {
                AdvanceResult::Retry(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                result => return result,
            }
        }
    }

    /// Says to shard 1 that round 1 is over, and that only session 1 was in it.
    async fn end_round(&self) -> RoundResult {
        let request = v1::EndRoundRequest {
            job: 1,
            incarnation: self.life(1).incarnation,
            round: Some(v1::Round { number: 1, members: vec![1] }),
            parts: vec![v1::RoundPart { shard: 1, epoch: self.epoch(1) }],
        };
        let reply = self.clock(1).end_round(request).await.expect("it is served").into_inner();
        reply.parts[0].result.expect("a result")
    }

    async fn value(&self) -> f32 {
        let keys = key_of(1).to_le_bytes().to_vec().into();
        let part = v1::PullPart {
            shard: 1,
            epoch: self.epoch(1),
            rows: vec![v1::PullRows { variable: 1, keys }],
            dense: Vec::new(),
        };
        let incarnation = self.life(1).incarnation;
        let request = v1::PullRequest { job: 1, incarnation, parts: vec![part] };
        let reply = self.servers[1].client().pull(request).await.expect("served").into_inner();
        match &reply.parts[0].result {
            Some(PullResult::Pulled(pulled)) => floats(&pulled.rows[0]).next().expect("a row"),
            other => panic!("not pulled: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_false_end_of_a_round_changes_nothing_and_a_true_one_counts_whom_shard_0_says() {
    let test = async {
        let rounds = Rounds::start().await;
        let not_ready = RoundResult::Retry(v1::Retry { reason: v1::RetryReason::NotReady.into() });
        for (session, gradient) in [(1, 1.0), (2, 5.0)] {
            rounds.contribute(session, gradient).await;
            assert!(matches!(rounds.tell(session, 0).await, AdvanceResult::Seated(_)));
        }
        assert_eq!(rounds.end_round().await, not_ready, "nobody decided it");
        assert_eq!(rounds.value().await, 0.0);
        for session in 1..=2 {
            rounds.tell(session, 1).await;
        }
        while rounds.end_round().await != RoundResult::Done(true) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(rounds.value().await, 3.0, "the mean of both");
        let made_up = rounds.tell(SESSIONS + 1, 0).await;
        assert_eq!(made_up, AdvanceResult::SessionClosed(v1::SessionClosed {}));
        let Rounds { servers: [first, second], .. } = rounds;
        first.kill().await;
        second.kill().await;
    };
    tokio::time::timeout(Duration::from_secs(60), test).await.expect("nothing hangs");
}
