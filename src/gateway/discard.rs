//! Discards the rest of bodies that are not read to their end.
//!
//! Many clients write their whole request before they read. If the server closes the connection in
//! the middle, they see a broken pipe instead of the refusal. So the rest is read and discarded as
//! it comes, never decompressed, within limits of bytes, time and number. Only for HTTP/1: on
//! HTTP/2 the answer arrives, and only the stream is reset.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{Version, header},
};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::{runtime::Handle, sync::Semaphore, time::timeout};

/// How many bodies are discarded at the same time, since callers without a key can cause it. The
/// connections of further ones are closed without reading.
const BODIES_MAX: usize = 64;

/// The most bytes that are discarded of one body.
const BYTES_MAX: usize = 64 << 20;

/// How long discarding one body may take, and how long no byte of it may arrive.
const TIMEOUT: Duration = Duration::from_secs(30);
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Slots for the bodies that are being discarded.
#[derive(Clone)]
pub(super) struct DiscardSlots(Arc<Semaphore>);

impl Default for DiscardSlots {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(BODIES_MAX)))
    }
}

impl DiscardSlots {
    /// Wraps the body of an HTTP/1 request, so that the part of it that nobody reads is discarded.
    pub(super) fn wrap(&self, request: Request) -> Request {
        if request.version() > Version::HTTP_11 || request.body().is_end_stream() {
            return request;
        }
        // A client that sends `Expect: 100-continue` has not begun to send, and never does once it
        // has its answer. Reading the body would tell it to send.
        let is_unsent = request.headers().contains_key(header::EXPECT);
        request.map(|body| Body::new(DiscardOnDrop { body: Some(body), is_unsent, slots: self.0.clone() }))
    }
}

struct DiscardOnDrop {
    /// None once the body has ended.
    body: Option<Body>,
    is_unsent: bool,
    slots: Arc<Semaphore>,
}

impl http_body::Body for DiscardOnDrop {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.is_unsent = false;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(cx);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for DiscardOnDrop {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| !self.is_unsent && !body.is_end_stream()) else { return };
        // No runtime is left when the runtime drops its own tasks.
        if let (Ok(runtime), Ok(slot)) = (Handle::try_current(), self.slots.clone().try_acquire_owned()) {
            runtime.spawn(async move {
                let _ = timeout(TIMEOUT, discard(body)).await;
                drop(slot);
            });
        }
    }
}

/// Reads until the body ends, [`BYTES_MAX`] have come, or nothing more comes.
async fn discard(mut body: Body) {
    let mut bytes = 0;
    while bytes < BYTES_MAX
        && let Ok(Some(Ok(frame))) = timeout(IDLE_TIMEOUT, body.frame()).await
    {
        bytes += frame.data_ref().map_or(0, Bytes::len);
    }
}
