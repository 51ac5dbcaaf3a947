//! A checkpoint that is listed is whole, and each row in it is of one moment (docs/protocol.md 6 and 8).

use anyhow::{Context, Result, ensure};
use downpour_checkpoint::catalog::{Catalog, links};
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::store::{Access, Store};
use downpour_checkpoint::write::Scratch;
use downpour_core::id::ShardId;
use downpour_proto::v1::cut_piece::Piece;

use crate::clients::{ADAGRAD, TRAINED};
use crate::cluster::CHECKPOINTS;
use crate::shared::Shared;

const PROMISE: &str = "a listed checkpoint is whole and of one moment";

pub(crate) async fn check(shared: &Shared) {
    if let Err(error) = check_all().await {
        shared.broken(PROMISE, format!("{error:#}"));
    }
}

async fn check_all() -> Result<()> {
    let catalog = Catalog::new(Store::open(CHECKPOINTS, Access::Read)?);
    for (name, manifest) in catalog.list("probe").await? {
        let manifest = manifest.with_context(|| name.to_string())?;
        let verified = catalog.verify(manifest.clone(), &Scratch::default(), |_| ()).await;
        verified.with_context(|| name.to_string())?;
        check_rows(&catalog, manifest).await.with_context(|| name.to_string())?;
    }
    Ok(())
}

async fn check_rows(catalog: &Catalog, manifest: Manifest) -> Result<()> {
    let chain = catalog.chain(manifest).await?;
    let Some(newest) = chain.last() else { return Ok(()) };
    let trained = newest.variables.iter().find(|variable| variable.spec.name == TRAINED);
    let shards = newest.job.shards;
    for shard in (0..shards).map(ShardId) {
        for (manifest, _) in links(&chain, shard)? {
            let mut reader = catalog.open_file(manifest, shard, &Scratch::default()).await?;
            while let Some(piece) = reader.next_piece()? {
                if let Piece::Rows(rows) = piece
                    && trained.is_some_and(|variable| variable.id.0 == rows.variable)
                {
                    trained_rows(&rows.floats)?;
                }
            }
        }
    }
    Ok(())
}

/// The slot says how often a row was updated, and that what its weight is.
fn trained_rows(floats: &[u8]) -> Result<()> {
    let floats: Vec<f32> =
        floats.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    for row in floats.chunks(2) {
        let (mut weight, mut sum) = (0.0f32, ADAGRAD.initial_accumulator);
        while sum < row[1] {
            sum += 1.0;
            weight -= ADAGRAD.learning_rate / (sum.sqrt() + ADAGRAD.epsilon);
        }
        ensure!((weight, sum) == (row[0], row[1]), "a row is {row:?}, not {:?}", [weight, sum]);
    }
    Ok(())
}
