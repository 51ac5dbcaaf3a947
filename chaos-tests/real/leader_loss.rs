//! A lost leader of the coordinators does not pause a healthy data plane.

use std::time::Duration;

use anyhow::{Result, ensure};
use downpour_chaos_tests::scenario::{Options, Scenario, run};

#[test]
fn clients_push_on_while_leading_coordinators_die() -> Result<()> {
    let options = Options {
        duration: Duration::from_secs(10),
        fault_every: Duration::from_secs(3),
        clients: 2,
    };
    let report = run(Scenario::KillCoordinator, &options)?;
    ensure!(report.passed(), "{report:?}");
    ensure!(report.leader_changes > 0 && report.tally.acknowledged > 0, "{report:?}");
    Ok(())
}
