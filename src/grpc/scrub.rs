//! `ScrubEntries`: checks a whole mailing list, message by message.
//!
//! A few messages are looked up concurrently and answered in order. Nothing more is read while they
//! wait for the database, or for a caller that does not take the answers, so memory stays constant.

use std::sync::Arc;

use futures_util::{Stream, TryStreamExt, stream};
use tonic::{Status, Streaming};

use super::{
    auth::{Authenticator, Principal},
    check,
    messages::Messages,
    metered::Work,
    status,
};
use crate::{
    domain::Error,
    grpc::StreamLimits,
    proto::{CheckEntriesRequest, ScrubEntriesRequest, ScrubEntriesResponse},
    store::Store,
};

/// Messages of one stream that are looked up concurrently, each with its own statements.
const MESSAGES_IN_FLIGHT_MAX: usize = 4;

/// The answers to the messages of a stream. `work` holds the memory of the message that was
/// received last.
pub(super) fn run(
    store: Store,
    auth: Arc<Authenticator>,
    principal: Principal,
    limits: StreamLimits,
    work: Work,
    stream: Streaming<ScrubEntriesRequest>,
) -> impl Stream<Item = Result<ScrubEntriesResponse, Status>> {
    let messages = Messages::new(stream, auth, principal.clone(), limits.idle_timeout);
    let received = stream::try_unfold(messages, move |mut messages| {
        let work = work.clone();
        async move {
            let message: Option<ScrubEntriesRequest> = messages.next().await?;
            // A message holds its memory until its answer is taken, not only until the next message
            // arrives.
            Ok::<_, Error>(message.map(|message| ((message, work.take()), messages)))
        }
    });
    let answers = received.map_ok(move |(message, permit)| {
        let (store, principal) = (store.clone(), principal.clone());
        async move {
            let request = CheckEntriesRequest { emails: message.emails };
            let answer = check::run(&store, &principal, request).await?;
            Ok((ScrubEntriesResponse { results: answer.results }, permit))
        }
    });
    answers.try_buffered(MESSAGES_IN_FLIGHT_MAX).map_ok(|(answer, _permit)| answer).map_err(status::from_error)
}
