//! CSV, TSV, libFM and libsvm files.

use downpour_data::{Dataset, Part, open};

use crate::{Folder, all, batches, options, schema, text};

const NUMBERS: &str = "[[number]]\ncolumns = [\"a\", \"b\"]";

#[test]
fn csv_knows_quotes_line_ends_byte_order_marks_and_blank_lines() {
    let content = "\u{feff}b,\"a\"\r\n1,\"2\"\r\n\r\n\"3\",4\r\n\n";
    let batch = text("x.csv", content, NUMBERS).expect("a batch");
    assert_eq!(batch.numbers, [2.0, 1.0, 4.0, 3.0]);
    assert_eq!(batch.origins.iter().map(|origin| origin.row).collect::<Vec<_>>(), [2, 4]);
}

#[test]
fn a_doubled_quote_is_a_quote_and_a_delimiter_inside_quotes_is_text() {
    let schema = "dim = 1\n[[key]]\ncolumn = \"a\"";
    let quoted = text("x.csv", "a,b\n\"x,\"\"y\"\"\",1\n", schema).expect("a batch");
    let key = downpour_data::Salt::new("a").key(b"x,\"y\"");
    assert_eq!(quoted.features[0].keys, [key]);
}

#[test]
fn spaces_delimiters_and_headers_follow_the_schema() {
    let layout = "[file]\ncolumns = [\"a\", \"_\", \"b\"]\ndelimiter = \";\"\ntrim = true\n";
    let plain = text("x.csv", " 1 ; z ; 2\n", &format!("{layout}{NUMBERS}")).expect("a batch");
    assert_eq!(plain.numbers, [1.0, 2.0]);
    let layout = "[file]\ncolumns = [\"a\", \"b\"]\nheader = true\n";
    let renamed =
        text("x.csv", "old,names\n1,2\n", &format!("{layout}{NUMBERS}")).expect("a batch");
    assert_eq!(renamed.numbers, [1.0, 2.0]);
}

#[test]
fn byte_ranges_part_the_lines_of_a_file_without_loss_or_repeat() {
    let folder = Folder::new();
    let content: String = (0..200).map(|i| format!("{},{i}\n", "x".repeat(i % 7))).collect();
    let file = folder.file("x.csv", format!("c,a\n{content}"));
    let schema = schema("[[number]]\ncolumn = \"a\"");
    for bytes_max in [1, 7, 64, 1000, 1 << 20] {
        let files = open(&[&file], &schema).expect("files").task_size(1, bytes_max);
        let whole = batches(files, schema.clone(), options(1000)).expect("batches").remove(0);
        let expected: Vec<f32> = (0..200_u16).map(f32::from).collect();
        assert_eq!(whole.numbers, expected, "{bytes_max}");
        let last = &whole.origins[199];
        assert_eq!(last.task.row_in_file(last.row), 201, "{bytes_max}");
    }
}

#[test]
fn tasks_come_sorted_by_file_and_place() {
    let folder = Folder::new();
    let (b, a) = (folder.file("b.csv", "a\n1\n"), folder.file("a.csv", "a\n1\n2\n3\n"));
    folder.file("_SUCCESS", "");
    let schema = schema("[[number]]\ncolumn = \"a\"");
    let directory = folder.name("");
    let pattern = folder.name("[ab].c*");
    for paths in [vec![&b, &a, &b], vec![&directory], vec![&pattern]] {
        let tasks = open(&paths, &schema).expect("files").task_size(1, 5).tasks().expect("tasks");
        assert_eq!(tasks.len(), 3, "{tasks:?}");
        assert!(tasks.is_sorted());
        assert_eq!(tasks[1].part, Part::Bytes { start: 4, end: 8 });
    }
}

#[test]
fn libsvm_indices_are_keys_and_values_their_weights() {
    let content = "# a comment\n+1 3:0.5 8:1 # why\n\n-1 qid:9 4:2\n";
    let schema = "dim = 1\nuser = \"qid\"\nmissing = []\n[[label]]\ncolumn = \"label\"\nthreshold = 0.0\n\
                  [[key]]\ncolumn = \"index\"\nraw = true\nweights = \"index.value\"";
    let batch = text("x.libsvm", &content.replace("+1", "+1 qid:8"), schema).expect("a batch");
    assert_eq!(batch.labels, [1.0, 0.0]);
    assert_eq!(batch.features[0].offsets, [0, 2, 3]);
    assert_eq!(batch.features[0].keys, [3, 8, 4]);
    assert_eq!(batch.features[0].weights, [0.5, 1.0, 2.0]);
    assert_eq!(batch.origins.iter().map(|origin| origin.row).collect::<Vec<_>>(), [2, 4]);
}

#[test]
fn a_repeated_libfm_field_is_a_bag_and_an_absent_one_is_empty() {
    let schema =
        "dim = 1\n[[label]]\ncolumn = \"label\"\n[[key]]\ncolumns = [\"f0..f2\"]\nraw = true";
    let batch = text("x.libfm", "1 0:5:1 2:7:1 2:8:1\n0 1:6:1 9:1:1\n", schema).expect("a batch");
    assert_eq!(
        batch.features.iter().map(|f| f.row(0)).collect::<Vec<_>>(),
        [&[5][..], &[], &[7, 8]]
    );
    assert_eq!(batch.features.iter().map(|f| f.row(1)).collect::<Vec<_>>(), [&[][..], &[6], &[]]);
}

#[test]
fn formats_mix_and_a_value_has_one_key_in_all_of_them() {
    let folder = Folder::new();
    let csv = folder.file("a.csv", "label,f1\n1,42\n");
    let libfm = folder.file("b.libfm", "1 1:42:1\n");
    let schema = schema("dim = 1\n[[key]]\ncolumn = \"f1\"");
    let batch = all(&[&csv, &libfm], schema).expect("a batch");
    assert_eq!(batch.features[0].keys[0], batch.features[0].keys[1]);
}
