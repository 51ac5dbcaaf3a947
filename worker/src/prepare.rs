//! From a batch of rows to what a step needs. Pure; runs on the reader's thread.

use std::sync::Arc;

use downpour_data::Encoded;

use crate::features::Layout;
use crate::keys::{Bags, UniqueKeys, unique};
use crate::progress::LastRow;

/// A batch whose keys are known and whose rows are not pulled yet.
#[derive(Clone, Debug)]
pub(crate) struct Prepared {
    pub(crate) layout: Arc<Layout>,
    pub(crate) encoded: Encoded,
    /// Tasks that have no rows after it.
    pub(crate) last_rows: Vec<LastRow>,
    /// One for each table of the layout.
    pub(crate) keys: Vec<UniqueKeys>,
    /// One for each feature.
    pub(crate) bags: Vec<Bags>,
}

impl Prepared {
    pub(crate) fn new(layout: &Arc<Layout>, encoded: Encoded, last_rows: Vec<LastRow>) -> Self {
        let mut positions: Vec<Vec<u32>> = vec![Vec::new(); layout.features.len()];
        let mut keys = Vec::new();
        for table in 0..layout.tables.len() {
            let of_table =
                || (0..layout.features.len()).filter(|&f| layout.features[f].table == table);
            let lists: Vec<&[u64]> =
                of_table().map(|feature| encoded.features[feature].keys.as_slice()).collect();
            let (unique, of_lists) = unique(layout.tables[table].arrangement(), &lists);
            keys.push(unique);
            of_table().zip(of_lists).for_each(|(feature, list)| positions[feature] = list);
        }
        let bags = layout.features.iter().zip(&encoded.features).zip(positions);
        let bags = bags
            .map(|((feature, keys), positions)| {
                Bags::new(feature.pool, positions, &keys.offsets, &keys.weights)
            })
            .collect();
        Self { layout: layout.clone(), encoded, last_rows, keys, bags }
    }
}
