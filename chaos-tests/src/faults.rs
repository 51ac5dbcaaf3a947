//! What goes wrong, and when: a pure function of the scenario and a seed.
//!
//! Kinds are dealt like cards, each round of the scenario's deck shuffled, so that a long run has every kind about equally often. Who is hit
//! is a drawn number; the harness takes it modulo those that can be hit when the time has come.

use std::time::Duration;

use clap::ValueEnum;
use downpour_core::mix::mix64;
use serde::Serialize;

/// What happens to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// A server is killed and started again, empty.
    KillPs,
    /// The leading coordinator is killed and started again; while nobody leads, a job is created and a worker joins it.
    KillCoordinator,
    /// Servers and coordinators are cut off, also in one direction only, and the network is slow at times.
    Partition,
    /// Servers and coordinators stand still, shorter and longer than the failure timeout.
    Pause,
    /// A coordinator's disk fills up, or a file on it is damaged.
    DiskFull,
    /// All of these, and coordinators are replaced.
    Mixed,
    /// No fault: two servers more, and away again.
    Scale,
    /// No fault: 8 of 64 shards carry 60 % of the rows, and are all on one of four servers.
    Hot,
    /// Three of six workers are killed in the midst of a pass, and two join.
    Workers,
}

/// One kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// SIGKILL of a server.
    KillServer,
    /// SIGSTOP of a server, shorter than any timeout.
    PauseServer,
    /// SIGSTOP of a server until it has been judged dead.
    PauseServerLong,
    /// Nothing passes to or from a server.
    PartitionServer,
    /// A server hears everybody and nobody hears it.
    PartitionServerOneWay,
    /// SIGKILL of the coordinator that leads.
    KillLeader,
    /// SIGKILL of any coordinator.
    KillCoordinator,
    /// SIGSTOP of the coordinator that leads, longer than an election takes.
    PauseLeader,
    /// Nothing passes to or from a coordinator.
    PartitionCoordinator,
    /// Every byte is late.
    Delay,
    /// Some segments are lost on the way, and what follows them waits until they were sent again.
    Loss,
    /// Every connection of a server breaks.
    Reset,
    /// A coordinator's disk fills up: it must stop by itself.
    DiskFull,
    /// A byte on a coordinator's disk changes: it must refuse to start, and come back without its data.
    CorruptFile,
    /// A coordinator joins the group, and once it votes another one, which may lead, leaves for good. Every other time the leader dies while the new one learns.
    ReplaceCoordinator,
}

impl Kind {
    /// As in the report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::KillServer => "kill_server",
            Kind::PauseServer => "pause_server",
            Kind::PauseServerLong => "pause_server_long",
            Kind::PartitionServer => "partition_server",
            Kind::PartitionServerOneWay => "partition_server_one_way",
            Kind::KillLeader => "kill_leader",
            Kind::KillCoordinator => "kill_coordinator",
            Kind::PauseLeader => "pause_leader",
            Kind::PartitionCoordinator => "partition_coordinator",
            Kind::Delay => "delay",
            Kind::Loss => "loss",
            Kind::Reset => "reset",
            Kind::DiskFull => "disk_full",
            Kind::CorruptFile => "corrupt_file",
            Kind::ReplaceCoordinator => "replace_coordinator",
        }
    }

    /// A server may leave its in-sync sets: must not come before all sets are full, or the last copy of a shard may go.
    #[must_use]
    pub fn lethal(self) -> bool {
        matches!(
            self,
            Kind::KillServer
                | Kind::PauseServerLong
                | Kind::PartitionServer
                | Kind::PartitionServerOneWay
        )
    }

    /// A coordinator is gone for a while: must not come before all are back, or no majority is left.
    #[must_use]
    pub fn of_a_coordinator(self) -> bool {
        matches!(
            self,
            Kind::KillLeader
                | Kind::KillCoordinator
                | Kind::PauseLeader
                | Kind::PartitionCoordinator
                | Kind::DiskFull
                | Kind::CorruptFile
                | Kind::ReplaceCoordinator
        )
    }

    /// Shortest and longest time until the harness undoes it. Servers are judged dead after 1.5 s, elections take up to 1 s.
    fn lasts_ms(self) -> (u64, u64) {
        match self {
            Kind::PauseServer => (100, 700),
            Kind::KillServer | Kind::PauseServerLong => (2_500, 4_000),
            Kind::PartitionServer | Kind::PartitionServerOneWay => (2_500, 5_000),
            Kind::KillLeader | Kind::KillCoordinator => (500, 3_000),
            Kind::PauseLeader | Kind::PartitionCoordinator => (1_500, 4_000),
            Kind::Delay | Kind::Loss => (1_000, 4_000),
            Kind::Reset => (0, 0),
            Kind::DiskFull | Kind::CorruptFile => (1_000, 2_000),
            Kind::ReplaceCoordinator => (500, 3_000),
        }
    }
}

impl Scenario {
    /// Its kinds, those that shall be more frequent several times.
    #[must_use]
    pub fn deck(self) -> &'static [Kind] {
        match self {
            Scenario::KillPs => &[Kind::KillServer],
            Scenario::KillCoordinator => &[Kind::KillLeader],
            Scenario::Partition => &[
                Kind::PartitionServer,
                Kind::PartitionServerOneWay,
                Kind::PartitionCoordinator,
                Kind::Delay,
                Kind::Loss,
                Kind::Reset,
            ],
            Scenario::Pause => &[Kind::PauseServer, Kind::PauseServerLong, Kind::PauseLeader],
            Scenario::DiskFull => &[Kind::DiskFull, Kind::CorruptFile],
            Scenario::Scale | Scenario::Hot | Scenario::Workers => &[],
            Scenario::Mixed => &[
                Kind::KillServer,
                Kind::PauseServer,
                Kind::PauseServerLong,
                Kind::PartitionServer,
                Kind::PartitionServerOneWay,
                Kind::KillLeader,
                Kind::KillCoordinator,
                Kind::PauseLeader,
                Kind::PartitionCoordinator,
                Kind::Delay,
                Kind::Loss,
                Kind::Reset,
                Kind::DiskFull,
                Kind::CorruptFile,
                Kind::ReplaceCoordinator,
            ],
        }
    }

    /// Whether any of its faults is one of these.
    #[must_use]
    pub fn has(self, kinds: &[Kind]) -> bool {
        self.deck().iter().any(|kind| kinds.contains(kind))
    }
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub kind: Kind,
    /// Time since the one before.
    pub after: Duration,
    /// Time until it is undone.
    pub lasts: Duration,
    /// Who, modulo those that can be hit.
    pub victim: u64,
}

/// All faults of a run, without end.
#[derive(Clone, Debug)]
pub struct Schedule {
    deck: &'static [Kind],
    dealt: Vec<Kind>,
    after_lethal: bool,
    state: u64,
}

impl Schedule {
    /// The faults of `scenario` that belong to `seed`.
    #[must_use]
    pub fn new(scenario: Scenario, seed: u64) -> Self {
        let deck = scenario.deck();
        Schedule { deck, dealt: Vec::new(), after_lethal: false, state: mix64(!seed) }
    }

    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix64(self.state)
    }

    fn between(&mut self, (least, most): (u64, u64)) -> Duration {
        Duration::from_millis(least + self.draw() % (most - least + 1))
    }

    fn shuffled(&mut self) -> Vec<Kind> {
        let mut cards = self.deck.to_vec();
        for last in (1..cards.len()).rev() {
            let other = (self.draw() % (last as u64 + 1)) as usize;
            cards.swap(last, other);
        }
        cards
    }
}

impl Iterator for Schedule {
    type Item = Fault;

    fn next(&mut self) -> Option<Fault> {
        if self.dealt.is_empty() {
            self.dealt = self.shuffled();
        }
        let kind = self.dealt.pop()?;
        // What follows the loss of a server shall often meet the failover.
        let soon = self.after_lethal && self.draw().is_multiple_of(2);
        let after = self.between(if soon { (50, 1_000) } else { (500, 3_500) });
        self.after_lethal = kind.lethal();
        Some(Fault { kind, after, lasts: self.between(kind.lasts_ms()), victim: self.draw() })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn faults(seed: u64, count: usize) -> Vec<Fault> {
        Schedule::new(Scenario::Mixed, seed).take(count).collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_faults_and_another_gives_others() {
        assert_eq!(faults(7, 100), faults(7, 100));
        assert_ne!(faults(7, 100), faults(8, 100));
    }

    #[test]
    fn every_round_has_every_card_of_the_deck() {
        let deck = Scenario::Mixed.deck();
        let mut wanted = deck.to_vec();
        wanted.sort_unstable();
        for round in faults(3, 10 * deck.len()).chunks(deck.len()) {
            let mut kinds: Vec<Kind> = round.iter().map(|fault| fault.kind).collect();
            kinds.sort_unstable();
            assert_eq!(kinds, wanted);
        }
    }

    #[test]
    fn a_mixed_run_of_ten_minutes_has_time_for_ten_of_each_kind() {
        let deck = Scenario::Mixed.deck();
        let faults = faults(1, 10 * deck.len());
        let mut counts = BTreeMap::new();
        faults.iter().for_each(|fault| *counts.entry(fault.kind).or_insert(0) += 1);
        assert!(counts.values().all(|&count| count >= 10), "{counts:?}");
        let gaps: Duration = faults.iter().map(|fault| fault.after).sum();
        assert!(faults.len() >= 120 && gaps < Duration::from_secs(300), "{gaps:?}");
    }

    #[test]
    fn a_long_pause_outlasts_the_failure_timeout_and_a_short_one_does_not() {
        for fault in faults(5, 1000) {
            match fault.kind {
                Kind::PauseServer => assert!(fault.lasts < Duration::from_millis(1000)),
                Kind::PauseServerLong => assert!(fault.lasts > Duration::from_millis(1500)),
                _ => {}
            }
        }
    }
}
