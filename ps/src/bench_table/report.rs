//! What is printed.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Args, Ids, Optimizer};

/// A whole run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    workload: &'static str,
    rows: u32,
    dim: u32,
    optimizer: &'static str,
    ids: &'static str,
    batch: u32,
    threads: u32,
    repeats: u32,
    seed: u64,
    variants: Vec<Measured>,
}

/// One variant; the help of the subcommand names the fields.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) variant: String,
    pub(super) lookup_share: f64,
    pub(super) update_share: f64,
    pub(super) gather_rows_s: Rate,
    pub(super) scatter_rows_s: Rate,
    pub(super) lookups_s: Rate,
    pub(super) updates_s: Rate,
    pub(super) row_overhead_bytes: f64,
    pub(super) pause_max_ms: f64,
    pub(super) pause_p999_ms: f64,
    pub(super) pause_max_cpu_ms: f64,
    pub(super) insert_ns: f64,
}

/// Of the repeats.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Rate {
    pub(super) median: f64,
    min: f64,
    max: f64,
}

impl Rate {
    pub(super) fn of(mut samples: Vec<f64>) -> Rate {
        samples.sort_unstable_by(f64::total_cmp);
        let middle = samples.len() / 2;
        let median = match samples.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => samples[middle],
            _ => f64::midpoint(samples[middle - 1], samples[middle]),
        };
        let end = |sample: Option<&f64>| sample.copied().unwrap_or(f64::NAN);
        Rate { median, min: end(samples.first()), max: end(samples.last()) }
    }
}

impl Report {
    pub(super) fn new(args: &Args, variants: Vec<Measured>) -> Self {
        Report {
            workload: "table",
            rows: args.rows,
            dim: args.dim,
            optimizer: if args.optimizer == Optimizer::Sgd { "sgd" } else { "adagrad" },
            ids: if args.ids == Ids::Uniform { "uniform" } else { "zipf" },
            batch: args.batch,
            threads: args.threads,
            repeats: args.repeats,
            seed: args.seed,
            variants,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { rows, dim, optimizer, ids, batch, threads, .. } = self;
        writeln!(
            f,
            "{rows} rows of dim {dim}, {optimizer}, {ids} batches of {batch}, {threads} threads; million rows/s per core"
        )?;
        writeln!(
            f,
            "{:<20}{:>9}{:>9}{:>7}{:>10}{:>9}{:>7}{:>11}{:>9}{:>9}{:>10}",
            "variant",
            "gather",
            "lookups",
            "share",
            "scatter",
            "updates",
            "share",
            "bytes/row",
            "pause",
            "cpu",
            "insert"
        )?;
        for m in &self.variants {
            let million = |rate: &Rate| rate.median / 1e6;
            writeln!(
                f,
                "{:<20}{:>9.1}{:>9.1}{:>6.0}%{:>10.1}{:>9.1}{:>6.0}%{:>11.1}{:>7.2}ms{:>7.2}ms{:>8.0}ns",
                m.variant,
                million(&m.gather_rows_s),
                million(&m.lookups_s),
                m.lookup_share * 100.0,
                million(&m.scatter_rows_s),
                million(&m.updates_s),
                m.update_share * 100.0,
                m.row_overhead_bytes,
                m.pause_max_ms,
                m.pause_max_cpu_ms,
                m.insert_ns,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_the_median_of_its_samples() {
        let rate = Rate::of(vec![3.0, 1.0, 7.0, 4.0]);
        assert_eq!((rate.median, rate.min, rate.max), (3.5, 1.0, 7.0));
        assert_eq!(Rate::of(vec![2.0]).median, 2.0);
    }
}
