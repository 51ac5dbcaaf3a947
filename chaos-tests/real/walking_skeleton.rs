//! The promise in small: an acknowledged push survives the death of the server that took it, and its repeat is recognised.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use downpour_chaos_tests::cluster::{DEADLINE, TestCluster};
use downpour_client::{Job, Session, SessionOptions, TableRows};
use downpour_core::id::ShardId;
use downpour_core::view::JobView;
use downpour_proto::v1;
use downpour_proto::v1::push_part_reply::Result as PartResult;
use downpour_psctl::probe::{self, Probe, counting_table, wait_for};

const KEY: u64 = 42;

#[test]
fn an_acknowledged_push_survives_its_primary_and_its_repeat_is_recognised() -> Result<()> {
    let mut cluster = TestCluster::start(2)?;
    let job = probe::job("skeleton", 1, 2);
    let (session, table) = cluster.runtime.block_on(async {
        let options = SessionOptions::worker("skeleton");
        let session = Session::open(&cluster.coordinators, &Job::Create(job), options).await?;
        let table = session.define(&[counting_table("count")]).await?.remove(0).variable.id;
        anyhow::Ok((session, table))
    })?;

    // A session of its own, whose one push this test sends by hand, to send the same bytes again.
    let by_hand = cluster.runtime.block_on(async {
        let job = session.job();
        let reply =
            cluster.coordinators.open_session(job, "by hand", v1::SessionKind::Worker).await?;
        anyhow::Ok(reply.session)
    })?;
    let update = v1::Update {
        variable: table.0,
        body: Some(v1::update::Body::Rows(v1::RowGradients {
            keys: KEY.to_le_bytes().to_vec().into(),
            gradients: (-1f32).to_le_bytes().to_vec().into(),
        })),
    };
    let push = |epoch: u64, incarnation: u64, view: &JobView| v1::PushRequest {
        request: 1,
        job: view.job.0,
        session: by_hand,
        incarnation,
        view_version: view.version,
        clock: 0,
        parts: vec![v1::PushPart {
            shard: 0,
            epoch,
            sequence: 1,
            updates: vec![update.clone()],
            ..Default::default()
        }],
    };

    let first = cluster.runtime.block_on(send_until_done(&session, &push))?;
    ensure!(!first.repeated && first.refusal.is_none(), "the first push: {first:?}");

    let (victim, epoch) = cluster.primary("skeleton", ShardId(0))?;
    cluster.processes.servers[victim].kill()?;

    let again = cluster.runtime.block_on(send_until_done(&session, &push))?;
    ensure!(again.repeated && again.refusal.is_none(), "the repeat: {again:?}");
    let (survivor, promoted) = cluster.primary("skeleton", ShardId(0))?;
    ensure!(survivor != victim && promoted > epoch, "epoch {epoch}, then {promoted}");

    let mut value = [0.0];
    let rows = TableRows { variable: table, keys: &[KEY], values: &mut value };
    cluster.runtime.block_on(session.pull(&mut [rows], None))?;
    ensure!(value == [1.0], "applied once, found {value:?}");
    cluster.runtime.block_on(session.close())?;
    cluster.stop()
}

#[test]
fn a_client_that_pushes_through_a_failover_loses_and_repeats_nothing() -> Result<()> {
    let mut cluster = TestCluster::start(2)?;
    let job = probe::job("failover", 8, 2);
    let mut probe = cluster.runtime.block_on(Probe::join(&cluster.coordinators, &job, 0))?;

    cluster.runtime.block_on(probe.push_until(|tally| tally.acknowledged >= 200))?;
    let (victim, _) = cluster.primary("failover", ShardId(0))?;
    let victim = &mut cluster.processes.servers[victim];
    // The server dies while pushes are under way.
    let killed = std::thread::scope(|scope| {
        let pushing = scope.spawn(|| {
            cluster.runtime.block_on(probe.push_until(|tally| tally.acknowledged >= 2_000))
        });
        let killed = victim.kill();
        pushing
            .join()
            .expect("the probe does not panic")
            .and_then(|()| killed.context("kill the server"))
    });
    killed?;

    cluster.counts_each_push_once(probe)?;
    cluster.stop()
}

/// Sends the push to whoever is primary, on a stream of its own each time, until it is done.
async fn send_until_done(
    session: &Session,
    push: &impl Fn(u64, u64, &JobView) -> v1::PushRequest,
) -> Result<v1::PushOutcome> {
    let attempt = || async {
        let state = session.state();
        let route = state.route(ShardId(0));
        let primary = route.primary?;
        let channel = downpour_proto::transport::channel(state.address(primary)?).ok()?;
        let request = push(route.epoch.0, primary.incarnation.0, &state.view);
        let requests = tokio_stream::iter([request]);
        let mut client = v1::shard_client::ShardClient::new(channel);
        let replies = tokio::time::timeout(Duration::from_secs(2), async {
            client.push(requests).await.ok()?.into_inner().message().await.ok()?
        });
        match replies.await.ok()??.parts.pop()?.result? {
            PartResult::Done(outcome) => Some(outcome),
            _ => None,
        }
    };
    wait_for("the push to be done", DEADLINE, attempt).await
}
