//! What this server tells the coordinators of its load: of each shard that it serves what it holds and what came since the report before, and of itself
//! what memory it has. A report is some 60 bytes for each shard.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use downpour_node::metrics::{cumulative, latency_quantile};
use downpour_proto::v1;

use crate::hosted::{Hosted, ShardKey};
use crate::life::Life;
use crate::metrics::ServerMetrics;
use crate::shard::{Role, Traffic};

/// Between two reports.
const INTERVAL: Duration = Duration::from_secs(2);
/// Shards in one report, the others follow in the next ones: a heartbeat must stay small.
const SHARDS_MAX: usize = 4096;
/// What was not told for this long is forgotten.
const FORGET: Duration = Duration::from_secs(120);
/// Share of the newest measurement in what is told: a moment is not a load.
const NEWEST: f64 = 0.3;

/// Remembers what was told last.
pub(crate) struct Reporter {
    told: Instant,
    served: Served,
    known: HashMap<ShardKey, Known>,
    /// The last shard of the report before, where it had not room for all.
    after: Option<ShardKey>,
}

#[derive(Clone, Copy)]
struct Known {
    at: Instant,
    /// So far, in the life of the replica here, as primary.
    traffic: Traffic,
    /// Rows that pulls named so far.
    pulled_rows: u64,
    rows_per_s: f64,
    pull_rows_per_s: f64,
    log_bytes_per_s: f64,
    /// Of the pushes that said what they had read: in clocks and in records.
    stale: Option<(f64, f64)>,
}

/// What the process has answered so far.
#[derive(Default)]
struct Served {
    pushes: Vec<u64>,
    pulls: Vec<u64>,
    pushed_bytes: u64,
    pulled_bytes: u64,
}

impl Served {
    fn now(metrics: &ServerMetrics) -> Self {
        Served {
            pushes: cumulative(&metrics.push_seconds),
            pulls: cumulative(&metrics.pull_seconds),
            pushed_bytes: metrics.pushed_bytes.get(),
            pulled_bytes: metrics.pulled_bytes.get(),
        }
    }
}

impl Reporter {
    pub(crate) fn new(now: Instant) -> Self {
        Reporter { told: now, served: Served::default(), known: HashMap::new(), after: None }
    }

    /// What is to be told now; nothing most of the time.
    pub(crate) fn due(
        &mut self,
        life: &Life,
        now: Instant,
    ) -> (Vec<v1::ShardReport>, Option<v1::NodeLoad>) {
        if now - self.told < INTERVAL {
            return (Vec::new(), None);
        }
        let passed_s = (now - self.told).as_secs_f64();
        self.told = now;
        let mut led = life.all();
        led.retain(|hosted| matches!(hosted.shard.lock().role(), Role::Primary(_)));
        led.sort_unstable_by_key(|hosted| (Some(hosted.key) <= self.after, hosted.key));
        self.after = led.get(SHARDS_MAX - 1).map(|last| last.key);
        self.known.retain(|_, known| now - known.at < FORGET);
        let reports = led.into_iter().take(SHARDS_MAX).map(|hosted| {
            let (report, known) = report(&hosted, self.known.get(&hosted.key), self.told);
            self.known.insert(hosted.key, known);
            report
        });
        let reports = reports.collect();
        let config = &life.process.config;
        let served = Served::now(&life.process.metrics);
        let before = std::mem::replace(&mut self.served, served);
        let served = &self.served;
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / passed_s;
        let load = v1::NodeLoad {
            memory_bytes: life.process.memory.resident(),
            memory_limit: config.memory_limit,
            capacity_bytes: config.capacity_bytes,
            copy_bytes_per_s: config.copy_bytes_per_s,
            push_p50_s: latency_quantile(&before.pushes, &served.pushes, 0.5),
            push_p99_s: latency_quantile(&before.pushes, &served.pushes, 0.99),
            pull_p50_s: latency_quantile(&before.pulls, &served.pulls, 0.5),
            pull_p99_s: latency_quantile(&before.pulls, &served.pulls, 0.99),
            pushed_bytes_per_s: rate(served.pushed_bytes, before.pushed_bytes),
            pulled_bytes_per_s: rate(served.pulled_bytes, before.pulled_bytes),
        };
        (reports, Some(load))
    }
}

fn report(hosted: &Hosted, before: Option<&Known>, now: Instant) -> (v1::ShardReport, Known) {
    let shard = hosted.shard.lock();
    let (state, traffic) = (shard.state(), shard.traffic());
    let mut known = Known {
        at: now,
        traffic,
        pulled_rows: hosted.pulled_rows.load(Ordering::Relaxed),
        rows_per_s: 0.0,
        pull_rows_per_s: 0.0,
        log_bytes_per_s: 0.0,
        stale: None,
    };
    // Since when the first came is not known.
    if let Some(before) = before {
        let passed_s = (now - before.at).as_secs_f64();
        let rate = |now: u64, before: u64, told: f64| {
            let newest = now.saturating_sub(before) as f64 / passed_s;
            if told == 0.0 { newest } else { NEWEST * newest + (1.0 - NEWEST) * told }
        };
        known.rows_per_s = rate(traffic.rows, before.traffic.rows, before.rows_per_s);
        known.pull_rows_per_s = rate(known.pulled_rows, before.pulled_rows, before.pull_rows_per_s);
        known.log_bytes_per_s = rate(traffic.bytes, before.traffic.bytes, before.log_bytes_per_s);
        known.stale = stale(traffic, before);
    }
    let report = v1::ShardReport {
        job: hosted.key.job.0,
        shard: hosted.key.shard.0,
        last_lsn: shard.last().0,
        rows: state.rows(),
        bytes: state.bytes(),
        epoch: shard.epoch().0,
        rows_per_s: known.rows_per_s,
        log_bytes_per_s: known.log_bytes_per_s,
        copy_bytes: state.copy_bytes(),
        pull_rows_per_s: known.pull_rows_per_s,
        clock: state.clock(),
        stale_clocks: known.stale.map(|(clocks, _)| clocks),
        stale_records: known.stale.map(|(_, records)| records),
    };
    (report, known)
}

/// How stale pushes were since the report before, smoothed over some; nothing where there was none.
fn stale(traffic: Traffic, before: &Known) -> Option<(f64, f64)> {
    let pushes = traffic.measured.saturating_sub(before.traffic.measured);
    let mean = |now: u64, before: u64| now.saturating_sub(before) as f64 / pushes as f64;
    let clocks = mean(traffic.stale_clocks, before.traffic.stale_clocks);
    let records = mean(traffic.stale_records, before.traffic.stale_records);
    let (told_clocks, told_records) = before.stale.unwrap_or((clocks, records));
    let smooth = |newest: f64, told: f64| NEWEST * newest + (1.0 - NEWEST) * told;
    (pushes > 0).then(|| (smooth(clocks, told_clocks), smooth(records, told_records)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Read;
    use crate::shard::tests::fixture::{basis, counting, push, ticket};
    use crate::shard::{Basis, Contact};

    #[tokio::test]
    async fn what_was_logged_since_the_report_before_is_told_as_a_rate() {
        let (life, _current) = crate::hostile::serving();
        let mut now = Instant::now();
        let mut reporter = Reporter::new(now);
        assert_eq!(reporter.due(&life, now), (Vec::new(), None), "not due yet");
        let mut rates = |reporter: &mut Reporter| {
            now += INTERVAL;
            let (reports, load) = reporter.due(&life, now);
            assert!(load.is_some() && reports.len() == 1);
            (reports[0].rows_per_s, reports[0].log_bytes_per_s)
        };
        assert_eq!(rates(&mut reporter), (0.0, 0.0));
        let hosted = life.all().pop().expect("one shard");
        for sequence in 1..=10 {
            let pushed = push(&mut hosted.shard.lock(), counting(sequence, &[1, 2]));
            ticket(pushed);
        }
        let (rows, bytes) = rates(&mut reporter);
        assert!(rows == 10.0 && bytes > 100.0, "{rows} {bytes}");
        assert_eq!(rates(&mut reporter).0, 0.7 * rows, "it fades");
        hosted.pulled_rows.fetch_add(40, Ordering::Relaxed);
        life.process.metrics.pulled_bytes.inc_by(1000);
        life.process.metrics.pull_seconds.observe(0.003);
        now += INTERVAL;
        let (reports, load) = reporter.due(&life, now);
        let load = load.expect("due");
        assert_eq!((reports[0].pull_rows_per_s, load.pulled_bytes_per_s), (20.0, 500.0));
        assert!(load.pull_p50_s.is_some_and(|s| (0.002..=0.005).contains(&s)), "{load:?}");
        assert_eq!(load.push_p99_s, None, "there was no request");
        assert_eq!((reports[0].stale_clocks, reports[0].stale_records), (None, None));
        // Two that had read what was there at the beginning.
        let read = {
            let shard = hosted.shard.lock();
            Some(Read { lsn: shard.last(), clock: shard.state().clock() })
        };
        for sequence in 11..=12 {
            let mut shard = hosted.shard.lock();
            let basis = Basis { read, ..basis(shard.epoch(), 1) };
            ticket(shard.push(basis, counting(sequence, &[1]), Contact::Leased, u64::MAX));
        }
        now += INTERVAL;
        let (reports, _) = reporter.due(&life, now);
        assert_eq!((reports[0].stale_clocks, reports[0].stale_records), (Some(0.5), Some(0.5)));
    }
}
