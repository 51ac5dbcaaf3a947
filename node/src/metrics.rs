//! Prometheus metrics on a registry that is handed in; nothing here is global.
//!
//! A component has one struct of metrics and builds it from the [`Registry`] of its [`Node`](crate::process::Node):
//! register each with the helpers below, name it with its unit (`downpour_ps_push_seconds`), counters with `_total`.

use prometheus::core::{Collector, Metric as _};
pub use prometheus::{
    Gauge, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
};
use prometheus::{HistogramOpts, Opts, TextEncoder};

/// Upper bounds of latency buckets in seconds, 50 µs to 10 s. The defaults of the usual libraries begin at 5 ms (or, in milliseconds, at
/// 5 s), where most of what Downpour does has ended long ago.
pub const LATENCY_SECONDS: &[f64] = &[
    50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3,
    1.0, 2.0, 5.0, 10.0,
];

/// Makes metrics and registers them. A name that is taken or malformed is a mistake in the program, and panics when the process starts.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// Everything that is made goes to `registry`.
    pub fn new(registry: &Registry) -> Self {
        Self { registry: registry.clone() }
    }

    /// A histogram of seconds with the buckets of [`LATENCY_SECONDS`].
    pub fn latency(&self, name: &str, help: &str) -> Histogram {
        let options = HistogramOpts::new(name, help).buckets(LATENCY_SECONDS.to_vec());
        self.register(Histogram::with_opts(options))
    }

    /// As [`latency`](Self::latency), by label. Resolve the labels once, not on each observation.
    pub fn latency_by(&self, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(LATENCY_SECONDS.to_vec());
        self.register(HistogramVec::new(options, labels))
    }

    /// A histogram of anything, with these upper bounds of buckets, by label. Resolve the labels once, not on each observation.
    pub fn histogram_by(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(HistogramVec::new(options, labels))
    }

    /// A counter.
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    /// A counter by label.
    pub fn counter_by(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), labels))
    }

    /// A gauge of whole numbers.
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    /// A gauge of whole numbers by label.
    pub fn gauge_by(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    /// Registers a collector of your own, for values that are read when they are asked for.
    pub fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector =
            made.expect("a metric's name, labels and buckets are constants of the program");
        self.registry
            .register(Box::new(collector.clone()))
            .expect("metric names are unique in a process");
        collector
    }
}

/// How many observations were in each bucket or a lower one, so far.
#[must_use]
pub fn cumulative(histogram: &Histogram) -> Vec<u64> {
    let metric = histogram.metric();
    metric
        .get_histogram()
        .get_bucket()
        .iter()
        .map(prometheus::proto::Bucket::cumulative_count)
        .collect()
}

/// What `share` of the observations of a latency between two counts were below, in seconds: as if those of a bucket were spread evenly
/// over it. None: there were none. What was above all buckets counts as their end.
#[must_use]
pub fn latency_quantile(before: &[u64], now: &[u64], share: f64) -> Option<f64> {
    let grown = |at: usize| {
        let earlier = before.get(at).copied().unwrap_or(0);
        now.get(at).copied().unwrap_or(0).saturating_sub(earlier) as f64
    };
    let all = grown(LATENCY_SECONDS.len().checked_sub(1)?);
    if all == 0.0 {
        return None;
    }
    let wanted = share * all;
    let (mut below, mut start) = (0.0, 0.0);
    for (at, &end) in LATENCY_SECONDS.iter().enumerate() {
        let up_to_here = grown(at);
        if up_to_here >= wanted && up_to_here > below {
            return Some(start + (end - start) * (wanted - below) / (up_to_here - below));
        }
        (below, start) = (up_to_here, end);
    }
    Some(start)
}

/// Everything in `registry`, in the Prometheus text format.
pub fn render(registry: &Registry) -> String {
    TextEncoder::new()
        .encode_to_string(&registry.gather())
        .unwrap_or_else(|error| format!("# {error}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_of_what_came_between_two_counts() {
        let latency = Metrics::new(&Registry::new()).latency("waited_seconds", "Waits");
        latency.observe(5.0);
        let before = cumulative(&latency);
        assert_eq!(latency_quantile(&before, &before, 0.5), None);
        for _ in 0..99 {
            latency.observe(0.000_15);
        }
        latency.observe(0.3);
        let now = cumulative(&latency);
        let of = |share| latency_quantile(&before, &now, share).expect("there were some");
        assert!((0.000_149..0.000_152).contains(&of(0.5)), "{}", of(0.5));
        assert!((0.2..=0.5).contains(&of(0.995)), "{}", of(0.995));
        assert!((2.0..=5.0).contains(&latency_quantile(&[], &before, 0.5).expect("one")));
    }

    #[test]
    fn sub_second_latencies_fall_into_different_buckets() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry);
        let seconds = metrics.latency("downpour_test_seconds", "Time of a test");
        for value in [80e-6, 3e-3, 0.7] {
            seconds.observe(value);
        }
        let text = render(&registry);
        for line in ["le=\"0.0001\"} 1", "le=\"0.005\"} 2", "le=\"1\"} 3"] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn registries_do_not_share_anything() {
        let (first, second) = (Registry::new(), Registry::new());
        Metrics::new(&first).counter("downpour_test_total", "Tests").inc();
        Metrics::new(&second).counter("downpour_test_total", "Tests");
        assert!(render(&first).contains("downpour_test_total 1"));
        assert!(render(&second).contains("downpour_test_total 0"));
    }
}
