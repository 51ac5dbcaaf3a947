//! The command line: what every command shares, and the tree of commands.

use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use downpour_client::Coordinators;

use crate::commands::{
    bench, checkpoint, completions, coordinator, events, export, job, local, node, scale, shard,
    status, top, verify, worker,
};
use crate::model::Cluster;
use crate::output::Format;

/// Operate a Downpour cluster
#[derive(Debug, Parser)]
#[command(name = "psctl", version, max_term_width = 120, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// How data is written to stdout
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        value_name = "FORMAT",
        default_value_t,
        help_heading = "Output"
    )]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  psctl local -- train --model deepfm --schema s.toml --train t.parquet   train on this machine
  psctl status --coordinators 127.0.0.1:7070,127.0.0.1:7071               a cluster at a glance
  psctl shard list --job ctr -o json                                      every shard, for scripts
  psctl bench sparse --local                                              how fast is this machine

Exit status: 0 done, 1 failed, 2 wrong usage, 3 a condition that was asked for does not hold.";

/// Which cluster, for every command that asks one. Not global: `local` counts coordinators under the same name.
#[derive(Debug, Args)]
pub(crate) struct Connection {
    /// Members of the coordinator group; some are enough
    #[arg(
        long,
        value_name = "HOST:PORT,...",
        env = "DOWNPOUR_COORDINATORS",
        hide_env_values = true,
        default_value = "127.0.0.1:7070",
        help_heading = "Connection"
    )]
    coordinators: String,
    /// How long a call may take, retries included
    #[arg(
        long,
        value_name = "TIME",
        default_value = "10s",
        value_parser = humantime::parse_duration,
        help_heading = "Connection"
    )]
    pub(crate) timeout: Duration,
}

/// A job or a server that is to be changed.
#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Its name
    pub(crate) name: String,
    /// Say what would be done, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a cluster on this machine, and train on it
    Local(local::Args),
    /// The cluster at a glance
    Status(status::Args),
    /// Members of the control plane
    #[command(subcommand)]
    Coordinator(coordinator::Command),
    /// Parameter servers
    #[command(subcommand)]
    Node(node::Command),
    /// More or fewer servers, where `psctl local` or Kubernetes runs them
    #[command(subcommand)]
    Scale(scale::Command),
    /// Slices of a job's variables, and where they are
    #[command(subcommand)]
    Shard(shard::Command),
    /// Models being trained
    #[command(subcommand)]
    Job(job::Command),
    /// Members of jobs
    #[command(subcommand)]
    Worker(worker::Command),
    /// What a job learnt, saved and restored
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
    /// Load, latency, the hottest shards and the workers, again and again
    Top(top::Args),
    /// What the coordinators decided of late, and why
    Events(events::Args),
    /// Write a model out of a checkpoint, for programs without a cluster
    Export(export::Args),
    /// Push for a while in a job of its own, and count what was lost or applied twice
    Verify(verify::Args),
    /// Measure speed, against a cluster or one that is started for it
    #[command(subcommand)]
    Bench(bench::Command),
    /// A script that completes psctl's arguments in a shell
    Completions(completions::Args),
}

/// An error with an exit status of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Exit {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Everything worked, and the answer is no.
    #[error("{0}")]
    Condition(String),
}

impl Cli {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let format = self.output;
        let call = match self.command {
            Command::Local(args) => return local::run(args, format),
            Command::Completions(args) => return completions::run(&args),
            Command::Bench(command) => return command.run(format),
            Command::Verify(args) => return verify::run(&args, format),
            call => call,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            match call {
                Command::Status(args) => status::run(args, format).await,
                Command::Coordinator(command) => command.run(format).await,
                Command::Node(command) => command.run(format).await,
                Command::Scale(command) => command.run(format).await,
                Command::Shard(command) => command.run(format).await,
                Command::Job(command) => command.run(format).await,
                Command::Worker(command) => command.run(format).await,
                Command::Checkpoint(command) => command.run(format).await,
                Command::Top(args) => top::run(args, format).await,
                Command::Events(args) => events::run(args, format).await,
                Command::Export(args) => export::run(args, format).await,
                Command::Local(_)
                | Command::Completions(_)
                | Command::Bench(_)
                | Command::Verify(_) => {
                    unreachable!("they need no runtime")
                }
            }
        })
    }
}

impl Connection {
    pub(crate) fn coordinators(&self) -> anyhow::Result<Coordinators> {
        let parsed = Coordinators::parse(&self.coordinators);
        Ok(parsed.map_err(|error| Exit::Usage(error.to_string()))?.with_deadline(self.timeout))
    }

    /// Everything that is committed, as of now.
    pub(crate) async fn cluster(&self) -> anyhow::Result<Cluster> {
        Ok(self.coordinators()?.cluster().await?.into())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_leaf_command_has_an_example() {
        fn leaves(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if command.has_subcommands() {
                return command.get_subcommands().for_each(|inner| leaves(inner, &path));
            }
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(path.trim()), "no example in{path}");
        }
        leaves(&Cli::command(), "");
    }

    /// What a change does to the help is seen in its diff. `UPDATE_GOLDEN=1 cargo test -p downpour-psctl` writes the file.
    #[test]
    fn the_help_is_as_recorded() {
        fn render(command: &mut clap::Command, text: &mut String) {
            let help = command.render_help().to_string();
            *text += &format!("$ {} -h\n", command.get_bin_name().unwrap_or("psctl"));
            help.lines().for_each(|line| *text += &format!("{}\n", line.trim_end()));
            let leaves = command.get_subcommands_mut().filter(|inner| inner.get_name() != "help");
            leaves.for_each(|inner| render(inner, text));
        }
        let mut command = Cli::command().term_width(100);
        command.build();
        let mut text = String::new();
        render(&mut command, &mut text);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/help.txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &text).expect("write");
        }
        let recorded = std::fs::read_to_string(path).expect("the recorded help");
        assert!(
            text == recorded,
            "the help differs from {path}: UPDATE_GOLDEN=1 records it anew\n{text}"
        );
    }

    #[test]
    fn shared_options_stand_before_or_after_the_command() {
        for line in
            ["psctl -o json node list", "psctl node list -o json", "psctl node -o json list"]
        {
            let cli = Cli::try_parse_from(line.split(' ')).expect("valid");
            assert_eq!(cli.output, Format::Json, "{line}");
        }
    }

    #[test]
    fn what_follows_the_dashes_is_the_workers() {
        let line = "psctl -o json local --workers 3 -- train -o x --workers 9";
        let cli = Cli::try_parse_from(line.split(' ')).expect("valid");
        let Command::Local(args) = cli.command else { panic!("local") };
        assert_eq!((args.workers, args.command.join(" ").as_str()), (3, "train -o x --workers 9"));
    }

    #[test]
    fn a_time_names_its_unit() {
        assert!(Cli::try_parse_from(["psctl", "status", "--timeout", "5"]).is_err());
        assert!(Cli::try_parse_from(["psctl", "status", "--timeout", "500ms"]).is_ok());
    }
}
