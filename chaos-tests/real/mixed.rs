//! Everything at once, from one seed: nothing acknowledged is lost, nothing is applied twice, no epoch goes back.

use std::time::Duration;

use anyhow::{Result, ensure};
use downpour_chaos_tests::faults::Scenario;
use downpour_chaos_tests::scenario::{Options, run};

#[test]
fn nothing_acknowledged_is_lost_in_a_minute_of_mixed_faults() -> Result<()> {
    let options = Options { duration: Duration::from_secs(60), seed: 3, ..Options::default() };
    let report = run(Scenario::Mixed, &options)?;
    ensure!(report.passed(), "{report:?}");
    ensure!(report.promotions > 0 && report.leader_changes > 0, "{report:?}");
    ensure!(report.checkpoints > 0, "{report:?}");
    ensure!(report.pushes_unknown * 100 <= report.pushes_acked, "{report:?}");
    Ok(())
}
