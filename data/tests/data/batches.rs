//! Cutting and shuffling a stream of tasks.

use std::collections::HashMap;
use std::sync::Arc;

use downpour_data::{BatchOptions, Batches, Dataset, Encoded, Encoder, open};

use crate::{Folder, batches, options, schema};

const SCHEMA: &str = "[[number]]\ncolumn = \"a\"";

/// Files of 10, 0, 1, 2,500 and 489 rows, numbered through: 3,000 rows.
fn folder() -> Folder {
    let folder = Folder::new();
    let mut next = 0;
    for (file, rows) in [10, 0, 1, 2500, 489].into_iter().enumerate() {
        let lines: String = (next..next + rows).map(|i| format!("{i}\n")).collect();
        folder.file(&format!("{file}.csv"), format!("a\n{lines}"));
        next += rows;
    }
    folder
}

fn cut(folder: &Folder, options: BatchOptions) -> Vec<Encoded> {
    let schema = schema(SCHEMA);
    let files = open(&[folder.name("")], &schema).expect("files").task_size(1, 4000);
    batches(files, schema, options).expect("batches")
}

fn values(batches: &[Encoded]) -> Vec<f32> {
    batches.iter().flat_map(|batch| batch.numbers.clone()).collect()
}

#[test]
fn batches_have_exactly_their_rows_across_tasks_and_lose_none() {
    let folder = folder();
    let expected: Vec<f32> = (0..3000_u16).map(f32::from).collect();
    for rows in [1, 7, 500, 1000, 1024, 3000, 5000] {
        let batches = cut(&folder, options(rows));
        assert_eq!(values(&batches), expected);
        let (last, full) = batches.split_last().expect("batches");
        assert!(full.iter().all(|batch| batch.rows() == rows));
        assert!((1..=rows).contains(&last.rows()), "{rows}: {}", last.rows());
    }
}

#[test]
fn each_task_is_finished_once_and_not_before_its_last_row() {
    let folder = folder();
    for shuffle_rows in [0, 1, 100, 10_000] {
        for rows in [1, 10, 1000, 3000] {
            let batches = cut(&folder, BatchOptions { batch: rows, shuffle_rows, seed: 3 });
            let (mut finished, mut rows_of) = (Vec::new(), HashMap::new());
            for batch in &batches {
                for origin in &batch.origins {
                    assert!(!finished.contains(&origin.task), "a row of a finished task");
                    *rows_of.entry(origin.task.clone()).or_insert(0) += 1;
                }
                for one in &batch.finished {
                    assert_eq!(one.rows, rows_of.get(&one.task).copied().unwrap_or(0));
                    finished.push(one.task.clone());
                }
            }
            let tasks = open(&[folder.name("")], &schema(SCHEMA)).expect("files");
            let tasks = tasks.task_size(1, 4000).tasks().expect("tasks");
            finished.sort();
            assert!(finished.iter().map(AsRef::as_ref).eq(&tasks), "{shuffle_rows} {rows}");
        }
    }
}

#[test]
fn shuffling_keeps_every_row_and_a_seed_repeats_it() {
    let folder = folder();
    let draw =
        |seed, shuffle_rows| values(&cut(&folder, BatchOptions { batch: 64, shuffle_rows, seed }));
    for shuffle_rows in [1, 100, 10_000] {
        let mut rows = draw(5, shuffle_rows);
        assert_eq!(rows, draw(5, shuffle_rows));
        assert_ne!(rows, draw(6, shuffle_rows));
        rows.sort_by(f32::total_cmp);
        assert!(rows.iter().copied().eq((0..3000_u16).map(f32::from)));
    }
}

#[test]
fn a_row_is_drawn_at_most_a_buffer_and_a_chunk_early() {
    let folder = folder();
    let rows = values(&cut(&folder, BatchOptions { batch: 64, shuffle_rows: 50, seed: 5 }));
    assert!(rows.iter().enumerate().all(|(place, row)| *row <= (place + 50 + 1024) as f32));
}

#[test]
fn when_tasks_run_out_the_rest_is_flushed_and_later_tasks_go_on() {
    let folder = folder();
    let schema = schema(SCHEMA);
    let files = open(&[folder.name("3.csv"), folder.name("4.csv")], &schema).expect("files");
    let files = files.task_size(1, 1 << 20);
    let mut tasks = files.tasks().expect("tasks").into_iter();
    let mut pause = false;
    // A lease that has nothing now: one task, nothing, the other task, nothing.
    let leases = std::iter::from_fn(move || {
        pause = !pause;
        if pause { tasks.next() } else { None }
    });
    let mut batches = Batches::new(Arc::new(files), Encoder::new(schema), leases, options(2000));
    let mut next = || batches.next().map(|batch| batch.expect("a batch").rows());
    assert_eq!(next(), Some(2000));
    assert_eq!(next(), Some(500));
    assert_eq!(next(), Some(489));
    assert_eq!(next(), None);
}

#[test]
fn data_is_cut_into_enough_tasks_for_many_workers_and_not_into_crumbs() {
    let folder = Folder::new();
    for (lines, tasks) in [(1, 1), (200_000, 7), (6_000_000, 128)] {
        let file = folder.file("x.csv", "1\n".repeat(lines));
        let files = open(&[&file], &schema("[[number]]\ncolumn = \"1\"")).expect("files");
        let found = files.tasks().expect("tasks").len();
        assert!((tasks..=tasks + tasks / 2).contains(&found), "{lines} lines: {found} tasks");
    }
}

#[test]
fn a_batch_names_its_rows() {
    let folder = folder();
    let batches = cut(&folder, options(20));
    let text = batches[0].describe_rows();
    let file = |name| folder.name(name);
    assert_eq!(
        text,
        format!(
            "{} rows 2 to 11; {} row 2; {} rows 2 to 10",
            file("0.csv"),
            file("2.csv"),
            file("3.csv")
        )
    );
}

#[test]
fn batches_can_move_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Batches>();
}
