//! `psctl job delete`

use std::io::{self, BufRead as _, IsTerminal as _};

use downpour_core::id::JobId;

use crate::cli::{Connection, Exit};
use crate::model::Job;
use crate::output::{self, Change, Format, count};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl job delete ctr
  psctl job delete ctr --yes       in a script
  psctl job delete ctr --dry-run   what would go")]
pub(crate) struct Args {
    /// Name of the job
    name: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Say what would be deleted, and delete nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let cluster = coordinators.cluster().await?.into();
    let job = super::find(&cluster, &args.name)?;
    if args.dry_run {
        return output::properties(format, job, |job| vec![("Would delete", describe(job))]);
    }
    eprintln!("{}", describe(job));
    if !args.yes {
        confirm(&job.name)?;
    }
    coordinators.delete_job(JobId(job.job)).await?;
    eprintln!("deleted");
    let change =
        Change { noun: "job", name: args.name, verb: "delete", changed: true, dry_run: false };
    output::changed(format, &change)
}

fn describe(job: &Job) -> String {
    let Job { name, shards, sessions, .. } = job;
    let variables = job.variables.len();
    format!(
        "job {name}: {shards} shards with {} rows, {variables} variables, {sessions} open sessions",
        count(job.rows)
    )
}

fn confirm(name: &str) -> anyhow::Result<()> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(Exit::Usage("nobody can be asked here: pass --yes to delete".into()).into());
    }
    eprint!("Delete it for ever? Type its name: ");
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    anyhow::ensure!(answer.trim() == name, "nothing was deleted");
    Ok(())
}
