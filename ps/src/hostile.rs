//! Nothing from the network, however malformed, panics a server or makes it allocate without bound (invariant 7 of the design).
// tidy: not simulated: tests.

mod frames;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::BytesMut;
use downpour_core::id::{JobId, Lsn, ShardId};
use downpour_node::metrics::Registry;
use downpour_node::shutdown::Shutdown;
use downpour_proto::v1;
use downpour_proto::v1::cut_piece::Piece;
use downpour_proto::v1::pull_part_reply::Result as PullResult;
use downpour_proto::v1::push_part_reply::Result as PushResult;
use proptest::prelude::*;
use prost::Message;
use tonic::Code;

use crate::config::Config;
use crate::coordinators::Coordinators;
use crate::hosted::ShardKey;
use crate::lease::{BootTime, Lease};
use crate::life::{Life, Process};
use crate::membership::Current;
use crate::memory::Memory;
use crate::metrics::ServerMetrics;
use crate::shard::tests::fixture::{COUNTS, DENSE, EMBEDDING, route, server, view};
use crate::shard::{Contact, Role};
use crate::threads::DataThreads;
use crate::{pull, push, receive, replica};

/// Of all servers of a test.
static THREADS: LazyLock<DataThreads> =
    LazyLock::new(|| DataThreads::start(2, &Shutdown::new(), Duration::ZERO).expect("threads"));

/// A server that serves one shard of one job, alone.
pub(crate) fn serving() -> (Arc<Life>, Current) {
    serving_with(|_| ())
}

/// The same with other options.
pub(crate) fn serving_with(change: impl FnOnce(&mut Config)) -> (Arc<Life>, Current) {
    let mut config = Config::default();
    change(&mut config);
    let process = Process {
        config,
        coordinators: Coordinators::new(vec!["127.0.0.1:1".into()]).expect("an address"),
        metrics: ServerMetrics::new(&Registry::new()),
        memory: Memory::unlimited(),
        copies: crate::pace::Budget::new(0),
        threads: THREADS.clone(),
        shutdown: Shutdown::new(),
    };
    let life = Life::new(server(1), Lease::new(BootTime::now(), Duration::ZERO), Arc::new(process));
    life.lease.renew(BootTime::now(), Duration::from_secs(3600));
    life.on_view(downpour_core::view::JobView::clone(&view(1, route(1, 1, 1, &[1]))));
    let current = Arc::new(ArcSwapOption::from(Some(Arc::clone(&life))));
    (life, current)
}

fn a_push() -> v1::PushRequest {
    let rows = v1::RowGradients {
        keys: [3u64, 9].iter().flat_map(|key| key.to_le_bytes()).collect(),
        gradients: [1f32, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    let values = v1::DenseBlocks { blocks: vec![0, 2], values: vec![0; 13 * 4].into() };
    let updates = vec![
        v1::Update { variable: COUNTS.0, body: Some(v1::update::Body::Rows(rows)) },
        v1::Update { variable: DENSE.0, body: Some(v1::update::Body::Values(values)) },
    ];
    v1::PushRequest {
        request: 1,
        job: 1,
        session: 7,
        incarnation: server(1).incarnation.0,
        view_version: 1,
        clock: 1,
        parts: vec![v1::PushPart {
            shard: 0,
            epoch: 1,
            sequence: 1,
            updates,
            read: Some(v1::Read { lsn: 1 << 40 | 1, clock: 1 }),
            ..Default::default()
        }],
    }
}

fn a_pull() -> v1::PullRequest {
    let keys = [3u64, 9].iter().flat_map(|key| key.to_le_bytes()).collect();
    v1::PullRequest {
        job: 1,
        incarnation: server(1).incarnation.0,
        parts: vec![v1::PullPart {
            shard: 0,
            epoch: 1,
            rows: vec![v1::PullRows { variable: COUNTS.0, keys }],
            dense: vec![v1::PullDense { variable: DENSE.0, have_lsn: 0 }],
        }],
    }
}

/// The records of the push, as a backup would get them.
fn some_records() -> v1::ShardRecords {
    let update = a_push().parts[0].updates[0].clone();
    let push = v1::PushRecord {
        session: 7,
        sequence: 1,
        clock: 1,
        refusal: None,
        updates: vec![v1::ResolvedUpdate {
            update: Some(update),
            learning_rate: -1.0,
            step: 1,
            ..Default::default()
        }],
    };
    let variable = (&view(1, route(1, 1, 1, &[1])).variables[0]).into();
    let bodies = [v1::record::Body::Define(variable), v1::record::Body::Push(push)];
    let records = (1..).zip(bodies).map(|(count, body)| v1::Record {
        lsn: 1 << 40 | count,
        previous_lsn: if count == 1 { 0 } else { 1 << 40 | (count - 1) },
        body: Some(body),
    });
    let check = Some(v1::Check { lsn: 1 << 40 | 2, digest: 3 });
    v1::ShardRecords {
        job: 1,
        shard: 0,
        epoch: 1,
        commit_lsn: 0,
        records: records.collect(),
        check,
    }
}

/// A message with a few bytes changed, if it still is one.
fn spoilt<M: Message + Default>(message: &M, changes: &[(usize, u8)]) -> Option<M> {
    let mut bytes = message.encode_to_vec();
    let len = bytes.len();
    for (at, byte) in changes {
        bytes[at % len] = *byte;
    }
    M::decode(bytes.as_slice()).ok()
}

fn changes() -> impl Strategy<Value = Vec<(usize, u8)>> {
    proptest::collection::vec((any::<usize>(), any::<u8>()), 1..4)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(future)
}

proptest! {
    #[test]
    fn spoilt_pushes_are_answered_or_refused(spoils in proptest::collection::vec(changes(), 8)) {
        block_on(async {
            let (life, current) = serving();
            for request in spoils.iter().filter_map(|changes| spoilt(&a_push(), changes)) {
                let parts = request.parts.len();
                match push::take(&life.process, &current, request).await {
                    Ok(taken) => assert_eq!(taken.settle(&life.process).await.parts.len(), parts),
                    Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{status}"),
                }
            }
        });
    }

    #[test]
    fn spoilt_pulls_are_answered_or_refused(spoils in proptest::collection::vec(changes(), 8)) {
        block_on(async {
            let (life, _) = serving();
            for request in spoils.iter().filter_map(|changes| spoilt(&a_pull(), changes)) {
                let parts = request.parts.len();
                match pull::answer(Some(&life), request, &mut BytesMut::new()).await {
                    Ok(reply) => assert_eq!(reply.parts.len(), parts),
                    Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{status}"),
                }
            }
        });
    }

    #[test]
    fn spoilt_records_are_acknowledged_or_refused(spoils in proptest::collection::vec(changes(), 8)) {
        block_on(async {
            let (life, _) = serving();
            let backup = view(2, route(1, 2, 2, &[1, 2]));
            life.end();
            for changes in spoils {
                let (life, _) = serving();
                life.on_deleted(JobId(1));
                life.on_view(downpour_core::view::JobView::clone(&backup));
                if let Some(records) = spoilt(&some_records(), &changes) {
                    let ack = replica::replicate(&life, server(2), Contact::Leased, records);
                    assert!(ack.not_ready || ack.last_lsn >> 40 <= ack.epoch, "{ack:?}");
                }
                life.end();
            }
        });
    }
}

/// A copy of a shard with rows and blocks, as somebody sends it who leads epoch 1.
async fn a_copy() -> Vec<v1::CopyRequest> {
    let (life, current) = serving();
    let taken = push::take(&life.process, &current, a_push()).await.expect("well-formed");
    taken.settle(&life.process).await;
    let hosted = life.hosted(KEY).expect("here");
    let mut shard = hosted.shard.lock();
    let id = shard.open_cut(Lsn::ZERO).expect("it serves");
    let head = v1::CopyHead {
        source: Some(server(2).into()),
        incarnation: server(1).incarnation.0,
        job: 1,
        shard: 0,
        epoch: 1,
        set_version: 2,
        attempt: 1,
    };
    let mut requests = vec![v1::CopyRequest { head: Some(head), piece: None }];
    loop {
        let piece = shard.read_cut(id, 30).expect("it is open");
        let end = matches!(piece, Piece::End(_));
        let piece = Some(v1::CutPiece { piece: Some(piece) });
        requests.push(v1::CopyRequest { head: None, piece });
        if end {
            return requests;
        }
    }
}

const KEY: ShardKey = ShardKey { job: JobId(1), shard: ShardId(0) };

/// A server to which server 2 is to copy the shard.
fn joining() -> Arc<Life> {
    let (life, _) = serving();
    let mut joining = route(1, 2, 2, &[2]);
    joining.joining = Some(server(1));
    life.on_view(downpour_core::view::JobView::clone(&view(2, joining)));
    life
}

async fn take_copy(life: &Arc<Life>, requests: Vec<v1::CopyRequest>) -> Result<Lsn, Code> {
    let mut requests = requests.into_iter();
    let head = requests.next().and_then(|first| first.head).unwrap_or_default();
    let pieces = futures::stream::iter(requests.map(Ok));
    receive::copy(life, head, pieces).await.map_err(|status| status.code())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn spoilt_copies_are_taken_or_refused(at: usize, changes in changes()) {
        block_on(async {
            let mut copy = a_copy().await;
            let at = at % copy.len();
            if let Some(request) = spoilt(&copy[at], &changes) {
                copy[at] = request;
                let life = joining();
                let taken = take_copy(&life, copy).await;
                assert_eq!(taken.is_ok(), life.hosted(KEY).is_some(), "{taken:?}");
                life.end();
            }
        });
    }
}

#[tokio::test]
async fn a_copy_becomes_a_replica_that_joins_and_only_a_newer_one_replaces_it() {
    let life = joining();
    let copy = a_copy().await;
    assert!(take_copy(&life, copy.clone()).await.is_ok(), "though its old replica was dropped");
    let joined =
        || life.hosted(KEY).is_some_and(|one| matches!(one.shard.lock().role(), Role::Joining));
    assert!(joined());
    assert_eq!(take_copy(&life, copy.clone()).await, Err(Code::AlreadyExists), "not newer");
    let with = |change: fn(&mut v1::CopyHead)| {
        let mut copy = copy.clone();
        copy[0].head.iter_mut().for_each(change);
        copy
    };
    assert!(take_copy(&life, with(|head| head.attempt = 2)).await.is_ok() && joined());
    // A copy that breaks off leaves nothing.
    let mut cut_short = with(|head| head.attempt = 3);
    cut_short.pop();
    assert_eq!(take_copy(&life, cut_short).await, Err(Code::Aborted));
    assert!(life.hosted(KEY).is_none());
    // It is a member: no copy takes its place.
    assert!(take_copy(&life, with(|head| head.attempt = 4)).await.is_ok());
    life.on_view(downpour_core::view::JobView::clone(&view(3, route(1, 3, 2, &[1, 2]))));
    assert_eq!(take_copy(&life, with(|head| head.attempt = 5)).await, Err(Code::AlreadyExists));
    // It left the set in epoch 2: what a primary of epoch 1 sends comes too late.
    life.on_view(downpour_core::view::JobView::clone(&view(4, route(2, 4, 2, &[2]))));
    assert!(life.hosted(KEY).is_none());
    assert_eq!(take_copy(&life, with(|head| head.attempt = 6)).await, Err(Code::Aborted));
}

#[tokio::test]
async fn a_copy_of_an_earlier_tenure_gives_way_to_the_first_of_the_next() {
    let life = joining();
    let mut copy = a_copy().await;
    copy[0].head.iter_mut().for_each(|head| head.attempt = 9);
    assert!(take_copy(&life, copy.clone()).await.is_ok());
    // What was between the two tenures is not heard here.
    let mut next = route(2, 4, 3, &[3]);
    next.joining = Some(server(1));
    life.on_view(downpour_core::view::JobView::clone(&view(3, next)));
    assert!(life.hosted(KEY).is_some());
    assert_eq!(take_copy(&life, copy.clone()).await, Err(Code::AlreadyExists));
    copy[0].head.iter_mut().for_each(|head| {
        (head.epoch, head.set_version, head.attempt) = (2, 4, 1);
    });
    assert!(take_copy(&life, copy).await.is_ok());
}

#[tokio::test]
async fn a_copy_that_is_not_wanted_when_it_is_whole_is_not_reported_as_taken() {
    let (life, _) = serving();
    life.on_view(downpour_core::view::JobView::clone(&view(2, route(1, 3, 2, &[2]))));
    assert_eq!(take_copy(&life, a_copy().await).await, Err(Code::Aborted));
    assert!(life.hosted(KEY).is_none());
}

#[tokio::test]
async fn a_member_that_was_dropped_does_not_come_back_by_a_view_alone() {
    let life = joining();
    life.on_view(downpour_core::view::JobView::clone(&view(3, route(1, 3, 2, &[1, 2]))));
    assert!(life.hosted(KEY).is_none());
}

#[tokio::test]
async fn what_is_not_spoilt_is_served() {
    let (life, current) = serving();
    let taken = push::take(&life.process, &current, a_push()).await.expect("well-formed");
    let reply = taken.settle(&life.process).await;
    let Some(PushResult::Done(done)) = &reply.parts[0].result else { panic!("{reply:?}") };
    assert_eq!((done.repeated, done.refusal), (false, None));
    let reply =
        pull::answer(Some(&life), a_pull(), &mut BytesMut::new()).await.expect("well-formed");
    let Some(PullResult::Pulled(pulled)) = &reply.parts[0].result else { panic!("{reply:?}") };
    let counts: Vec<f32> = downpour_core::tensor_bytes::floats(&pulled.rows[0]).collect();
    assert_eq!(counts, [1.0, 2.0]);
    assert_eq!(
        (pulled.dense[0].blocks.as_slice(), pulled.dense[0].uninitialized),
        (&[0, 2][..], 1)
    );
    assert_eq!(pulled.lsn, done.lsn);
}

#[tokio::test]
async fn a_pull_whose_reply_would_not_fit_into_a_message_is_refused_by_field() {
    let (life, _) = serving();
    let keys = (0..6_000_000u64).flat_map(u64::to_le_bytes).collect();
    let mut request = a_pull();
    request.parts[0].rows = vec![v1::PullRows { variable: EMBEDDING.0, keys }];
    let status =
        pull::answer(Some(&life), request, &mut BytesMut::new()).await.expect_err("72 MB of rows");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("parts.rows.keys: the reply would have more than"));
}

#[tokio::test]
async fn a_request_for_another_incarnation_changes_nothing_and_is_sent_on() {
    let (life, current) = serving();
    let stranger = v1::PushRequest { incarnation: 9, ..a_push() };
    let taken = push::take(&life.process, &current, stranger).await.expect("well-formed");
    let reply = taken.settle(&life.process).await;
    let Some(PushResult::Redirect(redirect)) = &reply.parts[0].result else { panic!("{reply:?}") };
    assert_eq!((redirect.epoch, redirect.primary), (1, Some(server(1).into())));
    let key = ShardKey { job: JobId(1), shard: ShardId(0) };
    assert_eq!(life.hosted(key).expect("here").shard.lock().state().rows(), 0);
    let stranger = v1::PullRequest { incarnation: 9, ..a_pull() };
    let reply =
        pull::answer(Some(&life), stranger, &mut BytesMut::new()).await.expect("well-formed");
    assert!(matches!(reply.parts[0].result, Some(PullResult::Redirect(_))));
}

#[tokio::test]
async fn a_pull_of_many_keys_and_of_none_is_answered_key_by_key() {
    let (life, current) = serving();
    let taken = push::take(&life.process, &current, a_push()).await.expect("well-formed");
    taken.settle(&life.process).await;
    let keys = |keys: std::ops::Range<u64>| keys.flat_map(u64::to_le_bytes).collect();
    let mut request = a_pull();
    request.parts[0].rows = vec![
        v1::PullRows { variable: COUNTS.0, keys: keys(0..5000) },
        v1::PullRows { variable: EMBEDDING.0, keys: keys(0..0) },
        v1::PullRows { variable: 4, keys: keys(0..1) },
    ];
    let reply = pull::answer(Some(&life), request.clone(), &mut BytesMut::new())
        .await
        .expect("well-formed");
    assert!(matches!(reply.parts[0].result, Some(PullResult::Retry(_))), "an unknown variable");
    request.parts[0].rows.pop();
    let reply =
        pull::answer(Some(&life), request, &mut BytesMut::new()).await.expect("well-formed");
    let Some(PullResult::Pulled(pulled)) = &reply.parts[0].result else { panic!("{reply:?}") };
    let counts: Vec<f32> = downpour_core::tensor_bytes::floats(&pulled.rows[0]).collect();
    assert_eq!((counts.len(), counts[3], counts[9]), (5000, 1.0, 2.0));
    assert_eq!(counts.iter().sum::<f32>(), 3.0);
    assert!(pulled.rows[1].is_empty());
}
