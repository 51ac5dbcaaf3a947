//! What `/metrics` shows of a parameter server.

use downpour_node::metrics::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, Metrics, Registry,
};

use crate::staleness;

/// The metrics of one process. Names end in their units.
#[derive(Clone, Debug)]
pub(crate) struct ServerMetrics {
    pub(crate) pull_seconds: Histogram,
    pub(crate) push_seconds: Histogram,
    pub(crate) apply_seconds: Histogram,
    pub(crate) pulled_bytes: IntCounter,
    pub(crate) pushed_bytes: IntCounter,
    pub(crate) parts: IntCounterVec,
    pub(crate) not_stored_elements: IntCounter,
    pub(crate) refused_keys: IntCounter,
    pub(crate) stale_clocks: HistogramVec,
    pub(crate) stale_records: HistogramVec,
    pub(crate) contributed_bytes: IntGauge,
    pub(crate) promotions: IntCounter,
    pub(crate) removed_members: IntCounter,
    pub(crate) added_members: IntCounter,
    pub(crate) differing_members: IntCounter,
    pub(crate) copied_bytes: IntCounter,
    pub(crate) primaries: IntGauge,
    pub(crate) backups: IntGauge,
    pub(crate) joining: IntGauge,
    pub(crate) in_sync_min: IntGauge,
    pub(crate) unacknowledged_records: IntGauge,
    pub(crate) unacknowledged_bytes: IntGauge,
    pub(crate) rows: IntGauge,
    pub(crate) parameter_bytes: IntGauge,
}

impl ServerMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let metrics = Metrics::new(registry);
        let (counter, gauge) =
            (|name, help| metrics.counter(name, help), |name, help| metrics.gauge(name, help));
        ServerMetrics {
            pull_seconds: metrics.latency("downpour_ps_pull_seconds", "Time to answer a pull"),
            push_seconds: metrics.latency(
                "downpour_ps_push_seconds",
                "Time from a push request's arrival to its reply, replication included",
            ),
            apply_seconds: metrics.latency(
                "downpour_ps_apply_seconds",
                "Time to check, log and apply a push request, replication not included",
            ),
            pulled_bytes: counter("downpour_ps_pulled_bytes_total", "Bytes of pulled values"),
            pushed_bytes: counter("downpour_ps_pushed_bytes_total", "Bytes of push requests"),
            parts: metrics.counter_by(
                "downpour_ps_push_parts_total",
                "Parts of pushes by outcome",
                &["outcome"],
            ),
            not_stored_elements: counter(
                "downpour_ps_not_stored_elements_total",
                "Elements left as they were because their new values would not be finite",
            ),
            refused_keys: counter(
                "downpour_ps_refused_keys_total",
                "New keys that were refused because of the memory limit",
            ),
            stale_clocks: metrics.histogram_by(
                "downpour_ps_stale_clocks",
                "Steps that the furthest worker went on between the pull and the push of gradients, as the shard knows them, by part of a push",
                &["job"],
                staleness::CLOCKS,
            ),
            stale_records: metrics.histogram_by(
                "downpour_ps_stale_records",
                "Records that a shard logged between the pull and the push of gradients, by part of a push",
                &["job"],
                staleness::RECORDS,
            ),
            contributed_bytes: gauge(
                "downpour_ps_contributed_bytes",
                "Bytes of contributions to rounds that are open, backups included",
            ),
            promotions: counter(
                "downpour_ps_promotions_total",
                "Shards that this server began to serve",
            ),
            removed_members: counter(
                "downpour_ps_removed_members_total",
                "Members that this server had removed from in-sync sets",
            ),
            added_members: counter(
                "downpour_ps_added_members_total",
                "Members that this server had added to in-sync sets",
            ),
            differing_members: counter(
                "downpour_ps_differing_members_total",
                "Answers of members that had other values than this primary",
            ),
            copied_bytes: counter(
                "downpour_ps_copied_bytes_total",
                "Bytes of shards that this server sent to new members",
            ),
            primaries: gauge("downpour_ps_primaries", "Shards that this server serves"),
            backups: gauge("downpour_ps_backups", "Shards that this server is a backup of"),
            joining: gauge(
                "downpour_ps_joining",
                "Shards that this server has a copy of and is not yet a backup of",
            ),
            in_sync_min: gauge(
                "downpour_ps_in_sync_members_min",
                "Members of the smallest in-sync set that this server is the primary of",
            ),
            unacknowledged_records: gauge(
                "downpour_ps_unacknowledged_records",
                "Records that not every member is known to have",
            ),
            unacknowledged_bytes: gauge(
                "downpour_ps_unacknowledged_bytes",
                "Bytes of these records",
            ),
            rows: gauge("downpour_ps_rows", "Rows of embedding tables, backups included"),
            parameter_bytes: gauge(
                "downpour_ps_parameter_bytes",
                "Bytes of rows and dense blocks, backups included",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_named_with_its_unit() {
        let registry = Registry::new();
        let metrics = ServerMetrics::new(&registry);
        metrics.parts.with_label_values(&["applied"]).inc();
        metrics.stale_clocks.with_label_values(&["ctr"]).observe(2.0);
        metrics.stale_records.with_label_values(&["ctr"]).observe(2.0);
        let names: Vec<String> =
            registry.gather().iter().map(|family| family.name().to_owned()).collect();
        let expected = [
            "downpour_ps_added_members_total",
            "downpour_ps_apply_seconds",
            "downpour_ps_backups",
            "downpour_ps_contributed_bytes",
            "downpour_ps_copied_bytes_total",
            "downpour_ps_differing_members_total",
            "downpour_ps_in_sync_members_min",
            "downpour_ps_joining",
            "downpour_ps_not_stored_elements_total",
            "downpour_ps_parameter_bytes",
            "downpour_ps_primaries",
            "downpour_ps_promotions_total",
            "downpour_ps_pull_seconds",
            "downpour_ps_pulled_bytes_total",
            "downpour_ps_push_parts_total",
            "downpour_ps_push_seconds",
            "downpour_ps_pushed_bytes_total",
            "downpour_ps_refused_keys_total",
            "downpour_ps_removed_members_total",
            "downpour_ps_rows",
            "downpour_ps_stale_clocks",
            "downpour_ps_stale_records",
            "downpour_ps_unacknowledged_bytes",
            "downpour_ps_unacknowledged_records",
        ];
        assert_eq!(names, expected);
    }
}
