//! Parquet: types, lists, row groups, damage.

use std::fs::File;
use std::sync::Arc;

use arrow_array::builder::{Int64Builder, ListBuilder};
use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, BooleanArray, DictionaryArray, Float32Array, Float64Array, Int64Array,
    LargeStringArray, ListArray, RecordBatch, StringArray,
};
use downpour_data::{Dataset, Encoder, Part, Salt, Task, open};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

use crate::{Folder, all, message, rows, schema};

fn write(folder: &Folder, columns: Vec<(&str, ArrayRef)>, group_rows: usize) -> String {
    let batch = RecordBatch::try_from_iter(columns).expect("a batch");
    let file = File::create(folder.path("in.parquet")).expect("a file");
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(group_rows))
        .set_data_page_row_count_limit(512)
        .set_write_batch_size(512)
        .build();
    let mut writer =
        ArrowWriter::try_new(file, batch.schema(), Some(properties)).expect("a writer");
    writer.write(&batch).expect("written");
    writer.close().expect("closed");
    folder.name("in.parquet")
}

fn lists(rows: &[Option<&[i64]>]) -> ListArray {
    let mut lists = ListBuilder::new(Int64Builder::new());
    for row in rows {
        match row {
            Some(items) => lists.append_value(items.iter().map(|item| Some(*item))),
            None => lists.append_null(),
        }
    }
    lists.finish()
}

#[test]
fn types_do_not_matter_for_what_a_value_is() {
    let folder = Folder::new();
    let dictionary: DictionaryArray<Int32Type> = [Some("7"), None].into_iter().collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("text", Arc::new(StringArray::from(vec![Some("7"), None]))),
        ("large", Arc::new(LargeStringArray::from(vec![Some("7"), None]))),
        ("integer", Arc::new(Int64Array::from(vec![Some(7), None]))),
        ("float", Arc::new(Float64Array::from(vec![Some(7.0), Some(f64::NAN)]))),
        ("dictionary", Arc::new(dictionary)),
        ("flag", Arc::new(BooleanArray::from(vec![Some(true), None]))),
    ];
    let file = write(&folder, columns, 100);
    let keys = r#"columns = ["text", "large", "integer", "float", "dictionary"]"#;
    let schema = schema(&format!(
        "dim = 4\n[[key]]\n{keys}\ntable = \"t\"\n[[number]]\n{keys}\n[[number]]\ncolumn = \"flag\""
    ));
    let batch = all(&[&file], schema).expect("a batch");
    for feature in &batch.features {
        assert_eq!((feature.row(0), feature.row(1)), (&[Salt::new("t").key(b"7")][..], &[][..]));
    }
    assert_eq!(batch.numbers, [7.0, 7.0, 7.0, 7.0, 7.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn dictionaries_in_memory_are_read_through() {
    let values: DictionaryArray<Int32Type> = [Some("7"), None, Some("x")].into_iter().collect();
    let batch = RecordBatch::try_from_iter([("k", Arc::new(values) as ArrayRef)]).expect("a batch");
    let encoder = Encoder::new(schema("dim = 1\n[[key]]\ncolumn = \"k\""));
    let chunk = downpour_data::Chunk { batch, first_row: 1 };
    let encoded = encoder.encode(&Arc::new(Task::whole("memory")), &chunk).expect("encoded");
    assert_eq!(encoded.features[0].offsets, [0, 1, 1, 2]);
}

#[test]
fn list_columns_are_bags_also_where_a_chunk_begins_inside() {
    let folder = Folder::new();
    let items: Vec<Vec<i64>> =
        (0..3000).map(|i| (0..i % 4).map(|j| i * 10 + j).collect()).collect();
    let bags: Vec<Option<&[i64]>> =
        items.iter().enumerate().map(|(i, row)| (i % 5 != 0).then_some(row.as_slice())).collect();
    let file = write(&folder, vec![("items", Arc::new(lists(&bags)))], 5000);
    let schema = schema("dim = 4\n[[key]]\ncolumn = \"items\"\nraw = true\npool = \"sqrtn\"");
    let files = open(&[&file], &schema).expect("files").task_size(700, 1);
    let batches = crate::batches(files, schema, crate::options(100)).expect("batches");
    let read: Vec<u64> = batches.iter().flat_map(|batch| batch.features[0].keys.clone()).collect();
    let expected =
        bags.iter().flat_map(|row| row.unwrap_or_default().iter().map(|key| *key as u64));
    assert!(expected.eq(read));
    assert_eq!(batches[1].features[0].row(1), [1010]);
}

#[test]
fn per_key_weights_come_from_a_second_list_column() {
    let folder = Folder::new();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("items", Arc::new(lists(&[Some(&[1, 2]), Some(&[3])]))),
        ("counts", Arc::new(lists(&[Some(&[10, 20]), Some(&[30, 40])]))),
    ];
    let file = write(&folder, columns, 100);
    let schema = schema("dim = 4\n[[key]]\ncolumn = \"items\"\nweights = \"counts\"");
    assert_eq!(
        message(all(&[&file], schema)),
        "in.parquet: row 2, column \"items\": 1 keys, but 2 weights"
    );
}

#[test]
fn row_groups_are_cut_into_tasks_that_add_up_and_rows_are_numbered_through() {
    let folder = Folder::new();
    let values = Int64Array::from_iter_values(0..5000);
    let file = write(&folder, vec![("a", Arc::new(values))], 2000);
    let schema = schema("[[number]]\ncolumn = \"a\"");
    for rows_max in [1, 100, 1999, 10_000] {
        let files = open(&[&file], &schema).expect("files").task_size(rows_max, 1);
        let tasks = files.tasks().expect("tasks");
        assert_eq!(rows(&tasks), Some(5000));
        assert!(tasks.is_sorted());
        for task in tasks.iter().step_by(97) {
            let mut next = None;
            for chunk in files.open(task).expect("a reader") {
                let chunk = chunk.expect("a chunk");
                let values = chunk.batch.column(0).as_any().downcast_ref::<Int64Array>();
                let first = values.expect("integers").value(0) as u64;
                assert_eq!(chunk.first_row, first + 1);
                assert!(next.is_none_or(|next| next == chunk.first_row));
                next = Some(chunk.first_row + chunk.batch.num_rows() as u64);
            }
        }
    }
}

/// What bounds memory: however large the row group, a chunk is small and has only the columns in use.
#[test]
fn a_row_group_of_any_size_comes_in_small_chunks_of_the_columns_in_use() {
    let folder = Folder::new();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("a", Arc::new(Int64Array::from_iter_values(0..100_000))),
        ("unused", Arc::new(StringArray::from_iter_values((0..100_000).map(|i| i.to_string())))),
    ];
    let file = write(&folder, columns, 100_000);
    let schema = schema("[[number]]\ncolumn = \"a\"");
    let files = open(&[&file], &schema).expect("files");
    let reader = files.open(&Task::whole(&file)).expect("a reader");
    let mut rows = 0;
    for chunk in reader {
        let batch = chunk.expect("a chunk").batch;
        assert!(batch.num_rows() <= 1024 && batch.num_columns() == 1);
        assert!(batch.get_array_memory_size() < 64 << 10);
        rows += batch.num_rows();
    }
    assert_eq!(rows, 100_000);
}

#[test]
fn a_truncated_file_is_named_and_so_is_a_damaged_page() {
    let folder = Folder::new();
    let file = write(&folder, vec![("a", Arc::new(Int64Array::from_iter_values(0..5000)))], 5000);
    let bytes = std::fs::read(&file).expect("bytes");
    let schema = schema("[[number]]\ncolumn = \"a\"");
    let cut = folder.file("cut.parquet", &bytes[..bytes.len() / 2]);
    let error = message(all(&[&cut], schema.clone()));
    assert!(error.starts_with("cut.parquet: not a whole Parquet file"), "{error}");
    let mut damaged = bytes.clone();
    damaged[4..bytes.len() / 2].fill(0xff);
    let damaged = folder.file("damaged.parquet", damaged);
    let error = message(all(&[&damaged], schema));
    assert!(error.starts_with("damaged.parquet: damaged near row 1"), "{error}");
}

#[test]
fn a_missing_column_and_a_nan_label_are_named() {
    let folder = Folder::new();
    let mut labels = vec![1.0; 3000];
    labels[2345] = f32::NAN;
    let columns: Vec<(&str, ArrayRef)> = vec![("label", Arc::new(Float32Array::from(labels)))];
    let file = write(&folder, columns, 1000);
    assert_eq!(
        message(all(&[&file], schema("[[label]]\ncolumn = \"label\""))),
        "in.parquet: row 2346, column \"label\": the label is missing or NaN"
    );
    assert_eq!(
        message(all(&[&file], schema("[[label]]\ncolumn = \"lable\""))),
        "in.parquet: no column \"lable\", did you mean \"label\"? The file has: label"
    );
}

#[test]
fn a_task_of_a_file_that_has_changed_is_refused() {
    let folder = Folder::new();
    let file = write(&folder, vec![("a", Arc::new(Int64Array::from(vec![1, 2])))], 10);
    let files = open(&[&file], &schema("[[number]]\ncolumn = \"a\"")).expect("files");
    for (group, end) in [(1, 1), (0, 3)] {
        let part = Part::Rows { group, start: 0, end };
        let error = message(files.open(&Task { file: file.clone(), part, rows: None }));
        assert!(error.contains("has it changed?"), "{error}");
    }
}
