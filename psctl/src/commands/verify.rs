//! `psctl verify`

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use downpour_client::{Coordinators, Error};
use downpour_psctl::local::Interrupt;
use downpour_psctl::probe::{self, Probe, Tally};
use serde::Serialize;

use crate::cli::Connection;
use crate::output::{self, Format};

/// Push for a while in a job of its own, and count what was lost or applied twice.
///
/// The job is deleted afterwards; others are not touched. Disturb the cluster meanwhile as you like. Exits 1 when anything was lost or
/// applied twice.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl verify
  psctl verify --coordinators 10.0.0.1:7070,10.0.0.2:7070 --seconds 300 --clients 8 -o json")]
pub(crate) struct Args {
    /// How long clients push
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// How many push at once
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    clients: u64,
    /// Shards of the job
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1024))]
    shards: u32,
    /// Copies of each
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3))]
    replicas: u32,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Serialize)]
struct Verdict {
    job: String,
    pushes_acked: u64,
    pushes_unknown: u64,
    lost: u64,
    duplicated: u64,
    longest_ack_gap_ms: u64,
    client_errors: u64,
}

pub(crate) fn run(args: &Args, format: Format) -> anyhow::Result<()> {
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let coordinators = args.connection.coordinators()?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let job = format!("verify-{}-{}", since.as_secs(), std::process::id());
        let tally = push_and_count(args, &coordinators, &job, &interrupt).await;
        // Whatever happened, the job goes.
        let deleted = delete(&coordinators, &job).await;
        let tally = tally?;
        deleted
            .with_context(|| format!("delete the job {job}; `psctl job delete` does it later"))?;
        show(&verdict(job, &tally), format)
    })
}

fn verdict(job: String, tally: &Tally) -> Verdict {
    Verdict {
        job,
        pushes_acked: tally.acknowledged,
        pushes_unknown: tally.unknown,
        lost: tally.lost,
        duplicated: tally.duplicated,
        longest_ack_gap_ms: tally.longest_ack_gap_ms,
        client_errors: tally.client_errors,
    }
}

fn show(verdict: &Verdict, format: Format) -> anyhow::Result<()> {
    output::properties(format, verdict, |verdict| {
        vec![
            ("Pushes acknowledged", output::count(verdict.pushes_acked)),
            ("Pushes of unknown outcome", output::count(verdict.pushes_unknown)),
            ("Lost", output::count(verdict.lost)),
            ("Applied twice", output::count(verdict.duplicated)),
            ("Longest wait for one", format!("{} ms", verdict.longest_ack_gap_ms)),
            ("Errors that clients saw", output::count(verdict.client_errors)),
        ]
    })?;
    if verdict.lost + verdict.duplicated > 0 {
        bail!("{} pushes were lost, {} applied twice", verdict.lost, verdict.duplicated);
    }
    Ok(())
}

async fn push_and_count(
    args: &Args,
    coordinators: &Coordinators,
    name: &str,
    interrupt: &Interrupt,
) -> anyhow::Result<Tally> {
    let job = probe::job(name, args.shards, args.replicas);
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let mut clients = Vec::new();
    for index in 0..args.clients {
        let mut probe = Probe::join(coordinators, &job, index).await?;
        let interrupt = interrupt.clone();
        clients.push(tokio::spawn(async move {
            probe.push_until(|_| interrupt.is_set() || Instant::now() >= end).await?;
            anyhow::Ok(probe)
        }));
    }
    let mut probes = Vec::new();
    for client in clients {
        probes.push(client.await.context("a client panicked")??);
    }
    probe::verify_all(probes).await
}

async fn delete(coordinators: &Coordinators, name: &str) -> anyhow::Result<()> {
    match coordinators.job(name).await {
        Ok(job) => Ok(coordinators.delete_job(job.job).await?),
        Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_or_applied_twice_is_a_failure_and_what_is_unknown_is_none() {
        let shown = |tally| show(&verdict("verify".into(), &tally), Format::Json);
        let unknown = Tally { acknowledged: 9, unknown: 1, client_errors: 1, ..Tally::default() };
        assert!(shown(unknown).is_ok());
        assert!(shown(Tally { lost: 1, ..Tally::default() }).is_err());
        assert!(shown(Tally { duplicated: 1, ..Tally::default() }).is_err());
    }
}
