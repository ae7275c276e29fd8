//! The bytes of a request's body, as they come: decompressed if the caller compressed them, and never waited for
//! without end. How far a body may expand is said in the room `files`.

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

/// How long a body may stand still.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes that are decompressed in one go: so many that go into a decoder, and so many that come out of it.
const PIECE_BYTES: usize = 16 << 10;
const READ_BYTES: usize = 64 << 10;

/// How a decoder is told that the body under it broke off.
const BROKEN: io::ErrorKind = io::ErrorKind::ConnectionAborted;

/// How a body is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Plain,
    Gzip,
    Zstd,
}

impl Encoding {
    /// What the headers say.
    ///
    /// # Errors
    /// 415 when it is none of those understood.
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

/// A body on its way in.
pub(super) enum ContentBody {
    /// As it comes.
    Plain(Body),
    /// Through a decoder.
    Packed(Unpacking),
}

/// A packed body, and how far it has come.
pub(super) struct Unpacking {
    decoder: Pin<Box<dyn AsyncRead + Send>>,
    bytes_in: Arc<AtomicU64>,
    bytes_out: u64,
    /// What the decoder holds of the memory for all of them.
    _window: Option<Permit>,
}

impl ContentBody {
    /// The body, unpacked.
    pub(super) fn new(encoding: Encoding, body: Body, window: Option<Permit>) -> Self {
        if encoding == Encoding::Plain {
            return Self::Plain(body);
        }
        let bytes_in = Arc::new(AtomicU64::new(0));
        let counter = bytes_in.clone();
        let chunks = TryStreamExt::map_err(body.into_data_stream(), |_| io::Error::from(BROKEN));
        // What unpacks to nothing (thousands of empty frames, say) is worked through piece by piece, too, with room for others between.
        let pieces =
            chunks.map_ok(|chunk| stream::iter(pieces(chunk).map(Ok::<_, io::Error>))).try_flatten().and_then(move |piece| {
                counter.fetch_add(piece.len() as u64, Ordering::Relaxed);
                tokio::task::yield_now().map(|()| Ok(piece))
            });
        let reader = StreamReader::new(pieces);
        let decoder: Pin<Box<dyn AsyncRead + Send>> = if encoding == Encoding::Gzip {
            let mut decoder = GzipDecoder::new(reader);
            // What `cat a.gz b.gz` makes is a gzip file, too.
            decoder.multiple_members(true);
            Box::pin(decoder)
        } else {
            let window = DParameter::window_log_max(ZSTD_WINDOW_LOG_MAX);
            let mut decoder = ZstdDecoder::with_params(reader, &[window]);
            decoder.multiple_members(true);
            Box::pin(decoder)
        };
        Self::Packed(Unpacking { decoder, bytes_in, bytes_out: 0, _window: window })
    }

    /// The next bytes; none at the end. Loses nothing when it is given up half-way.
    ///
    /// # Errors
    /// 408 when the body stands still, 400 when it breaks off or is not what its encoding says, 413 when it unpacks to far more than it is.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        let next = async {
            match self {
                Self::Plain(body) => plain(body).await,
                Self::Packed(unpacking) => unpacking.next().await,
            }
        };
        tokio::time::timeout(IDLE_TIMEOUT, next).await.map_err(|_| Problem::timed_out())?
    }
}

/// A chunk in pieces that a decoder is through with in a moment.
fn pieces(mut chunk: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let piece = chunk.split_to(chunk.len().min(PIECE_BYTES));
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

impl Unpacking {
    async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        let mut bytes = BytesMut::with_capacity(READ_BYTES);
        let count = self.decoder.read_buf(&mut bytes).await.map_err(|error| match error.kind() {
            BROKEN => Problem::broken_body(),
            _ if is_window_too_large(&error) => Problem::window(),
            _ => Problem::not_unpacked(),
        })?;
        self.bytes_out += count as u64;
        if expands_too_much(self.bytes_in.load(Ordering::Relaxed), self.bytes_out) {
            return Err(Problem::expands_too_much(EXPANSION_MAX));
        }
        Ok((count > 0).then(|| bytes.freeze()))
    }
}
