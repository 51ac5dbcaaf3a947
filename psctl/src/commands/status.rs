//! `psctl status`

use crate::cli::{Connection, Exit};
use crate::model::Cluster;
use crate::output::{self, Format, Row, table};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl status
  psctl status --healthy -o json   exit status 3 unless everything is as it should be")]
pub(crate) struct Args {
    /// Exit with status 3 unless a coordinator leads, every node lives and every shard has all its replicas
    #[arg(long)]
    healthy: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let cluster = args.connection.cluster().await?;
    match format {
        Format::Json => output::json(&cluster)?,
        Format::Table => output::line(&text(&cluster))?,
    }
    let problems = cluster.problems();
    if args.healthy && !problems.is_empty() {
        return Err(Exit::Condition(format!("not healthy: {}", problems.join("; "))).into());
    }
    Ok(())
}

fn text(cluster: &Cluster) -> String {
    fn section<R: Row>(name: &str, rows: &[R]) -> String {
        let rows = table(R::TITLES, rows.iter().map(Row::cells));
        let lines: Vec<String> = rows.lines().map(|line| format!("  {line}")).collect();
        format!("{name}\n{}", lines.join("\n"))
    }
    let mut sections =
        vec![section("Coordinators", &cluster.coordinators), section("Nodes", &cluster.nodes)];
    if !cluster.jobs.is_empty() {
        sections.push(section("Jobs", &cluster.jobs));
    }
    if !cluster.workers.is_empty() {
        sections.push(section("Workers", &cluster.workers));
    }
    let problems = cluster.problems();
    sections.push(match problems.is_empty() {
        true => "Healthy: a coordinator leads, every node lives, every shard has all its replicas"
            .to_owned(),
        false => format!("Problems\n  {}", problems.join("\n  ")),
    });
    sections.join("\n\n")
}
