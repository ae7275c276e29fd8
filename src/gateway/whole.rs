//! JSON bodies: read whole, unpacked and decoded, within what a server may hold in memory. Streamed files are counted here, too.
//!
//! A JSON body needs memory twice. While it comes it takes its own size out of one budget, so that slow
//! senders hold nothing that others need to get on. When all of it is there, it takes what decoding and
//! storing it need out of the budget of work, which it holds until the call is answered. Whoever holds
//! a part of the second waits for nothing but the service, so the two cannot block each other.

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
    MediaType,
    body::{ContentBody, Encoding},
    error::Problem,
};
use crate::wire::budget::{Budget, Permit};

/// How long a JSON body may take to come, and how long it may stand still.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bodies up to this size are not counted: a single check never waits for the imports of its own workspace.
const FREE_BYTES: usize = 4 << 10;

/// Bodies up to this size are decoded where they are; it takes less than a millisecond.
const DECODED_HERE_BYTES: usize = 64 << 10;

/// Bodies of the largest size that may be on their way at once; one caller may send one of them.
const ARRIVING_BODIES: usize = 4;

/// Bodies that are unpacked and decoded at once: four, and one of each caller, as a [`Budget`] gives a caller a quarter. So nobody's
/// bodies keep the processor from those of others.
const TURN: usize = 1 << 10;
const TURNS: usize = 4 * TURN;

/// What a streamed file takes until its import is answered: what was read and is not sent on, a message or two, and the batches that are made of
/// them. Files of the longest addresses and reasons may take a few times as much.
const FILE_BYTES: usize = 1 << 20;

/// What all zstd decoders of streamed files may keep, and what one of them keeps at most.
const WINDOWS_BYTES: usize = 64 << 20;
const WINDOW_BYTES: usize = 8 << 20;

/// What reading bodies needs; shared by all requests.
#[derive(Clone, Debug)]
pub(super) struct Bodies {
    bytes_max: usize,
    work: Budget,
    arriving: Budget,
    windows: Budget,
    turns: Budget,
    callers: RandomState,
}

/// What a call holds of the budget of work, until it is dropped.
#[derive(Clone, Debug, Default)]
pub(super) struct Held(Arc<Mutex<Option<Permit>>>);

impl Bodies {
    /// JSON bodies of `bytes_max` at most, whose decoded forms are counted against `work`.
    pub(super) fn new(bytes_max: usize, work: Budget) -> Self {
        Self {
            bytes_max,
            work,
            arriving: Budget::new(ARRIVING_BODIES.saturating_mul(bytes_max)),
            windows: Budget::new(WINDOWS_BYTES),
            turns: Budget::new(TURNS),
            callers: RandomState::new(),
        }
    }

    /// Reads a JSON body and decodes it; `held` then stands for the memory that the call needs.
    ///
    /// # Errors
    /// 400, 408, 413 or 415 for the body, 503 when too much is in work, and whatever `decode` says.
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
                // Unpacked twice: what it needs is known before anything is kept of it.
                Encoding::Gzip | Encoding::Zstd => {
                    let _turn = bodies.turns.acquire(caller, TURN).await?;
                    bodies.unpack(encoding, bytes.clone(), |_| {}).await?
                }
            };
            let permit = if size <= FREE_BYTES { None } else { Some(bodies.work.acquire(caller, cost(size)).await?) };
            drop(arrived);
            // Whoever has a turn waits for nothing.
            let turn = if size <= FREE_BYTES { None } else { Some(bodies.turns.acquire(caller, TURN).await?) };
            let bytes = if encoding == Encoding::Plain {
                bytes
            } else {
                let mut unpacked = Vec::with_capacity(size);
                bodies.unpack(encoding, bytes, |chunk| unpacked.extend_from_slice(chunk)).await?;
                unpacked.into()
            };
            if bytes.len() <= DECODED_HERE_BYTES {
                let decoded = decode(&bytes)?;
                held.keep(permit);
                return Ok(decoded);
            }
            // The bytes go on being counted when the caller goes away: nothing ends this task early.
            let decoding = spawn_blocking(move || {
                let decoded = decode(&bytes);
                drop(turn);
                (decoded, permit)
            });
            let (decoded, permit) = decoding.await.map_err(|_| Problem::internal())?;
            held.keep(permit);
            decoded
        }
    }

    /// A streamed file's bytes; `held` then stands for the memory that its import needs. A zstd decoder keeps as much as its frames ask
    /// for, and is counted for that.
    ///
    /// # Errors
    /// 415 when its encoding is none of those understood, 503 when too much is in work, or too many are unpacked already.
    pub(super) async fn file(&self, headers: &HeaderMap, body: Body, held: &Held) -> Result<ContentBody, Problem> {
        let encoding = Encoding::of(headers)?;
        held.keep(Some(self.work.acquire(self.caller(headers), FILE_BYTES).await?));
        let window = match encoding {
            Encoding::Zstd => Some(self.windows.acquire(self.caller(headers), WINDOW_BYTES).await?),
            Encoding::Plain | Encoding::Gzip => None,
        };
        Ok(ContentBody::new(encoding, body, window))
    }

    /// The packed or plain bytes as they come, and what they hold of the budget for them.
    async fn collect(&self, headers: &HeaderMap, caller: u64, body: Body) -> Result<(Bytes, Option<Permit>), Problem> {
        let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        // All that was announced is taken at once: bodies that wait for each other's rest would get nowhere.
        let mut room = announced.unwrap_or(FREE_BYTES).max(1);
        if room > self.bytes_max {
            return Err(Problem::too_large(self.bytes_max));
        }
        let mut permit = None;
        if room > FREE_BYTES {
            // When too much is in work, this is where it shows: before anything of the body is read.
            drop(self.work.acquire(caller, 1).await?);
            permit = Some(self.arriving.acquire(caller, room).await?);
        }
        let mut bytes = Vec::with_capacity(room);
        let mut body = ContentBody::new(Encoding::Plain, body, None);
        let reading = async {
            while let Some(chunk) = timeout(IDLE_TIMEOUT, body.next()).await.map_err(|_| Problem::timed_out())?? {
                let size = bytes.len() + chunk.len();
                if size > self.bytes_max {
                    return Err(Problem::too_large(self.bytes_max));
                }
                if size > room {
                    room = self.bytes_max.min(2 * size);
                    match &mut permit {
                        Some(permit) => permit.resize(room).await?,
                        None => permit = Some(self.arriving.acquire(caller, room).await?),
                    }
                    bytes.reserve_exact(room - bytes.len());
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok(())
        };
        timeout(BODY_TIMEOUT, reading).await.map_err(|_| Problem::timed_out())??;
        Ok((bytes.into(), permit))
    }

    /// Hands over what is in a packed body, as far as a body may go and no further, and says how much it is.
    async fn unpack(&self, encoding: Encoding, packed: Bytes, mut take: impl FnMut(&[u8])) -> Result<usize, Problem> {
        let mut body = ContentBody::new(encoding, Body::from(packed), None);
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

    /// Who sent this, as the owner of what its bodies hold. The service has let it in, so the key is one of its own.
    fn caller(&self, headers: &HeaderMap) -> u64 {
        let key = headers.get("x-api-key").or_else(|| headers.get(header::AUTHORIZATION)).map(HeaderValue::as_bytes);
        // The scheme and the spaces around a key are no part of it; they must not make several callers of one.
        self.callers.hash_one(key.and_then(|key| key.rsplit(u8::is_ascii_whitespace).find(|part| !part.is_empty())))
    }
}

impl Held {
    fn keep(&self, permit: Option<Permit>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = permit;
    }
}

/// The memory that a JSON body takes at most from when it is here until it is stored: itself, its texts a second time, and a message
/// made of them; and for each entry what stands around its texts. There are 10,000 entries at most, and the shortest takes 13 bytes.
fn cost(bytes: usize) -> usize {
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
