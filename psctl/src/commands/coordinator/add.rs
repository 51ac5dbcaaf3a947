//! `psctl coordinator add`

use std::time::Duration;

use downpour_client::Coordinators;
use downpour_proto::v1;
use tokio::time::{Instant, sleep};

use crate::cli::{Connection, Exit};
use crate::model::Cluster;
use crate::output::{self, Change, Format};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl coordinator add 4=host-d:7070             and on host-d: downpour-coordinator --join host-a:7070 --listen host-d:7070 ...
  psctl coordinator add host-d:7070               the next number
  psctl coordinator add 4=host-d:7070 --dry-run   whether it could be
  psctl coordinator add 4=host-d:7070 --no-wait   it votes by itself when it has caught up

A new member takes the log first, and votes when it has caught up: until then it counts in no majority. One is added at a time. Numbers never
come back: a member that lost its data directory is removed, and another is added under a new number.
Exit status: 0 it votes (or, with --no-wait, is let in), 1 refused or failed, 2 wrong usage, 3 it does not vote within --wait.")]
pub(crate) struct Args {
    /// Where the others reach it, and its number, one that no member ever had
    #[arg(value_name = "[NUMBER=]HOST:PORT", value_parser = parse)]
    member: (u64, String),
    /// Say whether it could be added, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// How long to wait until it votes
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = humantime::parse_duration)]
    wait: Duration,
    /// Do not wait
    #[arg(long, conflicts_with = "wait")]
    no_wait: bool,
    #[command(flatten)]
    connection: Connection,
}

fn parse(text: &str) -> Result<(u64, String), String> {
    let (id, address) = match text.split_once('=') {
        None => (0, text),
        Some((id, address)) => {
            let id = id.parse().ok().filter(|&id| id > 0);
            (id.ok_or("a number is at least 1")?, address)
        }
    };
    let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    match port {
        Some(1..) => Ok((id, address.to_owned())),
        _ => Err(format!("{address:?} is not host:port")),
    }
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let (id, address) = args.member;
    let request = v1::AddCoordinatorRequest { id, address: address.clone(), dry_run: args.dry_run };
    let v1::AddCoordinatorReply { id, added } = coordinators.add_coordinator(request).await?;
    let text = match (added, args.dry_run) {
        (false, _) => format!("member {id} is at {address} already"),
        (true, true) => format!("{address} would be let in as member {id}"),
        (true, false) => format!(
            "member {id} is let in; start it, if it does not run: downpour-coordinator --join {} --listen {address} --advertise {address} --data-dir DIRECTORY --cluster NAME",
            coordinators.addresses().join(",")
        ),
    };
    eprintln!("{text}");
    if !args.dry_run && !args.no_wait {
        wait(&coordinators, id, args.wait).await?;
        eprintln!("member {id} votes");
    }
    let name = id.to_string();
    output::changed(
        format,
        &Change { noun: "coordinator", name, verb: "add", changed: added, dry_run: args.dry_run },
    )
}

async fn wait(coordinators: &Coordinators, id: u64, within: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + within;
    loop {
        let cluster: Cluster = coordinators.cluster().await?.into();
        let member = cluster.coordinators.iter().find(|member| member.id == id);
        let problem = match member {
            Some(member) if !member.learner => return Ok(()),
            Some(member) if member.heard => "it is catching up",
            Some(_) => "it is not heard: does it run, with --join?",
            None => return Err(Exit::Condition(format!("member {id} was removed")).into()),
        };
        if Instant::now() >= end {
            return Err(Exit::Condition(format!(
                "member {id} does not vote after {}: {problem}. It stays in the group and votes when it has caught up; psctl coordinator remove {id} calls it off",
                humantime::format_duration(within)
            ))
            .into());
        }
        sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_member_is_an_address_with_or_without_a_number() {
        assert_eq!(parse("4=host:7070"), Ok((4, "host:7070".into())));
        assert_eq!(parse("host:7070"), Ok((0, "host:7070".into())));
        for wrong in ["0=host:7070", "x=host:7070", "host", "4=host", "host:0", "host:70700", ""] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
