//! HTTP/JSON in front of the gRPC API, and a client of it. Only this room speaks axum.
//!
//! The gateway knows no rule of its own: it turns a request into messages, sends the caller's credentials along, and turns the answer or status
//! back. A body is read by the message stream of the call it becomes, and so only once the service has let the caller in: a refused
//! call is refused before its body is read. Whatever is wrong with the body breaks that stream off, so nothing of it is stored.

mod error;
mod json;
mod upstream;

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{RawQuery, Request, State},
    http::{HeaderMap, HeaderValue, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{
    FutureExt, Stream, StreamExt,
    stream::{self, BoxStream},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::metadata::MetadataMap;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tracing::Instrument;

use self::error::Problem;
pub use self::upstream::Upstream;
use crate::{
    proto::{ImportOptions, dnc_service_client::DncServiceClient},
    running::Running,
    telemetry,
};

/// How long a body may stand still.
const BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Response headers of the service that REST callers are told about.
const PASSED_BACK: [&str; 3] = ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"];

/// Request headers that say who calls, and in which workspace.
const PASSED_ON: [header::HeaderName; 4] = [
    header::HeaderName::from_static("x-api-key"),
    header::AUTHORIZATION,
    header::HeaderName::from_static("x-workspace-id"),
    telemetry::REQUEST_ID,
];

#[derive(Clone)]
struct Gateway {
    upstream: Upstream,
    json_body_bytes_max: usize,
}

impl Gateway {
    /// Refuses a caller that the service would refuse, before the caller is told what is wrong with its body. A service in this process has
    /// let the caller in before it asked for the body; one elsewhere may answer after the body was sent on its way, so it is asked again.
    async fn require_admission(&self, metadata: MetadataMap) -> Result<(), Problem> {
        if let Upstream::Elsewhere(_) = self.upstream {
            let nothing = tonic::Request::from_parts(metadata, tonic::Extensions::default(), stream::empty());
            DncServiceClient::new(self.upstream.clone()).import_entries(nothing).await?;
        }
        Ok(())
    }
}

/// All HTTP calls, in front of `upstream`. `requests` counts those that run; once
/// `draining` is cancelled, new ones are refused.
pub fn router(upstream: Upstream, json_body_bytes_max: usize, requests: TaskTracker, draining: CancellationToken) -> Router {
    Router::new()
        .route("/v1/dnc/import", post(import_entries))
        .route("/healthz", get(|| async { ok(serde_json::json!({ "status": "alive" })) }))
        .route("/readyz", get(readyz))
        .fallback(async || Problem::not_found())
        .method_not_allowed_fallback(async || Problem::method_not_allowed())
        .with_state(Arc::new(Gateway { upstream, json_body_bytes_max }))
        .layer(middleware::from_fn_with_state((requests, draining), around_each))
}

/// What every request gets: an id, a span with a log line at its end, and an answer in the one error form even when a handler panics.
async fn around_each(
    State((requests, draining)): State<(TaskTracker, CancellationToken)>,
    mut request: Request,
    next: Next,
) -> Response {
    let running = requests.token();
    let request_id = telemetry::request_id(request.headers());
    // The path alone: a query may hold an address.
    let span = tracing::info_span!(
        "http",
        method = %request.method(),
        path = request.uri().path(),
        request_id = request_id.to_str().unwrap_or_default(),
    );
    request.headers_mut().insert(telemetry::REQUEST_ID, request_id.clone());
    let started = tokio::time::Instant::now();
    async move {
        let mut response = if draining.is_cancelled() && request.uri().path() != "/healthz" {
            Problem::draining().into_response()
        } else {
            let answer = AssertUnwindSafe(next.run(request)).catch_unwind().await;
            answer.unwrap_or_else(|_| Problem::internal().into_response())
        };
        tracing::info!(status = response.status().as_u16(), elapsed_ms = started.elapsed().as_millis() as u64, "request");
        response.headers_mut().insert(telemetry::REQUEST_ID, request_id);
        // The request counts as running until the last of its answer has been taken.
        response.map(|body| Body::new(Running::new(body, running)))
    }
    .instrument(span)
    .await
}

async fn readyz(State(gateway): State<Arc<Gateway>>) -> Result<Response, Problem> {
    let request = HealthCheckRequest { service: String::new() };
    let answer = HealthClient::new(gateway.upstream.clone()).check(request).await?.into_inner();
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
    let json_body_bytes_max = gateway.json_body_bytes_max;
    let metadata = metadata(&headers);
    let (messages, fault) = lazily(async move {
        let validate_only = json::query_flag(query.as_deref(), "validateOnly")?;
        let bytes = read_json(&headers, body, json_body_bytes_max).await?;
        let entries = json::import_entries(&bytes)?;
        Ok(json::import_requests(entries, ImportOptions { validate_only, ..ImportOptions::default() }))
    });
    let mut client = DncServiceClient::new(gateway.upstream.clone());
    let request = tonic::Request::from_parts(metadata.clone(), tonic::Extensions::default(), messages);
    let answer = tokio::select! {
        biased;
        answer = client.import_entries(request) => answer?,
        Ok(problem) = fault => {
            gateway.require_admission(metadata).await?;
            return Err(problem);
        }
    };
    let (metadata, answer, _) = answer.into_parts();
    Ok(pass_back(&metadata, ok(json::import_answer(answer))))
}

fn ok(data: impl serde::Serialize) -> Response {
    Json(json::Success { success: true, data }).into_response()
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

/// Messages that are made when the service first asks for one. When they cannot be made, the stream stands still for ever and
/// the cause comes out of the receiver: ending the stream would look like a whole, shorter import.
fn lazily<M: Send + 'static>(
    make: impl Future<Output = Result<Vec<M>, Problem>> + Send + 'static,
) -> (Messages<M>, oneshot::Receiver<Problem>) {
    let (report, fault) = oneshot::channel();
    let messages = stream::once(async move {
        match make.await {
            Ok(messages) => stream::iter(messages).left_stream(),
            Err(problem) => {
                let _ = report.send(problem);
                stream::pending().right_stream()
            }
        }
    });
    (Messages(messages.flatten().boxed()), fault)
}

/// A boxed stream with a name: the compiler cannot see through the bare one that a call with it may move between threads.
struct Messages<M>(BoxStream<'static, M>);

impl<M> Stream for Messages<M> {
    type Item = M;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<M>> {
        self.0.poll_next_unpin(cx)
    }
}

/// The whole body of a JSON request.
async fn read_json(headers: &HeaderMap, body: Body, bytes_max: usize) -> Result<Vec<u8>, Problem> {
    let media_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        return Err(Problem::media_type());
    }
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|bytes| bytes > bytes_max) {
        return Err(Problem::too_large(bytes_max));
    }
    let mut bytes = Vec::with_capacity(announced.unwrap_or_default());
    let mut data = Limited::new(body, bytes_max);
    while let Some(frame) = tokio::time::timeout(BODY_IDLE_TIMEOUT, data.frame()).await.map_err(|_| Problem::timed_out())? {
        match frame {
            Ok(frame) => bytes.extend_from_slice(&frame.into_data().unwrap_or_default()),
            Err(error) if error.is::<LengthLimitError>() => return Err(Problem::too_large(bytes_max)),
            Err(_) => return Err(Problem::broken_body()),
        }
    }
    Ok(bytes)
}
