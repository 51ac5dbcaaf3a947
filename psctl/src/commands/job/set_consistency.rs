//! `psctl job set-consistency`

use anyhow::Context as _;
use downpour_core::consistency::{Consistency, Mode};
use downpour_core::id::{JobId, VariableId};
use serde::Serialize;

use crate::cli::{Connection, Exit};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl job set-consistency ctr 'ssp(4)'                  nobody more than 4 steps ahead of the slowest
  psctl job set-consistency ctr 'sync(1)'                 rounds that do not wait for the slowest worker
  psctl job set-consistency ctr hybrid                    dense variables in rounds, tables asynchronous
  psctl job set-consistency ctr async --variable item     one variable, the others stay as they are")]
pub(crate) struct Args {
    /// Name of the job
    name: String,
    /// async, ssp(STEPS), sync, sync(BACKUP_WORKERS), hybrid or hybrid(BACKUP_WORKERS)
    mode: String,
    /// Only this variable
    #[arg(long, value_name = "NAME")]
    variable: Option<String>,
    /// Say what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Serialize)]
struct Change {
    job: String,
    was: String,
    becomes: String,
    changed: bool,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let wrong = |error: downpour_core::consistency::UnknownMode| Exit::Usage(error.to_string());
    let coordinators = args.connection.coordinators()?;
    let view = coordinators.job(&args.name).await?;
    let wanted = match &args.variable {
        None => args.mode.parse::<Consistency>().map_err(wrong)?,
        Some(name) => {
            let of_one = |_| {
                let mode = &args.mode;
                let problem = format!(
                    "{mode:?}: a variable takes async, ssp(STEPS), sync or sync(BACKUP_WORKERS)"
                );
                Exit::Usage(problem)
            };
            let mode: Mode = args.mode.parse().map_err(of_one)?;
            let of = view.variables.iter().find(|variable| variable.spec.name == *name);
            let of = of.with_context(|| format!("job {:?} has no variable {name:?}", args.name))?;
            let mut wanted = view.consistency.clone();
            wanted.variables.insert(of.id, mode);
            wanted
        }
    };
    let name = |id| {
        let variable = view.variables.iter().find(|variable| variable.id == id);
        variable.map_or_else(|| format!("variable {id}"), |variable| variable.spec.name.clone())
    };
    let change = Change {
        job: args.name,
        was: view.consistency.with_names(name),
        becomes: wanted.with_names(name),
        changed: wanted != view.consistency && !args.dry_run,
    };
    if change.changed {
        apply(&coordinators, view.job, &wanted, args.variable.is_some(), &view.consistency).await?;
    }
    output::properties(format, &change, |change| {
        vec![
            ("Job", change.job.clone()),
            ("Was", change.was.clone()),
            ("Becomes", change.becomes.clone()),
        ]
    })
}

/// One variable is changed by itself, so that a change of another one at the same time stays.
async fn apply(
    coordinators: &downpour_client::Coordinators,
    job: JobId,
    wanted: &Consistency,
    one: bool,
    was: &Consistency,
) -> anyhow::Result<()> {
    let changed = |(id, mode): &(&VariableId, &Mode)| was.variables.get(id) != Some(mode);
    match wanted.variables.iter().find(changed).filter(|_| one) {
        Some((variable, mode)) => coordinators.set_mode(job, *variable, *mode).await?,
        None => coordinators.set_consistency(job, wanted).await?,
    };
    Ok(())
}
