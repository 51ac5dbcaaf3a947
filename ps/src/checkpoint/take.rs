//! Writes the shards that this server leads, one at a time, while pushes go on.
//!
//! A shard is cut exactly at its last record and read piece by piece; between two pieces the reader rests longer than it read, so that those who push
//! have the cores. The file is stored under a name that no other tenure, position or attempt has, and reported once the commit LSN has reached its
//! position: what is in a checkpoint is never lost.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use downpour_checkpoint::Error;
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::head::Owner;
use downpour_checkpoint::manifest::ShardEntry;
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::Access;
use downpour_checkpoint::write::{Progress, Scratch, ShardFile, ShardWriter};
use downpour_core::checkpoint::CheckpointOrder;
use downpour_core::id::{Epoch, Lsn};
use downpour_core::view::JobView;
use downpour_proto::{threads, v1};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::cut::CutId;
use crate::hosted::{Hosted, ShardKey};
use crate::life::Life;
use crate::shard::Role;

/// Between two looks for something to do.
const ROUND: Duration = Duration::from_millis(100);
/// After a shard could not be stored.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes of a piece: what pushes to the shard wait for at most.
const PIECE_BYTES: usize = 256 << 10;
/// Rests so many times as long as a piece took.
const REST: u32 = 11;
/// A piece that a slow disk held up does not make the reader look as if it hung.
const REST_MAX: Duration = Duration::from_secs(5);
/// A reader that takes nothing for so long is given up.
const HANG_MAX: Duration = Duration::from_secs(30);
/// A coordinator that does not commit a report for this long is passed over.
const REPORT_PATIENCE: Duration = Duration::from_secs(2);
/// Names that were taken before by this process are not tried again.
const ATTEMPTS_MAX: u32 = 1000;

/// A shard's part of a checkpoint, in one tenure.
type Part = (ShardKey, Epoch, String);

/// Runs until the incarnation ends.
pub(crate) async fn run(life: Arc<Life>) {
    let mut done: HashSet<Part> = HashSet::new();
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        let views = life.views();
        let is_open = |(key, _, name): &Part| {
            let view = views.iter().find(|view| view.job == key.job);
            let order = view.and_then(|view| view.orders.checkpoint.as_ref());
            order.is_some_and(|order| order.checkpoint == *name)
        };
        done.retain(is_open);
        for view in &views {
            let Some(order) = &view.orders.checkpoint else { continue };
            for hosted in led(&life, view) {
                let epoch = hosted.shard.lock().epoch();
                let part = (hosted.key, epoch, order.checkpoint.clone());
                if done.contains(&part) {
                    continue;
                }
                match save(&life, &hosted, view, order, epoch).await {
                    Ok(()) => {
                        done.insert(part);
                    }
                    Err(error) => {
                        warn!(job = %hosted.key.job, shard = %hosted.key.shard, %epoch,
                            checkpoint = order.checkpoint, error = format!("{error:#}"),
                            "a shard could not be saved; it is tried again");
                        tokio::time::sleep(PAUSE).await;
                        break;
                    }
                }
            }
        }
    }
}

/// The shards of a job that this server serves and that have something to save, by rising number.
fn led(life: &Life, view: &JobView) -> Vec<Arc<Hosted>> {
    let mut led = life.all();
    led.retain(|hosted| {
        let shard = hosted.shard.lock();
        let serves = matches!(shard.role(), Role::Primary(_));
        hosted.key.job == view.job && serves && shard.last() > Lsn::ZERO
    });
    led.sort_by_key(|hosted| hosted.key);
    led
}

async fn save(
    life: &Arc<Life>,
    hosted: &Arc<Hosted>,
    view: &JobView,
    order: &CheckpointOrder,
    epoch: Epoch,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let shard = hosted.key.shard;
    let newer_than = order.newer_than.get(shard.0 as usize).copied().unwrap_or(Lsn::ZERO);
    let owner = Owner {
        job: view.spec.name.clone(),
        shard,
        shards: view.spec.shards,
        seed: view.spec.seed,
    };
    let cut = OpenCut::new(hosted, epoch, newer_than)?;
    let (pieces, piece) = watch::channel(());
    let memory_bytes_max = life.process.memory.scratch();
    let writer = ShardWriter::new(owner, Scratch { memory_bytes_max, ..Scratch::default() });
    let reading = (Arc::clone(hosted), cut.1, life.token.clone());
    let reading = threads::blocking(move || {
        let (hosted, cut, token) = reading;
        read(&hosted, cut, writer, &pieces, || token.is_cancelled())
    });
    let file = tokio::select! {
        file = reading => file.context("read the shard")??,
        () = hang(piece) => bail!("the disk for temporary files took nothing for {HANG_MAX:?}"),
    };
    drop(cut);
    let lsn = file.lsn;
    let catalog = super::catalog(&order.uri, Access::Write).await?;
    let name = CheckpointName::new(order.checkpoint.as_str())?;
    let entry = store(&catalog, &view.spec.name, &name, hosted, file).await?;
    committed(hosted, epoch, lsn).await?;
    let ShardEntry { lsn, newer_than, attempt, bytes, crc32, rows, blocks } = entry;
    let saved = v1::ShardSaved {
        shard: shard.0,
        epoch: epoch.0,
        lsn: lsn.0,
        newer_than: newer_than.0,
        attempt,
        bytes,
        crc32,
        rows,
        blocks,
    };
    let request = v1::ReportSavedRequest {
        job: hosted.key.job.0,
        checkpoint: order.checkpoint.clone(),
        saved: vec![saved],
    };
    let report = life.process.coordinators.call(REPORT_PATIENCE, |mut client| {
        let request = request.clone();
        async move { client.report_saved(request).await }
    });
    report.await.context("report it")?;
    info!(job = %hosted.key.job, %shard, checkpoint = order.checkpoint, %lsn, bytes, rows,
        seconds = started.elapsed().as_secs_f64(), "saved");
    Ok(())
}

/// Returns when no piece was taken for long: pushes must not pay for a reader that hangs, and it finds its cut closed should it go on.
async fn hang(mut piece: watch::Receiver<()>) {
    while let Ok(changed) = tokio::time::timeout(HANG_MAX, piece.changed()).await {
        if changed.is_err() {
            // It ended, and its result is there.
            std::future::pending::<()>().await;
        }
    }
}

/// Closes a cut whatever becomes of its reader: an open one makes every write dearer.
struct OpenCut<'a>(&'a Hosted, CutId);

impl<'a> OpenCut<'a> {
    fn new(hosted: &'a Hosted, epoch: Epoch, newer_than: Lsn) -> anyhow::Result<Self> {
        let mut shard = hosted.shard.lock();
        // An increment on top of another history would be one on top of nothing.
        let known = shard.state().lineage().contains(newer_than);
        let newer_than = if known { newer_than } else { Lsn::ZERO };
        let open = if shard.epoch() == epoch { shard.open_cut(newer_than) } else { None };
        Ok(OpenCut(hosted, open.context("the shard is no longer served here")?))
    }
}

impl Drop for OpenCut<'_> {
    fn drop(&mut self) {
        self.0.shard.lock().close_cut(self.1);
    }
}

/// Reads a whole cut. On a thread that may block.
fn read(
    hosted: &Hosted,
    cut: CutId,
    mut writer: ShardWriter,
    pieces: &watch::Sender<()>,
    stopped: impl Fn() -> bool,
) -> anyhow::Result<ShardFile> {
    loop {
        let started = Instant::now();
        let piece = hosted.shard.lock().read_cut(cut, PIECE_BYTES)?;
        match writer.take(piece)? {
            Progress::Whole(file) => return Ok(file),
            Progress::More(more) => writer = more,
        }
        pieces.send_replace(());
        if stopped() {
            bail!("the server stops");
        }
        std::thread::sleep((started.elapsed() * REST).min(REST_MAX));
    }
}

/// Under the first name that is free.
async fn store(
    catalog: &Catalog,
    job: &str,
    name: &CheckpointName,
    hosted: &Hosted,
    file: ShardFile,
) -> anyhow::Result<ShardEntry> {
    // An attempt that broke off may have left its name taken: the next one starts above it.
    let attempt = hosted.saves.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
    if attempt > ATTEMPTS_MAX {
        bail!("no name was free in {ATTEMPTS_MAX} attempts");
    }
    match catalog.create_file(job, name, hosted.key.shard, attempt, file).await {
        Ok(entry) => Ok(entry),
        Err(error @ Error::Exists(_)) => Err(error).context("another name is tried next"),
        Err(error) => Err(error.into()),
    }
}

/// Waits until every member has what was cut.
async fn committed(hosted: &Hosted, epoch: Epoch, lsn: Lsn) -> anyhow::Result<()> {
    let mut changed: watch::Receiver<()> = hosted.changed.subscribe();
    loop {
        {
            let shard = hosted.shard.lock();
            if shard.epoch() != epoch || !matches!(shard.role(), Role::Primary(_)) {
                bail!("the shard is no longer served here");
            }
            if shard.commit() >= lsn {
                return Ok(());
            }
        }
        changed.changed().await.context("the shard is gone")?;
    }
}
