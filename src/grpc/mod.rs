//! The gRPC service over the store. Only this module implements tonic's services.
//!
//! A call passes [`guard::Guard`], which refuses it before its body is read or adds an
//! [`auth::Principal`]. `convert` turns its messages into domain types, which satisfy the domain's
//! rules by construction. `status` turns errors into statuses.

pub mod auth;
mod check;
mod convert;
mod delete;
pub mod guard;
pub mod health;
mod import;
mod list;
mod logs;
mod messages;
mod metered;
pub mod rate;
mod scrub;
mod status;

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::BoxStream};
use http::HeaderMap;
use tonic::{Code, Request, Response, Status, Streaming, body::Body};

use self::auth::{Authenticator, Principal};
use crate::{
    domain::Error,
    proto::{
        CheckEntriesRequest, CheckEntriesResponse, DeleteEntriesRequest, DeleteEntriesResponse, ExportEntriesRequest,
        ExportEntriesResponse, ImportEntriesRequest, ImportEntriesResponse, ListDeletionsRequest, ListDeletionsResponse,
        ListEntriesRequest, ListEntriesResponse, ListImportsRequest, ListImportsResponse, ScrubEntriesRequest,
        ScrubEntriesResponse, SummarizeEntriesRequest, SummarizeEntriesResponse, dnc_service_server,
    },
    store::Store,
};

/// The largest message that is accepted or answered, in bytes. It is also the default limit of
/// clients.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// The service. It must be mounted behind the guard.
#[derive(Debug)]
pub struct DncService {
    store: Store,
    auth: Arc<Authenticator>,
    limits: StreamLimits,
    imports: import::Shared,
}

/// Limits of one stream: how much of the database an import may use, and how long a stream may send
/// nothing.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// Entries in one batch of a long stream.
    pub batch_entries_max: usize,
    /// Batches of one stream that are stored concurrently, each on its own connection.
    pub batches_in_flight_max: usize,
    /// Temporary files in which long imports are sorted, for all streams.
    pub sort_bytes_max: u64,
    /// A list must have as many entries for a long import into it to be sorted.
    pub sort_rows_min: u64,
    /// Memory of the batches of imports, for all streams.
    pub batch_bytes_max: usize,
    /// The longest time between two messages of a stream.
    pub idle_timeout: Duration,
}

impl DncService {
    /// The service over `store`. `auth` must be the authenticator of its guard.
    pub fn new(store: Store, auth: Arc<Authenticator>, limits: StreamLimits) -> Self {
        Self { store, auth, limits, imports: import::Shared::new(limits) }
    }
}

fn principal<T>(request: &Request<T>) -> Result<Principal, Status> {
    // Missing only if the service is mounted without its guard. Then no call may pass.
    request.extensions().get::<Principal>().cloned().ok_or_else(|| status::from_error(Error::internal("a call bypassed the guard")))
}

#[tonic::async_trait]
impl dnc_service_server::DncService for DncService {
    async fn import_entries(
        &self,
        request: Request<Streaming<ImportEntriesRequest>>,
    ) -> Result<Response<ImportEntriesResponse>, Status> {
        let principal = principal(&request)?;
        import::run(&self.store, self.auth.clone(), principal, self.limits, &self.imports, request.into_inner())
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

    async fn list_imports(&self, request: Request<ListImportsRequest>) -> Result<Response<ListImportsResponse>, Status> {
        let principal = principal(&request)?;
        answer(logs::imports(&self.store, &principal, request.into_inner()).await)
    }

    async fn list_deletions(&self, request: Request<ListDeletionsRequest>) -> Result<Response<ListDeletionsResponse>, Status> {
        let principal = principal(&request)?;
        answer(logs::deletions(&self.store, &principal, request.into_inner()).await)
    }
}

/// The answer to an unknown method or service, in place of tonic's own. None if `head` is not the
/// head of such an answer of tonic.
pub fn unimplemented(head: &HeaderMap) -> Option<http::Response<Body>> {
    let status = Status::from_header_map(head)?;
    (status.code() == Code::Unimplemented && status.details().is_empty())
        .then(|| status::from_error(Error::Unimplemented).into_http())
}

/// The refusal of a call that needs no key, when too many of those are open.
pub fn too_many_open_calls() -> http::Response<Body> {
    let message = "Too many calls without a key are open. Send the request again later.";
    status::from_error(Error::Unavailable { message, source: None }).into_http()
}

fn answer<T>(outcome: Result<T, Error>) -> Result<Response<T>, Status> {
    outcome.map(Response::new).map_err(status::from_error)
}
