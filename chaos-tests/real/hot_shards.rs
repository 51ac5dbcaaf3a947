//! 8 of 64 shards have 60 % of the work and are all on one of four servers: a cluster that looks after itself spreads them, and then leaves them alone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use downpour_chaos_tests::faults::Scenario;
use downpour_chaos_tests::scenario::{Options, run};

#[test]
fn hot_shards_are_spread_in_at_most_twelve_moves_while_clients_push() -> Result<()> {
    // `cargo xtask chaos --scenario hot` looks for five minutes whether anything moves afterwards.
    let options = Options { quiet: Duration::from_secs(15), ..Options::default() };
    let report = run(Scenario::Hot, &options)?;
    let hot = report.hot.as_ref().context("it looks at hot shards")?;
    ensure!(hot.is_spread() && report.passed(), "{report:?}");
    ensure!(report.client_errors == 0 && report.pushes_unknown == 0, "{report:?}");
    Ok(())
}
