//! The deadline of an answer for its reader.
//!
//! A client over HTTP/2 that stops reading one answer still answers pings, so its connection looks
//! alive. hyper does not poll the answer's body either, so the body cannot notice. Therefore a task
//! of its own watches the body.
//!
//! Time counts only while a part waits to be read. While the next part is being made, the service's
//! own deadlines hold. An answer that is made while its request still comes reports its progress:
//! its caller may send everything before it reads anything, and is not late while it sends.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, Bytes};
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use crate::wire::running::Progress;

/// A body that is dropped, with everything that its call holds, once its reader has read nothing
/// for too long. A reader that comes back then finds the answer cut off.
pub(super) struct TimedBody {
    state: Arc<Mutex<State>>,
    _watch: AbortOnDropHandle<()>,
}

struct State {
    /// `None` once it was given up.
    body: Option<Body>,
    /// Since when a part waits to be read; `None` while the next one is being made.
    waiting_since: Option<Instant>,
}

impl TimedBody {
    /// `body`, whose reader may take nothing for `limit`, counted from the last `progress` of the
    /// answer if there is one.
    pub(super) fn new(body: Body, limit: Duration, progress: Progress) -> Self {
        let state = Arc::new(Mutex::new(State { body: Some(body), waiting_since: Some(Instant::now()) }));
        let watch = tokio::spawn(watch(state.clone(), limit, progress));
        Self { state, _watch: AbortOnDropHandle::new(watch) }
    }
}

async fn watch(state: Arc<Mutex<State>>, limit: Duration, progress: Progress) {
    loop {
        let since = state.lock().unwrap_or_else(PoisonError::into_inner).waiting_since;
        let since = since.max(progress.last().filter(|_| since.is_some()));
        let deadline = since.unwrap_or_else(Instant::now) + limit;
        if deadline <= Instant::now() {
            tracing::info!("an answer is given up, since its reader takes nothing of it");
            let body = state.lock().unwrap_or_else(PoisonError::into_inner).body.take();
            drop(body);
            return;
        }
        sleep_until(deadline).await;
    }
}

impl http_body::Body for TimedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(body) = &mut state.body else {
            return Poll::Ready(Some(Err(axum::Error::new("nothing of the answer was taken for too long"))));
        };
        let polled = Pin::new(body).poll_frame(cx);
        state.waiting_since = polled.is_ready().then(Instant::now);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).body.as_ref().is_some_and(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}
