//! The guard: one layer around the service itself, not around a listener, so that calls from the
//! network and from the gateway in the same process pass the same checks. It is closed by default:
//! a method that is not in the table is refused, and a call is refused before its body is read.
//!
//! The guard also accounts for what a call costs: it is counted for a drain, takes its bytes in
//! work, and ends at the deadline that its caller set.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use http::{HeaderMap, Request, Response, header};
use http_body::Frame;
use http_body_util::{BodyExt, BodyStream, StreamBody};
use prost::bytes::Bytes;
use tokio::time::{Instant, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, body::Body, metadata::GRPC_CONTENT_TYPE, server::NamedService};
use tower::Service;
use tracing::Instrument;

use super::{
    auth::{self, Authenticator},
    metered::{Metered, Work},
    rate::Rate,
    status,
};
use crate::{
    domain::Error,
    telemetry::{self, metrics},
    wire::{EARLY_HEAD, budget::Budget, running::Running},
};

/// tonic takes a request that its caller cancelled for one that has ended. An import that was
/// cancelled must not count as complete.
fn as_aborted(status: Status) -> Status {
    if status.code() == tonic::Code::Cancelled { Status::aborted("the caller cancelled the call") } else { status }
}

const TOO_LATE: &str = "The deadline that the caller set has passed.";

/// The caller's timeout from the `grpc-timeout` header, in the format of gRPC over HTTP/2; none if
/// it is absent or malformed.
fn caller_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok().filter(|_| number.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3_600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Logs the end of a call, and returns its answer.
fn ended(mut response: Response<Body>, started: Instant) -> Response<Body> {
    if let Some(status) = Status::from_header_map(response.headers())
        && status.code() != tonic::Code::Ok
        && status.details().is_empty()
    {
        // tonic made this status while it read the message of a unary call.
        response = status::from_error(status::of_message(&status)).into_http();
    }
    let code = Status::from_header_map(response.headers()).map_or(tonic::Code::Ok, |status| status.code());
    tracing::info!(?code, elapsed_ms = started.elapsed().as_millis() as u64, "call");
    response
}

/// An answer whose head is sent at once. The call runs while the answer's body is read, and its
/// status follows in the trailers.
fn early_head(answer: impl Future<Output = Result<Response<Body>, Infallible>> + Send + 'static) -> Response<Body> {
    let frames = stream::once(answer).flat_map(|answer| -> BoxStream<'static, Result<Frame<Bytes>, Status>> {
        let Ok(response) = answer;
        let (mut head, body) = response.into_parts();
        if Status::from_header_map(&head.headers).is_none() {
            return Box::pin(BodyStream::new(body));
        }
        head.headers.remove(header::CONTENT_TYPE);
        Box::pin(stream::iter([Ok(Frame::trailers(head.headers))]))
    });
    let mut response = Response::new(Body::new(StreamBody::new(frames)));
    response.headers_mut().insert(header::CONTENT_TYPE, GRPC_CONTENT_TYPE);
    response
}

/// The body of an answer, whose trailers say how the call has ended.
struct Counted {
    body: Body,
    call: metrics::Call,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(status) = frame.trailers_ref().and_then(Status::from_header_map)
        {
            self.call.ends_with(status.code().into());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// The layer around a service; see the module's documentation.
#[derive(Clone, Debug)]
pub struct Guard<S> {
    inner: S,
    auth: Arc<Authenticator>,
    rate: Arc<Rate>,
    draining: CancellationToken,
    calls: TaskTracker,
    budget: Option<Budget>,
}

impl<S> Guard<S> {
    /// Guards `inner`. Once `draining` is cancelled, new calls are refused as unavailable. `calls`
    /// tracks the running ones.
    pub fn new(inner: S, auth: Arc<Authenticator>, rate: Rate, draining: CancellationToken, calls: TaskTracker) -> Self {
        Self { inner, auth, rate: Arc::new(rate), draining, calls, budget: None }
    }

    /// Takes the memory of requests from `budget`. For calls from the network; the gateway in the
    /// same process accounts for its own bodies.
    #[must_use]
    pub fn with_budget(self, budget: Budget) -> Self {
        Self { budget: Some(budget), ..self }
    }
}

impl<S: NamedService> NamedService for Guard<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // `poll_ready` was called on this instance and not on its clone, so this one is called.
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let (auth, rate, budget) = (self.auth.clone(), self.rate.clone(), self.budget.clone());
        // Counted before `draining` is read: a drain that missed this call has begun by then, and
        // the call sees it.
        let call = self.calls.token();
        let is_draining = self.draining.is_cancelled();
        let trace_id = telemetry::request_id(request.headers());
        let span = tracing::info_span!(
            "rpc",
            // An unknown path may contain anything, so it is not logged.
            method = if auth::needs(request.uri().path()).is_some() { request.uri().path() } else { "unknown" },
            request_id = trace_id.to_str().unwrap_or_default(),
            workspace = tracing::field::Empty,
            key = tracing::field::Empty,
        );
        telemetry::continue_trace(&span, request.headers());
        let started = Instant::now();
        let mut metered = metrics::Call::begin(request.uri().path());
        let (mut head, body) = request.into_parts();
        let answer = async move {
            let work = Work::default();
            let mut rate_headers = Vec::new();
            let admitted = async {
                if is_draining {
                    return Err(Error::Unavailable {
                        message: "This server is shutting down. Send the request again.",
                        source: None,
                    });
                }
                match auth::needs(head.uri.path()) {
                    None => Err(Error::Unimplemented),
                    Some(scope) => {
                        let principal = auth.authenticate(&head.headers, scope).await?;
                        let (verdict, headers) = rate.admit(principal.key);
                        rate_headers = headers;
                        verdict.map(|()| principal)
                    }
                }
            };
            let mut response = match admitted.await {
                Ok(principal) => {
                    let span = tracing::Span::current();
                    span.record("workspace", tracing::field::display(principal.workspace));
                    span.record("key", tracing::field::display(principal.key));
                    let body = Body::new(body.map_err(as_aborted));
                    let body = match budget {
                        Some(budget) => {
                            let owner = principal.workspace.0.unsigned_abs();
                            Body::new(Metered::new(body, budget, owner, head.uri.path(), work.clone()))
                        }
                        None => body,
                    };
                    let deadline = caller_timeout(&head.headers);
                    let is_early = head.headers.contains_key(EARLY_HEAD);
                    head.extensions.insert(principal);
                    head.extensions.insert(work.clone());
                    let answer = inner.call(Request::from_parts(head, body));
                    let answer = async move {
                        let response = match deadline {
                            None => answer.await?,
                            Some(deadline) => match timeout(deadline, answer).await {
                                Ok(answer) => answer?,
                                Err(_) => status::from_error(Error::Timeout { message: TOO_LATE, source: None }).into_http(),
                            },
                        };
                        Ok(ended(response, started))
                    };
                    if is_early { early_head(answer.in_current_span()) } else { answer.await? }
                }
                Err(error) => ended(status::from_error(error).into_http(), started),
            };
            response.headers_mut().extend(rate_headers);
            response.headers_mut().insert(telemetry::REQUEST_ID, trace_id);
            if let Some(status) = Status::from_header_map(response.headers()) {
                metered.ends_with(status.code().into());
            }
            // The call counts as running, and its request as in work, until the whole answer has
            // been taken.
            Ok(response.map(|body| Body::new(Running::new(Counted { body, call: metered }, (call, work)))))
        };
        Box::pin(answer.instrument(span))
    }
}
