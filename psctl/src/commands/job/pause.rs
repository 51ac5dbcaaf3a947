//! `psctl job pause` and `psctl job resume`

use downpour_core::id::JobId;

use crate::cli::Named;
use crate::output::{self, Change, Format};

pub(crate) const PAUSE_HELP: &str = "\
Examples:
  psctl job pause ctr
  psctl job pause ctr --dry-run

Workers end the steps that they have begun, say that they hold, and begin no further one; their sessions stay open. Servers go on, and so do
checkpoints, moves and evaluations. psctl job resume ends it.
Exit status: 0 done, also where it was so before; 1 failed; 2 wrong usage.";

pub(crate) const RESUME_HELP: &str = "\
Examples:
  psctl job resume ctr
  psctl job resume ctr --dry-run

Exit status: 0 done, also where it was so before; 1 failed; 2 wrong usage.";

pub(crate) async fn run(args: Named, paused: bool, format: Format) -> anyhow::Result<()> {
    let Named { name, dry_run, connection } = args;
    let coordinators = connection.coordinators()?;
    let cluster = coordinators.cluster().await?.into();
    let job = super::find(&cluster, &name)?;
    let changed = match dry_run {
        true => job.paused != paused,
        false => coordinators.pause_job(JobId(job.job), paused).await?,
    };
    let workers = cluster.workers.iter().filter(|one| one.job == name && one.kind == "worker");
    let workers = workers.count();
    eprintln!(
        "job {name} {}",
        match (changed, dry_run, paused) {
            (false, _, true) => "is paused already".to_owned(),
            (false, _, false) => "is not paused".to_owned(),
            (true, true, true) => format!("would be paused: {workers} workers would hold"),
            (true, true, false) => format!("would be resumed: {workers} workers would go on"),
            (true, false, true) => {
                format!(
                    "is paused: {workers} workers hold when they have ended the steps that they have begun"
                )
            }
            (true, false, false) => format!("is resumed: {workers} workers go on"),
        }
    );
    let verb = if paused { "pause" } else { "resume" };
    output::changed(format, &Change { noun: "job", name, verb, changed, dry_run })
}
