//! The gRPC service: how the domain is asked over the wire. Only this room speaks tonic's server side.
//!
//! A call comes through [`guard::Guard`], which refuses it before its body is read or hands it on with a [`auth::Principal`]; its
//! messages pass `convert` (behind which values are right by construction); errors leave through `status`.

pub mod auth;
mod check;
mod convert;
mod delete;
pub mod guard;
pub mod health;
mod import;
mod list;
mod messages;
mod metered;
pub mod rate;
mod scrub;
mod status;

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::BoxStream};
use http::HeaderMap;
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status, Streaming, body::Body};

use self::auth::{Authenticator, Principal};
use crate::{
    domain::Error,
    proto::{
        CheckEntriesRequest, CheckEntriesResponse, DeleteEntriesRequest, DeleteEntriesResponse, ExportEntriesRequest,
        ExportEntriesResponse, ImportEntriesRequest, ImportEntriesResponse, ListEntriesRequest, ListEntriesResponse,
        ScrubEntriesRequest, ScrubEntriesResponse, SummarizeEntriesRequest, SummarizeEntriesResponse, dnc_service_server,
    },
    store::Store,
};

/// The largest message accepted or answered, in bytes. Clients take no larger ones unless told to.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// The service behind the guard.
#[derive(Debug)]
pub struct DncService {
    store: Store,
    auth: Arc<Authenticator>,
    limits: StreamLimits,
    /// Leave to wait for an import with the same request id.
    repeats: Semaphore,
}

/// How much of the database one import may use, and how long a stream may send nothing.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// Entries in one batch of a long stream.
    pub batch_entries_max: usize,
    /// Batches of one stream at the database at once, each on a connection of its own.
    pub batches_in_flight_max: usize,
    /// How long a stream may rest between two messages.
    pub idle_timeout: Duration,
}

impl DncService {
    /// The service over this store. `auth` is the one that guards it.
    pub fn new(store: Store, auth: Arc<Authenticator>, limits: StreamLimits) -> Self {
        Self { store, auth, limits, repeats: Semaphore::new(import::REPEATS_MAX) }
    }
}

fn principal<T>(request: &Request<T>) -> Result<Principal, Status> {
    // Absent only if somebody mounts the service without its guard; then nobody may pass.
    request
        .extensions()
        .get::<Principal>()
        .cloned()
        .ok_or_else(|| status::from_error(Error::internal("a call came past the guard")))
}

#[tonic::async_trait]
impl dnc_service_server::DncService for DncService {
    async fn import_entries(
        &self,
        request: Request<Streaming<ImportEntriesRequest>>,
    ) -> Result<Response<ImportEntriesResponse>, Status> {
        let principal = principal(&request)?;
        import::run(&self.store, self.auth.clone(), principal, self.limits, &self.repeats, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn check_entries(&self, request: Request<CheckEntriesRequest>) -> Result<Response<CheckEntriesResponse>, Status> {
        let principal = principal(&request)?;
        answer(check::run(&self.store, &principal, request.into_inner()).await)
    }

    type ScrubEntriesStream = BoxStream<'static, Result<ScrubEntriesResponse, Status>>;

    async fn scrub_entries(
        &self,
        request: Request<Streaming<ScrubEntriesRequest>>,
    ) -> Result<Response<Self::ScrubEntriesStream>, Status> {
        let principal = principal(&request)?;
        let work = request.extensions().get::<metered::Work>().cloned().unwrap_or_default();
        let (store, auth) = (self.store.clone(), self.auth.clone());
        Ok(Response::new(scrub::run(store, auth, principal, self.limits, work, request.into_inner()).boxed()))
    }

    async fn list_entries(&self, request: Request<ListEntriesRequest>) -> Result<Response<ListEntriesResponse>, Status> {
        let principal = principal(&request)?;
        answer(list::page(&self.store, &principal, request.into_inner()).await)
    }

    type ExportEntriesStream = BoxStream<'static, Result<ExportEntriesResponse, Status>>;

    async fn export_entries(&self, request: Request<ExportEntriesRequest>) -> Result<Response<Self::ExportEntriesStream>, Status> {
        let principal = principal(&request)?;
        answer(list::export(self.store.clone(), self.auth.clone(), principal, request.into_inner()).await.map(StreamExt::boxed))
    }

    async fn delete_entries(&self, request: Request<DeleteEntriesRequest>) -> Result<Response<DeleteEntriesResponse>, Status> {
        let principal = principal(&request)?;
        answer(delete::run(&self.store, &self.auth, &principal, request.into_inner()).await)
    }

    async fn summarize_entries(
        &self,
        request: Request<SummarizeEntriesRequest>,
    ) -> Result<Response<SummarizeEntriesResponse>, Status> {
        answer(list::summarize(&self.store, &principal(&request)?).await)
    }
}

/// Our answer in place of tonic's own to a method or a service that there is not, told by the head of that answer.
pub fn unimplemented(head: &HeaderMap) -> Option<http::Response<Body>> {
    let status = Status::from_header_map(head)?;
    (status.code() == Code::Unimplemented && status.details().is_empty())
        .then(|| status::from_error(Error::Unimplemented).into_http())
}

/// Refuses a call that needs no key, because too many of them are open.
pub fn too_many_open_calls() -> http::Response<Body> {
    let message = "Too many calls without a key are open. Send the request again later.";
    status::from_error(Error::Unavailable { message, source: None }).into_http()
}

fn answer<T>(outcome: Result<T, Error>) -> Result<Response<T>, Status> {
    outcome.map(Response::new).map_err(status::from_error)
}
