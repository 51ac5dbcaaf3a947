//! `psctl job describe`

use crate::cli::Connection;
use crate::model::{Data, Job, Variable};
use crate::output::{self, Format, Row, table};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  psctl job describe ctr -o json")]
pub(crate) struct Args {
    /// Name of the job
    name: String,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let cluster = args.connection.cluster().await?;
    let job = super::find(&cluster, &args.name)?;
    match format {
        Format::Json => output::json(job),
        Format::Table => {
            let head = table(Job::TITLES, std::iter::once(job.cells()));
            let variables = table(Variable::TITLES, job.variables.iter().map(Row::cells));
            let labels: Vec<String> =
                job.labels.iter().map(|(key, value)| format!("\n{key}={value}")).collect();
            let data = job.data.as_ref().map_or_else(String::new, |data| {
                let Data { pass, passes, tasks, done, leased, samples, .. } = data;
                format!("\n\ndata: pass {pass} of {passes}, {done} of {tasks} tasks done, {leased} with workers; {samples} samples trained")
            });
            let Job { consistency, staleness, .. } = job;
            output::line(&format!(
                "{head}\n\nmode: {consistency}\nstaleness: {staleness}\n\n{variables}{data}{}{}",
                if labels.is_empty() { "" } else { "\n" },
                labels.concat()
            ))
        }
    }
}
