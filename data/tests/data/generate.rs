//! Generated clicks.

use std::collections::HashSet;

use downpour_data::generate::{Clicks, Compression, Row, Sampler, Shape, write_clicks};
use downpour_data::{Schema, open};

use crate::{Folder, batches, options};

const SHAPE: Shape = Shape { fields: 26, dense: 13, ids_per_field: 1000, exponent: 1.05, seed: 4 };

#[test]
fn a_row_is_a_pure_function_of_seed_and_index() {
    let (mut one, mut two) = (Row::default(), Row::default());
    Sampler::new(SHAPE).row(1234, &mut one);
    let sampler = Sampler::new(SHAPE);
    sampler.row(1233, &mut two);
    assert_ne!(one, two);
    sampler.row(1234, &mut two);
    assert_eq!(one, two);
    Sampler::new(Shape { seed: 5, ..SHAPE }).row(1234, &mut two);
    assert_ne!(one.ids, two.ids);
}

#[test]
fn few_ids_have_most_of_the_rows() {
    let sampler = Sampler::new(Shape { fields: 1, dense: 0, ..SHAPE });
    let mut row = Row::default();
    let hot = (0..10_000).filter(|i| {
        sampler.row(*i, &mut row);
        row.ids[0] < 32
    });
    // log(33) / log(1001) of the rows, were the exponent 1.
    assert!((4_800..6_000).contains(&hot.count()));
}

#[test]
fn files_hold_what_the_summary_says() {
    let folder = Folder::new();
    let clicks = Clicks {
        shape: Shape { fields: 3, dense: 2, ..SHAPE },
        rows: 2500,
        test_rows: 500,
        file_rows: 1500,
        row_group_rows: 400,
        first_row_group_rows: Some(1000),
        compression: Compression::Snappy,
        row_numbers: false,
    };
    let mut told = 0;
    let summary =
        write_clicks(&clicks, &folder.path("out"), &mut |rows| told = rows).expect("written");
    assert_eq!((told, summary.files.len()), (3000, 3));
    let ceiling = summary.ceiling.expect("both classes");
    assert_eq!(ceiling.rows, 500);
    assert!(ceiling.auc > 0.6 && ceiling.logloss < 0.69, "{ceiling:?}");

    let schema = Schema::load(&summary.schema).expect("a schema");
    let files = open(&[folder.name("out/train-*.parquet")], &schema).expect("files");
    let tasks = downpour_data::Dataset::tasks(&files).expect("tasks");
    let sizes: Vec<u64> = tasks.iter().filter_map(|task| task.rows).collect();
    assert_eq!(sizes, [1000, 400, 100, 400, 400, 200]);
    let batches = batches(files, schema, options(5000)).expect("batches");
    assert_eq!(batches[0].rows(), 2500);
    let distinct = batches[0].features.iter().map(|keys| keys.keys.iter().collect::<HashSet<_>>());
    assert_eq!(distinct.map(|keys| keys.len() as u64).sum::<u64>(), summary.distinct_keys);
}

#[test]
fn rows_are_numbered_through_all_files_where_that_is_asked_for() {
    let folder = Folder::new();
    let clicks = Clicks {
        shape: Shape { fields: 2, dense: 1, ..SHAPE },
        rows: 500,
        test_rows: 100,
        file_rows: 300,
        row_group_rows: 120,
        first_row_group_rows: None,
        compression: Compression::None,
        row_numbers: true,
    };
    write_clicks(&clicks, &folder.path("out"), &mut |_| ()).expect("written");
    let schema = "[[label]]\ncolumn = \"label\"\n[[key]]\ncolumn = \"row\"\ndim = 1\nraw = true\n";
    let schema = Schema::parse(schema).expect("a schema");
    let mut first = 0;
    for (files, rows) in [("out/train-*.parquet", 500), ("out/test.parquet", 100)] {
        let files = open(&[folder.name(files)], &schema).expect("files");
        let batches = batches(files, schema.clone(), options(1000)).expect("batches");
        let numbers: Vec<u64> = batches[0].features[0].keys.to_vec();
        assert_eq!(numbers, (first..first + rows).collect::<Vec<_>>());
        first += rows;
    }
}
