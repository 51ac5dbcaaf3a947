//! A job is saved while it trains, every process is killed, and another cluster with another number of servers goes on from the files.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use downpour_chaos_tests::cluster::{DEADLINE, TestCluster};
use downpour_client::{
    Coordinators, Job, PushBatch, RowGradients, Session, SessionOptions, TableRows,
};
use downpour_core::id::JobId;
use downpour_core::init::Init;
use downpour_core::optimizer::{Adagrad, OptimizerSpec};
use downpour_core::spec::{Shape, TableSpec, VariableSpec};
use downpour_proto::v1;
use downpour_psctl::probe::{Probe, counting_table, job, wait_for};

const SHARDS: u32 = 16;
const NAME: &str = "checkpoints";
const COUNTERS: u64 = 32;

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn psctl(coordinators: Option<&Coordinators>, args: &[&str]) -> Result<std::process::Output> {
    let test = std::env::current_exe()?;
    let beside = test.parent().and_then(|deps| deps.parent()).context("a folder of binaries")?;
    let mut psctl = Command::new(beside.join("psctl"));
    psctl.args(args);
    if let Some(coordinators) = coordinators {
        psctl.arg("--coordinators").arg(coordinators.addresses().join(","));
    }
    psctl.output().context("run psctl (`cargo build --bins` makes it)")
}

fn succeeds(coordinators: Option<&Coordinators>, args: &[&str]) -> Result<serde_json::Value> {
    let output = psctl(coordinators, args)?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "psctl {args:?}: {error}");
    Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
}

/// The serials from 0 and the counters, as the cluster has them.
async fn values(coordinators: &Coordinators, name: &str, serials: u64) -> Result<[Vec<f32>; 2]> {
    let options = SessionOptions::worker("reader");
    let session = Session::open(coordinators, &Job::Existing(name.into()), options).await?;
    let tables = [counting_table("probe/serials"), counting_table("probe/counters")];
    let defined = session.define(&tables).await?;
    let mut read = Vec::new();
    for (table, count) in defined.iter().zip([serials, COUNTERS]) {
        let keys: Vec<u64> = (0..count).collect();
        let mut values = vec![0.0; keys.len()];
        for (keys, values) in keys.chunks(10_000).zip(values.chunks_mut(10_000)) {
            let rows = TableRows { variable: table.variable.id, keys, values };
            session.pull(&mut [rows], None).await.context("read the rows")?;
        }
        read.push(values);
    }
    session.close().await?;
    let [serials, counters] = read.try_into().ok().context("two tables")?;
    Ok([serials, counters])
}

#[test]
fn a_job_saved_under_load_goes_on_with_another_number_of_servers_after_all_processes_were_killed()
-> Result<()> {
    let folder = std::env::temp_dir().join(format!("downpour-checkpoints-{}", std::process::id()));
    let folder = Folder(folder);
    let uri = format!("file://{}", folder.0.display());
    let (loaded, acked_before, last, values_at_end) = save(&uri)?;

    // The first cluster is gone: every process was killed.
    let cluster = TestCluster::start(2)?;
    let coordinators = cluster.coordinators.clone();
    let listed = succeeds(None, &["checkpoint", "list", &uri, "-o", "json"])?;
    ensure!(listed.as_array().is_some_and(|list| list.len() == 3), "{listed}");
    succeeds(None, &["checkpoint", "verify", &uri, NAME])?;
    succeeds(Some(&coordinators), &["checkpoint", "restore", &uri, NAME])?;
    let serials = values_at_end[0].len() as u64;
    let restored = cluster.runtime.block_on(values(&coordinators, NAME, serials))?;
    ensure!(restored == values_at_end, "the newest checkpoint ({last}) is another state");

    // Cut under load: what was acknowledged before is inside, and nothing twice.
    let again = ["checkpoint", "restore", &uri, NAME, "--checkpoint", &loaded];
    let refused = psctl(Some(&coordinators), &again)?;
    ensure!(!refused.status.success(), "a job of that name exists");
    succeeds(Some(&coordinators), &[&again[..], &["--as", "loaded", "--replicas", "1"]].concat())?;
    let [serials, _] = cluster.runtime.block_on(values(&coordinators, "loaded", serials))?;
    ensure!(serials[..acked_before as usize].iter().all(|&value| value == 1.0), "lost");
    ensure!(serials.iter().all(|&value| value <= 1.0), "twice");

    // The restored job trains on, exactly once, and gets its second replicas.
    let view = cluster.runtime.block_on(async {
        let mut probe = Probe::join(&coordinators, &job(NAME, SHARDS, 2), 1).await?;
        probe.push_until(|tally| tally.acknowledged + tally.client_errors >= 200).await?;
        let tally = probe.verify().await?;
        ensure!((tally.lost, tally.duplicated, tally.client_errors) == (0, 0, 0), "{tally:?}");
        let full = || async {
            let view = coordinators.job(NAME).await.ok()?;
            view.shards.iter().all(|route| route.in_sync.len() == 2).then_some(view)
        };
        wait_for("second replicas", DEADLINE, full).await
    })?;
    ensure!(
        view.shards.iter().all(|route| route.epoch.0 > 1),
        "epochs go on after the checkpoint's"
    );
    cluster.stop()
}

/// Saves a job in full while it trains, then what changed while it trains, then what changed until it stopped. Returns the second one's name, the pushes
/// acknowledged before it began, the last one's name, and the values at the end.
fn save(uri: &str) -> Result<(String, u64, String, [Vec<f32>; 2])> {
    let cluster = TestCluster::start(3)?;
    let coordinators = cluster.coordinators.clone();
    cluster.runtime.block_on(async {
        let mut probe = Probe::join(&coordinators, &job(NAME, SHARDS, 2), 0).await?;
        let (acked, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopping) = (Arc::clone(&acked), Arc::clone(&stop));
        let pushing = tokio::spawn(async move {
            let until = |tally: &downpour_psctl::probe::Tally| {
                counted.store(tally.acknowledged, Ordering::Relaxed);
                stopping.load(Ordering::Relaxed)
            };
            probe.push_until(until).await.map(|()| probe)
        });
        let more = async |count: u64| {
            let goal = acked.load(Ordering::Relaxed) + count;
            let there = || async { (acked.load(Ordering::Relaxed) >= goal).then_some(()) };
            wait_for("pushes", DEADLINE, there).await
        };
        more(300).await?;
        let id = coordinators.job(NAME).await?.job;
        let full = take(&coordinators, id, uri, false).await?;
        ensure!(full.chain == 0, "full");
        more(100).await?;
        let acked_before = acked.load(Ordering::Relaxed);
        let loaded = take(&coordinators, id, uri, true).await?;
        ensure!(loaded.chain == 1, "an increment");
        more(100).await?;
        stop.store(true, Ordering::Relaxed);
        let probe = pushing.await??;
        let last = take(&coordinators, id, uri, true).await?;
        ensure!(last.chain == 2, "an increment on an increment");
        let total = acked.load(Ordering::Relaxed) + 8;
        let at_end = values(&coordinators, NAME, total).await?;
        drop(probe);
        Ok((loaded.checkpoint, acked_before, last.checkpoint, at_end))
    })
}

async fn take(
    coordinators: &Coordinators,
    job: JobId,
    uri: &str,
    incremental: bool,
) -> Result<v1::EndedCheckpoint> {
    let begun = coordinators.create_checkpoint(job, uri, incremental).await?;
    let ended = coordinators.checkpoint_ended(job, &begun.checkpoint, DEADLINE, |_| {}).await?;
    ensure!(ended.error.is_empty(), "{}", ended.error);
    Ok(ended)
}

#[test]
fn checkpoints_go_on_by_themselves_through_the_loss_of_a_server_and_old_ones_are_deleted()
-> Result<()> {
    let folder = std::env::temp_dir().join(format!("downpour-schedule-{}", std::process::id()));
    let folder = Folder(folder);
    let uri = format!("file://{}", folder.0.display());
    let mut cluster = TestCluster::start(3)?;
    let coordinators = cluster.coordinators.clone();
    let mut probe =
        cluster.runtime.block_on(Probe::join(&coordinators, &job(NAME, SHARDS, 2), 0))?;
    let schedule = [
        "checkpoint",
        "schedule",
        NAME,
        "--to",
        &uri,
        "--every",
        "1s",
        "--keep",
        "2",
        "--full-every",
        "3",
    ];
    succeeds(Some(&coordinators), &schedule)?;
    let id = cluster.runtime.block_on(coordinators.job(NAME))?.job;
    let whole_after = async |time_ms: u64| {
        let look = || async {
            let (checkpoints, _) = coordinators.checkpoints(id).await.ok()?;
            checkpoints.whole.filter(|whole| whole.created_ms > time_ms)
        };
        wait_for("a whole checkpoint", DEADLINE, look).await
    };
    let (first, pushing) = cluster.runtime.block_on(async {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let pushing = tokio::spawn(async move {
            probe.push_until(|_| stopping.load(Ordering::Relaxed)).await.map(|()| probe)
        });
        whole_after(0).await.map(|first| (first, (stop, pushing)))
    })?;
    // As soon as the next one begins, one of its writers dies.
    let began = || async { coordinators.checkpoints(id).await.ok()?.0.open };
    cluster.runtime.block_on(wait_for("the next checkpoint", DEADLINE, began))?;
    cluster.processes.servers[0].kill()?;
    cluster.runtime.block_on(async {
        let (stop, pushing) = pushing;
        let mut whole = first;
        for _ in 0..4 {
            whole = whole_after(whole.created_ms).await?;
        }
        stop.store(true, Ordering::Relaxed);
        let tally = pushing.await??.verify().await?;
        ensure!((tally.lost, tally.duplicated) == (0, 0), "{tally:?}");
        anyhow::Ok(())
    })?;
    succeeds(Some(&coordinators), &["checkpoint", "schedule", NAME, "--off"])?;
    cluster.runtime.block_on(async {
        let idle =
            || async { coordinators.checkpoints(id).await.ok()?.0.open.is_none().then_some(()) };
        wait_for("the last one's end", DEADLINE, idle).await
    })?;
    succeeds(None, &["checkpoint", "verify", &uri, NAME])?;
    // The newest two, and what they build on: at most a chain of three each. The last of the others may be being deleted.
    let few = || async {
        let listed = succeeds(None, &["checkpoint", "list", &uri, "-o", "json"]).ok()?;
        listed.as_array().is_some_and(|list| (2..=6).contains(&list.len())).then_some(())
    };
    cluster.runtime.block_on(wait_for("the old ones' end", DEADLINE, few))
}

#[test]
fn an_increment_of_one_row_in_a_hundred_is_at_most_three_hundredths_of_the_whole() -> Result<()> {
    const ROWS: u64 = 200_000;
    const DIM: u32 = 16;
    let folder = std::env::temp_dir().join(format!("downpour-increment-{}", std::process::id()));
    let folder = Folder(folder);
    let uri = format!("file://{}", folder.0.display());
    let cluster = TestCluster::start(2)?;
    let coordinators = cluster.coordinators.clone();
    let (whole, increment) = cluster.runtime.block_on(async {
        let open = Job::Create(job(NAME, SHARDS, 1));
        let session = Session::open(&coordinators, &open, SessionOptions::worker("writer")).await?;
        let shape = Shape::Table(TableSpec::new(DIM, Init::Zeros, "rows"));
        let optimizer = OptimizerSpec::Adagrad(Adagrad {
            learning_rate: 0.1,
            epsilon: 1e-10,
            initial_accumulator: 0.0,
        });
        let rows = VariableSpec { name: "rows".into(), optimizer, shape };
        let variable = session.define(&[rows]).await?[0].variable.id;
        let push = async |step: usize| {
            let keys: Vec<u64> = (0..ROWS).step_by(step).collect();
            for keys in keys.chunks(20_000) {
                let gradients = vec![1.0; keys.len() * DIM as usize];
                let rows = vec![RowGradients { variable, keys, gradients: &gradients }];
                session.push(&PushBatch { rows, ..PushBatch::default() }).await?.await?;
            }
            anyhow::Ok(())
        };
        push(1).await?;
        let whole = take(&coordinators, session.job(), &uri, false).await?.bytes;
        push(100).await?;
        let increment = take(&coordinators, session.job(), &uri, true).await?.bytes;
        session.close().await?;
        Ok::<_, anyhow::Error>((whole, increment))
    })?;
    // Floats, one slot each, key and LSN.
    ensure!(whole > ROWS * u64::from(DIM * 8 + 16), "{whole} bytes");
    ensure!(increment * 100 <= whole * 3, "{increment} of {whole} bytes");
    cluster.stop()
}
