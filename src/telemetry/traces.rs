//! Traces over OTLP, for a collector that `OTEL_EXPORTER_OTLP_ENDPOINT` names.
//!
//! The spans are those of the log: a request, a call, and below them each piece of work on the
//! database. They hold ids and never an address or a key. The context of a trace comes from the
//! `traceparent` header of W3C and goes on in it. `tracestate` is not read: it is text of the
//! caller, and would be exported.

use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use opentelemetry::{
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{TraceContextExt, TracerProvider},
};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tracing::{Level, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

use super::TRACEPARENT;

/// How long the last spans may take to reach the collector when the program ends.
const LAST_EXPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// What sends the spans.
pub(super) struct Exporting(SdkTracerProvider);

impl Exporting {
    /// Sends what is left, and ends.
    pub(super) fn end(self) {
        // The collector may be away; that must not keep the program.
        let _ = self.0.shutdown_with_timeout(LAST_EXPORT_TIMEOUT);
    }
}

/// The layer that exports spans, if a collector is named. Must be called on the runtime that is
/// used to send them.
///
/// # Errors
/// When the endpoint cannot be used.
pub(super) fn layer<S>() -> anyhow::Result<Option<(impl Layer<S>, Exporting)>>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if !is_set("OTEL_EXPORTER_OTLP_ENDPOINT") && !is_set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") {
        return Ok(None);
    }
    let exporter = SpanExporter::builder().with_tonic().build().map_err(|error| {
        anyhow::anyhow!("OTEL_EXPORTER_OTLP_ENDPOINT cannot be used ({error}); give a URL such as http://127.0.0.1:4317")
    })?;
    let mut resource = Resource::builder();
    if !is_set("OTEL_SERVICE_NAME") {
        resource = resource.with_service_name("dnc");
    }
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("dnc"))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(exported());
    Ok(Some((layer, Exporting(provider))))
}

/// Only what this crate writes: a library may put the text of a statement into a span. Of the
/// events, those that are logged by default.
fn exported() -> Targets {
    Targets::new().with_target("dnc", Level::INFO).with_target("dnc::store::database", Level::DEBUG)
}

/// Makes `span` a part of the trace that the headers of a request name, if they name one.
pub fn continue_trace(span: &Span, headers: &HeaderMap) {
    let context = TraceContextPropagator::new().extract(&Received(headers));
    if context.span().span_context().is_valid() {
        // Fails if nothing is exported.
        let _ = span.set_parent(context);
    }
}

/// Puts the trace of the current span into the headers of a call, in place of what they name.
pub fn pass_on(headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut Sent(headers));
}

struct Received<'a>(&'a HeaderMap);

impl Extractor for Received<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        (name == TRACEPARENT).then(|| self.0.get(TRACEPARENT)?.to_str().ok())?
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

struct Sent<'a>(&'a mut HeaderMap);

impl Injector for Sent<'_> {
    fn set(&mut self, name: &str, value: String) {
        if name == TRACEPARENT
            && let Ok(value) = HeaderValue::try_from(value)
        {
            self.0.insert(TRACEPARENT, value);
        }
    }
}
