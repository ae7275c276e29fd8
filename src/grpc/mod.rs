//! The gRPC service: how the domain is asked over the wire. Only this room speaks tonic's server side.
//!
//! A call comes through [`auth::Guard`], which refuses it before its body is read or hands it on with a [`auth::Principal`]; its
//! messages pass `convert` (behind which values are right by construction); errors leave through `status`.

pub mod auth;
mod convert;
pub mod health;
mod import;
mod status;

use std::{sync::Arc, time::Duration};

use tonic::{Request, Response, Status, Streaming};

use self::auth::{Authenticator, Principal};
use crate::{
    proto::{ImportEntriesRequest, ImportEntriesResponse, dnc_service_server},
    store::Store,
};

/// The largest message accepted, in octets.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// The service behind the guard.
#[derive(Debug)]
pub struct DncService {
    store: Store,
    auth: Arc<Authenticator>,
    limits: ImportLimits,
}

/// How much of the database one import may use, and how long it may say nothing.
#[derive(Clone, Copy, Debug)]
pub struct ImportLimits {
    /// Entries in one batch of a long stream.
    pub batch_entries_max: usize,
    /// Batches of one stream at the database at once, each on a connection of its own.
    pub batches_in_flight_max: usize,
    /// How long a stream may rest between two messages.
    pub idle_timeout: Duration,
}

impl DncService {
    /// The service over this store. `auth` is the one that guards it.
    pub fn new(store: Store, auth: Arc<Authenticator>, limits: ImportLimits) -> Self {
        Self { store, auth, limits }
    }
}

fn principal<T>(request: &Request<T>) -> Result<Principal, Status> {
    // Absent only if somebody mounts the service without its guard; then nobody may pass.
    request
        .extensions()
        .get::<Principal>()
        .cloned()
        .ok_or_else(|| status::from_error(crate::domain::Error::internal("a call came past the guard")))
}

#[tonic::async_trait]
impl dnc_service_server::DncService for DncService {
    async fn import_entries(
        &self,
        request: Request<Streaming<ImportEntriesRequest>>,
    ) -> Result<Response<ImportEntriesResponse>, Status> {
        let principal = principal(&request)?;
        let tally = import::run(&self.store, &self.auth, principal, self.limits, request.into_inner()).await?;
        Ok(Response::new(convert::tally(tally)))
    }
}
