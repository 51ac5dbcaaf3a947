//! `psctl worker evict`

use downpour_core::id::{JobId, SessionId};

use crate::cli::{Connection, Exit};
use crate::model::{Cluster, Worker};
use crate::output::{self, Change, Format};
use crate::plan;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl worker evict worker-3 --yes
  psctl worker evict 17 --dry-run             by its session
  psctl worker evict worker-3 --job ctr -y    where two jobs have one of that name

Its session is closed for good: what it has not pushed yet is not trained, and what others can take over of it is given to them. The worker ends with
an error that says so, and with status 76. It may be started again: that is another session.
Exit status: 0 done, also where the session was closed before; 1 failed; 2 wrong usage.")]
pub(crate) struct Args {
    /// Name of the worker, or number of its session
    #[arg(value_name = "NAME|SESSION")]
    worker: String,
    /// Of this job
    #[arg(long, value_name = "NAME")]
    job: Option<String>,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Say which session would be closed, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let cluster: Cluster = coordinators.cluster().await?.into();
    let Worker { job, session, name, .. } = find(&cluster, &args.worker, args.job.as_deref())?;
    let id = crate::commands::job::find(&cluster, job)?.job;
    let what = format!("{name} (session {session} of job {job})");
    let change = |changed| Change {
        noun: "worker",
        name: session.to_string(),
        verb: "evict",
        changed,
        dry_run: args.dry_run,
    };
    if args.dry_run {
        eprintln!("{what} would be evicted");
        return output::changed(format, &change(true));
    }
    if !args.yes {
        plan::ask(&format!("Evict {what}?"))?;
    }
    let evicted = coordinators.evict_session(JobId(id), SessionId(*session)).await?;
    eprintln!("{what} {}", if evicted { "is evicted" } else { "was closed before" });
    output::changed(format, &change(evicted))
}

/// The one session that is meant: a name may be several workers' after one of them restarted.
fn find<'a>(cluster: &'a Cluster, worker: &str, job: Option<&str>) -> anyhow::Result<&'a Worker> {
    let of_job = |one: &&Worker| job.is_none_or(|job| one.job == job);
    let number: Option<u64> = worker.parse().ok();
    let mut sessions = cluster.workers.iter().filter(of_job);
    if let Some(found) = sessions.clone().find(|one| Some(one.session) == number) {
        return Ok(found);
    }
    let Some(found) = sessions.find(|one| one.name == worker) else {
        anyhow::bail!("there is no open session {worker:?}: psctl worker list shows them");
    };
    if let Some(other) = sessions.find(|one| one.name == worker) {
        return Err(Exit::Usage(format!(
            "{worker} is the name of sessions {} and {}: say which",
            found.session, other.session
        ))
        .into());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use downpour_proto::v1;

    use super::*;

    #[test]
    fn a_worker_is_found_by_name_or_session_and_never_guessed() {
        let session = |session, name: &str| v1::SessionView {
            session,
            name: name.into(),
            ..v1::SessionView::default()
        };
        let job = |job, name: &str, sessions| v1::JobStatus {
            view: Some(v1::JobView {
                job,
                spec: Some(v1::JobSpec { name: name.into(), ..v1::JobSpec::default() }),
                ..v1::JobView::default()
            }),
            sessions,
            ..v1::JobStatus::default()
        };
        let jobs = vec![
            job(1, "a", vec![session(3, "w0"), session(4, "w1")]),
            job(2, "b", vec![session(7, "w0"), session(8, "twice"), session(9, "twice")]),
        ];
        let cluster = v1::GetClusterReply { jobs, ..v1::GetClusterReply::default() }.into();
        let found = |worker: &str, job| find(&cluster, worker, job).map(|one| one.session).ok();
        assert_eq!(found("w1", None), Some(4));
        assert_eq!(found("9", None), Some(9));
        assert_eq!((found("w0", None), found("w0", Some("b"))), (None, Some(7)));
        assert_eq!(
            (found("twice", Some("b")), found("nobody", None), found("3", Some("b"))),
            (None, None, None)
        );
    }
}
