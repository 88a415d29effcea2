//! Traces: a span for every client request and one for every leg, in the context of W3C's `traceparent`, exported
//! over OTLP with HTTP.
//!
//! This module knows spans and headers; `record` knows what happened in a request. Spans wait in a queue of the
//! exporter's own thread. If the queue is full they are dropped, so that no request waits for a collector.

use std::time::{Duration, SystemTime};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{SpanBuilder, SpanKind, Status, TraceContextExt, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span};

/// Maximum spans that wait for the collector.
const MAX_WAITING: usize = 16_384;

/// Deadline of one export.
const EXPORT_DEADLINE: Duration = Duration::from_secs(5);

/// Why traces cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The URL is not plain HTTP: the exporter supports neither gRPC nor TLS.
    #[error("`{0}` is not a URL that begins with `http://`")]
    NoHttp(String),
    /// The exporter cannot be built.
    #[error("cannot send traces to `{endpoint}`")]
    Exporter {
        /// The collector's URL.
        endpoint: String,
        /// The error of the exporter.
        #[source]
        source: opentelemetry_otlp::ExporterBuildError,
    },
}

/// The connection to a collector. Clones are the same. Dropping the last one sends the waiting spans.
#[derive(Debug, Clone)]
pub struct Traces {
    tracer: SdkTracer,
    _provider: SdkTracerProvider,
}

impl Traces {
    /// Opens an exporter to the collector at this URL, such as `http://localhost:4318/v1/traces`. It samples
    /// `percent` of the requests without a trace context. A request with a context keeps its sampling decision.
    ///
    /// # Errors
    /// When the URL does not begin with `http://`.
    pub fn open(endpoint: &str, percent: u8) -> Result<Self, TracesError> {
        if !endpoint.starts_with("http://") {
            return Err(TracesError::NoHttp(endpoint.to_owned()));
        }
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_DEADLINE)
            .build()
            .map_err(|source| TracesError::Exporter {
                endpoint: endpoint.to_owned(),
                source,
            })?;
        let config = BatchConfigBuilder::default().with_max_queue_size(MAX_WAITING).build();
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
        let sampler = Sampler::TraceIdRatioBased(f64::from(percent) / 100.0);
        let resource = Resource::builder()
            .with_service_name("xpyd")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(Sampler::ParentBased(Box::new(sampler)))
            .with_resource(resource)
            .build();
        Ok(Self {
            tracer: provider.tracer("xpyd"),
            _provider: provider,
        })
    }

    /// Begins the span of a request, within the trace that its headers name, if any. Afterwards the headers name this
    /// span.
    pub(crate) fn begin(&self, headers: &mut HeaderMap, at: SystemTime) -> Trace {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Source(headers));
        let builder = SpanBuilder::from_name("request")
            .with_kind(SpanKind::Server)
            .with_start_time(at);
        let span = self.tracer.build_with_context(builder, &parent);
        let context = parent.with_span(span);
        write(&context, headers);
        Trace {
            tracer: self.tracer.clone(),
            context,
        }
    }
}

/// The span of a request, which creates those of its legs.
#[derive(Debug)]
pub(crate) struct Trace {
    tracer: SdkTracer,
    context: Context,
}

impl Trace {
    /// Begins the span of a leg, which ends when it is dropped, and writes it into the headers.
    pub(crate) fn leg(&self, name: &'static str, attributes: Vec<KeyValue>, headers: &mut HeaderMap) -> Span {
        let builder = SpanBuilder::from_name(name)
            .with_kind(SpanKind::Client)
            .with_attributes(attributes);
        let span = self.tracer.build_with_context(builder, &self.context);
        let context = opentelemetry::trace::Span::span_context(&span).clone();
        write(&self.context.with_remote_span_context(context), headers);
        span
    }

    /// Adds the span of a stage that ends now.
    pub(crate) fn part(&self, name: &'static str, took: Duration) {
        let end = SystemTime::now();
        let builder = SpanBuilder::from_name(name).with_start_time(end.checked_sub(took).unwrap_or(end));
        drop(self.tracer.build_with_context(builder, &self.context));
    }

    /// Ends the request's span under this name.
    pub(crate) fn end(&self, name: String, has_failed: bool, attributes: Vec<KeyValue>) {
        let span = self.context.span();
        span.update_name(name);
        span.set_attributes(attributes);
        if has_failed {
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

/// Marks the span of a leg as failed.
pub(crate) fn fail(leg: &mut Span) {
    opentelemetry::trace::Span::set_status(leg, Status::error(""));
}

fn write(context: &Context, headers: &mut HeaderMap) {
    headers.remove("tracestate");
    TraceContextPropagator::new().inject_context(context, &mut Target(headers));
}

/// Reads a trace context from headers.
struct Source<'headers>(&'headers HeaderMap);

impl Extractor for Source<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

/// Writes a trace context into headers.
struct Target<'headers>(&'headers mut HeaderMap);

impl Injector for Target<'_> {
    fn set(&mut self, key: &str, value: String) {
        // W3C recommends leaving out an empty `tracestate`.
        if let (Ok(name), Ok(value), false) = (
            HeaderName::try_from(key),
            HeaderValue::try_from(&value),
            value.is_empty(),
        ) {
            self.0.insert(name, value);
        }
    }
}
