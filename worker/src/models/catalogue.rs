use std::collections::{BTreeMap, BTreeSet};

use downpour_data::{BatchOptions, Batches, Encoder};

use crate::{Error, Result, Schema, Source};

/// Who had what: every item of a dataset, and for each user the items of his rows. Read in one pass, without the cluster.
///
/// It holds every (user, item) pair in memory: 8 bytes each.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    items: BTreeSet<u64>,
    by_user: BTreeMap<u64, BTreeSet<u64>>,
}

impl Catalogue {
    /// The keys of the schema's first feature are users, those of its second are items.
    pub fn read(source: impl Source, schema: &Schema) -> Result<Self> {
        if schema.features().len() < 2 {
            return Err(Error::usage(
                "ranking needs two keys in the schema: the first is the user, the second the item",
            ));
        }
        let dataset = source.open(schema)?;
        let tasks = dataset.tasks()?;
        let options = BatchOptions { batch: 8192, shuffle_rows: 0, seed: 0 };
        let mut catalogue = Self::default();
        for batch in Batches::new(dataset, Encoder::new(schema.clone()), tasks, options) {
            let batch = batch?;
            for row in 0..batch.rows() {
                let (users, items) = (batch.features[0].row(row), batch.features[1].row(row));
                catalogue.items.extend(items);
                for user in users {
                    catalogue.by_user.entry(*user).or_default().extend(items);
                }
            }
        }
        Ok(catalogue)
    }

    /// Every item, rising.
    #[must_use]
    pub fn items(&self) -> Vec<u64> {
        self.items.iter().copied().collect()
    }

    /// Users with their items, rising.
    pub fn users(&self) -> impl Iterator<Item = (u64, &BTreeSet<u64>)> {
        self.by_user.iter().map(|(user, items)| (*user, items))
    }

    /// Whether the user has the item.
    #[must_use]
    pub fn has(&self, user: u64, item: u64) -> bool {
        self.by_user.get(&user).is_some_and(|items| items.contains(&item))
    }
}
