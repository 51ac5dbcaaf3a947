//! Checkpoints (docs/protocol.md 8): [`take`] writes the shards that this server leads, [`restore`] loads those that begin from one.

pub(crate) mod restore;
pub(crate) mod take;

use downpour_checkpoint::Error;
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::store::{Access, Store};
use downpour_proto::threads;

/// Opening a place looks at the disk, or reads certificates.
async fn catalog(uri: &str, access: Access) -> Result<Catalog, Error> {
    let (place, uri) = (uri.to_owned(), uri.to_owned());
    let opened = threads::blocking(move || Store::open(&place, access)).await;
    let failed = |error| Error::Io { object: uri, source: std::io::Error::other(error) };
    Ok(Catalog::new(opened.map_err(failed)??))
}
