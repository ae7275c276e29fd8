//! The messages of a request stream, which may be long. Reading ends with an error when the
//! caller's key is no longer valid, or when the stream is idle for too long.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use prost::Message;
use tokio::time::{Instant, sleep_until};
use tonic::Streaming;

use super::{
    auth::{Authenticator, Principal},
    status,
};
use crate::domain::Error;

/// How often the key of a stream is checked again, so that a revocation takes effect in time
/// however slow the stream is.
const RECHECK_INTERVAL: Duration = Duration::from_millis(1_500);

/// Bytes of a repeat that are read and kept while it waits, beside its first message.
const AHEAD_BYTES_MAX: usize = 2 << 20;

/// The request stream of a call.
pub(super) struct Messages<M> {
    stream: Streaming<M>,
    /// Messages that were read ahead. They are kept encoded, which takes a fraction of the memory.
    ahead: VecDeque<Vec<u8>>,
    ahead_bytes: usize,
    has_ended: bool,
    auth: Arc<Authenticator>,
    principal: Principal,
    idle_timeout: Duration,
    checked_at: Instant,
}

impl<M: Message + Default> Messages<M> {
    /// The messages of `stream`, whose caller was authenticated just now. `idle_timeout` is the
    /// longest time between two messages.
    pub(super) fn new(stream: Streaming<M>, auth: Arc<Authenticator>, principal: Principal, idle_timeout: Duration) -> Self {
        let checked_at = Instant::now();
        Self { stream, ahead: VecDeque::new(), ahead_bytes: 0, has_ended: false, auth, principal, idle_timeout, checked_at }
    }

    /// Returns the next message; none at the end of the stream.
    ///
    /// # Errors
    /// When the key is no longer valid, when nothing arrived for `idle_timeout`, or when the stream
    /// broke.
    pub(super) async fn next(&mut self) -> Result<Option<M>, Error> {
        match self.ahead.pop_front() {
            Some(message) => M::decode(message.as_slice()).map(Some).map_err(Error::internal),
            None if self.has_ended => Ok(None),
            None => self.receive().await,
        }
    }

    /// Reads the stream to its end, and keeps the messages. Returns false once more than 2 MiB are
    /// kept, with the stream not yet at its end.
    ///
    /// # Errors
    /// As [`Messages::next`].
    pub(super) async fn read_ahead(&mut self) -> Result<bool, Error> {
        while !self.has_ended {
            match self.receive().await? {
                Some(message) => {
                    self.ahead_bytes += message.encoded_len();
                    self.ahead.push_back(message.encode_to_vec());
                    if self.ahead_bytes > AHEAD_BYTES_MAX {
                        return Ok(false);
                    }
                }
                None => self.has_ended = true,
            }
        }
        Ok(true)
    }

    /// Checks the key again: a stream can outlive it.
    pub(super) async fn recheck(&self) -> Result<(), Error> {
        self.auth.recheck(&self.principal).await
    }

    async fn receive(&mut self) -> Result<Option<M>, Error> {
        let idle_at = Instant::now() + self.idle_timeout;
        loop {
            let check_at = self.checked_at + RECHECK_INTERVAL;
            if check_at <= Instant::now() {
                self.recheck().await?;
                self.checked_at = Instant::now();
                continue;
            }
            tokio::select! {
                message = self.stream.message() => return message.map_err(|broken| status::of_message(&broken)),
                () = sleep_until(check_at.min(idle_at)) => {}
            }
            if idle_at <= Instant::now() {
                return Err(Error::Timeout {
                    message: "The stream sent nothing for too long. Send all of it again; a repeat is safe.",
                    source: None,
                });
            }
        }
    }
}
