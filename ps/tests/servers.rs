//! Servers over real gRPC, under a coordinator that does what the test says.

#[path = "servers/memory.rs"]
mod memory;
#[path = "servers/rounds.rs"]
mod rounds;
mod support;

use std::time::Duration;

use downpour_core::tensor_bytes::floats;
use downpour_proto::frame::{Hello, Kind, SERVER};
use downpour_proto::framed::Connection;
use downpour_proto::transport::channel;
use downpour_proto::v1;
use downpour_proto::v1::pull_part_reply::Result as PullResult;
use downpour_proto::v1::push_part_reply::Result as PushResult;
use downpour_proto::v1::replica_client::ReplicaClient;
use prost::Message;
use support::{Script, Server, wait_for};
use tonic::Code;

const SHARDS: u32 = 2;

/// A job of two shards with a table that counts pushes, all shards under the first server.
fn create_job(script: &Script, servers: &[&str]) {
    let members: Vec<_> = servers.iter().map(|name| script.server(name).expect("known")).collect();
    let spec = v1::JobSpec {
        name: "job".into(),
        shards: SHARDS,
        replicas: members.len() as u32,
        min_in_sync: 1,
        seed: 1,
    };
    let table = v1::TableSpec {
        row_format: 0,
        dim: 1,
        init: Some(v1::Init { kind: Some(v1::init::Kind::Constant(0.0)) }),
        group: "counts".into(),
    };
    let sgd = v1::optimizer::Kind::Sgd(v1::Sgd { learning_rate: -1.0 });
    let spec_of_table = v1::VariableSpec {
        name: "counts".into(),
        optimizer: Some(v1::Optimizer { kind: Some(sgd), ..Default::default() }),
        shape: Some(v1::variable_spec::Shape::Table(table)),
    };
    let shards = (0..SHARDS).map(|shard| v1::ShardRoute {
        shard,
        epoch: 1,
        set_version: 1,
        primary: Some(members[0]),
        in_sync: members.clone(),
        lost: false,
        joining: None,
        moving: None,
    });
    script.commit(|event| {
        event.jobs = vec![v1::JobView {
            job: 1,
            spec: Some(spec),
            version: 1,
            variables: vec![v1::Variable { id: 1, spec: Some(spec_of_table) }],
            shards: shards.collect(),
            sessions: Some(v1::ClosedSessions::default()),
            ..v1::JobView::default()
        }];
    });
}

/// A key of each shard.
fn key_of(shard: u32) -> u64 {
    let salt = downpour_core::mix::salt("counts");
    let here = |key: &u64| downpour_core::routing::shard_of(*key, salt, SHARDS).0 == shard;
    (1..).find(here).expect("the shards are even")
}

struct Client<'a> {
    script: &'a Script,
    server: &'a Server,
}

impl Client<'_> {
    fn incarnation(&self) -> u64 {
        self.script.server(&self.server.name).expect("registered").incarnation
    }

    fn epoch(&self) -> u64 {
        self.script.now().jobs[0].shards[0].epoch
    }

    /// Counts one on a key of every shard, as push `sequence` of session 1.
    async fn push(&self, sequence: u64) -> Result<Vec<PushResult>, tonic::Status> {
        let part = |shard| {
            let rows = v1::RowGradients {
                keys: key_of(shard).to_le_bytes().to_vec().into(),
                gradients: 1f32.to_le_bytes().to_vec().into(),
            };
            let update = v1::Update { variable: 1, body: Some(v1::update::Body::Rows(rows)) };
            v1::PushPart {
                shard,
                epoch: self.epoch(),
                sequence,
                updates: vec![update],
                ..Default::default()
            }
        };
        let request = v1::PushRequest {
            request: sequence,
            job: 1,
            session: 1,
            incarnation: self.incarnation(),
            parts: (0..SHARDS).map(part).collect(),
            ..Default::default()
        };
        let stream = tokio_stream::once(request);
        let mut replies = self.server.client().push(stream).await?.into_inner();
        let reply = replies.message().await?.expect("a reply to each request");
        assert_eq!(reply.request, sequence);
        Ok(reply.parts.into_iter().filter_map(|part| part.result).collect())
    }

    /// Pushes until it is acknowledged, as a client would, and says whether it was a repeat.
    async fn acknowledged(&self, sequence: u64) -> bool {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            let results = self.push(sequence).await.unwrap_or_default();
            let done = results.iter().map(|result| match result {
                PushResult::Done(done) => Some(done.repeated),
                _ => None,
            });
            match done.collect::<Option<Vec<bool>>>() {
                Some(repeated) if !repeated.is_empty() => return repeated.iter().all(|&r| r),
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
            assert!(tokio::time::Instant::now() < deadline, "not acknowledged: {results:?}");
        }
    }

    async fn pull(&self) -> Result<Vec<PullResult>, tonic::Status> {
        let part = |shard| v1::PullPart {
            shard,
            epoch: self.epoch(),
            rows: vec![v1::PullRows {
                variable: 1,
                keys: key_of(shard).to_le_bytes().to_vec().into(),
            }],
            dense: Vec::new(),
        };
        let incarnation = self.incarnation();
        let request =
            v1::PullRequest { job: 1, incarnation, parts: (0..SHARDS).map(part).collect() };
        let reply = self.server.client().pull(request).await?.into_inner();
        Ok(reply.parts.into_iter().filter_map(|part| part.result).collect())
    }

    async fn counts(&self) -> Vec<f32> {
        let parts = self.pull().await.expect("a reply");
        let counts = parts.iter().map(|part| match part {
            PullResult::Pulled(pulled) => floats(&pulled.rows[0]).next().expect("a row"),
            other => panic!("not pulled: {other:?}"),
        });
        counts.collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_push_survives_its_primary_and_the_retry_is_a_repeat() {
    let script = Script::start().await;
    let (first, second) =
        (Server::start(&script, "ps-0").await, Server::start(&script, "ps-1").await);
    create_job(&script, &["ps-0", "ps-1"]);
    let client = Client { script: &script, server: &first };
    assert!(!client.acknowledged(1).await);
    assert_eq!(client.counts().await, [1.0, 1.0]);
    assert!(first.node.readiness.reasons().is_empty());

    first.kill().await;
    let heir = script.server("ps-1").expect("known");
    script.reroute(|route| {
        route.epoch += 1;
        route.primary = Some(heir);
        route.in_sync = vec![heir];
    });
    let client = Client { script: &script, server: &second };
    assert!(client.acknowledged(1).await, "the retry is recognised");
    assert!(!client.acknowledged(2).await);
    assert_eq!(client.counts().await, [2.0, 2.0]);
    second.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_gone_leaves_the_set_and_pushes_go_on() {
    let script = Script::start().await;
    let (first, second) =
        (Server::start(&script, "ps-0").await, Server::start(&script, "ps-1").await);
    create_job(&script, &["ps-0", "ps-1"]);
    let client = Client { script: &script, server: &first };
    client.acknowledged(1).await;
    second.kill().await;
    client.acknowledged(2).await;
    let alone = script.now().jobs[0].shards.iter().all(|route| route.in_sync.len() == 1);
    assert!(alone, "acknowledged only after the committed removal was read back");
    assert_eq!(client.counts().await, [2.0, 2.0]);
    first.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_change_of_primary_goes_there_and_back_and_loses_nothing() {
    let script = Script::start().await;
    let (first, second) =
        (Server::start(&script, "ps-0").await, Server::start(&script, "ps-1").await);
    create_job(&script, &["ps-0", "ps-1"]);
    for sequence in 1..=6 {
        let (leader, follower) =
            if sequence % 2 == 1 { (&first, &second) } else { (&second, &first) };
        let primary = script.server(&leader.name);
        script.reroute(|route| {
            route.epoch += 1;
            route.primary = primary;
        });
        let client = Client { script: &script, server: leader };
        assert!(!client.acknowledged(sequence).await);
        assert_eq!(client.counts().await, [sequence as f32; 2]);
        let elsewhere = Client { script: &script, server: follower }.pull().await.expect("a reply");
        let redirected =
            |part: &PullResult| matches!(part, PullResult::Redirect(to) if to.primary == primary);
        assert!(elsewhere.iter().all(redirected), "{elsewhere:?}");
    }
    let both = script.now().jobs[0].shards.iter().all(|route| route.in_sync.len() == 2);
    assert!(both, "nobody had to leave");
    first.kill().await;
    second.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_given_up_returns_as_a_stranger_with_nothing() {
    let script = Script::start().await;
    let server = Server::start(&script, "ps-0").await;
    create_job(&script, &["ps-0"]);
    let client = Client { script: &script, server: &server };
    client.acknowledged(1).await;
    let old = script.server("ps-0").expect("known");
    script.fence(old);
    wait_for("a new incarnation", || script.server("ps-0").filter(|new| *new != old)).await;
    let results = client.push(2).await.expect("a reply");
    assert!(!results.iter().any(|result| matches!(result, PushResult::Done(_))), "{results:?}");
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_push_ends_its_stream_and_names_the_field() {
    let script = Script::start().await;
    let server = Server::start(&script, "ps-0").await;
    let request = tokio_stream::once(v1::PushRequest { job: 1, ..Default::default() });
    let answered = async {
        let mut replies = server.client().push(request).await?.into_inner();
        replies.message().await
    };
    let status = answered.await.expect_err("refused");
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "session: is not given"));
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_of_more_parts_than_a_job_has_shards_is_refused_before_it_is_decoded() {
    let script = Script::start().await;
    let server = Server::start(&script, "a").await;
    let parts = vec![v1::PullPart::default(); 65_537];
    let pull = v1::PullRequest { parts, ..Default::default() };
    let parts = vec![v1::PushPart::default(); 65_537];
    let push = v1::PushRequest { parts, ..Default::default() };
    let pulled = server.client().pull(pull).await.expect_err("too many");
    let mut replies =
        server.client().push(tokio_stream::once(push)).await.expect("opens").into_inner();
    for status in [pulled, replies.message().await.expect_err("too many")] {
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with("parts: have more than"), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_backup_alone_had_is_fetched_by_the_one_that_is_promoted() {
    let script = Script::start().await;
    let (first, second) =
        (Server::start(&script, "ps-0").await, Server::start(&script, "ps-1").await);
    // The test is the primary of epoch 1, and dies when only the second has its records.
    let me = script.register("ps-x", "127.0.0.1:1");
    create_job(&script, &["ps-x", "ps-0", "ps-1"]);
    let ahead = script.server("ps-1").expect("known");
    let mut replica = ReplicaClient::new(channel(&script.address_of(ahead)).expect("an address"));
    for shard in 0..SHARDS {
        let fence = v1::FenceRequest {
            job: 1,
            shard,
            epoch: 1,
            candidate: Some(me),
            incarnation: ahead.incarnation,
        };
        // The member may not have heard of the shard yet.
        while replica.fence(fence).await.expect("a reply").into_inner().not_ready {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let variable = script.now().jobs[0].variables[0].clone();
    let shards = (0..SHARDS).map(|shard| records(shard, variable.clone())).collect();
    let request = v1::ReplicateRequest { source: Some(me), incarnation: ahead.incarnation, shards };
    let hello = Hello { session: SERVER | 9, lane: 0 };
    let mut link = Connection::open(&script.address_of(ahead), hello).await.expect("connected");
    link.send(Kind::Replicate, 7, &request);
    let answer = loop {
        link.turn().await.expect("an answer");
        if let Some(frame) = link.take().expect("a server sends frames") {
            break frame;
        }
    };
    assert_eq!((answer.kind, answer.request), (Kind::Replicated, 7));
    let acks = v1::ReplicateReply::decode(answer.body).expect("a reply").shards;
    assert!(acks.iter().all(|ack| !ack.not_ready && ack.last_lsn == (1 << 40 | 2)), "{acks:?}");

    let heir = script.server("ps-0");
    script.reroute(|route| {
        route.epoch += 1;
        route.primary = heir;
        route.in_sync.retain(|member| *member != me);
    });
    let client = Client { script: &script, server: &first };
    assert!(client.acknowledged(1).await, "the push that only the other backup had");
    assert_eq!(client.counts().await, [1.0, 1.0]);
    first.kill().await;
    second.kill().await;
}

/// A definition and push 1 of session 1, as the log of a shard.
fn records(shard: u32, variable: v1::Variable) -> v1::ShardRecords {
    let rows = v1::RowGradients {
        keys: key_of(shard).to_le_bytes().to_vec().into(),
        gradients: 1f32.to_le_bytes().to_vec().into(),
    };
    let update = v1::Update { variable: 1, body: Some(v1::update::Body::Rows(rows)) };
    let push = v1::PushRecord {
        session: 1,
        sequence: 1,
        clock: 1,
        refusal: None,
        updates: vec![v1::ResolvedUpdate {
            update: Some(update),
            learning_rate: -1.0,
            step: 1,
            beta1_power: 0.0,
            beta2_power: 0.0,
        }],
    };
    let record = |count: u64, body| v1::Record {
        lsn: 1 << 40 | count,
        previous_lsn: if count == 1 { 0 } else { 1 << 40 | (count - 1) },
        body: Some(body),
    };
    let records = vec![
        record(1, v1::record::Body::Define(variable)),
        record(2, v1::record::Body::Push(push)),
    ];
    v1::ShardRecords { job: 1, shard, epoch: 1, commit_lsn: 0, records, check: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_that_go_on_while_the_primary_changes_are_counted_once_each() {
    const PUSHES: u64 = 200;
    let script = Script::start().await;
    let servers = [Server::start(&script, "ps-0").await, Server::start(&script, "ps-1").await];
    create_job(&script, &["ps-0", "ps-1"]);
    let primary = |script: &Script| {
        let primary = script.now().jobs[0].shards[0].primary;
        usize::from(primary != script.server("ps-0"))
    };
    let pushing = async {
        for sequence in 1..=PUSHES {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
            loop {
                let client = Client { script: &script, server: &servers[primary(&script)] };
                let results = client.push(sequence).await.unwrap_or_default();
                let done = |result: &PushResult| matches!(result, PushResult::Done(_));
                if !results.is_empty() && results.iter().all(done) {
                    break;
                }
                assert!(tokio::time::Instant::now() < deadline, "{sequence}: {results:?}");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    };
    let switching = async {
        loop {
            tokio::time::sleep(Duration::from_millis(15)).await;
            let next = script.server(["ps-1", "ps-0"][primary(&script)]);
            script.reroute(|route| {
                route.epoch += 1;
                route.primary = next;
            });
        }
    };
    tokio::select! {
        () = pushing => {}
        () = switching => unreachable!("it does not end"),
    }
    let client = Client { script: &script, server: &servers[primary(&script)] };
    client.acknowledged(PUSHES).await;
    assert_eq!(client.counts().await, [PUSHES as f32; 2]);
    assert!(client.epoch() > 2, "the primary did change");
    for server in servers {
        server.kill().await;
    }
}
