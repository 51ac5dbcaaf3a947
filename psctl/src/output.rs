//! Data on stdout: a table for people or JSON for scripts.

use std::io::{self, Write as _};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// How data is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Columns for people
    #[default]
    Table,
    /// One JSON value, numbers in full
    Json,
}

/// Something with one line in a table. Columns whose title begins with `>` are aligned to the right.
pub(crate) trait Row {
    const TITLES: &'static [&'static str];
    fn cells(&self) -> Vec<String>;
}

/// A list: one line for each, or a JSON array.
pub(crate) fn list<R: Row + Serialize>(format: Format, rows: &[R]) -> anyhow::Result<()> {
    match format {
        Format::Json => json(&rows),
        Format::Table => line(&table(R::TITLES, rows.iter().map(Row::cells))),
    }
}

/// One thing: a line for each property, or a JSON object.
pub(crate) fn properties<T: Serialize>(
    format: Format,
    value: &T,
    properties: impl FnOnce(&T) -> Vec<(&str, String)>,
) -> anyhow::Result<()> {
    match format {
        Format::Json => json(value),
        Format::Table => {
            let rows =
                properties(value).into_iter().map(|(name, value)| vec![format!("{name}:"), value]);
            line(&table(&[], rows))
        }
    }
}

/// The text of a table.
pub(crate) fn table(titles: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if !titles.is_empty() {
        table.set_header(titles.iter().map(|title| title.trim_start_matches('>')));
    }
    table.add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if titles.get(index).is_some_and(|title| title.starts_with('>')) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// What a verb changed, or would change.
#[derive(Debug, Serialize)]
pub(crate) struct Change {
    pub(crate) noun: &'static str,
    pub(crate) name: String,
    pub(crate) verb: &'static str,
    /// False: it was so before.
    pub(crate) changed: bool,
    /// Nothing was changed: it only would be.
    pub(crate) dry_run: bool,
}

/// An object for scripts; people were told on stderr.
pub(crate) fn changed(format: Format, change: &Change) -> anyhow::Result<()> {
    match format {
        Format::Json => json(change),
        Format::Table => Ok(()),
    }
}

pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Text and the end of its line.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()?;
    Ok(())
}

/// `psctl … | head` is no failure.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(|error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// 12.3 MiB.
pub(crate) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// 1,234,567.
pub(crate) fn count(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_frame_and_numbers_end_together() {
        let rows = [vec!["ps-0".into(), "7".into()], vec!["ps-10".into(), "1,000".into()]];
        let text = table(&["NAME", ">ROWS"], rows.into_iter());
        assert_eq!(text, "NAME    ROWS\nps-0       7\nps-10  1,000");
    }
}
