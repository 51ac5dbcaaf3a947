//! What a run showed.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::faults::Scenario;
use crate::monitor::Seen;
use crate::scenario::Options;
use downpour_psctl::acks::{Acks, Outage, Recovery};
use downpour_psctl::probe::Tally;

/// See the module. Every number is there in every report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Which scenario.
    pub scenario: Scenario,
    /// What its faults followed from.
    pub seed: u64,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Faults that happened while something was under way.
    pub during: During,
    /// Checkpoints that are listed after the run, every byte of them as it was written.
    pub checkpoints: u64,
    /// Shards that came under another primary.
    pub promotions: u64,
    /// Leaderships of the coordinators after the first.
    pub leader_changes: u64,
    /// Pushes that were acknowledged.
    pub pushes_acked: u64,
    /// Pushes that failed without telling whether they were applied.
    pub pushes_unknown: u64,
    /// Acknowledged pushes whose effect is missing.
    pub lost: u64,
    /// Pushes whose effect is there more than once.
    pub duplicated: u64,
    /// Shards that were seen in a lower epoch than before.
    pub epochs_regressed: u64,
    /// Servers judged dead, by how that was known.
    pub detected_by: DetectedBy,
    /// From SIGKILL of a server to the first acknowledgement of a push that was sent after it and touches all shards.
    pub recovery_ms: Recovery,
    /// The same from a long SIGSTOP, or a partition.
    pub recovery_silence_ms: Recovery,
    /// Longest time between two acknowledgements of one client.
    pub longest_ack_gap_ms: u64,
    /// Errors that the client's user would have seen.
    pub client_errors: u64,
    /// Of a cluster that grows and shrinks.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// Of hot shards.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub hot: Option<Hot>,
}

/// What came of shards that have more to do than others and were all on one server.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Hot {
    /// Share of the rows that clients push to the hot shards.
    pub rows_share: f64,
    /// Of the busiest server, times the mean: rows a second of the shards that it leads, as the servers report them.
    pub load: BeforeAndAfter,
    /// The same, by what clients push.
    pub pushed: BeforeAndAfter,
    /// Copies that went from one server to another.
    pub moves: u64,
    /// From when shards could go anywhere until the last move was done.
    pub spread_s: f64,
    /// Nothing moved for so long after it.
    pub quiet_s: f64,
}

/// One number twice.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct BeforeAndAfter {
    pub before: f64,
    pub after: f64,
}

impl Hot {
    /// Whether it is as good as was promised.
    #[must_use]
    pub fn is_spread(&self) -> bool {
        let good = |load: &BeforeAndAfter| load.before >= 1.8 && load.after <= 1.15;
        good(&self.load) && good(&self.pushed) && (1..=12).contains(&self.moves)
    }
}

/// What a cluster that grows and shrinks showed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Scale {
    /// Times that it grew and shrank.
    pub rounds: u64,
    /// Copies that went from one server to another.
    pub moves: u64,
    /// Of copies that were sent, as the servers count them that still live.
    pub bytes_moved: u64,
    /// Of the same, as the plans said.
    pub bytes_planned: u64,
    /// 99 of 100 pushes were acknowledged within this.
    pub push_p99_ms: Latency,
    /// Longest that any push waited while shards moved.
    pub longest_stall_ms: f64,
    /// Pushes in the worst second while shards moved, in percent of the mean before.
    pub worst_window_pct: f64,
    /// From the start of the new servers until they had their part; the last time, where it grew several times.
    pub grown_s: f64,
    /// From the first drain until the new servers held nothing.
    pub shrunk_s: f64,
}

impl Scale {
    /// What was promised of 2 GiB that move in peace, release binaries and two cores, and was not so.
    #[must_use]
    pub fn broken(&self) -> Vec<String> {
        let Latency { before, during } = self.push_p99_ms;
        let (planned, moved) = (self.bytes_planned as f64, self.bytes_moved as f64);
        let promises = [
            ("the longest way took seconds", self.grown_s.max(self.shrunk_s), 180.0),
            ("a push waited ms", self.longest_stall_ms, 250.0),
            ("a second had % fewer pushes than before", 100.0 - self.worst_window_pct, 50.0),
            ("99 of 100 pushes took times as long as before", during / before, 3.0),
            ("planned and moved bytes differ by %", 100.0 * (planned / moved - 1.0).abs(), 10.0),
        ];
        let broken = promises.iter().filter(|(_, seen, most)| seen > most);
        broken.map(|(what, seen, most)| format!("{what}: {seen:.1}, at most {most}")).collect()
    }
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    /// While nothing moved.
    pub before: f64,
    /// While shards moved.
    pub during: f64,
}

/// Counts of faults.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct During {
    /// A checkpoint was being written.
    pub checkpoint: u64,
    /// An in-sync set was not full.
    pub catch_up: u64,
    /// A server was gone, and no push had been acknowledged since.
    pub failover: u64,
}

/// Counts of judgements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DetectedBy {
    /// Its address refused connections.
    pub reset: u64,
    /// It was not heard in time.
    pub silence: u64,
}

impl DetectedBy {
    /// From the logs of all coordinators: a judgement that several leaders, or one in several attempts, made of one life counts once.
    pub(crate) fn from_logs<'a>(logs: impl IntoIterator<Item = &'a str>) -> Self {
        let mut judged: BTreeMap<&str, bool> = BTreeMap::new();
        for line in logs.into_iter().flat_map(str::lines) {
            let Some((_, said)) = line.split_once("judging servers dead: ") else { continue };
            let silent = said.starts_with("not heard");
            for life in said.split("ServerRef").skip(1) {
                let life = life.split_once('}').map_or(life, |(life, _)| life);
                judged.entry(life).or_insert(silent);
            }
        }
        let silence = judged.values().filter(|silent| **silent).count() as u64;
        DetectedBy { reset: judged.len() as u64 - silence, silence }
    }
}

impl Report {
    /// What the clients saw; nothing else yet.
    pub(crate) fn of(
        scenario: Scenario,
        options: &Options,
        faults: BTreeMap<&'static str, u64>,
        tally: &Tally,
    ) -> Self {
        Report {
            scenario,
            seed: options.seed,
            faults,
            during: During::default(),
            checkpoints: 0,
            promotions: 0,
            leader_changes: 0,
            pushes_acked: tally.acknowledged,
            pushes_unknown: tally.unknown,
            lost: tally.lost,
            duplicated: tally.duplicated,
            epochs_regressed: 0,
            detected_by: DetectedBy::default(),
            recovery_ms: Recovery::default(),
            recovery_silence_ms: Recovery::default(),
            longest_ack_gap_ms: tally.longest_ack_gap_ms,
            client_errors: tally.client_errors,
            scale: None,
            hot: None,
        }
    }

    pub(crate) fn with_seen(self, seen: &Seen) -> Self {
        let (promotions, leader_changes) = (seen.promotions, seen.leader_changes());
        Report { promotions, leader_changes, epochs_regressed: seen.epochs_regressed, ..self }
    }

    pub(crate) fn with_waits(self, acks: &Acks) -> Self {
        let recovery_ms = acks.recovery(Outage::Reset);
        Report { recovery_ms, recovery_silence_ms: acks.recovery(Outage::Silence), ..self }
    }

    pub(crate) fn with_logs(self, logs: &[String]) -> Self {
        Report { detected_by: DetectedBy::from_logs(logs.iter().map(String::as_str)), ..self }
    }

    /// Whether the promises were kept.
    #[must_use]
    pub fn passed(&self) -> bool {
        let kept = self.lost + self.duplicated + self.epochs_regressed == 0;
        kept && self.hot.is_none_or(|hot| hot.is_spread())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_slower_than_promised_is_named() {
        let kept = Scale {
            bytes_moved: 100,
            bytes_planned: 95,
            push_p99_ms: Latency { before: 5.0, during: 9.0 },
            longest_stall_ms: 183.0,
            worst_window_pct: 54.0,
            grown_s: 58.0,
            shrunk_s: 90.0,
            ..Scale::default()
        };
        assert_eq!(kept.broken(), Vec::<String>::new());
        let broken = Scale { worst_window_pct: 48.8, longest_stall_ms: 267.0, ..kept }.broken();
        assert_eq!(
            broken,
            [
                "a push waited ms: 267.0, at most 250",
                "a second had % fewer pushes than before: 51.2, at most 50"
            ]
        );
    }

    #[test]
    fn a_judgement_of_one_life_counts_once() {
        let line = |how: &str, node: u64| {
            format!(
                "10:00 WARN judging servers dead: {how} servers=[ServerRef {{ node: NodeId({node}) }}]\n"
            )
        };
        let first = line("not heard in time", 1) + &line("not heard in time", 1);
        let second = line("not heard in time", 1) + "something else\n" + &line("refused", 2);
        let found = DetectedBy::from_logs([first.as_str(), &second]);
        assert_eq!(found, DetectedBy { reset: 1, silence: 1 });
    }
}
