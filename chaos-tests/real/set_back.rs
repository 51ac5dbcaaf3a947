//! The only copy of some shards dies while a client pushes: they go on from the last checkpoint, and the client says exactly what is lost.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use downpour_chaos_tests::cluster::{DEADLINE, Setup, TestCluster};
use downpour_client::{Job, PushBatch, RowGradients, Session, SessionOptions, TableRows};
use downpour_core::id::{ShardId, VariableId};
use downpour_psctl::probe::{counting_table, job, wait_for};

const NAME: &str = "set-back";
const SHARDS: u32 = 8;
/// Shards are set back no sooner than a lease after they were lost.
const LEASE_MS: &str = "3500";

/// Pushes one to each of these rows in a push of its own, and says which shard each went to.
async fn count(
    session: &Session,
    table: VariableId,
    serials: std::ops::Range<u64>,
) -> Result<BTreeMap<u64, ShardId>> {
    let mut tickets = Vec::new();
    for serial in serials {
        let rows = RowGradients { variable: table, keys: &[serial], gradients: &[-1.0] };
        let batch = PushBatch { clock: serial + 1, rows: vec![rows], ..PushBatch::default() };
        tickets.push((serial, session.push(&batch).await?));
    }
    let mut shards = BTreeMap::new();
    for (serial, ticket) in tickets {
        let outcome = ticket.await.context("a push has its outcome")?;
        let (&shard, _) = outcome.lsns.first_key_value().context("one shard")?;
        shards.insert(serial, shard);
    }
    Ok(shards)
}

#[test]
fn what_was_pushed_since_the_checkpoint_is_lost_with_the_only_copy_and_named_push_by_push()
-> Result<()> {
    let setup = Setup {
        servers: 3,
        coordinator_args: ["--lease-ms", LEASE_MS].map(String::from).into(),
        ..Setup::default()
    };
    let mut cluster = TestCluster::launch(&setup)?;
    let coordinators = cluster.coordinators.clone();
    let uri = format!("file://{}", cluster.checkpoints().display());
    let (session, table, mut shards) = cluster.runtime.block_on(async {
        let options = SessionOptions { deadline: DEADLINE, ..SessionOptions::worker("counter") };
        let job = Job::Create(job(NAME, SHARDS, 1));
        let session = Session::open(&coordinators, &job, options).await?;
        let table = session.define(&[counting_table("probe/serials")]).await?[0].variable.id;
        let mut shards = count(&session, table, 0..200).await?;
        let begun = coordinators.create_checkpoint(session.job(), &uri, false).await?;
        let (job, name) = (session.job(), begun.checkpoint);
        let ended = coordinators.checkpoint_ended(job, &name, DEADLINE, |_| {}).await?;
        ensure!(ended.error.is_empty(), "{}", ended.error);
        shards.extend(count(&session, table, 200..400).await?);
        anyhow::Ok((session, table, shards))
    })?;

    let (victim, _) = cluster.primary(NAME, ShardId(0))?;
    let gone = &mut cluster.processes.servers[victim];
    gone.kill()?;
    gone.start()?;
    cluster.runtime.block_on(async {
        // Goes on through it.
        shards.extend(count(&session, table, 400..600).await?);
        session.flush().await?;
        let set_back = || async {
            let view = coordinators.job(NAME).await.ok()?;
            view.shards.iter().all(|route| route.primary.is_some()).then_some(view)
        };
        let view = wait_for("no lost shard", DEADLINE, set_back).await?;
        let back: Vec<ShardId> = (0..SHARDS)
            .map(ShardId)
            .filter(|&one| view.orders.set_back_in(one).is_some())
            .collect();
        ensure!(back.contains(&ShardId(0)) && back.len() < SHARDS as usize, "{back:?}");

        // The clock of a push is its serial and one.
        let lost = session.rolled_back();
        let is_lost = |serial: u64, shard: ShardId| {
            let within = |(first, last): (u64, u64)| (first..=last).contains(&(serial + 1));
            lost.iter().any(|lost| lost.shard == shard && lost.clocks.is_some_and(within))
        };
        let keys: Vec<u64> = (0..600).collect();
        let mut values = vec![0.0; keys.len()];
        let rows = TableRows { variable: table, keys: &keys, values: &mut values };
        session.pull(&mut [rows], None).await?;
        for (&serial, &shard) in &shards {
            let named = is_lost(serial, shard);
            let value = values[serial as usize];
            ensure!(
                value == if named { 0.0 } else { 1.0 },
                "{serial} of shard {shard}: {value}, {lost:?}"
            );
            let since = (200..400).contains(&serial) && back.contains(&shard);
            ensure!(named == since, "{serial} of shard {shard}: {lost:?}");
        }
        ensure!(lost.iter().map(|lost| lost.last + 1 - lost.first).sum::<u64>() > 0, "some are");
        let told = || async {
            let cluster = coordinators.cluster().await.ok()?;
            let mut sessions = cluster.jobs.into_iter().flat_map(|job| job.sessions);
            let told = sessions.find_map(|session| session.progress)?.rolled_back;
            (told.len() == lost.len()).then_some(())
        };
        wait_for("operators to be told", DEADLINE, told).await
    })?;
    drop(session);
    cluster.stop()
}
