//! Bodies that are not read to their end.
//!
//! Many clients write their whole request before they read. If the server closes the connection in
//! the middle, they see a broken pipe in place of the refusal. So the rest is read and thrown away, as
//! it comes and never decompressed, within bounds of bytes, time and number. Only for HTTP/1: on
//! HTTP/2 the answer arrives, and the stream alone is reset.

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

/// Bodies that are thrown away at once; callers without a key can cause it. Others are closed as they are.
const BODIES_MAX: usize = 64;

/// The most that is thrown away of one body.
const BYTES_MAX: usize = 64 << 20;

/// How long that may take, and how long the body may stand still.
const TIMEOUT: Duration = Duration::from_secs(30);
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Room for the bodies that are being thrown away.
#[derive(Clone)]
pub(super) struct Places(Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(BODIES_MAX)))
    }
}

impl Places {
    /// Sees to it that what nobody reads of this request's body is thrown away.
    pub(super) fn keep(&self, request: Request) -> Request {
        if request.version() > Version::HTTP_11 || request.body().is_end_stream() {
            return request;
        }
        // Such a client has not begun to send, and never will once it has its answer. Asking for the body tells it to.
        let is_held_back = request.headers().contains_key(header::EXPECT);
        request.map(|body| Body::new(Kept { body: Some(body), is_held_back, places: self.0.clone() }))
    }
}

struct Kept {
    /// None once it has come to its end.
    body: Option<Body>,
    is_held_back: bool,
    places: Arc<Semaphore>,
}

impl http_body::Body for Kept {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.is_held_back = false;
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

impl Drop for Kept {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| !self.is_held_back && !body.is_end_stream()) else { return };
        // There is no runtime any more when it drops its own tasks.
        if let (Ok(runtime), Ok(place)) = (Handle::try_current(), self.places.clone().try_acquire_owned()) {
            runtime.spawn(async move {
                let _ = timeout(TIMEOUT, discard(body)).await;
                drop(place);
            });
        }
    }
}

/// Reads until the end, until too much has come, or until nothing comes any more.
async fn discard(mut body: Body) {
    let mut bytes = 0;
    while bytes < BYTES_MAX
        && let Ok(Some(Ok(frame))) = timeout(IDLE_TIMEOUT, body.frame()).await
    {
        bytes += frame.data_ref().map_or(0, Bytes::len);
    }
}
