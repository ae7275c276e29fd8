//! Counts a call as running until the last of its answer has been taken, which is what a drain must wait for.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http_body::{Body, Frame, SizeHint};
use tokio_util::task::task_tracker::TaskTrackerToken;

/// A body that holds its call's token until it is dropped.
#[derive(Debug)]
pub struct Running<B> {
    body: B,
    _token: TaskTrackerToken,
}

impl<B> Running<B> {
    /// `body`, as part of the call that `token` stands for.
    pub fn new(body: B, token: TaskTrackerToken) -> Self {
        Self { body, _token: token }
    }
}

impl<B: Body + Unpin> Body for Running<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
