//! `psctl events`

use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

use crate::cli::Connection;
use crate::output::{self, Format, Row};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl events
  psctl events --limit 5 -o json | jq -r '.[].text'

The coordinators keep the last 512 as part of what they commit.")]
pub(crate) struct Args {
    /// Only the newest
    #[arg(long, value_name = "COUNT", default_value_t = 50)]
    limit: usize,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Serialize)]
struct Event {
    version: u64,
    /// Milliseconds since 1970.
    at_ms: u64,
    /// `node`, `failover`, `placement`, `move`.
    kind: String,
    text: String,
}

impl Row for Event {
    const TITLES: &'static [&'static str] = &["TIME", "KIND", "WHAT"];
    fn cells(&self) -> Vec<String> {
        let at = UNIX_EPOCH + Duration::from_millis(self.at_ms);
        let at = humantime::format_rfc3339_millis(at).to_string();
        vec![at, self.kind.clone(), self.text.clone()]
    }
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let events = args.connection.coordinators()?.events().await?;
    let older = events.len().saturating_sub(args.limit);
    let events = events.into_iter().skip(older).map(|event| {
        let downpour_proto::v1::ClusterEvent { version, at_ms, kind, text } = event;
        Event { version, at_ms, kind, text }
    });
    output::list(format, &events.collect::<Vec<_>>())
}
