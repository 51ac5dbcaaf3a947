//! Writes synthetic training data. Progress goes to stderr, the summary to stdout.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use downpour_data::generate::{Clicks, Compression, Shape, write_clicks, write_criteo};

/// Synthetic training data with a known ceiling
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// How the summary is printed
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
}

const EXAMPLES: &str = "\
Examples:
  A million clicks, and what the best model can score on 100,000 more:
    downpour-gen clicks --rows 1000000 --out /tmp/clicks
  More than 20 million different keys in 26 tables:
    downpour-gen clicks --rows 2000000 --ids-per-field 1200000 --exponent 0.6 --out /tmp/large
  About 4 GB with one row group of about 512 MB:
    downpour-gen clicks --rows 16000000 --file-rows 16000000 --compression none \\
      --first-row-group-rows 2000000 --out /tmp/groups
  A small file in the format of the Criteo click logs:
    downpour-gen criteo --rows 1000 --out /tmp/criteo.tsv";

#[derive(Subcommand)]
enum Command {
    /// Parquet files with power-law keys, and a schema for them
    Clicks(ClicksArgs),
    /// A text file in the format of the Criteo click logs
    Criteo {
        #[arg(long, default_value_t = 1000)]
        rows: u64,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// File to write
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Args)]
struct ClicksArgs {
    /// Rows to train on
    #[arg(long)]
    rows: u64,
    /// Rows to test on
    #[arg(long, default_value_t = 100_000)]
    test_rows: u64,
    /// Key columns, C1 and so on
    #[arg(long, default_value_t = 26, value_parser = clap::value_parser!(u16).range(0..=10_000))]
    fields: u16,
    /// Number columns, I1 and so on
    #[arg(long, default_value_t = 13, value_parser = clap::value_parser!(u16).range(0..=10_000))]
    dense: u16,
    /// Different ids that a field can have
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=1 << 28))]
    ids_per_field: u64,
    /// An id of rank r is drawn as often as r^-EXPONENT
    #[arg(long, default_value_t = 1.05)]
    exponent: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Rows of a file
    #[arg(long, default_value_t = 4_000_000)]
    file_rows: u64,
    /// Rows of a row group
    #[arg(long, default_value_t = 250_000)]
    row_group_rows: u64,
    /// Rows of the first row group, where it is to be larger than the others
    #[arg(long)]
    first_row_group_rows: Option<u64>,
    #[arg(long, value_enum, default_value_t = Codec::Zstd)]
    compression: Codec,
    /// Also a column `row` with the number of each row, from 0 through all files
    #[arg(long)]
    row_numbers: bool,
    /// Directory to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Codec {
    None,
    Snappy,
    Zstd,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("downpour-gen: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let summary = match &cli.command {
        Command::Clicks(args) => clicks(args)?,
        Command::Criteo { rows, seed, out } => {
            write_criteo(*rows, *seed, out)?;
            serde_json::json!({ "files": [out], "train_rows": rows })
        }
    };
    if cli.output == Output::Json {
        println!("{summary}");
    } else {
        println!("{summary:#}");
    }
    Ok(())
}

fn clicks(args: &ClicksArgs) -> anyhow::Result<serde_json::Value> {
    let clicks = Clicks {
        shape: Shape {
            fields: args.fields.into(),
            dense: args.dense.into(),
            ids_per_field: args.ids_per_field,
            exponent: args.exponent,
            seed: args.seed,
        },
        rows: args.rows,
        test_rows: args.test_rows,
        file_rows: args.file_rows,
        row_group_rows: args.row_group_rows,
        first_row_group_rows: args.first_row_group_rows,
        compression: match args.compression {
            Codec::None => Compression::None,
            Codec::Snappy => Compression::Snappy,
            Codec::Zstd => Compression::Zstd,
        },
        row_numbers: args.row_numbers,
    };
    let total = args.rows.saturating_add(args.test_rows).max(1);
    let mut shown = 0;
    let summary = write_clicks(&clicks, &args.out, &mut |rows| {
        let percent = (u128::from(rows) * 100 / u128::from(total)) as u64;
        if percent >= shown + 5 {
            shown = percent;
            eprintln!("{percent:3} %  {rows} of {total} rows");
        }
    })?;
    Ok(serde_json::to_value(summary)?)
}
