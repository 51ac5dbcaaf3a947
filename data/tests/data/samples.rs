//! Real data in this repository, and a Criteo sample.

use downpour_data::{Dataset, Schema, generate, open};

use crate::{Folder, batches, features::CRITEO, options, rows, schema};

fn positives(set: &str, split: &str) -> (usize, usize) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/datasets");
    let schema = Schema::load(format!("{folder}/{set}.toml")).expect("a schema");
    let files = open(&[format!("{folder}/{set}/{split}.parquet")], &schema).expect("files");
    let count = rows(&files.tasks().expect("tasks")).expect("known") as usize;
    let batches = batches(files, schema, options(4096)).expect("batches");
    assert_eq!(batches.iter().map(downpour_data::Encoded::rows).sum::<usize>(), count);
    assert!(batches.iter().all(|batch| batch.numbers.iter().all(|x| x.abs() < 20.0)));
    (count, batches.iter().flat_map(|batch| &batch.labels).filter(|label| **label == 1.0).count())
}

#[test]
fn the_data_sets_read_whole_with_their_published_counts() {
    assert_eq!(positives("adult", "train"), (39_073, 9_311));
    assert_eq!(positives("adult", "test"), (9_769, 2_376));
    assert_eq!(positives("census-income", "test"), (99_762, 6_186));
}

#[test]
fn a_criteo_file_reads_with_nothing_but_a_schema() {
    let folder = Folder::new();
    let file = folder.path("day_0");
    generate::write_criteo(500, 1, &file).expect("written");
    let schema = schema(CRITEO);
    let files = open(&[folder.name("day_0")], &schema).expect("files");
    let batch = batches(files, schema, options(500)).expect("batches").remove(0);
    assert_eq!((batch.rows(), batch.numbers.len(), batch.features.len()), (500, 500 * 13, 26));
    let keys: usize = batch.features.iter().map(|keys| keys.keys.len()).sum();
    assert!((8_000..13_000).contains(&keys), "{keys} of 13,000: some are gaps");
}
