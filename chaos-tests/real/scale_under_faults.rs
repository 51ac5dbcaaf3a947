//! A cluster grows from two servers to four and shrinks again while its processes are killed, stopped and cut off: nothing is lost, nothing is applied twice.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use downpour_chaos_tests::faults::Scenario;
use downpour_chaos_tests::scenario::{Options, run};

#[test]
fn nothing_acknowledged_is_lost_while_shards_move_under_mixed_faults() -> Result<()> {
    let options = Options {
        duration: Duration::from_secs(5),
        seed: 5,
        bytes: 4 << 20,
        faults: Some(Scenario::Mixed),
        ..Options::default()
    };
    let report = run(Scenario::Scale, &options)?;
    ensure!(report.passed(), "{report:?}");
    let scale = report.scale.as_ref().context("it scales")?;
    ensure!(scale.rounds > 0 && scale.moves > 0, "{report:?}");
    ensure!(report.faults.values().sum::<u64>() > 0 && report.promotions > 0, "{report:?}");
    ensure!(report.pushes_unknown * 100 <= report.pushes_acked, "{report:?}");
    Ok(())
}
