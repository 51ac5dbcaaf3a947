//! The crate as its user sees it: files in, batches or errors out.

mod bad_input;
mod batches;
mod features;
mod generate;
mod hash;
mod hostile;
mod parquet;
mod samples;
mod text;

use std::path::PathBuf;
use std::sync::Arc;

use downpour_data::{
    BatchOptions, Batches, Dataset, Encoded, Encoder, Files, Result, Schema, Task, open,
};

/// A folder with files that goes when the test ends.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), content).expect("written");
        self.name(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").into()
    }
}

fn schema(text: &str) -> Schema {
    Schema::parse(text).expect("a schema")
}

fn options(batch: usize) -> BatchOptions {
    BatchOptions { batch, shuffle_rows: 0, seed: 1 }
}

fn batches(files: Files, schema: Schema, options: BatchOptions) -> Result<Vec<Encoded>> {
    let tasks = files.tasks()?;
    Batches::new(Arc::new(files), Encoder::new(schema), tasks, options).collect()
}

/// All rows of some files as one batch.
fn all(paths: &[&str], schema: Schema) -> Result<Encoded> {
    let batches = batches(open(paths, &schema)?, schema, options(1 << 30))?;
    Ok(batches.into_iter().next().expect("a batch"))
}

/// A text file through a schema, as one batch.
fn text(name: &str, content: &str, schema_text: &str) -> Result<Encoded> {
    let folder = Folder::new();
    all(&[&folder.file(name, content)], schema(schema_text))
}

/// The message of an error, without the folder's name.
fn message<T>(result: Result<T>) -> String {
    let text = result.err().expect("an error").to_string();
    match text.find("/.tmp") {
        Some(at) => {
            let folder_end = at + 1 + text[at + 1..].find('/').expect("a file in the folder") + 1;
            let start = text[..at].rfind(|c: char| c.is_whitespace()).map_or(0, |space| space + 1);
            format!("{}{}", &text[..start], &text[folder_end..])
        }
        None => text,
    }
}

fn rows(tasks: &[Task]) -> Option<u64> {
    tasks.iter().map(|task| task.rows).sum()
}
