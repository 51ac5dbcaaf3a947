//! W3C trace context over gRPC: a caller [`inject`]s its span, the called side [`adopt`]s it as the parent of its own.
//!
//! Without a configured collector both cost a few instructions and write nothing.

use opentelemetry::propagation::{Extractor, Injector};
use tonic::metadata::{KeyRef, MetadataKey, MetadataMap, MetadataValue};
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

/// In a handler: makes the caller's span the parent of `span`.
pub fn adopt<T>(request: &Request<T>, span: &Span) {
    let context = opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.extract(&Incoming(request.metadata()))
    });
    // Fails only where the span is disabled or nothing exports traces.
    let _ = span.set_parent(context);
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

struct Incoming<'a>(&'a MetadataMap);

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0
            .keys()
            .filter_map(|key| if let KeyRef::Ascii(key) = key { Some(key.as_str()) } else { None })
            .collect()
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
            let request = caller
                .in_scope(|| inject(Request::new(())))
                .expect("an interceptor that never refuses");
            assert!(request.metadata().contains_key("traceparent"));
            let handler = tracing::info_span!(parent: None, "handle");
            adopt(&request, &handler);
            let trace = |span: &Span| span.context().span().span_context().trace_id();
            assert_eq!(trace(&caller), trace(&handler));
        });
    }
}
