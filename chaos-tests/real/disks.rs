//! Coordinators whose disks are full or damaged stop, and come back; the others go on.

use std::time::Duration;

use anyhow::{Result, ensure};
use downpour_chaos_tests::faults::Scenario;
use downpour_chaos_tests::scenario::{Options, run};

/// A full disk is left out where this test may not mount.
#[test]
fn coordinators_stop_for_full_and_damaged_disks_and_come_back() -> Result<()> {
    // Begins with a damaged file.
    let options = Options { duration: Duration::from_secs(15), seed: 3, ..Options::default() };
    let report = run(Scenario::DiskFull, &options)?;
    ensure!(report.passed(), "{report:?}");
    ensure!(report.client_errors + report.pushes_unknown == 0, "{report:?}");
    ensure!(report.faults.get("corrupt_file").is_some_and(|&count| count > 0), "{report:?}");
    Ok(())
}
