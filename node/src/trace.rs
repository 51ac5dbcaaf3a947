//! W3C trace context over gRPC: a caller [`inject`]s its span, the called side opens its own with [`server_span`].
//!
//! Without a configured collector nothing leaves the process.

use opentelemetry::propagation::{Extractor, Injector};
use tonic::codegen::http;
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tonic::{Request, Status};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Interceptor of a client: names the current span as the parent of whatever the call causes.
///
/// `CoordinatorClient::with_interceptor(channel, trace::inject)`
#[allow(clippy::result_large_err, reason = "the signature of tonic's interceptors")]
pub fn inject(mut request: Request<()>) -> Result<Request<()>, Status> {
    let context = Span::current().context();
    opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&context, &mut Outgoing(request.metadata_mut()));
    });
    Ok(request)
}

/// The span of one call (of the whole stream, where it streams), below the caller's where that named one.
///
/// `server_builder().trace_fn(downpour_node::trace::server_span)`
pub fn server_span(request: &http::Request<()>) -> Span {
    let span = tracing::info_span!(parent: None, "rpc", method = request.uri().path());
    let context = opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.extract(&Incoming(request.headers()))
    });
    // Fails only where the span is disabled or nothing exports traces.
    let _ = span.set_parent(context);
    span
}

struct Outgoing<'a>(&'a mut MetadataMap);

impl Injector for Outgoing<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) =
            (MetadataKey::from_bytes(key.as_bytes()), MetadataValue::try_from(value))
        {
            self.0.insert(key, value);
        }
    }
}

struct Incoming<'a>(&'a http::HeaderMap);

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
    use opentelemetry_sdk::propagation::TraceContextPropagator;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn a_trace_crosses_a_call() {
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        let provider = SdkTracerProvider::builder().build();
        let subscriber = tracing_subscriber::registry()
            .with(tracing_opentelemetry::layer().with_tracer(provider.tracer("test")));
        tracing::subscriber::with_default(subscriber, || {
            let caller = tracing::info_span!("call");
            let request = caller.in_scope(|| inject(Request::new(()))).expect("it never refuses");
            let mut received = http::Request::new(());
            *received.headers_mut() = request.into_parts().0.into_headers();
            assert!(received.headers().contains_key("traceparent"));
            let handler = server_span(&received);
            let trace = |span: &Span| span.context().span().span_context().trace_id();
            assert_eq!(trace(&caller), trace(&handler));
        });
    }
}
