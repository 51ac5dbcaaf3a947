//! A session against a cluster that misbehaves.

use std::time::Duration;

use downpour_client::{
    Clock, Coordinators, DenseTensor, Error, Job, JobState, PushBatch, RowGradients, Session,
    SessionOptions, TableRows,
};
use downpour_core::cells::RefusalReason;
use downpour_core::id::VariableId;
use downpour_core::init::Init;
use downpour_core::optimizer::{OptimizerSpec, Sgd};
use downpour_core::spec::{DenseSpec, Shape, TableSpec, VariableSpec};
use downpour_proto::v1::RetryReason;

use super::TRANSPORT;
use crate::fake::{self, Chances, Cluster, wait_for, wait_for_state, within};

fn sgd() -> OptimizerSpec {
    OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 })
}

fn table(name: &str, dim: u32) -> VariableSpec {
    let shape = Shape::Table(TableSpec::new(dim, Init::Zeros, name));
    VariableSpec { name: name.into(), optimizer: sgd(), shape }
}

fn dense(name: &str, floats: u64, block_floats: u32) -> VariableSpec {
    let shape = Shape::Dense(DenseSpec { shape: vec![floats], block_floats });
    VariableSpec { name: name.into(), optimizer: sgd(), shape }
}

async fn open_with(cluster: &Cluster, options: SessionOptions) -> Session {
    let options = SessionOptions { transport: TRANSPORT, ..options };
    let coordinators = Coordinators::new(cluster.addresses()).expect("addresses");
    Session::open(&coordinators, &Job::Create(fake::job()), options).await.expect("a session")
}

async fn open(cluster: &Cluster) -> Session {
    open_with(cluster, SessionOptions::worker("test")).await
}

async fn define(session: &Session, spec: VariableSpec) -> VariableId {
    session.define(&[spec]).await.expect("defined")[0].variable.id
}

async fn rows(session: &Session, variable: VariableId, keys: &[u64], dim: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; keys.len() * dim];
    let rows = TableRows { variable, keys, values: &mut values };
    session.pull(&mut [rows], None).await.expect("pulled");
    values
}

/// The probe: each push counts in shared rows and marks a row of its own.
async fn every_push_counts_once(cluster: &Cluster, pushes: u64) {
    const SHARED: u64 = 1 << 40;
    let session = open(cluster).await;
    let variable = define(&session, table("probe", 3)).await;
    let shared: Vec<u64> = (0..20).map(|key| SHARED + key).collect();
    let mut tickets = Vec::new();
    for serial in 1..=pushes {
        let keys: Vec<u64> = std::iter::once(serial).chain(shared.iter().copied()).collect();
        let gradients = vec![1.0; keys.len() * 3];
        let rows = vec![RowGradients { variable, keys: &keys, gradients: &gradients }];
        let batch = PushBatch { clock: serial, rows, ..Default::default() };
        tickets.push(session.push(&batch).await.expect("accepted"));
    }
    for ticket in tickets {
        let outcome = ticket.await.expect("acknowledged").applied().expect("applied");
        assert!(!outcome.lsns.is_empty());
    }
    session.flush().await.expect("flushed");
    let serials: Vec<u64> = (1..=pushes).collect();
    assert_eq!(rows(&session, variable, &serials, 3).await, vec![1.0; serials.len() * 3]);
    assert_eq!(rows(&session, variable, &shared, 3).await, vec![pushes as f32; 60]);
}

#[tokio::test]
async fn every_push_is_applied_exactly_once_where_nothing_fails() {
    every_push_counts_once(&Cluster::start(1, 2).await, 200).await;
}

#[tokio::test]
async fn every_push_is_applied_exactly_once_through_breaks_refusals_and_moves() {
    for seed in 1..=3 {
        let cluster = Cluster::start(1, 3).await;
        cluster.state.lock().chances =
            Chances { seed, retry: 20, break_before: 15, break_after: 15, move_shard: 40 };
        every_push_counts_once(&cluster, 200).await;
    }
}

#[tokio::test]
async fn a_pull_brings_tables_and_dense_together_and_only_newer_blocks() {
    let cluster = Cluster::start(1, 2).await;
    let session = open(&cluster).await;
    let specs = [table("b", 2), dense("net", 1000, 64), table("a", 4)];
    let defined = session.define(&specs).await.unwrap();
    let [b, net, a] = [0, 1, 2].map(|at| defined[at].variable.id);
    assert!(defined[1].initializer && !defined[1].initialized);

    let mut cache = session.dense_cache(&[net]).unwrap();
    session.pull(&mut [], Some(&mut cache)).await.unwrap();
    assert_eq!(cache.uninitialized(net), Some(16));
    let first: Vec<f32> = (0..1000).map(|at| at as f32).collect();
    let values = vec![DenseTensor { variable: net, floats: &first }];
    let batch = PushBatch { values, ..Default::default() };
    session.push(&batch).await.unwrap().await.unwrap().applied().unwrap();
    session.mark_initialized(&[net]).await.unwrap();
    assert!(session.define(&specs).await.unwrap()[1].initialized);

    let keys: Vec<u64> = (0..3000).collect();
    let gradients: Vec<f32> = (0..12_000).map(|at| at as f32).collect();
    let batch = PushBatch {
        rows: vec![
            RowGradients { variable: b, keys: &keys, gradients: &gradients[..6000] },
            RowGradients { variable: a, keys: &keys, gradients: &gradients },
        ],
        ..Default::default()
    };
    session.push(&batch).await.unwrap().await.unwrap().applied().unwrap();
    cluster.state.lock().pulls = 0;
    let (mut of_a, mut of_b) = (vec![0.0; 12_000], vec![0.0; 6000]);
    let mut tables = [
        TableRows { variable: a, keys: &keys, values: &mut of_a },
        TableRows { variable: b, keys: &keys, values: &mut of_b },
    ];
    let pulled = session.pull(&mut tables, Some(&mut cache)).await.unwrap();
    assert_eq!(pulled.lsns.len(), fake::SHARDS as usize);
    assert!(cluster.state.lock().pulls <= 4, "one message for each lane of a server");
    assert_eq!((of_a, of_b), (gradients.clone(), gradients[..6000].to_vec()));
    assert_eq!(cache.values(net), Some(&first[..]));
    assert_eq!(cache.uninitialized(net), Some(0));

    cluster.state.lock().dense_blocks_sent = 0;
    session.pull(&mut [], Some(&mut cache)).await.unwrap();
    assert_eq!(cluster.state.lock().dense_blocks_sent, 0, "nothing is newer");
    let dense = vec![DenseTensor { variable: net, floats: &[0.5; 1000] }];
    let batch = PushBatch { dense, ..Default::default() };
    session.push(&batch).await.unwrap().await.unwrap().applied().unwrap();
    session.pull(&mut [], Some(&mut cache)).await.unwrap();
    assert_eq!(cluster.state.lock().dense_blocks_sent, 16);
    assert_eq!(cache.values(net).unwrap()[999], 999.5);
}

#[tokio::test]
async fn a_pull_larger_than_a_message_is_split_and_whole_through_moves() {
    let cluster = Cluster::start(1, 3).await;
    let session = open(&cluster).await;
    let variable = define(&session, table("wide", 512)).await;
    let keys: Vec<u64> = (0..5000).map(|key| key * 7).collect();
    let gradients: Vec<f32> = (0..5000 * 512).map(|at| (at / 512) as f32).collect();
    let rows_pushed = vec![RowGradients { variable, keys: &keys, gradients: &gradients }];
    let batch = PushBatch { rows: rows_pushed, ..Default::default() };
    session.push(&batch).await.unwrap().await.unwrap().applied().unwrap();
    cluster.state.lock().chances =
        Chances { seed: 5, retry: 7, move_shard: 7, ..Chances::default() };
    assert!(rows(&session, variable, &keys, 512).await == gradients);
    assert!(cluster.state.lock().pulls > 10);
}

#[tokio::test]
async fn an_answer_of_an_older_epoch_is_not_believed() {
    let cluster = Cluster::start(1, 2).await;
    let options =
        SessionOptions { deadline: Duration::from_millis(300), ..SessionOptions::worker("test") };
    let session = open_with(&cluster, options).await;
    let variable = define(&session, table("t", 1)).await;
    // The old primary goes on answering while the client has heard of a higher epoch without a primary.
    cluster.state.lock().stale_pulls = true;
    cluster.change_view(|view| {
        for route in &mut view.shards {
            route.epoch.0 += 1;
            (route.primary, route.in_sync) = (None, Vec::new());
        }
    });
    wait_for_state(&session, "the loss is known", |state| state.view.shards[0].lost()).await;
    let mut value = [0.0];
    let rows = TableRows { variable, keys: &[1], values: &mut value };
    let error = session.pull(&mut [rows], None).await.unwrap_err();
    assert!(matches!(error, Error::Deadline { what: "pull", .. }), "{error}");
}

#[tokio::test]
async fn a_refusal_for_good_is_in_the_outcome_and_later_pushes_go_on() {
    let cluster = Cluster::start(1, 1).await;
    let session = open(&cluster).await;
    let variable = define(&session, table("t", 1)).await;
    let push = async |gradient: f32| {
        let gradient = [gradient];
        let rows = vec![RowGradients { variable, keys: &[5], gradients: &gradient }];
        let batch = PushBatch { rows, ..Default::default() };
        session.push(&batch).await.unwrap().await.unwrap()
    };
    let refused = push(f32::NAN).await;
    assert_eq!(refused.refusals[0].1.reason, RefusalReason::NotFinite);
    assert_eq!(refused.refusals[0].1.variable, variable);
    assert!(matches!(refused.applied(), Err(Error::PushRefused { .. })));
    assert!(push(2.0).await.applied().is_ok());
    assert_eq!(rows(&session, variable, &[5], 1).await, [2.0]);
}

#[tokio::test]
async fn a_closed_session_leaves_its_open_pushes_unknown() {
    let cluster = Cluster::start(1, 1).await;
    let session = open(&cluster).await;
    let variable = define(&session, table("t", 1)).await;
    cluster.state.lock().hold_replies = true;
    let rows = vec![RowGradients { variable, keys: &[5], gradients: &[1.0] }];
    let batch = PushBatch { rows, ..Default::default() };
    let ticket = session.push(&batch).await.unwrap();
    cluster.close_session(session.id());
    let error = ticket.await.unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }), "{error}");
    let error = session.push(&batch).await.unwrap_err();
    assert!(matches!(error, Error::SessionClosed(_)), "{error}");
    let error = session.flush().await.unwrap_err();
    assert!(matches!(error, Error::SessionClosed(_)), "{error}");
}

#[tokio::test]
async fn who_is_not_known_any_more_learns_from_the_view_that_it_was_evicted() {
    let cluster = Cluster::start(1, 1).await;
    let session = open(&cluster).await;
    wait_for_state(&session, "the watch has begun", |state| state.version > 0).await;
    let unknown = Error::NotFound { what: "ask for tasks", message: "no open session".into() };
    let id = session.id();
    let evicted = async { cluster.change_view(|view| view.orders.evicted.push(id)) };
    let (why, ()) = tokio::join!(session.explain(unknown), evicted);
    assert!(matches!(why, Error::Evicted(session) if session == id), "{why}");
}

#[tokio::test]
async fn a_deleted_job_ends_its_sessions() {
    let cluster = Cluster::start(1, 1).await;
    let session = open(&cluster).await;
    let coordinators = Coordinators::new(cluster.addresses()).unwrap();
    wait_for_state(&session, "the watch has begun", |state| state.version > 0).await;
    coordinators.delete_job(session.job()).await.unwrap();
    wait_for("the session ends", || matches!(session.ended(), Some(Error::JobDeleted))).await;
}

#[tokio::test]
async fn a_push_that_nobody_takes_is_unknown_at_the_deadline_and_says_why() {
    let cluster = Cluster::start(1, 1).await;
    let options =
        SessionOptions { deadline: Duration::from_millis(200), ..SessionOptions::worker("test") };
    let session = open_with(&cluster, options).await;
    let variable = define(&session, table("t", 1)).await;
    cluster.state.lock().retry_all = Some(RetryReason::TooFewInSync);
    let rows_pushed = vec![RowGradients { variable, keys: &[5], gradients: &[1.0] }];
    let batch = PushBatch { rows: rows_pushed, ..Default::default() };
    let error = session.push(&batch).await.unwrap().await.unwrap_err();
    assert!(error.to_string().contains("too few replicas are in sync"), "{error}");
    let mut ticket = session.push(&batch).await.unwrap();
    assert!(ticket.try_outcome().is_none());
    let mut outcome = None;
    wait_for("it is late", || {
        outcome = outcome.take().or_else(|| ticket.try_outcome());
        outcome.is_some()
    })
    .await;
    assert!(matches!(outcome, Some(Err(Error::Unknown { .. }))));
    cluster.state.lock().retry_all = None;
    session.flush().await.expect("the session goes on trying");
    assert_eq!(rows(&session, variable, &[5], 1).await, [2.0]);
}

#[tokio::test]
async fn a_push_waits_while_too_many_bytes_are_in_flight() {
    let cluster = Cluster::start(1, 1).await;
    let options = SessionOptions { in_flight_bytes_max: 4096, ..SessionOptions::worker("test") };
    let session = open_with(&cluster, options).await;
    let variable = define(&session, table("t", 512)).await;
    cluster.state.lock().retry_all = Some(RetryReason::Overloaded);
    let gradients = [1.0; 512];
    let rows_pushed = vec![RowGradients { variable, keys: &[5], gradients: &gradients }];
    let batch = PushBatch { rows: rows_pushed, ..Default::default() };
    let first = session.push(&batch).await.unwrap();
    let mut second = Box::pin(session.push(&batch));
    assert!(futures::poll!(second.as_mut()).is_pending(), "the first holds most of the room");
    cluster.state.lock().retry_all = None;
    first.await.unwrap();
    second.await.unwrap().await.unwrap();
    assert_eq!(rows(&session, variable, &[5], 512).await, [2.0; 512]);
}

#[tokio::test]
async fn a_server_that_comes_back_as_a_stranger_is_found_under_its_new_address() {
    let cluster = Cluster::start(1, 1).await;
    let session = open(&cluster).await;
    let variable = define(&session, table("t", 1)).await;
    let push = async || {
        let rows = vec![RowGradients { variable, keys: &[5], gradients: &[1.0] }];
        let batch = PushBatch { rows, ..Default::default() };
        session.push(&batch).await.unwrap().await.unwrap().applied().unwrap();
    };
    push().await;
    cluster.add_server(1).await;
    let server = session.state().nodes.values().next().unwrap().server.node;
    let server = cluster.state.lock().nodes[&server].server;
    cluster.change_view(|view| {
        for route in &mut view.shards {
            route.epoch.0 += 1;
            (route.primary, route.in_sync) = (Some(server), vec![server]);
        }
    });
    push().await;
    assert_eq!(rows(&session, variable, &[5], 1).await, [2.0]);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_before_anything_is_sent() {
    let cluster = Cluster::start(1, 1).await;
    let session = open(&cluster).await;
    let specs = [table("t", 2), dense("d", 10, 4)];
    let defined = session.define(&specs).await.unwrap();
    let [t, d] = [0, 1].map(|at| defined[at].variable.id);
    let push = async |rows: Vec<RowGradients<'_>>, dense: Vec<DenseTensor<'_>>| {
        let batch = PushBatch { rows, dense, ..Default::default() };
        session.push(&batch).await.map(drop).unwrap_err().to_string()
    };
    let row =
        |variable, keys: &'static [u64]| RowGradients { variable, keys, gradients: &[0.0; 4] };
    let two = || row(t, &[1, 2]);
    assert_eq!(
        push(vec![row(t, &[1, 2, 3])], vec![]).await,
        "gradients: has 4 floats, 6 are needed"
    );
    assert_eq!(push(vec![row(t, &[2, 2])], vec![]).await, "keys: 2 is there twice");
    assert_eq!(push(vec![row(d, &[1, 2])], vec![]).await, "variable: \"d\" is dense, not a table");
    assert_eq!(
        push(vec![two(), two()], vec![]).await,
        "variable: variable 1 appears twice in one push"
    );
    let other = VariableId(9);
    assert_eq!(push(vec![row(other, &[1])], vec![]).await, "variable: the job has no variable 9");
    let short = DenseTensor { variable: d, floats: &[0.0; 9] };
    assert_eq!(push(vec![], vec![short]).await, "dense: has 9 floats, 10 are needed");
    let empty = session.push(&PushBatch::default()).await.unwrap().await.unwrap();
    assert!(empty.lsns.is_empty());
}

#[test]
fn the_blocking_face_reads_what_it_wrote_and_refuses_to_run_inside_a_runtime() {
    use downpour_client::blocking::Client;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cluster = runtime.block_on(Cluster::start(1, 2));
    let client = Client::connect(&cluster.addresses().join(",")).unwrap();
    let job = client.create_job(fake::job()).unwrap();
    let items = job.table("items", 2, Init::Zeros, sgd()).unwrap();
    items.push(&[3, 4], &[1.0, 2.0, 3.0, 4.0]).unwrap();
    items.push(&[4], &[0.5, 0.5]).unwrap();
    job.flush().unwrap();
    let mut values = [0.0; 6];
    items.pull(&[3, 4, 5], &mut values).unwrap();
    assert_eq!(values, [1.0, 2.0, 3.5, 4.5, 0.0, 0.0]);

    let net = job.dense("net", &[3], &[1.0, 2.0, 3.0], sgd()).unwrap();
    assert!(job.dense("net", &[3], &[1.0], sgd()).is_err(), "of another length");
    let other = client.job("job").unwrap().dense("net", &[3], &[9.0, 9.0, 9.0], sgd()).unwrap();
    net.push(&[1.0, 1.0, 1.0]).unwrap();
    job.flush().unwrap();
    let mut values = [0.0; 3];
    other.pull(&mut values).unwrap();
    assert_eq!(values, [2.0, 3.0, 4.0], "the first client's values win");

    items.push(&[3], &[f32::INFINITY, 0.0]).unwrap();
    assert!(matches!(job.flush(), Err(Error::PushRefused { .. })));
    runtime.block_on(async {
        assert!(matches!(items.pull(&[3], &mut [0.0; 2]), Err(Error::InsideRuntime)));
        assert!(matches!(Client::connect("127.0.0.1:1"), Err(Error::InsideRuntime)));
        drop((client, items));
    });
    job.close().unwrap();
}

/// A session of a job with clocks.
async fn in_mode(mode: &str) -> (Cluster, Session) {
    let cluster = Cluster::start(1, 2).await;
    let session = open(&cluster).await;
    cluster.change_view(|view| view.consistency = mode.parse().expect("a mode"));
    let has_clocks = |state: &JobState| state.view.consistency.has_clocks();
    wait_for_state(&session, "the job has clocks", has_clocks).await;
    (cluster, session)
}

#[tokio::test]
async fn a_loop_of_a_session_finds_a_seat_also_after_another_one_gave_its_own_back() {
    let (cluster, session) = in_mode("ssp(1)").await;
    for turn in 1..=3 {
        let mut clock = Clock::new(&session);
        for _ in 0..2 {
            let begun = within("a step may begin", clock.begin()).await.expect("the session lives");
            assert!(begun.clock.is_some(), "{turn}");
            clock.finished(None, false);
        }
        clock.leave().await.expect("the session lives");
    }
    assert!(cluster.state.lock().board.seats().is_empty());
}

#[tokio::test]
async fn a_contribution_that_a_shard_dropped_does_not_count_where_another_has_its_round_open() {
    let (cluster, session) = in_mode("sync").await;
    let mut clock = Clock::new(&session);
    let mut counted = Vec::new();
    for (round, late) in [(1, false), (2, true), (3, false)] {
        within("a step may begin", clock.begin()).await.expect("the session lives");
        clock.finished(Some(round), late);
        let begun = within("the round is over", clock.begin()).await.expect("the session lives");
        counted.push(begun.counted);
        let members = cluster.state.lock().board.last_round().members.len();
        assert_eq!(members, usize::from(!late), "shard 0 drops its part too");
    }
    assert_eq!(counted, [Some(true), Some(false), Some(true)]);
}
