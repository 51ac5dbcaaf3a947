//! The options that every server has.

use clap::ArgAction;
use serde::{Deserialize, Serialize};

use super::Problem;

/// The options that every server has; a binary flattens them into its own.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct Common {
    /// Address on which this process serves gRPC, host:port; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: String,
    /// Address under which others reach this process; without it the address it listens on
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Address of the HTTP endpoint with /metrics, /healthz and /readyz; without it there is none
    #[arg(long, value_name = "HOST:PORT")]
    pub http: Option<String>,
    /// Listen beyond loopback although nothing is encrypted or authenticated
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set, value_name = "BOOL")]
    pub insecure: bool,
    /// What is logged: a level, or directives such as `info,downpour_ps=debug`
    #[arg(long, value_name = "FILTER")]
    pub log_level: String,
    /// How the log on stderr is written
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// OTLP collector (gRPC) that receives traces, for example http://127.0.0.1:4317; without it none are recorded
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Time that tasks have to end after SIGTERM; then the process exits without them
    #[arg(long, value_name = "MS")]
    pub shutdown_ms: u64,
}

/// How a log line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Common {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".into(),
            advertise: None,
            http: None,
            insecure: false,
            log_level: "info".into(),
            log_format: LogFormat::Text,
            otlp_endpoint: None,
            shutdown_ms: 10_000,
        }
    }
}

impl Common {
    /// Everything that is wrong with these.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        problems.extend(check_host_port("listen", &self.listen));
        problems.extend(
            self.advertise.as_deref().and_then(|address| check_host_port("advertise", address)),
        );
        problems.extend(self.http.as_deref().and_then(|address| check_host_port("http", address)));
        if let Err(error) = self.log_level.parse::<tracing_subscriber::EnvFilter>() {
            problems.push(Problem::new("log_level", format!("is no filter: {error}")));
        }
        if let Some(endpoint) = &self.otlp_endpoint
            && !(endpoint.starts_with("http://") || endpoint.starts_with("https://"))
        {
            problems.push(Problem::new(
                "otlp_endpoint",
                format!("must begin with http:// or https://, not {endpoint:?}"),
            ));
        }
        problems
    }
}

/// A problem unless `address` is `host:port`, where the host is a name, an IPv4 address or an IPv6 address in brackets.
pub fn check_host_port(field: &'static str, address: &str) -> Option<Problem> {
    let well_formed = address.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        !host.is_empty() && (bracketed || !host.contains([':', '/'])) && port.parse::<u16>().is_ok()
    });
    (!well_formed).then(|| Problem::new(field, format!("must be host:port, not {address:?}")))
}
