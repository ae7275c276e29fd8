//! A call of the service on behalf of an HTTP caller: which headers go along and come back, and
//! what ends the call. Its messages are made only when the service asks for them.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    http::{HeaderMap, HeaderValue, header, uri::PathAndQuery},
    response::Response,
};
use futures_util::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use tokio::time::{Instant, timeout_at};
use tonic::{Status, Streaming, client::Grpc, metadata::MetadataMap};
use tonic_prost::ProstCodec;

use super::{
    Gateway, Upstream,
    error::{self, Problem},
};
use crate::telemetry;

/// How long the service may be silent. It ends its own statements earlier. The end of an import
/// that is sorted takes longer, and so does a deletion of a whole list, in proportion to the list.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(75);
const IMPORT_TIMEOUT: Duration = Duration::from_secs(180);
const DELETE_TIMEOUT: Duration = Duration::from_secs(600);

/// Response headers of the service that are passed back to REST callers.
const PASSED_BACK: [&str; 3] = ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"];

/// Request headers that are passed on to the service: the caller's credentials, its workspace, the
/// trace id and the trace.
const PASSED_ON: [header::HeaderName; 5] = [
    header::HeaderName::from_static("x-api-key"),
    header::AUTHORIZATION,
    header::HeaderName::from_static("x-workspace-id"),
    telemetry::REQUEST_ID,
    header::HeaderName::from_static(telemetry::TRACEPARENT),
];

/// The headers of an answer, and its message.
pub(super) type Answer<T> = (MetadataMap, T);

impl Gateway {
    /// Calls a method that has a single response. Its messages are made only when the service asks
    /// for them; an error there cancels the call.
    pub(super) async fn call<Q, A>(
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
    pub(super) async fn call_for_stream<Q, A>(
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
pub(super) fn reconcile<T>(answer: Result<T, Status>, fault: &Fault) -> Result<T, Problem> {
    answer.map_err(|status| match fault.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(problem) if !error::is_refusal(&status) => problem.with_outcome_of(&status),
        _ => status.into(),
    })
}

fn metadata(headers: &HeaderMap) -> MetadataMap {
    let mut passed_on = HeaderMap::new();
    for name in PASSED_ON {
        for value in headers.get_all(&name) {
            passed_on.append(name.clone(), value.clone());
        }
    }
    telemetry::pass_on(&mut passed_on);
    MetadataMap::from_headers(passed_on)
}

pub(super) fn pass_back(metadata: &MetadataMap, mut response: Response) -> Response {
    for name in PASSED_BACK {
        if let Some(value) = metadata.get(name).and_then(|value| HeaderValue::from_bytes(value.as_bytes()).ok()) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// Why the messages of a call broke off, if they did.
pub(super) type Fault = Arc<Mutex<Option<Problem>>>;

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
    let silence_max = match method {
        "/dnc.v1.DncService/ImportEntries" => IMPORT_TIMEOUT,
        "/dnc.v1.DncService/DeleteEntries" => DELETE_TIMEOUT,
        _ => ANSWER_TIMEOUT,
    };
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
pub(super) struct Resumable<M>(Arc<Mutex<Option<BoxStream<'static, M>>>>);

impl<M> Resumable<M> {
    pub(super) fn new(stream: impl Stream<Item = M> + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Some(stream.fuse().boxed()))))
    }

    pub(super) fn take_over(&self) -> Option<BoxStream<'static, M>> {
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
