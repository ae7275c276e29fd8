//! `grpc.health.v1`: serving when the database answers and is migrated, and this server is not
//! shutting down.
//!
//! The service needs no key, so its load on the database is bounded: one probe runs at a time.
//! Callers that arrived before a probe began share its result, and watchers share one probe a
//! second.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, server::NamedService};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health, HealthServer},
};

use super::{DncService, status};
use crate::{domain::Error, proto::dnc_service_server::DncServiceServer, store::Store};

/// How long the database may take to answer a probe.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// How long watchers use the result of a probe, and how often they need one.
const PROBE_TTL: Duration = Duration::from_secs(1);

/// The health service. It answers not serving once `draining` is cancelled.
pub fn service(store: Store, draining: CancellationToken) -> HealthServer<impl Health> {
    HealthServer::new(HealthService { store, draining, last: Arc::default() })
}

#[derive(Clone)]
struct HealthService {
    store: Store,
    draining: CancellationToken,
    /// When the last probe of the database began, and whether the database was ready. Locked during
    /// a probe, so that all other callers wait for it.
    last: Arc<Mutex<Option<(Instant, bool)>>>,
}

impl HealthService {
    /// The status by a probe that began no earlier than `not_before`, or by the last one if that is
    /// `None`.
    async fn status(&self, not_before: Option<Instant>) -> ServingStatus {
        let is_ready = !self.draining.is_cancelled() && self.is_ready(not_before).await;
        // Read again: a drain may have begun while the database answered.
        if is_ready && !self.draining.is_cancelled() { ServingStatus::Serving } else { ServingStatus::NotServing }
    }

    async fn is_ready(&self, not_before: Option<Instant>) -> bool {
        let mut last = self.last.lock().await;
        if let Some((begun_at, is_ready)) = *last
            && not_before.is_none_or(|not_before| begun_at >= not_before)
        {
            return is_ready;
        }
        let begun_at = Instant::now();
        let is_ready = matches!(timeout(ANSWER_TIMEOUT, self.store.pending_migrations()).await, Ok(Ok(0)));
        *last = Some((begun_at, is_ready));
        is_ready
    }
}

fn is_known(service: &str) -> bool {
    service.is_empty() || service == <DncServiceServer<DncService> as NamedService>::NAME
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !is_known(&request.get_ref().service) {
            return Err(status::from_error(Error::NotFound("There is no service of that name here.")));
        }
        Ok(Response::new(response(self.status(Some(Instant::now())).await)))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// Sends the status, and again each time it changes. Ends when the server drains.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        if !is_known(&request.get_ref().service) {
            // The health protocol requires that the stream stays open, since the service may be
            // added later.
            let unknown = stream::iter([Ok(response(ServingStatus::ServiceUnknown))]).chain(stream::pending());
            return Ok(Response::new(Box::pin(unknown.take_until(self.draining.clone().cancelled_owned()))));
        }
        let changes = stream::unfold((self.clone(), None), |(service, last)| async move {
            loop {
                let is_draining = service.draining.is_cancelled();
                if is_draining && last == Some(ServingStatus::NotServing) {
                    return None;
                }
                let now = service.status(Instant::now().checked_sub(PROBE_TTL)).await;
                if last != Some(now) {
                    return Some((Ok(response(now)), (service, Some(now))));
                }
                tokio::select! {
                    () = tokio::time::sleep(PROBE_TTL) => {}
                    () = service.draining.cancelled() => {}
                }
            }
        });
        Ok(Response::new(Box::pin(changes)))
    }
}
