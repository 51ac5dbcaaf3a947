//! Each bad input gets an error that names file, row and column.

use downpour_data::{Dataset, Schema, open};

use crate::{Folder, message, schema, text};

const SCHEMA: &str = "dim = 4\nweight = \"w\"\n[[number]]\ncolumn = \"age\"\n[[key]]\ncolumn = \"job\"\n\
                      [[label]]\ncolumn = \"y\"";

fn csv(content: &str) -> String {
    message(text("in.csv", content, SCHEMA))
}

#[test]
fn a_missing_column_lists_those_that_are_there() {
    assert_eq!(
        csv("agee,job,y,w\n1,a,1,1\n"),
        "in.csv: no column \"age\", did you mean \"agee\"? The file has: agee, job, y, w"
    );
}

#[test]
fn a_label_that_is_missing_or_nan_is_named() {
    let expected = "in.csv: row 3, column \"y\": the label is missing or NaN";
    assert_eq!(csv("age,job,y,w\n1,a,1,1\n1,a,NaN,1\n"), expected);
    assert_eq!(csv("age,job,y,w\n1,a,1,1\n1,a,,1\n"), expected);
}

#[test]
fn an_unparseable_or_infinite_number_is_named() {
    assert_eq!(
        csv("age,job,y,w\n1,a,1,1\nold,a,1,1\n"),
        "in.csv: row 3, column \"age\": \"old\" is not a number"
    );
    assert_eq!(
        csv("age,job,y,w\n1e999,a,1,1\n"),
        "in.csv: row 2, column \"age\": inf is not a finite number"
    );
    assert!(csv("age,job,y,w\n1e99,a,1,1\n").ends_with("is no finite number of 32 bits"));
}

#[test]
fn a_ragged_line_is_named() {
    assert_eq!(csv("age,job,y,w\n1,a,1,1\n1,a,1\n"), "in.csv: row 3: 3 fields, but 4 columns");
    assert_eq!(csv("age,job,y,w\n1,a,1,1,9\n"), "in.csv: row 2: 5 fields, but 4 columns");
}

#[test]
fn quotes_that_do_not_match_are_named() {
    assert!(
        csv("age,job,y,w\n1,\"a,1,1\n").starts_with("in.csv: row 2: a quoted field is not closed")
    );
    assert_eq!(
        csv("age,job,y,w\n1,\"a\"b,1,1\n"),
        "in.csv: row 2: text behind the quoted field \"a\""
    );
}

#[test]
fn a_negative_or_missing_weight_is_named() {
    assert_eq!(
        csv("age,job,y,w\n1,a,1,-0.5\n"),
        "in.csv: row 2, column \"w\": sample weight -0.5 is negative"
    );
    assert_eq!(
        csv("age,job,y,w\n1,a,1,\n"),
        "in.csv: row 2, column \"w\": the sample weight is missing"
    );
}

#[test]
fn rows_deep_inside_a_file_that_is_read_in_ranges_are_named_as_an_editor_counts_them() {
    let folder = Folder::new();
    let mut content = String::from("age,job,y,w\n");
    content += &"1,a,1,1\n".repeat(5000);
    content += "1,a,x,1\n";
    let file = folder.file("in.csv", content);
    let schema = schema(SCHEMA);
    let files = open(&[&file], &schema).expect("files").task_size(1, 1000);
    let result = crate::batches(files, schema, crate::options(100));
    assert_eq!(message(result), "in.csv: row 5002, column \"y\": \"x\" is not a number");
}

#[test]
fn a_label_that_is_no_listed_string_is_named() {
    let schema = "[[label]]\ncolumn = \"y\"\npositive = [\"yes\"]\nnegative = [\"no\"]";
    assert_eq!(
        message(text("in.csv", "x,y\n1,no\n1,maybe\n", schema)),
        "in.csv: row 3, column \"y\": \"maybe\" is neither a positive nor a negative label"
    );
}

#[test]
fn a_key_that_is_no_integer_is_named_where_integers_are_wanted() {
    let schema = "dim = 1\n[[key]]\ncolumn = \"k\"\nraw = true\nseparator = \"|\"";
    assert_eq!(
        message(text("in.csv", "k\n1|2\n1|b\n", schema)),
        "in.csv: row 3, column \"k\": \"b\" is not an integer of 64 bits"
    );
}

#[test]
fn keys_and_weights_that_do_not_match_are_named() {
    let schema = "dim = 1\n[[key]]\ncolumn = \"k\"\nweights = \"w\"\nseparator = \"|\"";
    assert_eq!(
        message(text("in.csv", "k,w\n1|2,1\n", schema)),
        "in.csv: row 2, column \"k\": 2 keys, but 1 weights"
    );
}

#[test]
fn libfm_tokens_that_do_not_parse_are_named() {
    let schema = "dim = 1\n[[label]]\ncolumn = \"label\"\n[[key]]\ncolumn = \"index\"\nraw = true";
    let fm = |content| message(text("in.libfm", content, schema));
    assert_eq!(
        fm("1 1:1\n1 b:1\n"),
        "in.libfm: row 2, column \"index\": \"b:1\": the index must be an integer, the value a number"
    );
    assert_eq!(
        fm("1 1:2:3:4\n"),
        "in.libfm: row 1, column \"index\": \"1:2:3:4\" is neither index:value nor field:index:value"
    );
    assert_eq!(
        fm("1:1 2:1\n"),
        "in.libfm: row 1, column \"label\": the line begins with \"1:1\" and no label"
    );
    assert_eq!(fm("one 2:1\n"), "in.libfm: row 1, column \"label\": \"one\" is not a number");
    let wrong = schema.replace("\"index\"", "\"idx\"");
    assert!(
        message(text("in.libfm", "1 1:1\n", &wrong)).starts_with("in.libfm: no column \"idx\"")
    );
}

#[test]
fn empty_files_and_files_without_rows_are_named() {
    assert_eq!(csv(""), "in.csv: the file is empty");
    let schema = schema(SCHEMA);
    let folder = Folder::new();
    let empty = folder.file("in.parquet", "");
    let files = open(&[&empty], &schema).expect("files");
    assert_eq!(message(files.tasks()), "in.parquet: the file is empty");
}

#[test]
fn paths_that_lead_to_no_data_are_named() {
    let schema = schema(SCHEMA);
    let folder = Folder::new();
    let find = |name: &str| message(open(&[folder.name(name)], &schema));
    assert_eq!(find("none.csv"), "none.csv: no such file or directory");
    assert_eq!(find("*.csv"), "*.csv: no file matches");
    assert!(find("").contains("the directory holds no .parquet"));
    folder.file("x.csv.gz", "");
    assert!(find("x.csv.gz").starts_with("x.csv.gz: the name does not tell the format"));
}

#[test]
fn a_schema_file_that_is_not_there_or_wrong_is_named() {
    let folder = Folder::new();
    assert!(message(Schema::load(folder.path("no.toml"))).starts_with("no.toml: No such file"));
    let wrong = folder.file("wrong.toml", "dims = 3");
    assert!(message(Schema::load(wrong)).contains("wrong.toml: TOML parse error at line 1"));
}
