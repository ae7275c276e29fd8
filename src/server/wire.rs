//! The bytes of a connection between hyper and the socket.
//!
//! Two things are done here that hyper has no setting for. A peer that reads nothing of what is
//! written to it is disconnected. And the bare answers that hyper itself gives to a request that it
//! cannot parse get the form of every other error.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::http::StatusCode;
use futures_util::FutureExt;
use http_body_util::{BodyExt, Collected};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

use super::connections::Activity;
use crate::gateway;

/// How long, and how many bytes, are read and discarded after an answer of hyper's own. If the
/// socket were closed while the peer still writes, the peer's system would discard the answer.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 1 << 20;

/// A connection as hyper sees it.
pub(super) struct Wire<I> {
    io: I,
    activity: Arc<Activity>,
    /// How long the peer may read nothing of what is written to it.
    write_timeout: Duration,
    write_deadline: Option<Pin<Box<Sleep>>>,
    /// What is written instead of hyper's own answer, and how many bytes of it were.
    replacement: Option<(Vec<u8>, usize)>,
    linger: Option<(Pin<Box<Sleep>>, usize)>,
}

impl<I: AsyncRead + AsyncWrite + Unpin> Wire<I> {
    pub(super) fn new(io: I, activity: Arc<Activity>, write_timeout: Duration) -> Self {
        Self { io, activity, write_timeout, write_deadline: None, replacement: None, linger: None }
    }

    fn timed<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_deadline = None;
            return written;
        }
        let timeout = self.write_timeout;
        let deadline = self.write_deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// If `buf` is an answer of hyper's own, writes ours instead and reports all of `buf` as
    /// written.
    fn poll_replace(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Option<Poll<io::Result<usize>>> {
        if self.replacement.is_none() {
            // With a call in work, this is the answer of that call.
            let status = if self.activity.has_calls() { None } else { bare_error(buf) };
            self.replacement = Some((replacement(buf, status?), 0));
        }
        let (bytes, mut written) = self.replacement.take()?;
        while written < bytes.len() {
            let poll = Pin::new(&mut self.io).poll_write(cx, &bytes[written..]);
            match self.timed(cx, poll) {
                Poll::Ready(Ok(count)) => written += count,
                Poll::Ready(Err(error)) => return Some(Poll::Ready(Err(error))),
                Poll::Pending => {
                    self.replacement = Some((bytes, written));
                    return Some(Poll::Pending);
                }
            }
        }
        self.linger = Some((Box::pin(tokio::time::sleep(LINGER_TIMEOUT)), 0));
        Some(Poll::Ready(Ok(buf.len())))
    }
}

/// The status of an answer of hyper's own. It has no body; every error of ours has one.
fn bare_error(buf: &[u8]) -> Option<StatusCode> {
    let head = std::str::from_utf8(buf.get(..buf.len().min(512))?).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.get(2..5)?.parse::<StatusCode>().ok()?;
    let is_bare = head.ends_with("\r\n\r\n") && head.contains("\r\ncontent-length: 0\r\n");
    [StatusCode::BAD_REQUEST, StatusCode::URI_TOO_LONG, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE]
        .into_iter()
        .find(|ours| is_bare && *ours == status)
}

/// hyper's head with our headers and body.
fn replacement(bare: &[u8], status: StatusCode) -> Vec<u8> {
    let (head, body) = gateway::unreadable(status).into_parts();
    // The whole body is in memory, so this never waits.
    let body = body.collect().now_or_never().and_then(Result::ok).map(Collected::to_bytes).unwrap_or_default();
    let bare = String::from_utf8_lossy(bare).replace("content-length: 0\r\n", "");
    let mut bytes = bare.trim_end().as_bytes().to_vec();
    for (name, value) in &head.headers {
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
    }
    bytes.extend_from_slice(format!("\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

impl<I: AsyncRead + Unpin> AsyncRead for Wire<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(replaced) = self.poll_replace(cx, buf) {
            return replaced;
        }
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.timed(cx, written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let Some(first) = bufs.iter().find(|buf| !buf.is_empty())
            && let Some(replaced) = self.poll_replace(cx, first)
        {
            return replaced;
        }
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.timed(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.timed(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(Pin::new(&mut this.io).poll_shutdown(cx))?;
        let Some((timeout, bytes)) = this.linger.as_mut() else { return Poll::Ready(Ok(())) };
        let mut buf = [0; 8 << 10];
        while *bytes < LINGER_BYTES_MAX && timeout.as_mut().poll(cx).is_pending() {
            let mut buf = ReadBuf::new(&mut buf);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut buf))?;
            if buf.filled().is_empty() {
                break;
            }
            *bytes += buf.filled().len();
        }
        Poll::Ready(Ok(()))
    }
}
