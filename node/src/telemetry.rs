//! Logs on stderr, traces to an OTLP collector if one is configured.

use std::time::Duration;

use anyhow::Context as _;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{error, warn};
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{Common, LogFormat};

/// Longest wait for the last traces to leave when the process ends.
const FLUSH_DEADLINE: Duration = Duration::from_secs(3);

/// Keeps the exporter; [`flush`](Self::flush) is the last thing that a process does.
#[derive(Debug)]
#[must_use = "without flush the last traces are lost"]
pub struct Guard {
    traces: Option<SdkTracerProvider>,
}

/// Sets up logs, traces and the reporting of panics for the whole process; once, inside its runtime. `service` names the process in traces.
pub fn init(service: &'static str, config: &Common) -> anyhow::Result<Guard> {
    let filter = config.log_level.parse::<EnvFilter>().context("read log_level")?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let log = match config.log_format {
        LogFormat::Text => {
            lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let traces =
        config.otlp_endpoint.as_deref().map(|endpoint| exporter(service, endpoint)).transpose()?;
    let spans = traces.as_ref().map(|provider| {
        // The exporter's own HTTP/2 would trace itself.
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer(service))
            .with_filter(LevelFilter::INFO)
    });
    tracing_subscriber::registry()
        .with(log.with_filter(filter))
        .with(spans)
        .try_init()
        .context("set up logs")?;
    report_panics();
    Ok(Guard { traces })
}

fn exporter(service: &'static str, endpoint: &str) -> anyhow::Result<SdkTracerProvider> {
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(FLUSH_DEADLINE)
        .build()
        .with_context(|| format!("export traces to {endpoint} (--otlp-endpoint)"))?;
    let resource = Resource::builder()
        .with_service_name(service)
        .with_attribute(KeyValue::new("service.instance.id", std::process::id().to_string()))
        .build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

/// A panic is logged like any other error, then reported as before.
fn report_panics() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map(ToString::to_string);
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let message = text
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("(not text)");
        error!(place, message, "panic");
        previous(panic);
    }));
}

impl Guard {
    /// Sends what is left of the traces, within a deadline.
    pub async fn flush(self) {
        let Some(traces) = self.traces else { return };
        let flush =
            tokio::task::spawn_blocking(move || traces.shutdown_with_timeout(FLUSH_DEADLINE));
        // The exporter's own limit comes first; this one holds when its thread hangs.
        match tokio::time::timeout(2 * FLUSH_DEADLINE, flush).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => warn!(%error, "traces lost at the end"),
            Ok(Err(_)) | Err(_) => warn!("traces lost at the end"),
        }
    }
}
