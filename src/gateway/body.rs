//! The bytes of a request's body as they arrive, decompressed if the caller compressed them. Every
//! read has a deadline. How far a body may expand is decided in `files`, since the command line
//! applies the same limit.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_compression::{
    tokio::bufread::{GzipDecoder, ZstdDecoder},
    zstd::DParameter,
};
use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, HeaderValue, header},
};
use futures_util::{FutureExt, TryStreamExt, stream};
use http_body_util::BodyExt;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_util::{bytes::BytesMut, io::StreamReader};

use super::error::Problem;
use crate::{
    files::{EXPANSION_MAX, ZSTD_WINDOW_LOG_MAX, expands_too_much, is_window_too_large},
    wire::budget::Permit,
};

/// How long no byte of a body may arrive.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes that go into a decoder in one step, and the most that come out of it in one step.
const PIECE_BYTES_MAX: usize = 16 << 10;
const READ_BYTES_MAX: usize = 64 << 10;

/// The error kind by which a decoder reports that the body under it broke off.
const BROKEN_BODY: io::ErrorKind = io::ErrorKind::ConnectionAborted;

/// The content encoding of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Plain,
    Gzip,
    Zstd,
}

impl Encoding {
    /// Reads the content encoding from the headers.
    ///
    /// # Errors
    /// 415 when it is unknown, or when there is more than one.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let mut named = headers.get_all(header::CONTENT_ENCODING).iter();
        let (first, more) = (named.next(), named.next());
        let name = match (first.map(HeaderValue::to_str), more) {
            (None, _) => return Ok(Self::Plain),
            (Some(Ok(name)), None) => name.trim().to_ascii_lowercase(),
            _ => return Err(Problem::encoding()),
        };
        match name.as_str() {
            "identity" => Ok(Self::Plain),
            "gzip" | "x-gzip" => Ok(Self::Gzip),
            "zstd" => Ok(Self::Zstd),
            _ => Err(Problem::encoding()),
        }
    }
}

/// A body that is being read.
pub(super) enum ContentBody {
    /// Without a content encoding.
    Plain(Body),
    /// Read through a decoder.
    Compressed(Decompressing),
}

/// The decoder of a compressed body, and the bytes that went in and came out so far.
pub(super) struct Decompressing {
    decoder: Pin<Box<dyn AsyncRead + Send>>,
    bytes_in: Arc<AtomicU64>,
    bytes_out: u64,
    /// The decoder's part of the memory for all zstd windows.
    _window: Option<Permit>,
}

impl ContentBody {
    /// Reads `body` through a decoder for `encoding`. `window` is held until the body is dropped.
    pub(super) fn new(encoding: Encoding, body: Body, window: Option<Permit>) -> Self {
        if encoding == Encoding::Plain {
            return Self::Plain(body);
        }
        let bytes_in = Arc::new(AtomicU64::new(0));
        let counter = bytes_in.clone();
        let chunks = TryStreamExt::map_err(body.into_data_stream(), |_| io::Error::from(BROKEN_BODY));
        // Input that decompresses to nothing (thousands of empty frames, say) must not keep the
        // processor, so the task yields after each piece.
        let pieces =
            chunks.map_ok(|chunk| stream::iter(pieces(chunk).map(Ok::<_, io::Error>))).try_flatten().and_then(move |piece| {
                counter.fetch_add(piece.len() as u64, Ordering::Relaxed);
                tokio::task::yield_now().map(|()| Ok(piece))
            });
        let reader = StreamReader::new(pieces);
        let decoder: Pin<Box<dyn AsyncRead + Send>> = if encoding == Encoding::Gzip {
            let mut decoder = GzipDecoder::new(reader);
            // The output of `cat a.gz b.gz` is a valid gzip file, too.
            decoder.multiple_members(true);
            Box::pin(decoder)
        } else {
            let window = DParameter::window_log_max(ZSTD_WINDOW_LOG_MAX);
            let mut decoder = ZstdDecoder::with_params(reader, &[window]);
            decoder.multiple_members(true);
            Box::pin(decoder)
        };
        Self::Compressed(Decompressing { decoder, bytes_in, bytes_out: 0, _window: window })
    }

    /// Returns the next bytes, decompressed, or `None` at the end. Safe to cancel: nothing is lost
    /// when the future is dropped before it is done.
    ///
    /// # Errors
    /// 408 when no byte arrives in time, 400 when the body breaks off or does not match its
    /// encoding, 413 when it expands to more than [`EXPANSION_MAX`] times its size.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        let next = async {
            match self {
                Self::Plain(body) => plain(body).await,
                Self::Compressed(decompressing) => decompressing.next().await,
            }
        };
        tokio::time::timeout(IDLE_TIMEOUT, next).await.map_err(|_| Problem::timed_out())?
    }
}

/// Splits a chunk into pieces that a decoder processes in a short time.
fn pieces(mut chunk: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let piece = chunk.split_to(chunk.len().min(PIECE_BYTES_MAX));
        Some(piece).filter(|piece| !piece.is_empty())
    })
}

async fn plain(body: &mut Body) -> Result<Option<Bytes>, Problem> {
    loop {
        match body.frame().await.transpose().map_err(|_| Problem::broken_body())? {
            None => return Ok(None),
            Some(frame) => {
                if let Ok(data) = frame.into_data()
                    && !data.is_empty()
                {
                    return Ok(Some(data));
                }
            }
        }
    }
}

impl Decompressing {
    async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        let mut bytes = BytesMut::with_capacity(READ_BYTES_MAX);
        let count = self.decoder.read_buf(&mut bytes).await.map_err(|error| match error.kind() {
            BROKEN_BODY => Problem::broken_body(),
            _ if is_window_too_large(&error) => Problem::window(),
            _ => Problem::not_decompressed(),
        })?;
        self.bytes_out += count as u64;
        if expands_too_much(self.bytes_in.load(Ordering::Relaxed), self.bytes_out) {
            return Err(Problem::expands_too_much(EXPANSION_MAX));
        }
        Ok((count > 0).then(|| bytes.freeze()))
    }
}
