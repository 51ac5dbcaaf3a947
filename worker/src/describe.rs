//! What a model needs beside its variables to score raw rows elsewhere, as labels of the job: `psctl export` writes it out with the tables (`docs/export.md`).

use downpour_client::Coordinators;
use downpour_core::id::JobId;
use downpour_data::schema::Part;
use downpour_data::{Bucket, Feature, Pool, Salt, Schema, Source, Transform, hash};
use serde_json::{Value, json};

use crate::{Error, Result, begin};

/// Between two elements of a row before its first push (`downpour_core::init`).
const INIT_STREAM: u64 = 0x9E37_79B9_7F4A_7C15;
/// Labels hold no more.
const PART_BYTES: usize = 4000;
/// The others are for workers and people.
const PARTS_MAX: usize = 100;

/// Writes the labels `features/0` and so on, one after the other the text of a JSON object, where they are not there yet.
pub(crate) async fn write(
    coordinators: &Coordinators,
    (name, job): (&str, JobId),
    model: &str,
    schema: &Schema,
) -> Result<()> {
    let text = describe(model, schema).to_string();
    let parts = parts(&text);
    if parts.len() > PARTS_MAX {
        let bytes = text.len();
        tracing::warn!(
            bytes,
            "the features are too many to be kept with the job: it cannot be exported"
        );
        return Ok(());
    }
    let labels =
        begin::status(coordinators, name).await?.map_or_else(Default::default, |job| job.labels);
    // A shorter text than before leaves no part of it behind.
    let beyond = (parts.len()..PARTS_MAX).take_while(|n| labels.contains_key(&key(*n)));
    let wanted = parts.iter().copied().enumerate().chain(beyond.map(|n| (n, "")));
    for (n, part) in wanted {
        let key = key(n);
        if labels.get(&key).map_or("", String::as_str) != part {
            coordinators.label_job(job, &key, part, None).await.map_err(Error::from)?;
        }
    }
    Ok(())
}

fn key(n: usize) -> String {
    format!("features/{n}")
}

fn parts(text: &str) -> Vec<&str> {
    let mut rest = text;
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let fits = (0..=rest.len().min(PART_BYTES)).rev().find(|&at| rest.is_char_boundary(at));
        let (part, others) = rest.split_at(fits.unwrap_or(rest.len()));
        parts.push(part);
        rest = others;
    }
    parts
}

fn describe(model: &str, schema: &Schema) -> Value {
    let numbers = schema.numbers().iter().map(|number| {
        let log = matches!(number.transform, Transform::Log);
        json!({"column": number.column, "log": log, "mean": number.mean, "std": number.std, "default": number.default})
    });
    json!({
        "model": model,
        "hash": {"offset": hash::FNV_OFFSET, "prime": hash::FNV_PRIME, "mix": hash::MIX, "stream": INIT_STREAM},
        "missing": schema.spec().missing,
        "features": schema.features().iter().map(feature).collect::<Vec<_>>(),
        "numbers": numbers.collect::<Vec<_>>(),
        "labels": schema.labels().iter().map(|label| &label.name).collect::<Vec<_>>(),
    })
}

/// What has its default is left out.
fn feature(feature: &Feature) -> Value {
    let mut described = json!({"name": feature.name, "table": feature.table});
    let mut set = |name: &str, value: Value| described[name] = value;
    let pool = match feature.pool {
        Pool::Sum => "sum",
        Pool::Mean => "mean",
        Pool::Sqrtn => "sqrtn",
        Pool::Padded => "padded",
    };
    set("pool", pool.into());
    if let Some(len) = feature.max_len {
        set("max_len", len.into());
    }
    match &feature.source {
        Source::Column { column, hash, separator, weights } => {
            set("column", column.as_str().into());
            // Raw keys have none.
            set("salt", hash.as_ref().map(Salt::text).into());
            if let Some(separator) = separator {
                set("separator", separator.as_str().into());
            }
            if let Some(weights) = weights {
                set("weights", weights.as_str().into());
            }
        }
        Source::Bucket { bucket: Bucket { column, boundaries }, salt } => {
            set("bucket", json!({"column": column, "boundaries": boundaries}));
            set("salt", salt.text().into());
        }
        Source::Cross { parts, salt } => {
            let part = |part: &Part| match part {
                Part::Column(column) => json!({"column": column}),
                Part::Bucket(Bucket { column, boundaries }) => {
                    json!({"column": column, "boundaries": boundaries})
                }
            };
            set("cross", parts.iter().map(part).collect());
            set("salt", salt.text().into());
        }
    }
    described
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_described_to_the_last_salt_and_cut_into_labels_without_a_loss() {
        let schema = Schema::parse(
            "dim = 4\nmissing = [\"?\"]\n[[key]]\ncolumns = [\"a\", \"b\"]\ntable = \"shared\"\n[[key]]\ncolumn = \"r\"\nraw = true\nseparator = \"|\"\n\
             pool = \"mean\"\nmax_len = 3\nweights = \"w\"\n[[bucket]]\ncolumn = \"x\"\nboundaries = [1.5, 2]\n[[cross]]\ncolumns = [\"a\", \"x_bucket\"]\n\
             [[number]]\ncolumn = \"x\"\ntransform = \"log\"\nmean = 0.5\n[[label]]\ncolumn = \"y\"",
        )
        .unwrap();
        let described = describe("deepfm", &schema);
        let features = &described["features"];
        assert_eq!(
            features[0],
            json!({"name": "a", "table": "shared", "pool": "sum", "column": "a", "salt": "shared"})
        );
        assert_eq!(features[2]["salt"], Value::Null);
        assert_eq!((&features[2]["separator"], &features[2]["max_len"]), (&json!("|"), &json!(3)));
        assert_eq!(features[3]["bucket"], json!({"column": "x", "boundaries": [1.5, 2.0]}));
        assert_eq!(
            features[4]["cross"],
            json!([{"column": "a"}, {"column": "x", "boundaries": [1.5, 2.0]}])
        );
        assert_eq!(described["numbers"][0]["log"], true);
        let long = "ä".repeat(5001);
        let parts = parts(&long);
        assert!(parts.len() == 3 && parts.iter().all(|part| part.len() <= PART_BYTES));
        assert_eq!(parts.concat(), long);
    }
}
