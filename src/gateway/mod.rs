//! HTTP/JSON in front of the gRPC API, as a client of it. Only this module uses axum.
//!
//! The gateway has no rules of its own. It turns a request into messages, sends the caller's
//! credentials along, and turns the answer or status into a response. The message stream of a call
//! reads the body, so a body is read only after the service has admitted the caller: a refused call
//! is refused before its body is read. A fault in a JSON body breaks the stream off before anything
//! of the body is stored.

mod answers;
mod body;
mod discard;
mod error;
mod files;
mod query;
mod requests;
mod spool;
mod upstream;
mod whole;

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{MatchedPath, RawQuery, Request, State},
    http::{HeaderMap, HeaderValue, header, uri::PathAndQuery},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{
    FutureExt, Stream, StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, Streaming, client::Grpc, metadata::MetadataMap};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_prost::ProstCodec;
use tracing::Instrument;

pub use self::error::unreadable;
pub use self::upstream::{UPSTREAM_CALLS_MAX, UPSTREAM_CONNECTIONS_MAX, Upstream};
use self::{
    error::Problem,
    files::FileSource,
    query::Query,
    whole::{Bodies, Held},
};
use crate::{
    files::Format,
    proto::{ExportEntriesRequest, ImportEntriesResponse, SummarizeEntriesRequest},
    telemetry,
    wire::{budget::Budget, running::Running},
};

/// How long the service may be silent. It ends its own statements earlier. A deletion of a whole
/// list takes longer, in proportion to the list.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(75);
const DELETE_TIMEOUT: Duration = Duration::from_secs(600);

/// How long the service may take to say whether it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// Response headers of the service that are passed back to REST callers.
const PASSED_BACK: [&str; 3] = ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"];

/// Request headers that are passed on to the service: the caller's credentials, its workspace and
/// the trace id.
const PASSED_ON: [header::HeaderName; 4] = [
    header::HeaderName::from_static("x-api-key"),
    header::AUTHORIZATION,
    header::HeaderName::from_static("x-workspace-id"),
    telemetry::REQUEST_ID,
];

#[derive(Clone)]
struct Gateway {
    upstream: Upstream,
    bodies: Bodies,
}

/// The headers of an answer, and its message.
type Answer<T> = (MetadataMap, T);

impl Gateway {
    /// Calls a method that has a single response. Its messages are made only when the service asks
    /// for them; an error there cancels the call.
    async fn call<Q, A>(
        &self,
        method: &'static str,
        headers: &HeaderMap,
        messages: impl Stream<Item = Result<Q, Problem>> + Send + 'static,
    ) -> Result<Answer<A>, Problem>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let (request, fault, last_asked) = request(headers, messages);
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        let mut grpc = self.grpc().await?;
        let answer = grpc.client_streaming(request, PathAndQuery::from_static(method), codec);
        let answer = unless_silent(method, &last_asked, answer).await?;
        let (metadata, answer, _) = reconcile(answer, &fault)?.into_parts();
        Ok((metadata, answer))
    }

    /// Calls a method that has a stream of responses, likewise. An error in the messages after the
    /// response has begun is found in the returned [`Fault`].
    async fn call_for_stream<Q, A>(
        &self,
        method: &'static str,
        headers: &HeaderMap,
        messages: impl Stream<Item = Result<Q, Problem>> + Send + 'static,
    ) -> Result<(MetadataMap, Streaming<A>, Fault), Problem>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let (request, fault, last_asked) = request(headers, messages);
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        let mut grpc = self.grpc().await?;
        let answer = unless_silent(method, &last_asked, grpc.streaming(request, PathAndQuery::from_static(method), codec)).await?;
        let (metadata, answer, _) = reconcile(answer, &fault)?.into_parts();
        Ok((metadata, answer, fault))
    }

    /// The generic client. The generated one takes the message of a unary call before the caller is
    /// admitted. Both look the same on the wire.
    async fn grpc(&self) -> Result<Grpc<Upstream>, Problem> {
        // Responses come from the service itself, so their size needs no limit.
        let mut grpc = Grpc::new(self.upstream.clone()).max_decoding_message_size(usize::MAX);
        grpc.ready().await?;
        Ok(grpc)
    }
}

/// Chooses what to report when a call ended with an error. If the body had a fault, that is the
/// fault, since the body was read only after the caller was admitted. If the service has refused
/// the call, it is the refusal.
fn reconcile<T>(answer: Result<T, Status>, fault: &Fault) -> Result<T, Problem> {
    answer.map_err(|status| match fault.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(problem) if !error::is_refusal(&status) => problem.with_outcome_of(&status),
        _ => status.into(),
    })
}

/// The router of all HTTP calls, in front of `upstream`.
///
/// A JSON body may have up to `json_body_bytes_max` bytes, decompressed; the memory it needs is
/// counted in `work`. `requests` counts the calls that run. Once `draining` is cancelled, all calls
/// but `/healthz` are refused with 503.
pub fn router(
    upstream: Upstream,
    json_body_bytes_max: usize,
    work: Budget,
    requests: TaskTracker,
    draining: CancellationToken,
) -> Router {
    Router::new()
        .route("/v1/dnc", post(add_entries).get(list_entries).delete(delete_entries))
        .route("/v1/dnc/import", post(import_entries))
        .route("/v1/dnc/check", post(check_entries).get(check_entry))
        .route("/v1/dnc/export", get(export_entries))
        .route("/v1/dnc/summary", get(summarize_entries))
        .route("/healthz", get(|| async { ok(serde_json::json!({ "status": "alive" })) }))
        .route("/readyz", get(readyz))
        .fallback(async || Problem::not_found())
        .method_not_allowed_fallback(async || Problem::method_not_allowed())
        .with_state(Arc::new(Gateway { upstream, bodies: Bodies::new(json_body_bytes_max, work) }))
        .layer(middleware::from_fn_with_state(
            Shared { requests, draining, discard_slots: discard::DiscardSlots::default() },
            wrap_request,
        ))
}

/// What all requests share.
#[derive(Clone)]
struct Shared {
    requests: TaskTracker,
    draining: CancellationToken,
    discard_slots: discard::DiscardSlots,
}

/// Gives every request a trace id, a span with a log line at its end, and an answer in the
/// documented error form even when a handler panics.
async fn wrap_request(
    State(Shared { requests, draining, discard_slots }): State<Shared>,
    mut request: Request,
    next: Next,
) -> Response {
    let running = requests.token();
    let trace_id = telemetry::request_id(request.headers());
    // The route and not the path is logged: a query or a mistyped path may contain an address or a
    // key.
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!(
        "http",
        method = %request.method(),
        route,
        request_id = trace_id.to_str().unwrap_or_default(),
    );
    request.headers_mut().insert(telemetry::REQUEST_ID, trace_id.clone());
    let is_private = request.uri().path() == "/v1" || request.uri().path().starts_with("/v1/");
    let started = Instant::now();
    async move {
        let request = discard_slots.wrap(request);
        let mut response = if draining.is_cancelled() && request.uri().path() != "/healthz" {
            Problem::draining().into_response()
        } else {
            let answer = AssertUnwindSafe(next.run(request)).catch_unwind().await;
            answer.unwrap_or_else(|_| Problem::internal().into_response())
        };
        tracing::info!(status = response.status().as_u16(), elapsed_ms = started.elapsed().as_millis() as u64, "request");
        let headers = response.headers_mut();
        headers.insert(telemetry::REQUEST_ID, trace_id);
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if is_private {
            // The answer is for one workspace only, and a cache between does not know the key.
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        }
        // The request counts as running until the end of its answer has been read.
        response.map(|body| Body::new(Running::new(body, running)))
    }
    .instrument(span)
    .await
}

async fn readyz(State(gateway): State<Arc<Gateway>>) -> Result<Response, Problem> {
    let request = HealthCheckRequest { service: String::new() };
    let mut health = HealthClient::new(gateway.upstream.clone());
    let answer = timeout(READY_TIMEOUT, health.check(request)).await.map_err(|_| Problem::not_ready())??.into_inner();
    if answer.status() == ServingStatus::Serving {
        Ok(ok(serde_json::json!({ "status": "ready" })))
    } else {
        Err(Problem::not_ready())
    }
}

async fn import_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let (metadata, answer, excluded) = gateway.import(query, &headers, body, "").await?;
    Ok(pass_back(&metadata, ok(answers::import_answer(answer, excluded))))
}

async fn add_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let (metadata, answer, excluded) = gateway.import(query, &headers, body, "manual").await?;
    Ok(pass_back(&metadata, ok(answers::add_answer(answer, excluded))))
}

async fn list_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let limit = Query::parse(query.as_deref(), &query::PAGE).and_then(|query| query.limit());
    let request = once(async move { requests::list_request(&Query::parse(query.as_deref(), &query::PAGE)?) });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/ListEntries", &headers, request).await?;
    Ok(pass_back(&metadata, Json(answers::list_answer(answer, limit?)).into_response()))
}

async fn delete_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let held = Held::default();
    let decoding = gateway.bodies.decode(&headers, body, &held, requests::delete_request);
    let request = once(async move {
        Query::parse(query.as_deref(), &[])?;
        decoding.await
    });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/DeleteEntries", &headers, request).await?;
    Ok(pass_back(&metadata, ok(answers::delete_answer(answer))))
}

async fn check_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    if let Ok(MediaType::File(format)) = MediaType::of(&headers) {
        return gateway.check_file(query, &headers, body, format).await;
    }
    let held = Held::default();
    let decoding = gateway.bodies.decode(&headers, body, &held, requests::check_request);
    let request = once(async move {
        Query::parse(query.as_deref(), &[])?;
        decoding.await
    });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/CheckEntries", &headers, request).await?;
    Ok(pass_back(&metadata, ok(answers::check_answer(answer))))
}

async fn check_entry(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let request = once(async move { requests::check_one_request(query.as_deref()) });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/CheckEntries", &headers, request).await?;
    let result = answers::check_answer(answer).into_iter().next().ok_or_else(Problem::internal)?;
    Ok(pass_back(&metadata, ok(result)))
}

async fn export_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let parsed =
        Query::parse(query.as_deref(), &query::EXPORT).and_then(|query| Ok((files::format_of_query(&query)?, query.filter()?)));
    let (format, filter) = match parsed {
        Ok(parsed) => parsed,
        Err(problem) => {
            // A caller that is not admitted gets that error first. So the service is called, with a
            // broken message stream.
            let broken = once(async move { Err::<ExportEntriesRequest, _>(problem) });
            gateway.call::<_, ()>("/dnc.v1.DncService/ListEntries", &headers, broken).await?;
            return Err(Problem::internal());
        }
    };
    let request = once(async move { Ok(ExportEntriesRequest { filter: Some(filter) }) });
    let (metadata, entries, _) = gateway.call_for_stream("/dnc.v1.DncService/ExportEntries", &headers, request).await?;
    Ok(pass_back(&metadata, files::export(format, entries)))
}

async fn summarize_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let request = once(async move {
        Query::parse(query.as_deref(), &[])?;
        Ok(SummarizeEntriesRequest {})
    });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/SummarizeEntries", &headers, request).await?;
    Ok(pass_back(&metadata, ok(answers::summary_answer(answer))))
}

impl Gateway {
    async fn import(
        &self,
        query: Option<String>,
        headers: &HeaderMap,
        body: Body,
        default_reason: &'static str,
    ) -> Result<(MetadataMap, ImportEntriesResponse, u64), Problem> {
        let idempotency_key = headers.get("idempotency-key").cloned();
        let excluded = Arc::new(AtomicU64::new(0));
        let held = Held::default();
        let (received, bodies, counted, holding) = (headers.clone(), self.bodies.clone(), excluded.clone(), held.clone());
        let messages = once(async move {
            let query = Query::parse(query.as_deref(), &requests::IMPORT_PARAMETERS)?;
            let options = requests::import_options(&query, idempotency_key, default_reason)?;
            let source = FileSource::of_query(&query)?;
            Ok(match MediaType::of(&received)? {
                MediaType::File(format) => {
                    let body = bodies.file(&received, body, &holding).await?;
                    files::import_messages(format, body, source, options, counted).boxed()
                }
                MediaType::Json => {
                    source.require_none()?;
                    let entries = bodies.decode(&received, body, &holding, requests::import_entries).await?;
                    stream::iter(requests::import_requests(entries, options)).map(Ok).boxed()
                }
            })
        });
        let messages = Resumable::new(messages.try_flatten());
        let (metadata, answer): Answer<ImportEntriesResponse> =
            self.call("/dnc.v1.DncService/ImportEntries", headers, messages.clone()).await?;
        // A repeated import is answered before its body is read. Reading on counts the excluded
        // rows again, and spares the caller a connection that closes while it still writes.
        if let Some(rest) = messages.take_over() {
            let _ = rest.try_for_each(|_| std::future::ready(Ok(()))).await;
        }
        Ok((metadata, answer, excluded.load(Ordering::Relaxed)))
    }

    /// Checks a mailing list, and answers row by row as the file comes.
    async fn check_file(
        &self,
        query: Option<String>,
        headers: &HeaderMap,
        body: Body,
        format: Format,
    ) -> Result<Response, Problem> {
        let held = Held::default();
        let (received, bodies, holding) = (headers.clone(), self.bodies.clone(), held.clone());
        let parts = once(async move {
            let source = FileSource::of_query(&Query::parse(query.as_deref(), &["column"])?)?;
            Ok(files::check_parts(format, source, bodies.file(&received, body, &holding).await?))
        });
        let (requests, waiting) = files::check_requests(parts.try_flatten());
        let (metadata, answers, fault) = self.call_for_stream("/dnc.v1.DncService/ScrubEntries", headers, requests).await?;
        Ok(pass_back(&metadata, files::checked(format, answers, waiting, fault, held).await?))
    }
}

fn once<T>(make: impl Future<Output = Result<T, Problem>> + Send) -> impl Stream<Item = Result<T, Problem>> + Send {
    stream::once(make)
}

fn ok(data: impl serde::Serialize) -> Response {
    Json(answers::Success { success: true, data }).into_response()
}

fn metadata(headers: &HeaderMap) -> MetadataMap {
    let mut passed_on = HeaderMap::new();
    for name in PASSED_ON {
        for value in headers.get_all(&name) {
            passed_on.append(name.clone(), value.clone());
        }
    }
    MetadataMap::from_headers(passed_on)
}

fn pass_back(metadata: &MetadataMap, mut response: Response) -> Response {
    for name in PASSED_BACK {
        if let Some(value) = metadata.get(name).and_then(|value| HeaderValue::from_bytes(value.as_bytes()).ok()) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// Why the messages of a call broke off, if they did.
type Fault = Arc<Mutex<Option<Problem>>>;

/// When the service last asked for a message.
type LastAsked = Arc<Mutex<Instant>>;

/// Makes a request of these messages. When a message cannot be made, the request is cancelled and
/// the cause kept in the fault. Ending the stream would look like a complete, shorter call.
fn request<M: Send + 'static>(
    headers: &HeaderMap,
    messages: impl Stream<Item = Result<M, Problem>> + Send + 'static,
) -> (tonic::Request<BoxStream<'static, M>>, Fault, LastAsked) {
    let last_asked = Arc::new(Mutex::new(Instant::now()));
    let noted = last_asked.clone();
    let fault = Fault::default();
    let mut request = tonic::Request::from_parts(metadata(headers), tonic::Extensions::default(), ());
    let cancel = request.cancellation_handle();
    let kept = fault.clone();
    let messages = messages.then(move |message| {
        let (kept, cancel) = (kept.clone(), cancel.clone());
        async move {
            match message {
                Ok(message) => message,
                Err(problem) => {
                    *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem);
                    cancel.cancel();
                    std::future::pending().await
                }
            }
        }
    });
    let mut messages = messages.boxed();
    let messages = stream::poll_fn(move |cx| {
        *noted.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        messages.poll_next_unpin(cx)
    });
    (request.map(|()| messages.boxed()), fault, last_asked)
}

/// Gives up a call when the service neither asks for a message nor answers for too long. While the
/// service waits for a message, the deadlines of the body apply.
async fn unless_silent<T>(method: &str, last_asked: &LastAsked, answer: impl Future<Output = T>) -> Result<T, Problem> {
    let silence_max = if method.ends_with("/DeleteEntries") { DELETE_TIMEOUT } else { ANSWER_TIMEOUT };
    let mut answer = std::pin::pin!(answer);
    loop {
        let deadline = *last_asked.lock().unwrap_or_else(PoisonError::into_inner) + silence_max;
        if deadline <= Instant::now() {
            return Err(Problem::silent());
        }
        if let Ok(answer) = timeout_at(deadline, &mut answer).await {
            return Ok(answer);
        }
    }
}

/// A stream that can be read on after the call that took it has ended. Once it is taken over, the
/// call sees its end.
struct Resumable<M>(Arc<Mutex<Option<BoxStream<'static, M>>>>);

impl<M> Resumable<M> {
    fn new(stream: impl Stream<Item = M> + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Some(stream.fuse().boxed()))))
    }

    fn take_over(&self) -> Option<BoxStream<'static, M>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<M> Clone for Resumable<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M> Stream for Resumable<M> {
    type Item = M;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<M>> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(stream) => stream.poll_next_unpin(cx),
            None => Poll::Ready(None),
        }
    }
}

enum MediaType {
    Json,
    File(Format),
}

impl MediaType {
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let named = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let essence = named.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match essence.as_str() {
            "application/json" => Ok(Self::Json),
            "application/x-ndjson" => Ok(Self::File(Format::Ndjson)),
            "text/csv" => Ok(Self::File(Format::Csv)),
            _ => Err(Problem::media_type()),
        }
    }
}
