//! A server at its memory limit, as a process of its own.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use downpour_core::tensor_bytes::floats;
use downpour_proto::transport::{MESSAGE_BYTES_MAX, channel};
use downpour_proto::v1;
use downpour_proto::v1::pull_part_reply::Result as PullResult;
use downpour_proto::v1::push_part_reply::Result as PushResult;
use downpour_proto::v1::shard_client::ShardClient;
use tonic::transport::Channel;

use crate::support::{Script, wait_for};

const LIMIT: u64 = 256 << 20;
/// Floats of a row: wide, so that few pushes fill the memory.
const DIM: usize = 4096;
/// Keys of a push: 4 MiB of gradients.
const KEYS: u64 = 256;

/// Ends the child when a test fails.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn create_job(script: &Script, server: v1::ServerRef) {
    let table = v1::TableSpec {
        row_format: 0,
        dim: DIM as u32,
        init: Some(v1::Init { kind: Some(v1::init::Kind::Constant(0.0)) }),
        group: "wide".into(),
    };
    let sgd = v1::optimizer::Kind::Sgd(v1::Sgd { learning_rate: -1.0 });
    let spec = v1::VariableSpec {
        name: "wide".into(),
        optimizer: Some(v1::Optimizer { kind: Some(sgd), ..Default::default() }),
        shape: Some(v1::variable_spec::Shape::Table(table)),
    };
    let job = v1::JobSpec { name: "job".into(), shards: 1, replicas: 1, min_in_sync: 1, seed: 1 };
    let route = v1::ShardRoute {
        shard: 0,
        epoch: 1,
        set_version: 1,
        primary: Some(server),
        in_sync: vec![server],
        lost: false,
        joining: None,
        moving: None,
    };
    script.commit(|event| {
        event.jobs = vec![v1::JobView {
            job: 1,
            spec: Some(job),
            version: 1,
            variables: vec![v1::Variable { id: 1, spec: Some(spec) }],
            shards: vec![route],
            sessions: Some(v1::ClosedSessions::default()),
            ..v1::JobView::default()
        }];
    });
}

/// A session that pushes gradients of 1 to the only shard.
struct Client {
    shard: ShardClient<Channel>,
    incarnation: u64,
    sequence: u64,
}

impl Client {
    async fn push(&mut self, keys: std::ops::Range<u64>) -> v1::PushOutcome {
        let one = 1f32.to_le_bytes();
        let count = (keys.end - keys.start) as usize;
        let rows = v1::RowGradients {
            keys: keys.flat_map(u64::to_le_bytes).collect(),
            gradients: one.repeat(count * DIM).into(),
        };
        let update = v1::Update { variable: 1, body: Some(v1::update::Body::Rows(rows)) };
        loop {
            let part = v1::PushPart {
                shard: 0,
                epoch: 1,
                sequence: self.sequence,
                updates: vec![update.clone()],
                ..Default::default()
            };
            let request = v1::PushRequest {
                request: 1,
                job: 1,
                session: 1,
                incarnation: self.incarnation,
                parts: vec![part],
                ..Default::default()
            };
            let replies = self.shard.push(tokio_stream::once(request)).await.expect("a stream");
            let reply = replies.into_inner().message().await.expect("no error").expect("a reply");
            match reply.parts[0].result {
                Some(PushResult::Done(done)) => {
                    self.sequence += 1;
                    return done;
                }
                // It does not serve yet.
                Some(PushResult::Retry(_) | PushResult::Redirect(_)) => {
                    tokio::task::yield_now().await;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The first float of a row.
    async fn pull(&mut self, key: u64) -> f32 {
        let rows = vec![v1::PullRows { variable: 1, keys: key.to_le_bytes().to_vec().into() }];
        let part = v1::PullPart { shard: 0, epoch: 1, rows, dense: Vec::new() };
        let request = v1::PullRequest { job: 1, incarnation: self.incarnation, parts: vec![part] };
        let reply = self.shard.pull(request).await.expect("a reply").into_inner();
        match &reply.parts[0].result {
            Some(PullResult::Pulled(pulled)) => floats(&pulled.rows[0]).next().expect("a row"),
            other => panic!("{other:?}"),
        }
    }
}

/// The most that a process ever had resident.
fn peak_bytes(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("KiB");
    kib << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_limit_new_keys_are_refused_and_known_keys_are_trained_and_memory_stays_below() {
    let script: Arc<Script> = Script::start().await;
    let child = Command::new(env!("CARGO_BIN_EXE_downpour-ps"))
        .args(["--name", "ps-0", "--listen", "127.0.0.1:0", "--coordinators", &script.address])
        .args(["--memory-limit", &LIMIT.to_string(), "--data-threads", "2"])
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let child = Guard(child);
    let server = wait_for("registration", || script.server("ps-0")).await;
    create_job(&script, server);
    let shard = ShardClient::new(channel(&script.address_of(server)).expect("host and port"))
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let mut client = Client { shard, incarnation: server.incarnation, sequence: 1 };

    let mut refused_from = None;
    for first in (0..).step_by(KEYS as usize) {
        let outcome = client.push(first..first + KEYS).await;
        let refused = outcome.refusal.map(|refusal| (refusal.reason(), refusal.variable));
        if refused.is_some() {
            assert_eq!(refused, Some((v1::RefusalReason::MemoryLimit, 1)));
            refused_from = refused_from.or(Some(first));
        }
        // Until long after no key finds room any more: about four times the limit was pushed.
        if first * (DIM * 4) as u64 > 4 * LIMIT {
            break;
        }
    }
    let refused_from = refused_from.expect("the limit is reached");
    assert!(
        refused_from * (DIM * 4) as u64 > LIMIT / 2,
        "most of the limit is for rows: {refused_from}"
    );

    let known = client.push(0..KEYS).await;
    assert_eq!(known.refusal, None);
    assert_eq!(client.pull(0).await, 2.0);
    let last = 4 * LIMIT / (DIM * 4) as u64;
    assert_eq!(client.pull(last).await, 0.0, "a refused key has its first value");

    let peak = peak_bytes(&child.0);
    assert!(peak <= LIMIT + LIMIT / 50, "{peak} bytes at a limit of {LIMIT}");
}
