//! A shard begins with the state that files hold. Until they are read and proved it is nobody's: requests for it are asked to come later.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use downpour_checkpoint::catalog::links;
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::Access;
use downpour_checkpoint::write::Scratch;
use downpour_core::checkpoint::RestoreOrder;
use downpour_core::id::{ServerRef, ShardId};
use downpour_core::view::JobView;
use downpour_proto::threads;
use tracing::{info, warn};

use crate::cut::Loader;
use crate::hosted::ShardKey;
use crate::life::Life;
use crate::state::{Identity, ShardState};

/// After a shard could not be loaded.
const PAUSE: Duration = Duration::from_secs(2);
/// Shards that are loaded at once.
pub(crate) const LOADS_MAX: usize = 2;

/// What the replica on `me` is to be loaded from: it is the primary of the epoch in which the job, or this shard again, began from a checkpoint.
pub(crate) fn order(view: &JobView, shard: ShardId, me: ServerRef) -> Option<RestoreOrder> {
    let (order, route) = (view.orders.restore_of(shard)?, view.route(shard)?);
    (route.epoch == order.epoch && route.primary == Some(me)).then_some(order)
}

/// Starts a task that loads a shard and then takes it into service.
pub(crate) fn start(life: &Arc<Life>, key: ShardKey, view: &Arc<JobView>, order: RestoreOrder) {
    let (owner, view) = (Arc::clone(life), Arc::clone(view));
    life.spawn("restore", async move {
        let Ok(_turn) = owner.loads.acquire().await else { return };
        let started = Instant::now();
        while owner.wants_restored(key, order.epoch) {
            match load(key.shard, &view, &order).await {
                Ok(state) => {
                    info!(job = %key.job, shard = %key.shard, checkpoint = order.checkpoint, lsn = %state.last(),
                        rows = state.rows(), seconds = started.elapsed().as_secs_f64(), "loaded from a checkpoint");
                    return owner.restored(key, order.epoch, state);
                }
                Err(error) => {
                    warn!(job = %key.job, shard = %key.shard, error = format!("{error:#}"),
                        "a shard cannot be loaded from its checkpoint; it is tried again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    });
}

/// The state that a checkpoint and those that it builds on hold of a shard.
async fn load(shard: ShardId, view: &JobView, order: &RestoreOrder) -> anyhow::Result<ShardState> {
    let catalog = super::catalog(&order.uri, Access::Read).await?;
    let name = CheckpointName::new(order.checkpoint.as_str())?;
    let chain = catalog.chain(catalog.manifest(&order.job, &name).await?).await?;
    let Manifest { job, .. } = chain.last().context("the chain is empty")?;
    ensure!(
        job.shards == view.spec.shards && job.seed == view.spec.seed,
        "the checkpoint is of a job with another number of shards, or another seed"
    );
    let identity = Identity { shard, shards: view.spec.shards, seed: view.spec.seed };
    let mut loader = Loader::new(identity);
    for (manifest, link) in links(&chain, shard)? {
        let mut reader = catalog.open_file(manifest, shard, &Scratch::default()).await?;
        let loading = threads::blocking(move || {
            while let Some(piece) = reader.next_piece()? {
                loader.take(piece)?;
            }
            Ok::<_, anyhow::Error>(loader)
        });
        let loaded = loading.await.context("load a file")?;
        loader = loaded.with_context(|| link.entry.object(shard))?;
    }
    Ok(loader.finish()?)
}
