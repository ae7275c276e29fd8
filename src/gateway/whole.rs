//! Reads JSON bodies into memory, decompresses and decodes them, within the memory that a server
//! may use. Streamed files are counted here, too, and read in `files`.
//!
//! A JSON body takes memory from two budgets. While it arrives, it takes its own size from the
//! budget for arriving bodies, so slow senders hold nothing that other calls need to finish. When
//! it is complete, it takes what decoding and storing need from the budget of work, and holds that
//! until the call is answered. A call that holds a part of the second budget waits for nothing but
//! the service, so the two budgets cannot block each other.

use std::{
    future::Future,
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, HeaderValue, header},
};
use tokio::{task::spawn_blocking, time::timeout};

use super::{
    body::{ContentBody, Encoding},
    error::Problem,
    handlers::MediaType,
};
use crate::wire::budget::{Budget, Permit};

/// How long a JSON body may take to arrive, and how long no byte of it may arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bodies up to this size are not counted. So a single check never waits for the imports of its own
/// workspace.
const UNCOUNTED_BYTES_MAX: usize = 4 << 10;

/// Bodies up to this size are decoded on the calling task: decoding takes less than a millisecond.
const INLINE_DECODE_BYTES_MAX: usize = 64 << 10;

/// How many bodies of the largest size may arrive at the same time. One caller may send one of
/// them.
const ARRIVING_BODIES_MAX: usize = 4;

/// How many bodies are decompressed and decoded at the same time. A slot is one unit of a
/// [`Budget`], which gives a caller a quarter: four slots in all, and one per caller. So one
/// caller's bodies cannot take the processor from those of other callers.
const DECODE_SLOT: usize = 1 << 10;
const DECODE_SLOTS: usize = 4 * DECODE_SLOT;

/// What a streamed file takes from the budget of work until its import is answered. It covers the
/// bytes that were read and not sent on, one or two messages, and the batches made of them. Files
/// of the longest addresses and reasons may take a few times as much.
const FILE_BYTES: usize = 1 << 20;

/// Limit of the memory that all zstd decoders of streamed files keep, and that one of them keeps.
const WINDOWS_BYTES_MAX: usize = 64 << 20;
const WINDOW_BYTES_MAX: usize = 8 << 20;

/// The budgets for reading bodies, shared by all requests.
#[derive(Clone, Debug)]
pub(super) struct Bodies {
    bytes_max: usize,
    work: Budget,
    arriving: Budget,
    windows: Budget,
    decode_slots: Budget,
    callers: RandomState,
}

/// The part of the budget of work that a call holds, until this is dropped. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Held(Arc<Mutex<Option<Permit>>>);

impl Bodies {
    /// Reads JSON bodies of at most `bytes_max` bytes, decompressed. What decoding and storing them
    /// needs is counted against `work`.
    pub(super) fn new(bytes_max: usize, work: Budget) -> Self {
        Self {
            bytes_max,
            work,
            arriving: Budget::new(ARRIVING_BODIES_MAX.saturating_mul(bytes_max)),
            windows: Budget::new(WINDOWS_BYTES_MAX),
            decode_slots: Budget::new(DECODE_SLOTS),
            callers: RandomState::new(),
        }
    }

    /// Reads a JSON body and decodes it. Afterwards `held` holds the memory that the call needs.
    ///
    /// # Errors
    /// 400, 408, 413 or 415 for the body, 503 when too many bytes are in work, and the errors of
    /// `decode`.
    pub(super) fn decode<T: Send + 'static, F: FnOnce(&[u8]) -> Result<T, Problem> + Send + 'static>(
        &self,
        headers: &HeaderMap,
        body: Body,
        held: &Held,
        decode: F,
    ) -> impl Future<Output = Result<T, Problem>> + Send + use<T, F> {
        let (bodies, headers, held) = (self.clone(), headers.clone(), held.clone());
        async move {
            let MediaType::Json = MediaType::of(&headers)? else { return Err(Problem::media_type()) };
            let encoding = Encoding::of(&headers)?;
            let caller = bodies.caller(&headers);
            let (bytes, arrived) = bodies.collect(&headers, caller, body).await?;
            let size = match encoding {
                Encoding::Plain => bytes.len(),
                // Decompressed twice: the first pass finds the size, so that nothing is kept before
                // its memory is taken from the budget.
                Encoding::Gzip | Encoding::Zstd => {
                    let _slot = bodies.decode_slots.acquire(caller, DECODE_SLOT).await?;
                    bodies.decompress(encoding, bytes.clone(), |_| {}).await?
                }
            };
            let permit =
                if size <= UNCOUNTED_BYTES_MAX { None } else { Some(bodies.work.acquire(caller, work_bytes(size)).await?) };
            drop(arrived);
            // A call that holds a decode slot waits for nothing, so the slot comes after the
            // permit.
            let slot =
                if size <= UNCOUNTED_BYTES_MAX { None } else { Some(bodies.decode_slots.acquire(caller, DECODE_SLOT).await?) };
            let bytes = if encoding == Encoding::Plain {
                bytes
            } else {
                let mut decompressed = Vec::with_capacity(size);
                bodies.decompress(encoding, bytes, |chunk| decompressed.extend_from_slice(chunk)).await?;
                decompressed.into()
            };
            if bytes.len() <= INLINE_DECODE_BYTES_MAX {
                let decoded = decode(&bytes)?;
                held.keep(permit);
                return Ok(decoded);
            }
            // The task holds the permit, since it runs to its end even if the caller goes away. So
            // the bytes stay counted.
            let decoding = spawn_blocking(move || {
                let decoded = decode(&bytes);
                drop(slot);
                (decoded, permit)
            });
            let (decoded, permit) = decoding.await.map_err(|_| Problem::internal())?;
            held.keep(permit);
            decoded
        }
    }

    /// Returns the bytes of a streamed file, decompressed. Afterwards `held` holds the memory that
    /// its import needs. A zstd decoder keeps as much memory as its frames ask for, so it takes a
    /// window from a budget of its own.
    ///
    /// # Errors
    /// 415 for an unknown content encoding, 503 when too many bytes are in work or too many zstd
    /// bodies are being decompressed.
    pub(super) async fn file(&self, headers: &HeaderMap, body: Body, held: &Held) -> Result<ContentBody, Problem> {
        let encoding = Encoding::of(headers)?;
        held.keep(Some(self.work.acquire(self.caller(headers), FILE_BYTES).await?));
        let window = match encoding {
            Encoding::Zstd => Some(self.windows.acquire(self.caller(headers), WINDOW_BYTES_MAX).await?),
            Encoding::Plain | Encoding::Gzip => None,
        };
        Ok(ContentBody::new(encoding, body, window))
    }

    /// Collects the bytes as sent, and returns them with their part of the budget for arriving
    /// bodies.
    async fn collect(&self, headers: &HeaderMap, caller: u64, body: Body) -> Result<(Bytes, Option<Permit>), Problem> {
        let content_length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        // The whole announced length is taken at once. Bodies that took it bit by bit could wait
        // for each other forever.
        let mut reserved = content_length.unwrap_or(UNCOUNTED_BYTES_MAX).max(1);
        if reserved > self.bytes_max {
            return Err(Problem::too_large(self.bytes_max));
        }
        let mut permit = None;
        if reserved > UNCOUNTED_BYTES_MAX {
            // When too many bytes are in work, the call is refused here, before any of its body is
            // read.
            drop(self.work.acquire(caller, 1).await?);
            permit = Some(self.arriving.acquire(caller, reserved).await?);
        }
        let mut bytes = Vec::with_capacity(reserved);
        let mut body = ContentBody::new(Encoding::Plain, body, None);
        let reading = async {
            while let Some(chunk) = timeout(IDLE_TIMEOUT, body.next()).await.map_err(|_| Problem::timed_out())?? {
                let size = bytes.len() + chunk.len();
                if size > self.bytes_max {
                    return Err(Problem::too_large(self.bytes_max));
                }
                if size > reserved {
                    reserved = self.bytes_max.min(2 * size);
                    match &mut permit {
                        Some(permit) => permit.resize(reserved).await?,
                        None => permit = Some(self.arriving.acquire(caller, reserved).await?),
                    }
                    bytes.reserve_exact(reserved - bytes.len());
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok(())
        };
        timeout(BODY_TIMEOUT, reading).await.map_err(|_| Problem::timed_out())??;
        Ok((bytes.into(), permit))
    }

    /// Decompresses a body, passes each chunk to `take`, and returns the decompressed size in
    /// bytes. Stops with 413 at `bytes_max`.
    async fn decompress(&self, encoding: Encoding, compressed: Bytes, mut take: impl FnMut(&[u8])) -> Result<usize, Problem> {
        let mut body = ContentBody::new(encoding, Body::from(compressed), None);
        let mut size = 0;
        while let Some(chunk) = body.next().await? {
            size += chunk.len();
            if size > self.bytes_max {
                return Err(Problem::too_large(self.bytes_max));
            }
            take(&chunk);
        }
        Ok(size)
    }

    /// The hash of the caller's key, as the owner of its part of the budgets. The service has
    /// authenticated the caller, so the key is a valid one.
    fn caller(&self, headers: &HeaderMap) -> u64 {
        let key = headers.get("x-api-key").or_else(|| headers.get(header::AUTHORIZATION)).map(HeaderValue::as_bytes);
        // The scheme and the spaces around a key are not part of it. They must not make several
        // callers of one.
        self.callers.hash_one(key.and_then(|key| key.rsplit(u8::is_ascii_whitespace).find(|part| !part.is_empty())))
    }
}

impl Held {
    fn keep(&self, permit: Option<Permit>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = permit;
    }
}

/// The most memory in bytes that a complete JSON body of `bytes` takes until it is stored: the
/// body, its texts a second time and a message made of them, and a fixed part for each entry. There
/// are at most 10,000 entries, and the shortest takes 13 bytes of JSON.
fn work_bytes(bytes: usize) -> usize {
    3 * bytes + (20 * bytes).min(10_000 * 256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_is_its_key_however_it_is_sent() {
        let bodies = Bodies::new(1 << 20, Budget::new(1 << 20));
        let caller = |headers: &[(&'static str, &'static str)]| {
            let headers =
                headers.iter().map(|(name, value)| (header::HeaderName::from_static(name), HeaderValue::from_static(value)));
            bodies.caller(&headers.collect())
        };
        let plain = caller(&[("x-api-key", "sk_1")]);
        assert_eq!(plain, caller(&[("x-api-key", " sk_1 "), ("authorization", "Bearer sk_2")]));
        assert_eq!(plain, caller(&[("authorization", "bearer   sk_1")]));
        assert_ne!(plain, caller(&[("x-api-key", "sk_2")]));
    }
}
