//! The rate limit: how many requests a second each key may make. Every server counts for itself.

use std::{fmt, num::NonZeroU32, time::Duration};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
    state::keyed::DashMapStateStore,
};
use http::{HeaderName, HeaderValue};

use crate::domain::{Error, KeyId};

type Limiter = RateLimiter<KeyId, DashMapStateStore<KeyId>, DefaultClock, StateInformationMiddleware>;

/// Counts the requests of each key. Shared by all calls.
pub struct Rate {
    limiter: Option<Limiter>,
    requests_per_sec_max: u32,
}

impl fmt::Debug for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rate").field("requests_per_sec_max", &self.requests_per_sec_max).finish_non_exhaustive()
    }
}

impl Rate {
    /// Each key may make `requests_per_sec_max` requests a second; `None` means no limit.
    pub fn new(requests_per_sec_max: Option<NonZeroU32>) -> Self {
        Self {
            limiter: requests_per_sec_max.map(|max| RateLimiter::keyed(Quota::per_second(max)).with_middleware()),
            requests_per_sec_max: requests_per_sec_max.map_or(0, NonZeroU32::get),
        }
    }

    /// Counts a request against the rate limit of its key. Returns the verdict and the
    /// `X-RateLimit-*` headers; there are none without a limit.
    pub(super) fn admit(&self, key: KeyId) -> (Result<(), Error>, Vec<(HeaderName, HeaderValue)>) {
        let Some(limiter) = &self.limiter else { return (Ok(()), Vec::new()) };
        let (verdict, remaining, reset_secs) = match limiter.check_key(&key) {
            Ok(state) => (Ok(()), state.remaining_burst_capacity(), 1),
            Err(not_until) => {
                let retry_after = not_until.wait_time_from(DefaultClock::default().now());
                let secs = retry_after.as_secs_f64().ceil().max(1.0);
                let message = "Too many requests for this key. Wait as long as Retry-After says, then send it again.";
                (Err(Error::Exhausted { message, retry_after: Duration::from_secs_f64(secs) }), 0, secs as u64)
            }
        };
        let headers = [
            (HeaderName::from_static("x-ratelimit-limit"), u64::from(self.requests_per_sec_max)),
            (HeaderName::from_static("x-ratelimit-remaining"), u64::from(remaining)),
            (HeaderName::from_static("x-ratelimit-reset"), reset_secs),
        ];
        (verdict, headers.into_iter().map(|(name, value)| (name, HeaderValue::from(value))).collect())
    }
}
