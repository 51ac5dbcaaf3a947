//! A lost leader of the coordinators does not pause a healthy data plane.

use std::time::Duration;

use anyhow::{Result, ensure};
use downpour_chaos_tests::faults::Scenario;
use downpour_chaos_tests::scenario::{Options, run};

#[test]
fn clients_push_on_while_leading_coordinators_die() -> Result<()> {
    let options = Options { duration: Duration::from_secs(15), seed: 1, ..Options::default() };
    let report = run(Scenario::KillCoordinator, &options)?;
    ensure!(report.passed(), "{report:?}");
    ensure!(report.client_errors + report.pushes_unknown == 0, "{report:?}");
    ensure!(report.leader_changes > 0 && report.pushes_acked > 0, "{report:?}");
    Ok(())
}
