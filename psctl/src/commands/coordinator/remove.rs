//! `psctl coordinator remove`

use downpour_proto::v1;

use crate::cli::Connection;
use crate::output::{self, Change, Format};
use crate::plan;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl coordinator remove 1 --dry-run   whether it could be
  psctl coordinator remove 1 --yes       in a script

The member is told and ends with status 0. One that leads hands over first. Refused where the members that are left and heard would be no
majority. Its number never comes back.
Exit status: 0 done, also where it was no member any more; 1 refused or failed; 2 wrong usage.")]
pub(crate) struct Args {
    /// Number of the member
    #[arg(value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    id: u64,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Say whether it could be removed, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let Args { id, dry_run, yes, .. } = args;
    if !dry_run && !yes {
        plan::ask(&format!("Remove member {id} for good?"))?;
    }
    let request = v1::RemoveCoordinatorRequest { id, dry_run };
    let changed = coordinators.remove_coordinator(request).await?;
    eprintln!(
        "member {id} {}",
        match (changed, dry_run) {
            (false, _) => "is no member any more",
            (true, true) => "would be removed",
            (true, false) => "is removed",
        }
    );
    let name = id.to_string();
    output::changed(format, &Change { noun: "coordinator", name, verb: "remove", changed, dry_run })
}
