//! `psctl coordinator transfer-leader`

use anyhow::Context as _;

use crate::cli::{Connection, Exit};
use crate::model::Cluster;
use crate::output::{self, Change, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl coordinator transfer-leader             to whoever is furthest
  psctl coordinator transfer-leader 2
  psctl coordinator transfer-leader 2 --dry-run

Exit status: 0 another member leads (or the one that was named does already), 1 refused or failed, 2 wrong usage, 3 somebody else leads.")]
pub(crate) struct Args {
    /// Number of the member that is to lead
    #[arg(value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    to: Option<u64>,
    /// Say who would lead, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let cluster: Cluster = coordinators.cluster().await?.into();
    let leader = cluster.coordinators.iter().find(|member| member.leader);
    let from = leader.context("nobody leads")?.id;
    let Args { to, dry_run, .. } = args;
    let may = |id: &u64| {
        let mut members = cluster.coordinators.iter();
        members.any(|member| member.id == *id && !member.learner && member.heard)
    };
    if let Some(to) = to.filter(|to| !may(to)) {
        anyhow::bail!(
            "member {to} is none that votes and is heard: psctl coordinator list shows them"
        );
    }
    let done = |name: u64, changed| {
        let name = name.to_string();
        let change =
            Change { noun: "coordinator", name, verb: "transfer-leader", changed, dry_run };
        output::changed(format, &change)
    };
    if to == Some(from) {
        eprintln!("member {from} leads already");
        return done(from, false);
    }
    if dry_run {
        let others = cluster.coordinators.iter().filter(|one| one.id != from && may(&one.id));
        let next = others.max_by_key(|one| (one.matched, one.id)).map(|one| one.id);
        let next = to.or(next).context("no other member that votes is heard")?;
        eprintln!("member {next} would lead instead of member {from}");
        return done(next, true);
    }
    let leads = coordinators.transfer_leader(from, to.unwrap_or(0)).await?;
    eprintln!("member {leads} leads");
    done(leads, true)?;
    match to.filter(|&to| to != leads) {
        None => Ok(()),
        Some(to) => {
            Err(Exit::Condition(format!("member {to} was to lead, and member {leads} does")).into())
        }
    }
}
