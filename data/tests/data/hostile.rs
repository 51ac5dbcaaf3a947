//! Any bytes in: values or an error out, never a panic.

use std::sync::Arc;

use downpour_data::{Dataset, Encoder, Schema, open};
use proptest::prelude::*;

use crate::{Folder, schema};

/// Reads everything, in small tasks; whether it succeeds does not matter, but rows must be well formed.
fn read(name: &str, content: &[u8], schema: &Schema) {
    let folder = Folder::new();
    let file = folder.file(name, content);
    let files = open(&[&file], schema).expect("a known name").task_size(5000, 37);
    let encoder = Encoder::new(schema.clone());
    for task in files.tasks().unwrap_or_default() {
        let Ok(reader) = files.open(&task) else { continue };
        let task = Arc::new(task);
        for chunk in reader {
            let Ok(encoded) = chunk.and_then(|chunk| encoder.encode(&task, &chunk)) else { break };
            for keys in &encoded.features {
                assert_eq!(keys.offsets.len(), encoded.rows() + 1);
                assert_eq!(keys.offsets.last().copied(), u32::try_from(keys.keys.len()).ok());
            }
            assert_eq!(encoded.numbers.len(), encoded.rows() * schema.numbers().len());
            assert!(encoded.numbers.iter().all(|x| x.is_finite()));
        }
    }
}

/// Bytes of which many are those that mean something.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let meaningful = prop::sample::select(b",;\t\"\r\n :|#.-019ae\xff".to_vec());
    prop::collection::vec(prop_oneof![8 => meaningful, 1 => any::<u8>()], 0..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_bytes_as_csv(content in bytes(), quotes: bool, trim: bool) {
        let schema = schema(&format!(
            "dim = 1\n[file]\ncolumns = [\"a\", \"b\"]\nquotes = {quotes}\ntrim = {trim}\n\
             [[key]]\ncolumn = \"a\"\nseparator = \"|\"\n[[number]]\ncolumn = \"b\"\n\
             [[bucket]]\ncolumn = \"b\"\nboundaries = [0, 1]\n[[cross]]\ncolumns = [\"a\", \"b_bucket\"]"
        ));
        read("x.csv", &content, &schema);
    }

    #[test]
    fn any_bytes_as_csv_with_a_header(content in bytes()) {
        let content = [b"a,b\n", content.as_slice()].concat();
        read("x.csv", &content, &schema("dim = 1\n[[key]]\ncolumn = \"a\"\n[[number]]\ncolumn = \"b\""));
    }

    #[test]
    fn any_bytes_as_libfm(content in bytes()) {
        let schema = schema(
            "dim = 1\nuser = \"qid\"\n[[label]]\ncolumn = \"label\"\n[[key]]\ncolumns = [\"index\", \"f0\", \"f1\"]\n\
             weights = \"{column}.value\"",
        );
        read("x.libfm", &content, &schema);
    }

    #[test]
    fn any_text_as_a_schema(content in bytes()) {
        _ = Schema::parse(&String::from_utf8_lossy(&content));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn any_bytes_in_a_parquet_file(at: prop::sample::Index, change in prop::collection::vec(any::<u8>(), 1..8)) {
        let mut content = include_bytes!("../../datasets/adult/test.parquet").to_vec();
        let at = at.index(content.len() - change.len());
        content[at..at + change.len()].copy_from_slice(&change);
        let schema = schema("dim = 1\n[[key]]\ncolumns = [\"occupation\", \"age\"]");
        read("x.parquet", &content, &schema);
    }
}
