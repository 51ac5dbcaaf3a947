//! What the schema makes of values.

use downpour_data::{Pool, Salt, Schema, Source};

use crate::{message, schema, text};

fn key(salt: &str, value: &str) -> u64 {
    Salt::new(salt).key(value.as_bytes())
}

#[test]
fn a_missing_or_empty_key_is_no_key() {
    let batch = text(
        "a.csv",
        "c,y\nred,1\n,0\n?,1\n",
        "dim = 4\nmissing = [\"?\"]\n[[key]]\ncolumn = \"c\"\n[[label]]\ncolumn = \"y\"",
    )
    .expect("a batch");
    assert_eq!(batch.features[0].offsets, [0, 1, 1, 1]);
    assert_eq!(batch.features[0].keys, [key("c", "red")]);
    assert_eq!(batch.labels, [1.0, 0.0, 1.0]);
}

#[test]
fn features_of_one_table_share_keys_and_a_salt_of_its_own_parts_them() {
    let batch = text(
        "a.csv",
        "a,b\n7,7\n",
        "dim = 4\n[[key]]\ncolumns = [\"a\", \"b\"]\ntable = \"item\"\n\
         [[key]]\ncolumns = [\"a\", \"b\"]\nname = \"{column}_own\"\ntable = \"all\"\nsalt = \"{column}\"",
    )
    .expect("a batch");
    let keys: Vec<u64> = batch.features.iter().map(|keys| keys.keys[0]).collect();
    assert_eq!(keys, [key("item", "7"), key("item", "7"), key("a", "7"), key("b", "7")]);
}

#[test]
fn raw_keys_are_the_integers_themselves() {
    let batch = text(
        "a.csv",
        "a\n7\n-1\n18446744073709551615\n",
        "dim = 1\n[[key]]\ncolumn = \"a\"\nraw = true",
    );
    assert_eq!(batch.expect("a batch").features[0].keys, [7, u64::MAX, u64::MAX]);
}

#[test]
fn a_separator_makes_bags_with_weights_and_a_longest_length() {
    let batch = text(
        "a.tsv",
        "bag\tw\n1|2|3\t0.5|1|2\n\t\n4||5\t1|9|-2\n",
        "dim = 4\n[[key]]\ncolumn = \"bag\"\nseparator = \"|\"\nraw = true\npool = \"mean\"\n\
         max_len = 2\nweights = \"w\"",
    )
    .expect("a batch");
    let bag = &batch.features[0];
    assert_eq!(bag.offsets, [0, 2, 2, 4]);
    assert_eq!(bag.keys, [1, 2, 4, 5]);
    assert_eq!(bag.weights, [0.5, 1.0, 1.0, -2.0]);
}

#[test]
fn numbers_are_transformed_then_standardized_and_gaps_get_the_default() {
    let batch = text(
        "a.csv",
        "x,y\n-3, 10\n,nan\n0,4\n",
        "[[number]]\ncolumn = \"x\"\ntransform = \"log\"\ndefault = -9.0\n\
         [[number]]\ncolumn = \"y\"\nmean = 4.0\nstd = 2.0",
    )
    .expect("a batch");
    let log4 = -(4.0_f64.ln() as f32);
    assert_eq!(batch.numbers, [log4, 3.0, -9.0, 0.0, 0.0, 0.0]);
}

#[test]
fn buckets_are_closed_below_and_open_above() {
    let batch = text(
        "a.csv",
        "age\n17.9\n18\n64\n65\n\n",
        "dim = 4\n[[bucket]]\ncolumn = \"age\"\nboundaries = [18, 65]",
    );
    let expected = ["0", "1", "1", "2"].map(|index| key("age_bucket", index));
    assert_eq!(batch.expect("a batch").features[0].keys, expected);
}

#[test]
fn a_cross_joins_columns_and_buckets_and_needs_them_all() {
    let batch = text(
        "a.csv",
        "age,job\n30,cook\n30,\n,cook\n",
        "dim = 4\n[[bucket]]\ncolumn = \"age\"\nboundaries = [18, 65]\nhidden = true\n\
         [[cross]]\ncolumns = [\"age_bucket\", \"job\"]",
    )
    .expect("a batch");
    assert_eq!(batch.features.len(), 1);
    assert_eq!(batch.features[0].offsets, [0, 1, 1, 1]);
    let expected = Salt::new("age_bucket_x_job").cross([&b"1"[..], b"cook"]);
    assert_eq!(batch.features[0].keys, [expected]);
}

#[test]
fn labels_come_from_numbers_thresholds_and_strings() {
    let batch = text(
        "a.csv",
        "stars,income\n5,>50K\n3,<=50K\n",
        "[[label]]\ncolumn = \"stars\"\nname = \"rating\"\n\
         [[label]]\ncolumn = \"stars\"\nname = \"liked\"\nthreshold = 3.0\n\
         [[label]]\ncolumn = \"income\"\npositive = [\">50K\"]\nnegative = [\"<=50K\"]",
    );
    assert_eq!(batch.expect("a batch").labels, [5.0, 1.0, 1.0, 3.0, 0.0, 0.0]);
}

#[test]
fn weights_and_users_come_with_each_row() {
    let batch =
        text("a.csv", "w,u\n0.5,ann\n2,bob\n", "weight = \"w\"\nuser = \"u\"").expect("a batch");
    assert_eq!(batch.weights, [0.5, 2.0]);
    assert_eq!(batch.users, [key("", "ann"), key("", "bob")]);
}

#[test]
fn a_criteo_schema_is_ten_lines() {
    let schema = schema(CRITEO);
    assert_eq!(schema.features().len(), 26);
    assert_eq!(schema.numbers().len(), 13);
    assert_eq!(schema.text_columns().len(), 40);
    assert_eq!(schema.columns().len(), 40);
    assert_eq!(schema.tables().expect("tables").get("C26"), Some(&16));
    assert_eq!(schema.features()[25].pool, Pool::Sum);
    assert!(
        matches!(&schema.features()[0].source, Source::Column { column, .. } if column == "C1")
    );
}

pub(crate) const CRITEO: &str = r#"
dim = 16
[file]
format = "tsv"
columns = ["label", "I1..I13", "C1..C26"]
[[label]]
column = "label"
[[number]]
columns = "I1..I13"
transform = "log"
[[key]]
columns = "C1..C26"
"#;

#[test]
fn the_schemas_of_the_manual_are_right() {
    let manual = include_str!("../../../docs/data.md");
    let blocks = manual.split("```toml\n").skip(1).filter_map(|block| block.split("```").next());
    assert_eq!(blocks.map(|block| schema(block).columns().len()).collect::<Vec<_>>(), [40, 3, 2]);
}

#[test]
fn a_schema_survives_being_written_out_and_read_again() {
    let schema = schema(CRITEO);
    let text = toml::to_string(schema.spec()).expect("TOML");
    assert_eq!(Schema::parse(&text).expect("the same"), schema);
}

#[test]
fn a_schema_that_contradicts_itself_is_refused_with_the_reason() {
    for (text, reason) in [
        ("dims = 4", "unknown field `dims`"),
        ("[[key]]\ncolumn = \"a\"", "feature \"a\" has no dim"),
        ("dim = 4\n[[key]]\ndim = 2", "a [[key]] names no column"),
        ("dim = 0\n[[key]]\ncolumn = \"a\"", "dim 0 is not 1 to 65536"),
        ("dim = 4\n[[key]]\ncolumns = \"C9..C1\"", "column range \"C9..C1\""),
        ("dim = 4\n[[key]]\ncolumns = \"C1..D4\"", "column range \"C1..D4\""),
        ("dim = 4\n[[key]]\ncolumns = [\"a\", \"a\"]", "two features are called \"a\""),
        ("dim = 4\n[[key]]\ncolumn = \"a\"\npool = \"padded\"", "it needs a max_len above 0"),
        ("dim = 4\n[[key]]\ncolumn = \"a\"\nraw = true\nsalt = \"s\"", "raw keys have no salt"),
        (
            "dim = 4\n[[key]]\ncolumn = \"a\"\ntable = \"t\"\n[[key]]\ncolumn = \"b\"\ntable = \"t\"\ndim = 8",
            "table \"t\" has dim 4 and, by feature \"b\", dim 8",
        ),
        ("dim = 4\n[[bucket]]\ncolumn = \"a\"\nboundaries = [2, 1]", "must be finite and rise"),
        ("dim = 4\n[[cross]]\ncolumns = [\"a\"]", "it needs two columns or more"),
        ("[[number]]\ncolumn = \"a\"\nstd = 0.0", "std above 0"),
        (
            "[[label]]\ncolumn = \"a\"\nthreshold = 1.0\npositive = [\"x\"]",
            "give a finite threshold",
        ),
        ("[file]\ncolumns = [\"age\"]\n[[number]]\ncolumn = \"agee\"", "did you mean \"age\"?"),
        ("[file]\ndelimiter = \"ü\"", "is no ASCII delimiter"),
    ] {
        let error = message(Schema::parse(text));
        assert!(error.contains(reason), "{text:?} gave {error:?}");
    }
}
