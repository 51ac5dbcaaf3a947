//! The shell that every server binary of Downpour shares.
//!
//! Follow a process from its first line to its exit status:
//! [`config::load`] merges defaults < file < environment < flags into the binary's one struct of options;
//! [`process::run`] then starts the runtime, [`telemetry`], the signal handling of [`shutdown`] and the [`http`] endpoint, and
//! calls the binary's own `async fn` with a [`process::Node`]; that opens its port with [`listen::bind`] and serves until
//! the token is cancelled; `run` waits for the tracked tasks up to a deadline, flushes traces and returns the exit status.
//!
//! ```no_run
//! use downpour_node::config::{self, Common, Options, Problem, Program};
//! use downpour_node::process::{self, Node};
//!
//! /// Every option, declared once: field of the TOML file, `DOWNPOUR_NAME`, `--name`. Defaults are those of `Default`.
//! #[derive(Clone, Debug, Default, clap::Args, serde::Serialize, serde::Deserialize)]
//! #[serde(default)]
//! struct Config {
//!     /// Stable name under which this server registers
//!     #[arg(long, value_name = "NAME")]
//!     name: String,
//!     #[command(flatten)]
//!     #[serde(flatten)]
//!     common: Common,
//! }
//!
//! impl Options for Config {
//!     fn problems(&self) -> Vec<Problem> {
//!         let mut problems = self.common.problems();
//!         if self.name.is_empty() {
//!             problems.push(Problem::new("name", "is required"));
//!         }
//!         problems
//!     }
//! }
//!
//! async fn serve(config: Config, node: Node) -> anyhow::Result<()> {
//!     let _listener = downpour_node::listen::bind("listen", &config.common.listen, config.common.insecure).await?;
//!     node.readiness.started();
//!     node.shutdown.token().cancelled().await;
//!     Ok(())
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     let config: Config = config::load(Program { name: "downpour-example", about: "An example" });
//!     let common = config.common.clone();
//!     process::run("downpour-example", &common, move |node| serve(config, node))
//! }
//! ```
//!
//! Beside these: [`metrics`] (histograms with buckets that fit) and [`trace`] (W3C trace context over gRPC).
//! Nothing here knows what a shard or a job is.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod config;
pub mod http;
pub mod listen;
pub mod metrics;
pub mod process;
pub mod shutdown;
pub mod telemetry;
pub mod trace;
