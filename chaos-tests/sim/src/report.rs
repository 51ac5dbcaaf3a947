//! What one seed showed, and many.

use serde::{Deserialize, Serialize};

/// Of one seed; a line of JSON between processes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) seed: u64,
    pub(crate) failure: Option<String>,
    pub(crate) faults: Vec<String>,
    pub(crate) promotions: u64,
    pub(crate) in_sync_changes: u64,
    pub(crate) leader_changes: u64,
    pub(crate) cuts: u64,
    pub(crate) moves: u64,
    pub(crate) set_backs: u64,
    pub(crate) pushes_acked: u64,
    pub(crate) simulated_ms: u64,
    /// Another one where anything went another way.
    pub(crate) fingerprint: String,
}

/// Of many.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) seeds: u64,
    pub(crate) failures: Vec<Failure>,
    pub(crate) promotions: u64,
    pub(crate) in_sync_changes: u64,
    pub(crate) leader_changes: u64,
    pub(crate) cuts: u64,
    pub(crate) moves: u64,
    pub(crate) set_backs: u64,
    pub(crate) pushes_acked: u64,
    pub(crate) faults: u64,
    /// Seeds in which the number is above 0.
    pub(crate) seeds_with: SeedsWith,
    pub(crate) pushes_acked_min: u64,
    pub(crate) faults_min: u64,
    pub(crate) seconds: f64,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct SeedsWith {
    pub(crate) promotions: u64,
    pub(crate) in_sync_changes: u64,
    pub(crate) leader_changes: u64,
    pub(crate) cuts: u64,
    pub(crate) set_backs: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    pub(crate) seed: u64,
    pub(crate) failure: String,
    /// Repeats it.
    pub(crate) command: String,
}

impl Report {
    pub(crate) fn add(&mut self, outcome: Outcome, plant: Option<&str>) {
        let first = self.seeds == 0;
        self.seeds += 1;
        self.promotions += outcome.promotions;
        self.in_sync_changes += outcome.in_sync_changes;
        self.leader_changes += outcome.leader_changes;
        self.cuts += outcome.cuts;
        self.moves += outcome.moves;
        self.set_backs += outcome.set_backs;
        self.pushes_acked += outcome.pushes_acked;
        let faults = outcome.faults.len() as u64;
        self.faults += faults;
        self.seeds_with.promotions += u64::from(outcome.promotions > 0);
        self.seeds_with.in_sync_changes += u64::from(outcome.in_sync_changes > 0);
        self.seeds_with.leader_changes += u64::from(outcome.leader_changes > 0);
        self.seeds_with.cuts += u64::from(outcome.cuts > 0);
        self.seeds_with.set_backs += u64::from(outcome.set_backs > 0);
        let least = |least: u64, value| if first { value } else { least.min(value) };
        if outcome.failure.is_none() || first {
            self.pushes_acked_min = least(self.pushes_acked_min, outcome.pushes_acked);
            self.faults_min = least(self.faults_min, faults);
        }
        if let Some(failure) = outcome.failure {
            let seed = outcome.seed;
            self.failures.push(Failure { seed, failure, command: command(seed, plant) });
        }
    }
}

/// What repeats a seed.
pub(crate) fn command(seed: u64, plant: Option<&str>) -> String {
    let plant = plant.map(|name| format!(" --plant {name}")).unwrap_or_default();
    format!("cargo xtask sim --seed {seed}{plant}")
}
