//! How stale pushes are, as histograms by job: observed once for each part, never for rows.

use downpour_core::optimizer::Staleness;
use downpour_node::metrics::Histogram;

use crate::metrics::ServerMetrics;

/// Upper bounds of buckets, in steps of the furthest worker.
pub(crate) const CLOCKS: &[f64] =
    &[0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0, 256.0, 1024.0];
/// The same in records.
pub(crate) const RECORDS: &[f64] = &[
    0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16_384.0,
    65_536.0,
];

/// The histograms of one job.
#[derive(Debug)]
pub(crate) struct StalenessMetrics {
    clocks: Histogram,
    records: Histogram,
}

impl StalenessMetrics {
    pub(crate) fn of_job(metrics: &ServerMetrics, name: &str) -> Self {
        StalenessMetrics {
            clocks: metrics.stale_clocks.with_label_values(&[name]),
            records: metrics.stale_records.with_label_values(&[name]),
        }
    }

    pub(crate) fn observe(&self, Staleness { clocks, records }: Staleness) {
        self.clocks.observe(clocks as f64);
        if let Some(records) = records {
            self.records.observe(records as f64);
        }
    }

    /// The job is gone.
    pub(crate) fn forget(metrics: &ServerMetrics, name: &str) {
        // Fails where nothing was observed.
        _ = metrics.stale_clocks.remove_label_values(&[name]);
        _ = metrics.stale_records.remove_label_values(&[name]);
    }
}
